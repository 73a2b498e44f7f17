"""A whole training, its repetition, its interruption, its golden losses."""

import json

import pytest
import torch

from projects.fssm.checkpoints import load_published
from projects.fssm.export import export
from projects.fssm.module import SuperResolution
from shared.errors import InputError
from shared.kernels.selective_scan import HOLDS
from shared.testing.project import TrainingPromises


class TestTraining(TrainingPromises):
    module = SuperResolution
    scores = ("test/photographs/psnr_y", "test/photographs/ssim_y")
    curves = ("train/loss", "val/psnr_y")
    settled = ("model.net.drop_path_rate=0",)


def test_exported_weights_carry_what_the_run_said(smoke, tmp_path):
    record, path = smoke("a")
    weights = export(path, tmp_path / "project")
    assert weights == tmp_path / "project" / "weights" / "fmambair_x2.safetensors"
    net, best = load_published(weights), torch.load(path / "checkpoints" / "best.ckpt")["state_dict"]
    assert all(torch.equal(value, best[f"net.{name}"]) for name, value in net.state_dict().items())
    (row,) = json.loads((tmp_path / "project" / "results" / "weights.json").read_text())["rows"]
    assert row[3] == f"{record['metrics']['test/photographs/psnr_y']:.2f}"
    with pytest.raises(InputError, match="no finished run"):
        export(tmp_path / "nothing")


@pytest.mark.slow
@pytest.mark.parametrize("hold", HOLDS)
def test_one_batch_is_overfitted_in_every_hold_mode(hold):
    torch.manual_seed(0)
    net = {"scale": 2, "embed_dim": 16, "depths": [1, 1], "d_state": 4, "expand": 1.2, "cab": "depthwise", "hold": hold}
    module = SuperResolution(net, optimizer={"lr": 2e-3}, scheduler={"milestones": [], "gamma": 0.5})
    optimizer = module.configure_optimizers()["optimizer"]
    gt = torch.rand(2, 3, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    lq = torch.nn.functional.avg_pool2d(gt, 2)
    losses = []
    for _ in range(150):
        loss = (module(lq) - gt).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
