"""The atlas that a run ends with, and those that stand beside it."""

import csv
import json
import math

import pytest
import torch
from PIL import Image

from projects.hybrid_atlas import compare
from projects.hybrid_atlas.assess import COLUMNS
from projects.hybrid_atlas.atlas import AtlasOptions
from projects.hybrid_atlas.compare import add_comparison, identity_energy, mean_image, reached, write_subjects
from projects.hybrid_atlas.data import SyntheticCohorts
from projects.hybrid_atlas.module import RegistrationPrior
from projects.hybrid_atlas.workspace import Workspace
from shared.testing.project import KilledError

BRIEF = ["trainer.max_steps=5", "model.num_pictures=0"]
SHORT = {**compare.CLASSICAL, "iterations": 4}


@pytest.fixture
def quick(monkeypatch):
    """Let the classical method end after 4 iterations."""
    monkeypatch.setattr(compare, "CLASSICAL", SHORT)


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def timeless(values):
    return {name: value for name, value in values.items() if "seconds" not in name}


def test_run_ends_with_an_atlas_and_those_that_stand_beside_it(smoke, quick):
    record, path = smoke("a", *BRIEF, "classical=true")
    found = {"hybrid": record["metrics"], **record["peers"]}
    assert set(found) == {"hybrid", "iterative", "flash"}
    assert sorted(folder.name for folder in (path / "atlases").iterdir()) == sorted(found)
    for name, values in found.items():
        history = table(path / "atlases" / name / "history.csv")
        assert len(history) == values["test/atlas/iterations"]
        assert [int(row["iteration"]) for row in history] == list(range(1, len(history) + 1))
        assert values["test/atlas/seconds"] == pytest.approx(sum(float(row["seconds"]) for row in history))
        assert values["test/atlas/change"] == float(history[-1]["change"])
        subjects = table(path / "atlases" / name / "subjects.csv")
        assert [row["subject"] for row in subjects] == [f"subject_{i:04d}" for i in range(4)]
        assert list(subjects[0]) == ["subject", *COLUMNS]
        for score in ("energy", "psnr", "dice", "bridge_dice", "folding"):
            mean = sum(float(row[score]) for row in subjects) / 4
            assert values[f"test/atlas/{score}"] == pytest.approx(mean, rel=1e-6), score
        for row in subjects:
            parts = float(row["image_energy"]) + float(row["regulariser"])
            assert float(row["energy"]) == pytest.approx(parts, rel=1e-5)
        # the last update of the atlas comes after the last row
        if name != "flash":
            assert values["test/atlas/energy"] < float(history[-1]["energy"])
    assert table(path / "atlases" / "hybrid" / "history.csv")[0]["predicted"] == "True"
    assert {row["predicted"] for row in table(path / "atlases" / "iterative" / "history.csv")} == {"False"}
    flash = table(path / "atlases" / "flash" / "history.csv")
    assert [(row["update"], row["gradients"]) for row in flash] == [("splat", "1")] * 4
    # the mean of the scans is worse than any atlas, and sharper than none
    assert set(record["baseline"]) >= {"test/atlas/energy", "test/atlas/atlas_psnr", "test/atlas/sharpness"}
    for values in found.values():
        assert values["test/atlas/energy"] < record["baseline"]["test/atlas/energy"]
        assert values["test/atlas/atlas_psnr"] > record["baseline"]["test/atlas/atlas_psnr"]
    picture = Image.open(path / "pictures" / "atlas.png")
    assert picture.width >= 5 * 36


def test_energy_to_reach_is_the_classical_methods_with_a_margin(smoke, quick):
    record, path = smoke("a", *BRIEF, "classical=true", "iterative=false")
    target = 1.05 * float(table(path / "atlases" / "flash" / "history.csv")[-1]["energy"])
    for name, values in {"hybrid": record["metrics"], "flash": record["peers"]["flash"]}.items():
        gradients = 0
        for row in table(path / "atlases" / name / "history.csv"):
            gradients += int(row["gradients"])
            if float(row["energy"]) <= target:
                break
        assert values["test/atlas/gradients_to_target"] == gradients
    assert record["metrics"]["test/atlas/relative_seconds"] == pytest.approx(
        record["metrics"]["test/atlas/seconds_to_target"] / record["peers"]["flash"]["test/atlas/seconds_to_target"]
    )


