"""A whole training with its atlas, its repetition, its interruption, its golden losses; and every kind of it."""

import json
import shutil

import numpy as np
import pytest
import torch

from projects.hybrid_atlas.checkpoints import save_network
from projects.hybrid_atlas.model import build_network
from projects.hybrid_atlas.module import RegistrationPrior
from shared.io.volumes import make_volume, write_volume
from shared.testing.project import KilledError, TrainingPromises, assert_equal_weights, rows, stop_at

PAIRS = ("energy", "psnr", "ncc", "dice")
FOLDING = ("folding", "folding_cells")
ATLAS = ("atlas_psnr", "atlas_ssim", "sharpness", "energy")
SUBJECTS = ("psnr", "dice", "bridge_dice", *FOLDING)
COSTS = ("iterations", "change")
NET = {"name": "flash_head", "dims": 2, "encoder": [8, 8, 8], "decoder": [8], "first_stride": 2, "num_modes": 7}
BRIEF = ["trainer.max_steps=5", "model.num_pictures=0"]
ALONE = ["iterative=false", "atlas.iterations=1", "atlas.prediction_iterations=0", "atlas.final_iterations=0", *BRIEF]
VXM = ["model=vxm", "~model.net.num_modes", "model.net.decoder=[8,8,8]", "model.net.final=[8]"]
DEEPFLASH = ["model=deepflash", "~model.net.encoder", "~model.net.decoder", "model.net.spectrum_size=32"]
SVF = ["deformation=svf", "~deformation.num_modes"]
LDDMM = ["deformation=lddmm", "~deformation.num_modes"]
SCANS = ["~data.shape", "~data.amplitude"]
VOLUMES = ["dims=3", "data.shape=[24,20,18]", "data.num_modes=5", "deformation.num_modes=5", "model.net.num_modes=5"]


@pytest.fixture
def smoke(smoke):
    """Run the smoke experiment; what times and folders an atlas adds is taken off what every project leaves."""

    def run(folder, *overrides):
        record, path = smoke(folder, *overrides)
        for values in (record["metrics"], *record["peers"].values()):
            for name in [name for name in values if "seconds" in name]:
                del values[name]
        if json.loads((path / "metrics.json").read_text()) != record:
            (path / "metrics.json").write_text(json.dumps(record))
        if (path / "atlases").is_dir():
            shutil.move(path / "atlases", path.parent / f"{folder}_atlases")
        return record, path

    return run


class TestTraining(TrainingPromises):
    module = RegistrationPrior
    scores = (
        *(f"test/pairs/{name}" for name in (*PAIRS, *FOLDING)),
        *(f"test/atlas/{name}" for name in (*ATLAS, *SUBJECTS, *COSTS)),
    )  # fmt: skip
    baselines = (*(f"test/pairs/{name}" for name in PAIRS), *(f"test/atlas/{name}" for name in ATLAS))
    curves = ("train/loss", "train/energy/image", "val/energy")
    pictures = 2  # a pair, the atlases

    @pytest.mark.slow
    def test_two_processes_train_as_one_that_sees_the_batches_of_both(self, smoke, tmp_path):
        super().test_two_processes_train_as_one_that_sees_the_batches_of_both(smoke, tmp_path)
        assert (tmp_path / "both" / "atlases" / "hybrid" / "history.csv").is_file()


KINDS = (
    VXM, [*VXM, *SVF], [*SVF], [*LDDMM], DEEPFLASH, [*DEEPFLASH, "model.net.two_nets=false"], VOLUMES,
    ["model.net.first_stride=1", "model.net.encoder=[8,8,8,8]", "model.net.decoder=[8,8]"],
    ["deformation.integrator=rk4"], ["model.loss.similarity=ncc"], ["model.loss.noise_std=0.05"],
    ["model.loss.kind=supervised", "model.loss.teacher_steps=3"],
    ["model.loss.kind=supervised", "model.loss.teacher_steps=3", "model.loss.spectral_weight=true"],
    ["model.loss.steps=4"], ["data.blur_sources=1.0"], ["data.flip=false"], ["data.gamma=0.2"], ["data.contrast=0.3"],
    ["data.bias=0.3"], ["model.optimizer.weight_decay=0.1"], ["model.net.unit=0.1"], ["trainer.gradient_clip_val=null"],
    ["trainer.accumulate_grad_batches=2"], ["trainer.precision=bf16-mixed"],
    ["data=digits", "~data.amplitude", "deformation.metric.alpha=1.0"],
    ["data=digits", "~data.amplitude", "data.kind=bullseye"],
)  # fmt: skip


