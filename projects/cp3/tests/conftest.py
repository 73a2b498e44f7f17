"""What several test files need: small networks of every kind, clouds, groups that were traced once."""

import pytest
import torch
from torch import nn

pytest.register_assert_rewrite("shared.testing.project")

from hydra import compose, initialize_config_dir  # noqa: E402

from projects.cp3 import compare, train  # noqa: E402
from projects.cp3.groups import find_groups  # noqa: E402
from projects.cp3.model import build_network  # noqa: E402
from shared import recorded  # noqa: E402
from shared.kernels.points import ball_query_reference  # noqa: E402
from shared.testing.project import QUIET, ROOT, project_fixtures  # noqa: E402

composed, smoke, command_line = project_fixtures("cp3")

SMALL = {"num_classes": 5, "num_samples": 8}
CLASSIFIER = {**SMALL, "head": [16, 8]}
KINDS = {
    "pointnext_s": {
        "name": "pointnext", "width": 4, "radius": 0.5, "blocks": [1, 1, 1, 1], "strides": [1, 2, 2, 1], **CLASSIFIER,
    },
    "pointnext_b": {
        "name": "pointnext", "width": 4, "radius": 0.5, "blocks": [1, 2, 3, 1], "strides": [1, 2, 2, 1], "sa_layers": 1,
        "sa_residual": False, "expansion": 2, **CLASSIFIER,
    },
    "pointnet2": {"name": "pointnet2", "width": 1 / 16, **CLASSIFIER},
    "pointnet2_msg": {"name": "pointnet2", "kind": "msg", "in_channels": 3, "width": 1 / 16, **CLASSIFIER},
    "scenes_s": {
        "name": "pointnext_seg", "width": 4, "radius": 0.5, "blocks": [1, 1, 1], "strides": [1, 2, 2], **SMALL,
    },
    "scenes_b": {
        "name": "pointnext_seg", "width": 4, "radius": 0.5, "blocks": [1, 2, 2], "strides": [1, 2, 2], "sa_layers": 1,
        "sa_residual": False, "expansion": 2, **SMALL,
    },
    "parts": {
        "name": "pointnext_seg", "width": 4, "radius": 0.5, "blocks": [1, 1, 1], "strides": [1, 2, 2], "sa_layers": 3,
        "num_shapes": 3, "in_channels": 7, **SMALL,
    },
}  # fmt: skip


def make_net(kind, seed=0, **changes):
    """Build a small network in eval mode whose norms have statistics and factors of their own."""
    torch.manual_seed(seed)
    net = build_network({**KINDS[kind], **changes})
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0.2, 0.3)
    return net.eval()


def make_cloud(kind, batch=2, points=64, seed=0):
    """Draw arguments of such a network's call."""
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.rand(batch, points, 3, generator=generator) * 2 - 1
    features = torch.randn(batch, KINDS[kind].get("in_channels", 4), points, generator=generator)
    num_shapes = KINDS[kind].get("num_shapes", 0)
    return (xyz, features, *([torch.arange(batch) % num_shapes] if num_shapes else []))


def group_plainly(xyz, features, new_xyz, radius, num_samples, scale=1.0):
    """Make cat([Δp / scale, f_j]), (B, 3 + C, M, K), out loud."""
    rows = torch.arange(len(xyz))[:, None, None]
    neighbors = ball_query_reference(radius, num_samples, xyz, new_xyz).long()
    dp = (xyz[rows, neighbors] - new_xyz[:, :, None]) / scale
    return torch.cat([dp, features.mT[rows, neighbors]], -1).permute(0, 3, 1, 2)


@pytest.fixture(scope="session")
def kinds():
    return KINDS


@pytest.fixture(scope="session")
def tiny():
    return make_net


@pytest.fixture(scope="session")
def cloud():
    return make_cloud


@pytest.fixture(scope="session")
def plain_group():
    return group_plainly


@pytest.fixture(scope="session")
def traced():
    """Trace each kind once -> function of kind and keep: groups."""
    found = {}

    def trace(kind, keep=("head.*",)):
        if (kind, keep) not in found:
            found[kind, keep] = find_groups(make_net(kind), *make_cloud(kind, batch=1, points=16), keep=keep)
        return found[kind, keep]

    return trace


def pytest_generate_tests(metafunc):
    """Run a test that takes a kind on each, unless it says on which."""
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "kind" in metafunc.fixturenames and "kind" not in own:
        metafunc.parametrize("kind", KINDS)


# --- Runs of the whole project, on a network of two stages that learns in seconds

TWO_STAGES = {
    "name": "pointnext", "num_classes": 15, "width": 8, "num_samples": 8, "blocks": [1, 1, 1, 1],
    "strides": [1, 2, 2, 1], "head": [16],
}  # fmt: skip
NET = ["~model.net", "+model.net=" + str(TWO_STAGES).replace("'", "")]
CUT = ["prune=cp3", "model.prune.num_clouds=8", "model.prune.batch_size=4"]


def run_in(path, *overrides):
    """Run the smoke experiment on the small network in a folder -> (record, folder)."""
    options = ["experiment=smoke", QUIET, f"run_dir={path}", *NET, *overrides]
    with initialize_config_dir(str(ROOT / "projects" / "cp3" / "configs"), version_base="1.3"):
        config = compose("train", overrides=options)
    return train.run(config), path


@pytest.fixture(autouse=True)
def recorded_runs(tmp_path, monkeypatch):
    """Look for recorded runs in a folder of the test instead of this machine's -> that folder."""
    runs = tmp_path / "recorded" / "runs"
    monkeypatch.setattr(recorded, "ROOT", tmp_path / "recorded")
    monkeypatch.setattr(recorded, "RUNS", runs)
    monkeypatch.setattr(compare, "RUNS", runs)
    return runs / "cp3"


@pytest.fixture(scope="session")
def dense_run(tmp_path_factory):
    """A dense network that was trained from nothing -> (record, folder)."""
    options = ["model.init_from=null", "trainer.max_epochs=12", "model.optimizer.lr=0.01", "tested=[last]"]
    return run_in(tmp_path_factory.mktemp("dense") / "run", *options)


@pytest.fixture(scope="session")
def dense_file(dense_run):
    return dense_run[1] / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def pruned_run(tmp_path_factory, dense_file):
    """That network pruned and fine-tuned, its criterion's base and random beside it -> (record, folder)."""
    path = tmp_path_factory.mktemp("pruned") / "run"
    return run_in(path, *CUT, f"model.init_from={dense_file}", "beside=[base, random]")


@pytest.fixture
def fine_tuned(tmp_path, dense_file, monkeypatch):
    """Prune the trained network and fine-tune it for a step, without the slow picture -> (record, folder)."""
    monkeypatch.setattr(compare, "draw_importance", lambda path, pruned: None)

    def run(folder, *overrides):
        brief = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "tested=[last]"]
        return run_in(tmp_path / folder, *CUT, f"model.init_from={dense_file}", *brief, *overrides)

    return run