@pytest.mark.parametrize(
    ("atlas", "last"),
    [("hybrid", 1), *(pytest.param(*place, marks=pytest.mark.slow) for place in (("iterative", 1), ("hybrid", 3)))],
)
def test_run_that_was_killed_while_it_built_the_atlas_goes_on_there(smoke, monkeypatch, atlas, last):
    whole, path = smoke("whole", *BRIEF)
    save = Workspace.save_iteration

    def stop(self, iteration, *state):
        if (self.folder.name, iteration) == (atlas, last + 1):
            raise KilledError
        save(self, iteration, *state)

    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "save_iteration", stop)
        with pytest.raises(KilledError):
            smoke("cut", *BRIEF)
    assert (path.parent / "cut" / "atlases" / atlas / f"atlas_{last:04d}.safetensors").is_file()
    assert not (path.parent / "cut" / "metrics.json").exists()
    monkeypatch.setattr(RegistrationPrior, "training_step", lambda *_: pytest.fail("trained again"))
    done = []

    def note(self, iteration, *state):
        done.append((self.folder.name, iteration))
        save(self, iteration, *state)

    monkeypatch.setattr(Workspace, "save_iteration", note)
    resumed, cut = smoke("cut", *BRIEF, "resume=auto")
    assert timeless(resumed["metrics"]) == timeless(whole["metrics"])
    assert timeless(resumed["peers"]["iterative"]) == timeless(whole["peers"]["iterative"])
    assert done[0] == (atlas, last + 1)
    for name in ("hybrid", "iterative"):
        found, expected = (run / "atlases" / name / "subjects.csv" for run in (cut, path))
        assert found.read_bytes() == expected.read_bytes()


def test_without_a_prior_the_iterative_method_is_all_there_is(smoke):
    record, path = smoke("none", "prior=none")
    assert not record["peers"]
    assert not any("pairs" in name for name in record["metrics"])
    assert not (path / "checkpoints").exists()
    assert [folder.name for folder in (path / "atlases").iterdir()] == ["hybrid"]
    beside, _ = smoke("beside", *BRIEF)
    assert timeless(record["metrics"]) == timeless(beside["peers"]["iterative"])
    assert smoke("none", "prior=none", "resume=auto")[0] == record


@pytest.mark.slow
def test_models_without_a_prior_build_atlases_too(smoke):
    record, _ = smoke("a", "prior=none", "deformation=lddmm_momentum", "~deformation.num_modes", "atlas.optimizer=gd")
    assert record["metrics"]["test/atlas/energy"] < record["baseline"]["test/atlas/energy"]


def test_no_atlas_is_built_where_none_is_wanted(composed, tmp_path):
    config = composed(
        "train", "atlas=none", "data=bullseye", "data.shape=[36,40]", "data.num_train=4", "data.num_validation=2",
        "data.num_atlas=2", "data.amplitude=1.0", "data.steps_per_epoch=2", "data.batch_size=2", "trainer.max_steps=2",
        "callbacks.progress=null", "threads=1", f"run_dir={tmp_path / 'run'}", "model.net.encoder=[8,8,8]",
        "model.net.decoder=[8]", "model.net.num_modes=7",
    )  # fmt: skip
    from projects.hybrid_atlas.train import run

    record = run(config)
    assert not any("atlas" in name for name in record["metrics"])
    assert not (tmp_path / "run" / "atlases").exists()
    assert not (tmp_path / "run" / "pictures" / "atlas.png").exists()


@pytest.mark.slow
def test_predictions_alone_stand_without_an_iterative_method(smoke):
    nothing = ["atlas.iterations=0", "atlas.final_iterations=0", "atlas.prediction_iterations=2"]
    record, path = smoke("a", *BRIEF, *nothing)
    assert not record["peers"]
    history = table(path / "atlases" / "hybrid" / "history.csv")
    assert [(row["predicted"], row["gradients"]) for row in history] == [("True", "0")] * 2


OPTIONS = (
    "atlas.coarse_iterations=2", "atlas.repredict=always", "atlas.repredict=until_stall", "atlas.center=delayed",
    "atlas.center=shape_update", "atlas.center=none", "atlas.update=pull", "atlas.update=splat", "atlas.update=grad",
    "atlas.final_iterations=1", "atlas.optimizer=gd", "atlas.optimizer=adam", "atlas.gradient=adjoint",
    "atlas.similarity=ncc", "atlas.sharpen=0.2", "atlas.noise_std=0.1", "atlas.refine=1", "atlas.ridge=0.5",
    "deformation.steps=8",
)  # fmt: skip


