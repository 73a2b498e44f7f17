"""Every configuration composes, keeps what its files say, and builds what it names."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from projects.mccdic import data as data_module
from projects.mccdic.baselines import CUNet, PlainNet
from projects.mccdic.data import SliceData
from projects.mccdic.degrade import Degradation
from projects.mccdic.model import MCCDic
from projects.mccdic.module import MultiContrastRestoration
from projects.mccdic.phantom import PhantomSettings
from shared.errors import InputError
from shared.experiment import build
from shared.testing.project import ConfigPromises

FOLDER = Path(__file__).parents[1]
CARD = yaml.safe_load((FOLDER / "paper.yaml").read_text())
ARMS = {
    f"{claim['id']}: {name}": overrides for claim in CARD["claims"] for name, overrides in claim.get("arms", {}).items()
}
TASKS = {
    "rec4": ("rec", 4, False, 0.1), "rec8": ("rec", 8, False, 0.1), "sr2": ("sr", 2, False, 0.1),
    "sr4": ("sr", 4, False, 0.1), "joint4": ("rec", 4, True, 1.0),
}  # fmt: skip
DATA = {
    "phantom": "Phantom", "misaligned": "Phantom", "prepared": "Prepared", "ixi": "IXI", "brats": "BraTS",
    "fastmri": "FastMRI", "folders": "Folders",
}  # fmt: skip


class TestConfigurations(ConfigPromises):
    project = "mccdic"
    extra_groups = ("task",)

    def test_every_experiment_composes_keeps_its_leaves_and_builds(self, composed, tmp_path):
        with torch.device("meta"):  # ten networks of the published size, without the numbers in them
            super().test_every_experiment_composes_keeps_its_leaves_and_builds(composed, tmp_path)


def count(module):
    return sum(p.numel() for p in module.parameters())


def built(composed, *overrides):
    """The module as configured, without the numbers in it."""
    with torch.device("meta"):
        return build(composed("train", *overrides).model, "model")


def test_networks_of_the_sizes_have_the_parameters_that_the_card_and_the_files_say(composed):
    for size in ("tiny", "small", "base", "plain", "cunet"):
        counts = {name: p.numel() for name, p in built(composed, f"model={size}").net.named_parameters()}
        if size == "base":  # the published count is without what the published class does not register
            counts = {name: count for name, count in counts.items() if "thresholds" not in name and "steps" not in name}
        shown = sum(counts.values())
        assert CARD["network"]["parameters"].get(size, shown) == shown
        header = (FOLDER / "configs" / "model" / f"{size}.yaml").read_text().splitlines()[0]
        assert f"{shown:,} parameters" in header, size


@pytest.mark.parametrize(
    ("name", "kind"), [("tiny", MCCDic), ("small", MCCDic), ("base", MCCDic), ("plain", PlainNet), ("cunet", CUNet)]
)
def test_each_model_names_its_network_and_all_arguments_of_it(composed, name, kind):
    config = composed("train", f"model={name}").model
    assert type(built(composed, f"model={name}").net) is kind
    assert set(config.net) == {"name", *inspect.signature(kind).parameters}
    assert set(config) - {"_target_", "_recursive_", "_convert_"} == set(
        inspect.signature(MultiContrastRestoration).parameters
    )


@pytest.mark.parametrize("name", TASKS)
def test_task_sets_the_data_and_what_the_references_count(composed, name):
    config = composed("train", f"task={name}")
    task, factor, joint, weight = TASKS[name]
    assert (config.data.task, config.data.factor, config.data.joint) == (task, factor, joint)
    made = build(config.data, "data")
    assert (made.degradation, made.joint) == (Degradation(task, factor), joint)
    assert config.model.loss.reference_weight == weight
    if joint:
        assert composed("evaluate", f"task={name}").data == config.data
        # which returns the references as they are
        assert composed("train", f"task={name}", "model=plain").model.loss.reference_weight == 0


@pytest.mark.parametrize("name", DATA)
def test_data_are_built_from_every_argument_and_take_the_seed_of_the_run(composed, name):
    config = composed("train", f"data={name}", "seed=7")
    made = build(config.data, "data")
    assert type(made) is getattr(data_module, DATA[name])
    assert made.seed == 7
    arguments = set()
    for kind in type(made).__mro__:
        if issubclass(kind, SliceData):
            arguments |= set(inspect.signature(kind.__init__).parameters)
    # a Scans prepares what its subclasses say
    arguments -= {"self", "others", "find", "recipe"}
    assert set(config.data) - {"_target_", "_convert_"} == arguments
    if "phantom" in config.data:
        assert set(config.data.phantom) == set(inspect.signature(PhantomSettings).parameters)


def test_group_of_data_and_tables_of_this_test_are_the_same():
    files = {group: {p.stem for p in (FOLDER / "configs" / group).glob("*.yaml")} for group in ("data", "task")}
    assert files == {"data": set(DATA), "task": set(TASKS)}


def test_evaluation_does_by_default_as_training_does(composed):
    training, evaluation = composed("train"), composed("evaluate")
    assert evaluation.data == training.data
    assert evaluation.trainer == training.trainer
    assert evaluation.num_pictures == training.model.num_pictures
    assert evaluation.guided is None  # as the checkpoint says


def test_recipe_at_paper_scale_is_the_authors(composed):
    for name in ("ixi_sr2", "brats_rec8", "authors_ixi_rec4"):
        config = composed("train", f"experiment={name}")
        assert config.model.optimizer == {"lr": 1e-4, "betas": [0.9, 0.99]}
        assert config.model.scheduler.lr_min == 1e-5
        loss = config.model.loss
        assert (loss.kind, loss.reference_weight, loss.kspace_weight) == ("l1", 0.1, 0)
        assert (config.trainer.max_steps, config.trainer.gradient_clip_val) == (200_000, None)
        assert (config.data.batch_size, config.data.crop_size, config.data.gain) == (6, 128, None)
        assert (config.data.mask, config.data.mask_seed, config.data.normalisation) == ("random", 42, "published")
        net = config.model.net
        assert (net.widths, net.features, net.stages, net.blocks) == ([128, 96, 64], 64, 5, [1, 3, 5])
        assert (net.attention, net.skip, net.consistency, net.zero_heads) == (True, False, "none", False)
        target, reference = config.data.target, config.data.reference
        assert (target, reference) == ("t2", ["pd"] if "ixi" in name else ["t1"])


@pytest.mark.slow
def test_experiments_are_named_by_what_they_do(composed):
    assert composed("train", "experiment=ixi_rec4", "task=sr2").data.task == "sr"  # the command line has the last word
    for file in (FOLDER / "configs" / "experiment").glob("*_*.yaml"):
        *_, data, task = file.stem.split("_")
        if task in TASKS:
            config = composed("train", f"experiment={file.stem}")
            assert (config.data.task, config.data.factor) == TASKS[task][:2]
            assert config.data["_target_"].endswith(DATA[data])


def test_authors_slips_are_all_in_one_experiment(composed):
    ours, theirs = (composed("train", f"experiment={name}") for name in ("ixi_rec4", "authors_ixi_rec4"))
    assert (theirs.data.form, theirs.model.net.steps) == ("half_spectrum", "constant")
    assert theirs.model.net.initialisation == "published"
    theirs.data.form, theirs.model.net.steps = "complex", "learnt"
    theirs.model.net.initialisation = "consistent"
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["claims", "claims_gpu"])
def test_arms_of_the_claims_are_built_and_differ(composed, setting):
    assert ARMS
    base = [o.replace("claims", setting) if o.startswith("experiment") else o for o in CARD["base"]]
    found = {}
    for name, overrides in ARMS.items():
        config = composed("train", *base, *overrides)
        with torch.device("meta"):
            build(config.model, "model")
        build(config.data, "data")
        assert not config.without_reference
        assert config.callbacks.checkpoint.save_top_k == 0
        claim = name.split(":")[0]
        known = found.setdefault(claim, [])
        assert config not in known
        known.append(config)


def test_rivals_at_equal_parameters_have_as_many(composed):
    rivals = {name: overrides for name, overrides in ARMS.items() if re.search(r": (plain|soft_wide|one_scale)", name)}
    assert len(rivals) >= 4
    ours = count(built(composed, *CARD["base"]))
    for name, overrides in rivals.items():
        assert count(built(composed, *CARD["base"], *overrides)) == pytest.approx(ours, rel=0.05), name


def test_shipped_weights_are_of_the_default_network_and_know_other_intensities(composed):
    config = composed("train", "experiment=weights", "task=sr2")
    assert config.model.net == composed("train").model.net
    assert 0 < config.data.gain[0] < 1 < config.data.gain[1]


def test_mistyped_keys_stop_at_composition_or_construction(composed):
    for override in ("sede=1", "seed=two", "factor=four", "joint=both", "model.optimizer.learning_rate.x=1"):
        with pytest.raises(ConfigCompositionException):
            composed("train", override)
    for override in ("guide=false", "guided=both", "num_pictures=many", "model=tiny"):
        with pytest.raises(ConfigCompositionException):
            composed("evaluate", override)
    with pytest.raises(InputError, match="sise"):
        build(composed("train", "+data.phantom.sise=[64,64]").data, "data")
    with pytest.raises(InputError, match="cropsize"):
        build(composed("train", "+data.cropsize=8").data, "data")
    config = composed("train")
    OmegaConf.set_struct(config, False)
    config.model.net.widht = 8
    with pytest.raises(InputError, match="widht"), torch.device("meta"):
        build(config.model, "model")


def test_hyperparameters_are_plain_so_that_the_checkpoint_loads_safely(composed, tmp_path):
    torch.save(dict(built(composed).hparams), tmp_path / "hparams.pt")
    found = torch.load(tmp_path / "hparams.pt", weights_only=True)
    assert (found["net"]["widths"], found["guided"]) == ([32, 24, 16], True)
