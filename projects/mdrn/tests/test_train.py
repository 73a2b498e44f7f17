"""A whole training, its repetition, its interruption, its golden losses; with a teacher, averaged, of every kind."""

import pytest
import torch

from projects.mdrn.checkpoints import load_published, network_state, save_network
from projects.mdrn.module import Denoising
from projects.mdrn.networks import build_network
from shared.errors import InputError
from shared.testing.project import KilledError, TrainingPromises, assert_equal_weights, rows, stop_at


class TestTraining(TrainingPromises):
    module = Denoising
    scores = ("test/photographs_25/psnr", "test/photographs_25/ssim")
    curves = ("train/loss", "val/psnr")


@pytest.fixture
def teacher(tmp_path):
    """A teacher of the smoke network's form but wider, untrained."""
    arguments = {"name": "mdrn", "width": 12, "num_blocks": 2}
    torch.manual_seed(0)
    save_network(build_network(arguments), arguments, tmp_path / "teacher.safetensors")
    return f"model.distill.teacher={tmp_path / 'teacher.safetensors'}"


def weights(path):
    return network_state(torch.load(path / "checkpoints" / "last.ckpt"))


def test_distillation_of_no_weight_is_plain_training_to_the_last_bit(smoke, teacher):
    plain, path = smoke("plain")
    distilled, other = smoke(
        "distilled", "distill=capacity", teacher, "model.distill.out_weight=0", "model.distill.feat_weight=0"
    )
    assert distilled["metrics"] == plain["metrics"]
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(path).items())


def test_distilled_run_differs_resumes_and_loads_without_its_teacher(smoke, teacher, monkeypatch, tmp_path):
    options = ["distill=capacity", teacher]
    plain, _ = smoke("plain")
    whole, path = smoke("whole", *options)
    assert whole["metrics"] != plain["metrics"]
    assert {"train/loss/out", "train/loss/feat"} <= set(rows(path)[0])
    with monkeypatch.context() as patched:
        stop_at(7, Denoising, patched)
        with pytest.raises(KilledError):
            smoke("cut", *options)
    resumed, cut = smoke("cut", *options, "resume=auto")
    assert resumed["metrics"] == whole["metrics"]
    assert_equal_weights(cut, path)
    state = torch.load(path / "checkpoints" / "last.ckpt")["state_dict"]
    assert any(name.startswith("distiller.adapters") for name in state)
    (tmp_path / "teacher.safetensors").unlink()
    Denoising.load_from_checkpoint(path / "checkpoints" / "best.ckpt", weights_only=True)
    assert load_published(path / "checkpoints" / "best.ckpt").in_channels == 1


@pytest.mark.parametrize("noise", ["model.noise.kind=clipped_u8", "data.fixed_noise_level=25"])
def test_noise_that_cannot_be_scaled_is_refused_with_a_teacher_of_another_level(smoke, teacher, noise):
    with pytest.raises(InputError, match="teacher_noise_level scales the noise"):
        smoke("a", "distill=noise", teacher, noise)


@pytest.mark.slow
def test_averaged_weights_are_what_is_scored_and_kept_and_resumed(smoke, monkeypatch):
    plain, _ = smoke("plain")
    # the smoke run's own callbacks, and the averaging
    options = ["callbacks=ema", "callbacks.progress=null"]
    whole, path = smoke("whole", *options)
    assert whole["metrics"] != plain["metrics"]
    checkpoint = torch.load(path / "checkpoints" / "last.ckpt")
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert any(not torch.equal(averaged[name], current[name]) for name in current)
    assert all(torch.equal(value, averaged[f"net.{name}"]) for name, value in weights(path).items())
    with monkeypatch.context() as patched:
        stop_at(12, Denoising, patched)
        with pytest.raises(KilledError):
            smoke("cut", *options)
    assert smoke("cut", *options, "resume=auto")[0]["metrics"] == whole["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["model.noise.kind=clipped_u8"], ["model.noise.kind=camera"], ["channels=3"],
    ["model.noise.level=[0,70]", "model.net.noise_map=true"], ["model.net.deep_supervision=true"],
    ["model.scheduler.halve_every=5"], ["data.fixed_noise_level=25"], ["trainer.accumulate_grad_batches=2"],
    ["model.ensemble=true"], ["model.test_levels=[15,50]"],
])  # fmt: skip
def test_every_kind_of_training_runs(smoke, options):
    record, path = smoke("a", *options, "trainer.max_steps=5")
    assert all(torch.isfinite(torch.tensor(value)) for value in record["metrics"].values())
    assert len(list((path / "pictures").glob("*.png"))) == (2 if "[15,50]" in options[0] else 1)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dncnn", "ffdnet", "ircnn"])
def test_baselines_train(smoke, model):
    width = ["model.net.width=4"] + (["model.net.num_layers=3"] if model != "ircnn" else [])
    composed_without = [f"model={model}", *width]
    record, _ = smoke("a", *composed_without, "trainer.max_steps=5", "~model.net.num_blocks")
    assert record["metrics"]["test/photographs_25/psnr"] > 5


def test_classical_peers_are_scored_beside_the_network(smoke):
    record, _ = smoke("a", "model.peers=[wavelet_shrinkage]", "trainer.max_steps=5")
    peer = record["peers"]["wavelet_shrinkage"]["test/photographs_25/psnr"]
    assert peer > record["baseline"]["test/photographs_25/psnr"] + 3


def test_fall_is_the_difference_of_the_scores(smoke):
    metrics = smoke("a", "model.test_levels=[15,50]", "trainer.max_steps=5")[0]["metrics"]
    fall = metrics["test/photographs_15/psnr"] - metrics["test/photographs_50/psnr"]
    assert metrics["test/photographs/psnr_fall"] == pytest.approx(fall, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"levels": 0, "num_residual": 6}, {"downsample": "haar"}, {"upsample": "transposed"}]
)
def test_one_batch_is_overfitted(options):
    torch.manual_seed(0)
    net = build_network({"name": "mdrn", "width": 16, "num_blocks": 1} | options)
    clean = torch.rand(2, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    noisy = clean + 0.2 * torch.randn_like(clean)
    optimizer, losses = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(300):
        loss = (net(noisy) - clean).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0]