@pytest.mark.slow
def test_every_option_of_the_atlas_makes_a_difference(smoke):
    # a prediction of some worth is needed where predictions are compared
    alone = ["iterative=false", "model.num_pictures=0", "atlas.tolerance=0"]
    _, path = smoke("trained", *alone, "trainer.max_steps=60", "model.optimizer.lr=1e-2")
    given = [*alone, f"model.init_from={path}/checkpoints/best.ckpt", "trainer.max_steps=0"]
    found = []
    for number, option in enumerate(["seed=0", *OPTIONS]):
        record, _ = smoke(str(number), *given, option)
        scores = timeless(record["metrics"])
        assert all(math.isfinite(value) for value in scores.values()), option
        assert scores["test/atlas/energy"] < record["baseline"]["test/atlas/energy"], option
        found.append(json.dumps(scores))
    # of a good prediction the first repetition is no better, and none is after it
    same = {found.index(score) for score in found}
    assert len(same) >= len(found) - 1, sorted(set(range(len(found))) - same)


@pytest.mark.slow
def test_batches_and_exact_sums_change_nothing_but_the_last_bits(smoke):
    plain, _ = smoke("plain", *BRIEF, "iterative=false")
    for number, option in enumerate(("atlas.batch_size=1", "atlas.exact_reduce=true", "atlas.cache_mb=0")):
        record, _ = smoke(str(number), *BRIEF, "iterative=false", option)
        expected = pytest.approx(plain["metrics"]["test/atlas/energy"], rel=1e-3)
        assert record["metrics"]["test/atlas/energy"] == expected, option


# --- its parts ---


def cohort(**options):
    return SyntheticCohorts("bullseye", shape=[24, 20], amplitude=0.8, num_atlas=3, **options).cohort("atlas")


def test_baseline_is_the_mean_of_the_scans_and_its_error():
    scans = cohort()
    images = scans.images(range(3))
    mean = mean_image(scans)
    torch.testing.assert_close(mean, images.mean(0, keepdim=True))
    found = identity_energy(scans, mean, AtlasOptions(noise_std=0.1), {"name": "flash"})
    error = (images - images.mean(0)).square().sum() / 3
    assert found == pytest.approx(float(error) / (2 * 0.1**2), rel=1e-5)


def test_target_is_reached_where_the_energy_first_is_below():
    history = [{"energy": energy, "seconds": 2.0, "gradients": 3} for energy in (9.0, 5.0, 6.0, 4.0)]
    assert reached(history, 5.5) == {"seconds_to_target": 4.0, "gradients_to_target": 6.0}
    assert reached(history, 9.0) == {"seconds_to_target": 2.0, "gradients_to_target": 3.0}
    assert reached(history, 1.0) == {}


def test_training_pays_from_as_many_scans_as_its_time_is_worth():
    def compared(own, flash):
        metric = "test/atlas/seconds_to_target"
        record = {"metrics": {} if own is None else {metric: own}, "peers": {"flash": {metric: flash}}}
        add_comparison(record, 100.0, 16)
        return record["metrics"].get("test/atlas/relative_seconds"), record.get("break_even_scans")

    # 16 scans save 6 s, so 267 scans save 100
    assert compared(2.0, 8.0) == (0.25, 267)
    assert compared(8.0, 2.0) == (4.0, None)
    assert compared(None, 2.0) == (None, None)
    record = {"metrics": {}, "peers": {}}
    add_comparison(record, 100.0, 16)
    assert record == {"metrics": {}, "peers": {}}


def test_scores_that_do_not_apply_are_empty_cells(tmp_path):
    values = torch.arange(2.0 * len(COLUMNS)).reshape(2, -1)
    values[1, COLUMNS.index("dice")] = math.nan
    write_subjects(tmp_path / "subjects.csv", ["a", "b,c"], values)
    first, second = table(tmp_path / "subjects.csv")
    assert (second["subject"], second["dice"], first["energy"]) == ("b,c", "", "0.0")
    assert float(second["energy"]) == len(COLUMNS)


def test_atlas_of_scans_without_truth_is_scored_by_their_own_labels(smoke):
    record, path = smoke("a", *BRIEF, "iterative=false", "data=digits", "~data.amplitude", "data.kind=bullseye")
    assert 0 < record["metrics"]["test/atlas/dice"] < 1
    assert "test/atlas/atlas_psnr" not in record["metrics"]
    assert all(row["dice"] for row in table(path / "atlases" / "hybrid" / "subjects.csv"))
