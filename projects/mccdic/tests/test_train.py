"""A whole training, its repetition, its interruption, its golden losses; and every kind of it."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from projects.mccdic.checkpoints import save_network
from projects.mccdic.loss import restoration_losses
from projects.mccdic.module import MultiContrastRestoration
from projects.mccdic.networks import build_network
from shared import experiment
from shared.io.fastmri import write_kspace
from shared.testing.project import (
    QUIET,
    KilledError,
    TrainingPromises,
    assert_equal_weights,
    rows,
    stop_at,
    train_on_two_processes,
)

NET = {
    "name": "mccdic", "widths": [8, 6, 4], "features": 4, "stages": 2, "blocks": [1, 1, 1], "attention": False,
}  # fmt: skip
SLICES = ("psnr", "ssim", "rmse", "psnr_inside", "error_common", "error_target_only", "leakage")
VOLUMES = ("volume_psnr", "volume_ssim", "volume_nmse")
SHARES = ("unique_share", "unique_share_common")
BRIEF = ["trainer.max_steps=5", "model.num_pictures=0"]
# the smoke experiment is of MC-CDic's size
WITHOUT_SIZE = ["~model.net.widths", "~model.net.features", "~model.net.stages"]
PLAIN = ["model=plain", *WITHOUT_SIZE, "model.net.width=4", "model.net.blocks=1"]
CUNET = ["model=cunet", *WITHOUT_SIZE, "~model.net.blocks"]
WHOLE = ["data.whole_slices=true", "data.batch_size=1"]


class TestTraining(TrainingPromises):
    module = MultiContrastRestoration
    baselines = tuple(f"test/phantom/{name}" for name in (*SLICES, *VOLUMES))
    scores = (*baselines, *(f"test/phantom/{name}" for name in SHARES))
    curves = (
        "train/loss", "train/loss/target", "train/loss/reference", "val/psnr", "val/step_size_target",
        "val/step_size_common",
    )  # fmt: skip
    pictures = 2  # of the one slice: images, and what the codes add

    def test_run_leaves_everything_and_another_seed_gives_other_scores(self, first, smoke):
        left = []

        def taken(record, path):
            left.append((path / "slices.csv").read_bytes())
            (path / "slices.csv").unlink()  # beside what every project leaves
            return record, path

        def run(folder, *overrides):
            return taken(*smoke(folder, *overrides))

        super().test_run_leaves_everything_and_another_seed_gives_other_scores(taken(*first), run)
        _, again = smoke("again")
        assert (again / "slices.csv").read_bytes() == left[0] != left[1]


def test_means_of_the_slices_are_the_scores_of_the_run(smoke):
    record, path = smoke("a", "trainer.max_steps=5")
    with open(path / "slices.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["set"], line["name"]) for line in lines] == [
        (method, "phantom", f"subject2000{i}_0") for i in range(2) for method in ("network", "zero_filled")
    ]
    for method, scores in (("network", record["metrics"]), ("zero_filled", record["baseline"])):
        for name in (*SLICES, *SHARES):
            values = [float(line[name]) for line in lines if line["method"] == method and line[name]]
            assert bool(values) == (f"test/phantom/{name}" in scores)
            if values:
                assert scores[f"test/phantom/{name}"] == pytest.approx(np.mean(values), rel=1e-6)
    pictures = {file.name: Image.open(file).size for file in (path / "pictures").iterdir()}
    assert set(pictures) == {"phantom_subject20000_0.png", "phantom_subject20000_0_parts.png"}
    assert pictures["phantom_subject20000_0.png"][0] >= 5 * 48
    assert pictures["phantom_subject20000_0_parts.png"][0] >= 6 * 48  # common, unique, and four maps


@pytest.mark.slow
def test_baseline_is_the_zero_filled_input_whatever_is_trained(smoke):
    still = ["model.optimizer.lr=1e-12", "model.scheduler.lr_min=0"]
    record, _ = smoke("still", *still, *BRIEF)
    other, _ = smoke("other", *BRIEF, "model.guided=false")
    assert record["baseline"] == other["baseline"]
    # heads begin at zero: an untrained network returns its input
    trained = {name: record["metrics"][name] for name in record["baseline"]}
    assert trained == pytest.approx(record["baseline"], rel=1e-5)
    assert other["metrics"]["test/phantom/psnr"] != other["baseline"]["test/phantom/psnr"]


@pytest.mark.slow
def test_training_goes_on_from_the_weights_it_is_given(smoke, tmp_path):
    torch.manual_seed(5)
    given = build_network(NET)
    save_network(given, NET, tmp_path / "given.safetensors")
    still = ["model.optimizer.lr=1e-12", "model.scheduler.lr_min=0", *BRIEF]
    _, path = smoke("a", f"model.init_from={tmp_path / 'given.safetensors'}", *still)
    found = torch.load(path / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.allclose(found[f"net.{name}"], value, atol=1e-9) for name, value in given.state_dict().items())


@pytest.mark.slow
def test_run_from_given_weights_is_resumed_without_their_file(smoke, monkeypatch):
    _, first = smoke("first", *BRIEF)
    start = first / "checkpoints" / "last.ckpt"
    options = [f"model.init_from={start}"]
    whole, path = smoke("whole", *options)
    assert whole["metrics"] != smoke("scratch")[0]["metrics"]
    with monkeypatch.context() as patched:
        stop_at(7, MultiContrastRestoration, patched)
        with pytest.raises(KilledError):
            smoke("cut", *options)
    start.unlink()
    resumed, cut = smoke("cut", *options, "resume=auto")
    assert resumed["metrics"] == whole["metrics"]
    assert rows(cut) == rows(path)
    assert_equal_weights(cut, path)


KINDS = (
    ["task=rec8"], ["task=sr2"], ["task=sr4"], ["task=joint4"], ["factor=6"], ["model.guided=false"],
    ["data.phantom.references=[t1]"], ["data.phantom.references=[pd,t1]", "model.net.num_references=2"],
    [*WHOLE], [*WHOLE, "model.net.consistency=hard"], [*WHOLE, "model.net.consistency=soft"],
    [*WHOLE, "model.net.consistency=hard", "data.phantom.phase=1.0"], ["data.phantom.phase=1.0"],
    ["data.phantom.size=[45,47]"], ["data.form=half_spectrum"], ["data.mask=equispaced"], ["data.mask_seed=7"],
    ["data.center_fraction=0.2"], ["data.instance_norm=true"], ["data.gain=[0.8,1.6]"],
    ["data=misaligned", "data.phantom.anatomy=ellipses", "data.phantom.size=[48,48]"],
    ["model.net.common=false"], ["model.net.prox=soft"], ["model.net.tie=true"], ["model.net.attention=true"],
    ["model.net.skip=false"], ["model.net.zero_heads=false"], ["model.net.steps=constant"],
    ["model.net.initialisation=published"], ["model.net.widths=[8]", "model.net.blocks=[1]"],
    ["model.net.widths=[8,6]", "model.net.blocks=[1,1]"], ["model.net.stages=3"], ["model.loss.kind=l1"],
    ["model.loss.kind=l2"], ["model.loss.kspace_weight=1.0"], ["trainer.gradient_clip_val=null"],
    ["trainer.accumulate_grad_batches=2"], ["trainer.precision=bf16-mixed"], PLAIN, CUNET,
    [*PLAIN, "task=joint4"], [*PLAIN, "data.phantom.references=[pd,t1]", "model.net.num_references=2"],
)  # fmt: skip
NOT_SHARED = ("model.guided=false", "model.net.common=false", "model=plain", "model=cunet")


@pytest.mark.slow
def test_every_kind_of_training_runs_and_makes_a_difference(smoke):
    plain, _ = smoke("plain", "trainer.max_steps=5")
    found = []
    for number, options in enumerate(KINDS):
        record, path = smoke(str(number), *options, "trainer.max_steps=5")
        found.append(record["metrics"])
        assert all(np.isfinite(value) for value in record["metrics"].values()), options
        shown = {name.split("/")[-1] for name in record["metrics"]}
        assert set(SHARES) <= shown or set(NOT_SHARED) & set(options), options
        assert not (set(SHARES) & shown and set(NOT_SHARED) & set(options)), options
        sets = 2 if "data=misaligned" in options else 1
        each = 1 if "model=plain" in options else 2
        assert len(list((path / "pictures").glob("*.png"))) == sets * each, options
    scores = [json.dumps(metrics) for metrics in (plain["metrics"], *found)]
    assert len(set(scores)) == len(scores)


@pytest.mark.slow
def test_recomputed_iterations_and_workers_change_no_number(smoke):
    plain, path = smoke("plain", "trainer.max_steps=5")
    for number, option in enumerate(("model.net.recompute=true", "data.num_workers=2")):
        record, other = smoke(str(number), option, "trainer.max_steps=5")
        assert record["metrics"] == plain["metrics"]
        assert_equal_weights(other, path)


@pytest.mark.slow
def test_half_precision_trains_and_its_scores_are_those_of_single_precision(smoke, command_line, tmp_path):
    record, path = smoke("half", "trainer.precision=bf16-mixed")
    losses = [row["train/loss"] for row in rows(path)]
    single = [row["train/loss"] for row in rows(smoke("single")[1])]
    assert losses != single
    assert losses == pytest.approx(single, rel=0.05)
    code, _, error = command_line(
        "evaluate", f"ckpt_path={path}/checkpoints/best.ckpt", f"run_dir={tmp_path}/run", "threads=1",
        "data.phantom.anatomy=ellipses", "data.phantom.size=[48,48]", "data.num_test=2",
    )  # fmt: skip
    assert code == 0, error
    again = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert again["metrics"] == pytest.approx(record["metrics"], rel=1e-6)


@pytest.mark.slow
def test_two_processes_train_without_a_reference_and_write_each_slice_once(smoke, tmp_path):
    alone, _ = smoke("alone", "model.guided=false")
    both = tmp_path / "both"
    train_on_two_processes("mccdic", both, "model.guided=false", "data.batch_size=1")
    together = json.loads((both / "metrics.json").read_text())
    assert together["metrics"] == pytest.approx(alone["metrics"], rel=1e-3)
    assert len((both / "slices.csv").read_text().splitlines()) == 1 + 2 * 2


def write_folders(root):
    for split in ("train", "validation", "test"):
        for contrast in ("T2", "PD"):
            (root / split / contrast).mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng(i).integers(0, 256, (24, 20), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / contrast / f"{i:08}.png")


def write_knees(root):
    for folder, pairs in (("train", [(0, 1), (2, 3)]), ("val", [(8, 9)])):
        (root / f"singlecoil_{folder}").mkdir(parents=True)
        for i in np.ravel(pairs):
            rng = np.random.default_rng(i)
            kspace = rng.standard_normal((2, 24, 20)) + 1j * rng.standard_normal((2, 24, 20))
            write_kspace(root / f"singlecoil_{folder}/file{i}.h5", kspace.astype(np.complex64), recon_shape=(16, 16))
        listed = "".join(f"file{a},file{b},0.9\n" for a, b in pairs)
        (root / f"singlecoil_{folder}_split_less.csv").write_text(listed)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["folders", "fastmri"])
def test_scans_on_disk_train_and_are_scored(composed, tmp_path, data):
    if data == "folders":
        write_folders(tmp_path / "tree")
        own = []
    else:
        write_knees(tmp_path / "tree")
        own = ["data.crop=16", "data.num_validation=1", f"data.cache_dir={tmp_path}/cache"]
    record = experiment.train(composed(
        "train", f"data={data}", f"data.root={tmp_path}/tree", *own, "data.crop_size=8", "data.batch_size=2",
        "data.steps_per_epoch=2", "data.num_workers=0", "model.net.widths=[8,6,4]", "model.net.features=4",
        "trainer.max_steps=2", "without_reference=false", QUIET, "threads=1", f"run_dir={tmp_path}/run",
    ))  # fmt: skip
    expected = {f"test/{data}/{score}" for score in ("psnr", "ssim", "rmse", *VOLUMES)}
    assert set(record["metrics"]) == set(record["baseline"]) == expected
    assert all(np.isfinite(value) for value in record["metrics"].values())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"prox": "soft"}, {"common": False}, {"tie": True}, {"widths": [16]}], ids=str)
def test_one_slice_is_overfitted(options):
    torch.manual_seed(0)
    blocks = [1] * len(options.get("widths", [1, 1, 1]))
    net = build_network(NET | {"widths": [16, 12, 8], "features": 8, "blocks": blocks, "zero_heads": True} | options)
    target, reference = (torch.nn.functional.interpolate(torch.rand(1, 1, 6, 6), (24, 24)) for _ in range(2))
    given = torch.nn.functional.avg_pool2d(target, 5, 1, 2)
    optimizer, losses = torch.optim.Adam(net.parameters(), 2e-3), []
    for _ in range(150):
        terms = restoration_losses(net(given, reference), target, reference, kind="l1", reference_weight=0.1)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        losses.append(terms["target"].item())
    assert losses[-1] < 0.3 * losses[0]
