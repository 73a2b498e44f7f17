"""What the data modules give, and the settings that they refuse; slices.py, phantom.py and prepare.py have more."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import OmegaConf

from projects.mccdic import phantom as phantom_module
from projects.mccdic.degrade import Degradation
from projects.mccdic.slices import Slices, TrainingCrops
from shared.errors import InputError
from shared.experiment import build

REC = Degradation("rec", 4)
CONFIG = Path(phantom_module.__file__).parent / "configs" / "data" / "phantom.yaml"
FEW = {
    "phantom": {"anatomy": "ellipses", "size": [48, 40]}, "num_train": 3, "num_validation": 1, "num_test": 2,
    "crop_size": 16, "batch_size": 2, "steps_per_epoch": 3,
}  # fmt: skip


@pytest.fixture
def phantoms(tmp_path):
    """The data module of generated heads as configured, as few and small as can be."""

    def make(seed=0, **changes):
        root = {"task": "rec", "factor": 4, "joint": False, "seed": seed, "data": OmegaConf.load(CONFIG)}
        changes = [FEW, {"cache_dir": str(tmp_path)}, changes]
        return build(OmegaConf.merge(root, *({"data": change} for change in changes)).data, "data")

    return make


def slices_of(count=3, references=1, shape=(20, 16)):
    rng = np.random.default_rng(0)
    target, reference = rng.random((count, *shape), np.float32), rng.random((count, references, *shape), np.float32)
    names = [f"a_{i}" for i in range(count)]
    return Slices(names, ["a"] * count, target, reference, [1.0] * count)


# --- gain ---


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("references", [1, 2])
def test_gain_scales_each_contrast_of_a_crop_by_a_factor_of_its_own(references, joint):
    slices = slices_of(references=references)
    plain, scaled = (TrainingCrops(slices, REC, 8, 0, joint, gain=gain) for gain in (None, [0.5, 2.0]))
    factors = []
    for draw in range(40):
        before, after = plain[draw], scaled[draw]
        own = (after["target"] / before["target"]).median()
        torch.testing.assert_close(after["target"], before["target"] * own)
        torch.testing.assert_close(after["input"], before["input"] * own)
        found = [own.item()]
        for i in range(references):
            factor = (after["reference_target"][i] / before["reference_target"][i]).median()
            for key in ("reference", "reference_target"):
                torch.testing.assert_close(after[key][i], before[key][i] * factor)
            found.append(factor.item())
        assert after.keys() == before.keys()
        factors.append(found)
    factors = np.array(factors)
    assert ((factors >= 0.5) & (factors <= 2)).all()
    assert (factors.min(0) < 0.7).all()
    assert (factors.max(0) > 1.7).all()
    for one, other in itertools.combinations(factors.T, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.5


def test_gain_is_of_the_draw_and_of_training_alone(phantoms):
    plain, scaled = phantoms(), phantoms(gain=[0.5, 2])
    for one, other in zip(scaled.train_dataloader(), phantoms(gain=[0.5, 2]).train_dataloader(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    first, changed = (next(iter(data.train_dataloader())) for data in (plain, scaled))
    assert not torch.equal(first["target"], changed["target"])
    for loaders in (
        (plain.val_dataloader(), scaled.val_dataloader()),
        (plain.test_dataloader()[0], scaled.test_dataloader()[0]),
    ):
        for one, other in zip(*loaders, strict=True):
            assert torch.equal(one["target"], other["target"])
            assert torch.equal(one["reference"], other["reference"])


@pytest.mark.parametrize(
    "gain", [1.5, [1.5], [2, 1], [0, 1], [-1, 1], [1, math.inf], [math.nan, 1], {"low": 1, "high": 2}]
)
def test_gain_is_a_range_of_positive_factors(phantoms, gain):
    with pytest.raises(InputError, match=r"data\.gain is a range of positive factors such as \[0\.8, 1\.5\]"):
        phantoms(gain=gain)


def test_gain_is_for_crops(phantoms):
    with pytest.raises(InputError, match=r"data\.gain is for crops"):
        phantoms(gain=[0.8, 1.5], whole_slices=True)


# --- generated heads ---


def test_heads_of_the_splits_are_others_and_are_drawn_once(phantoms, monkeypatch):
    data = phantoms()
    volumes = [set(s.volumes) for s in (data.train_slices(), data.val_slices(), *data.test_slices().values())]
    assert [len(found) for found in volumes] == [3, 1, 2]
    assert not any(a & b for a, b in itertools.combinations(volumes, 2))
    monkeypatch.setattr(phantom_module, "draw_subject", lambda *_: pytest.fail("drawn again"))
    again = phantoms(seed=5)  # of the training, not of the heads
    np.testing.assert_array_equal(again.train_slices().target, data.train_slices().target)


def test_other_heads_come_of_another_data_seed(phantoms):
    one, other = (phantoms(**changes).val_slices() for changes in ({}, {"data_seed": 1}))
    assert not np.array_equal(one.target, other.target)


def test_only_what_is_asked_for_is_drawn(phantoms, tmp_path):
    data = phantoms()
    for stage, count in ((TrainerFn.FITTING, 2), (TrainerFn.TESTING, 3)):
        data.trainer = SimpleNamespace(state=SimpleNamespace(fn=stage), world_size=1)
        data.prepare_data()
        assert len(list(tmp_path.glob("phantom_*.npz"))) == count


def test_batches_depend_on_the_seed_alone(phantoms):
    def batches(**changes):
        return [batch["target"] for batch in phantoms(**changes).train_dataloader()]

    assert len(batches()) == 3
    for one, other in zip(batches(), batches(num_workers=2), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(batches()[0], batches(seed=1)[0])


def test_test_sets_are_of_the_same_heads_but_for_what_differs(phantoms):
    data = phantoms(test_sets={"noisy": {"noise": 0.05}, "beside": {"rigid_shift": 3}})
    loaders = [list(loader) for loader in data.test_dataloader()]
    assert data.test_names == ["phantom", "noisy", "beside"]
    for plain, noisy, beside in zip(*loaders, strict=True):
        assert plain["name"] == noisy["name"] == beside["name"]
        assert not torch.equal(plain["target"], noisy["target"])
        assert torch.equal(plain["target"], beside["target"])
        assert not torch.equal(plain["reference"], beside["reference"])


def test_complex_heads_bring_their_phase_where_their_samples_are(phantoms):
    crops = next(iter(phantoms(phantom={"phase": 1}).train_dataloader()))
    assert not {"phase", "kspace"} & crops.keys()
    data = phantoms(phantom={"phase": 1}, whole_slices=True)
    batch = next(iter(data.train_dataloader()))
    assert {"phase", "kspace", "mask"} <= batch.keys()
    assert batch["phase"].shape == batch["target"].shape == (2, 1, 48, 40)
    assert batch["target"].dtype == torch.float32
    assert batch["target"].min() >= 0
    assert "phase" in next(iter(data.val_dataloader()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phantom": {"target": "pd"}}, "besides the target, each once"),
        ({"phantom": {"references": ["flair"]}}, "unknown contrast 'flair'"),
        ({"phantom": {"noise": 2}}, r"noise must lie in \[0, 1\]"),
        ({"phantom": {"size": [16, 48]}}, "size must be two numbers from 32 on"),
        ({"test_sets": {"noisy": {"noise": 2}}}, r"noise must lie in \[0, 1\]"),
        ({"test_sets": {"noisy": {"nose": 1}}}, "nose"),
        ({"form": "real"}, "unknown form 'real'"),
        ({"crop_size": 0}, "data.crop_size is at least 1"),
        ({"crop_size": None}, "takes data.whole_slices=true"),
    ],
)
def test_arguments_out_of_range_are_named(phantoms, changes, message):
    with pytest.raises(InputError, match=message):
        phantoms(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train": 0}, r"train has 1 \.\. 10000 subjects, not 0"),
        ({"phantom": {"slices_per_subject": 2}}, "3 train slices are no multiple"),
        ({"crop_size": 44}, "subject00000: 40x48 is smaller than the crop of 44; set data.crop_size"),
        ({"factor": 5}, "no published centre for acceleration 5"),
        ({"phantom": {"anatomy": "absent.nii.gz"}}, "absent.nii.gz"),
    ],
)
def test_data_that_cannot_be_loaded_are_named(phantoms, changes, message):
    with pytest.raises(InputError, match=message):
        next(iter(phantoms(**changes).train_dataloader()))