@pytest.mark.slow
def test_every_kind_of_training_runs_and_makes_a_difference(smoke):
    found = []
    for number, options in enumerate([[], *KINDS]):
        record, _ = smoke(str(number), *options, *ALONE)
        assert all(np.isfinite(value) for value in record["metrics"].values()), options
        # digits have no labels
        labelled = "data=digits" not in options or "data.kind=bullseye" in options
        assert ("test/pairs/dice" in record["metrics"]) == labelled, options
        found.append(json.dumps(record["metrics"]))
    assert len(set(found)) == len(found)


@pytest.mark.slow
def test_workers_change_no_number(smoke):
    record, path = smoke("plain", *ALONE)
    other, again = smoke("workers", *ALONE, "data.num_workers=2")
    assert other["metrics"] == record["metrics"]
    assert_equal_weights(again, path)


@pytest.mark.slow
def test_baseline_is_the_undeformed_image_whatever_is_trained(smoke):
    still, _ = smoke("still", *ALONE, "model.optimizer.lr=1e-12")
    other, _ = smoke("other", *ALONE, *VXM, *SVF)
    assert other["baseline"] == pytest.approx(still["baseline"], rel=1e-6)
    # networks begin with nearly no deformation
    for name in PAIRS:
        trained = still["metrics"][f"test/pairs/{name}"]
        assert trained == pytest.approx(still["baseline"][f"test/pairs/{name}"], rel=1e-3), name


@pytest.mark.slow
def test_training_learns(smoke):
    record, path = smoke("a", "trainer.max_steps=300", "model.optimizer.lr=1e-2", "data.num_train=32")
    energies = [row["val/energy"] for row in rows(path)]
    assert min(energies) < 0.6 * energies[0]
    assert record["metrics"]["test/pairs/energy"] < 0.6 * record["baseline"]["test/pairs/energy"]
    assert record["metrics"]["test/pairs/dice"] > record["baseline"]["test/pairs/dice"]


@pytest.mark.slow
def test_training_goes_on_from_the_weights_it_is_given(smoke, tmp_path):
    torch.manual_seed(5)
    given = build_network(NET)
    save_network(given, NET, tmp_path / "given.safetensors")
    still = ["model.optimizer.lr=1e-12", *ALONE]
    _, path = smoke("a", f"model.init_from={tmp_path / 'given.safetensors'}", *still)
    found = torch.load(path / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.allclose(found[f"net.{name}"], value, atol=1e-9) for name, value in given.state_dict().items())


@pytest.mark.slow
def test_run_from_given_weights_is_resumed_without_their_file(smoke, monkeypatch):
    _, first = smoke("first", *ALONE)
    start = first / "checkpoints" / "last.ckpt"
    options = [f"model.init_from={start}", "iterative=false"]
    whole, path = smoke("whole", *options)
    assert whole["metrics"] != smoke("scratch", "iterative=false")[0]["metrics"]
    with monkeypatch.context() as patched:
        stop_at(7, RegistrationPrior, patched)
        with pytest.raises(KilledError):
            smoke("cut", *options)
    start.unlink()
    resumed, cut = smoke("cut", *options, "resume=auto")
    assert resumed["metrics"] == whole["metrics"]
    assert rows(cut) == rows(path)
    assert_equal_weights(cut, path)


@pytest.mark.slow
def test_scans_on_disk_train_and_make_an_atlas(smoke, tmp_path):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        x, y = np.meshgrid(np.linspace(-1, 1, 32), np.linspace(-1, 1, 28), indexing="ij")
        labels = ((x / 0.7) ** 2 + (y / rng.uniform(0.5, 0.8)) ** 2 < 1).astype(np.float32)
        for name, values in ((f"head{seed}", 90 * labels + 10 * rng.random((32, 28))), (f"head{seed}_seg", labels)):
            volume = make_volume(values[..., None].astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]))
            write_volume(tmp_path / "scans" / f"{name}.nii.gz", volume.data, volume, "float32")
    ways = ["data.layout=null", "data.root=null", f"data.source={tmp_path}/scans", f"data.cache_dir={tmp_path}/cache"]
    record, path = smoke(
        "a", "data=scans", *SCANS, *ways, "data.shares=[5,2,3]", "data.num_train=null", "data.num_validation=null",
        "data.num_atlas=null", "data.num_workers=1", "trainer.max_steps=5",
    )  # fmt: skip
    assert 0.5 < record["metrics"]["test/atlas/dice"] <= 1
    assert 0.5 < record["metrics"]["test/pairs/dice"] <= 1
    assert record["metrics"]["test/atlas/energy"] < record["baseline"]["test/atlas/energy"]
    assert (path / "pictures" / "head7_to_head8.png").is_file()
