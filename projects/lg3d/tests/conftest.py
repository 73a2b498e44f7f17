"""What several test files need: a small detector that is sure of itself though untrained, and rooms to look at."""

import copy
import json

import pytest
import torch

pytest.register_assert_rewrite("shared.testing.project")

from hydra import compose, initialize_config_dir  # noqa: E402

from projects.lg3d import compare, train  # noqa: E402
from projects.lg3d.checkpoints import save_network  # noqa: E402
from projects.lg3d.layouts import SUNRGBD_CLASSES, SUNRGBD_MEAN_SIZES  # noqa: E402
from projects.lg3d.model import build_network  # noqa: E402
from shared import recorded  # noqa: E402
from shared.io.procroom import generate  # noqa: E402
from shared.testing.project import QUIET, ROOT, project_fixtures  # noqa: E402

composed, smoke, command_line = project_fixtures("lg3d")

SMALL = {
    "name": "votenet",
    "backbone": {
        "in_channels": 1, "num_points": [64, 32, 16, 8], "radii": [0.2, 0.4, 0.8, 1.2], "num_samples": [8, 8, 8, 8],
        "widths": [[8, 8, 16], [16, 16, 32], [16, 16, 32], [16, 16, 32]], "out_channels": 32,
    },
    "head": {
        "num_proposals": 24, "radius": 0.3, "num_samples": 8, "widths": [16, 16, 16], "num_headings": 12,
        "mean_sizes": torch.tensor(SUNRGBD_MEAN_SIZES).tolist(),
    },
}  # fmt: skip


def make_detector(rooms, **changes):
    """Build a small detector in eval mode whose boxes of these rooms (B, N, 3) differ in score, class and heading."""
    arguments = copy.deepcopy(SMALL)
    for part, values in changes.items():
        arguments[part] |= values
    torch.manual_seed(0)
    net = build_network(arguments)
    xyz = torch.as_tensor(rooms)
    features = xyz[:, :, 2][:, None].repeat(1, arguments["backbone"]["in_channels"], 1)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    seen = []
    with torch.no_grad():
        # votes stay near their seeds
        net.head.vote.out.weight[:3] *= 0.1
        net.head.vote.out.bias[:3] = 0
        for norm in norms:
            norm.momentum = None  # the mean over all passes
        for _ in range(3):
            net.train()(xyz, features)
        net.eval()
        hook = net.head.shared.register_forward_hook(lambda module, inputs, output: seen.append(output))
        net(xyz, features)
        hook.remove()
        for layer, width in ((net.head.classify, 3.0), (net.head.regress, 0.3)):
            found = layer(seen[0])
            factor = width / found.std((0, 2))
            layer.bias.copy_((layer.bias - found.mean((0, 2))) * factor)
            layer.weight *= factor[:, None, None]
        net.head.classify.bias[1] += 3
    return net, arguments


@pytest.fixture(scope="session")
def rooms():
    """Three generated rooms of 600 points each, (3, 600, 3) float32, z up."""
    return generate(3, "sun", 600, 0, "test")["points"]


@pytest.fixture(scope="session")
def detector(rooms):
    """Build such a detector -> function of changes of its arguments: network, arguments."""
    return lambda **changes: make_detector(rooms, **changes)


@pytest.fixture(scope="session")
def weights(detector, tmp_path_factory):
    """A .safetensors file of such a detector that says how it was trained, ten classes, 512 points."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    net, arguments = detector()
    save_network(net, arguments, path, class_names=json.dumps(SUNRGBD_CLASSES), num_points="512")
    return path


@pytest.fixture(autouse=True)
def recorded_runs(tmp_path, monkeypatch):
    """Look for recorded runs in a folder of the test instead of this machine's -> that folder."""
    runs = tmp_path / "recorded" / "runs"
    monkeypatch.setattr(recorded, "ROOT", tmp_path / "recorded")
    monkeypatch.setattr(recorded, "RUNS", runs)
    monkeypatch.setattr(compare, "RUNS", runs)
    return runs / "lg3d"


@pytest.fixture(scope="session")
def guided_run(tmp_path_factory):
    """A finished guided training, the smoke experiment -> (record, folder)."""
    path = tmp_path_factory.mktemp("guided") / "run"
    with initialize_config_dir(str(ROOT / "projects" / "lg3d" / "configs"), version_base="1.3"):
        config = compose("train", overrides=["experiment=smoke", QUIET, f"run_dir={path}"])
    return train.run(config), path
