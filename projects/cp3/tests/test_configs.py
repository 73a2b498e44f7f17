"""Every configuration composes, keeps what its files say, and builds what it names."""

import inspect
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from projects.cp3 import data as data_file
from projects.cp3.checkpoints import load_published, save_network
from projects.cp3.data import AUGMENTATIONS, ObjectData, PointData, PublishedObjects
from projects.cp3.model import NETWORKS, build_network
from projects.cp3.module import PointNetwork
from projects.cp3.pruner import Pruning
from projects.cp3.scoring import Criterion
from shared.errors import InputError
from shared.experiment import build
from shared.testing.project import ConfigPromises

FOLDER = Path(__file__).parents[1]
CARD = yaml.safe_load((FOLDER / "paper.yaml").read_text())
DATA = {
    "procshape": "ProcShape", "procshape_clean": "ProcShape", "scanobjectnn": "ScanObjectNN",
    "modelnet40": "ModelNet40", "s3dis": "S3DIS", "shapenet_part": "ShapeNetPart",
}  # fmt: skip


def stems(group):
    return sorted(path.stem for path in (FOLDER / "configs" / group).glob("*.yaml"))


@pytest.fixture
def composed(composed, tmp_path):
    """Compose; data sets that lie on disk are given a folder, as their commands say."""

    def run(config_name, *overrides):
        config = composed(config_name, *overrides)
        if config.get("data") and OmegaConf.is_missing(config.data, "root"):
            config.data.root = str(tmp_path)
        return config

    return run


class TestConfigurations(ConfigPromises):
    project = "cp3"
    extra_groups = ("prune",)

    def test_every_experiment_composes_keeps_its_leaves_and_builds(self, composed, tmp_path):
        with torch.device("meta"):  # networks of the published size, without the numbers in them
            super().test_every_experiment_composes_keeps_its_leaves_and_builds(composed, tmp_path)


def module(composed, *overrides):
    """The module as configured, without the numbers in it."""
    with torch.device("meta"):
        return build(composed("train", *overrides).model, "model")


def arguments_of(*kinds):
    """What a class and its bases with an __init__ of their own can be told."""
    names = set()
    for kind in kinds:
        names |= set(inspect.signature(kind.__init__).parameters)
    return names - {"self", "others"}


def test_tables_of_code_and_test_are_the_same():
    assert stems("data") == sorted(DATA)
    assert set(CARD["network"]["parameters"]) <= set(stems("model"))


@pytest.mark.parametrize("name", [name for name in stems("model") if name != "recipe"])
def test_each_model_builds_a_network_of_known_arguments(composed, name):
    config = composed("train", f"model={name}", "prune=none").model
    with torch.device("meta"):
        made = build(config, "model")
    assert type(made.net) is NETWORKS[config.net.name]
    assert set(config) - {"_target_", "_recursive_", "_convert_"} == arguments_of(PointNetwork)
    count = sum(p.numel() for p in made.parameters())
    if name in CARD["network"]["parameters"]:
        assert count == CARD["network"]["parameters"][name]
        text = (FOLDER / "configs" / "model" / f"{name}.yaml").read_text()
        # the file of width 64 says what it is of, ModelNet40's classes
        assert f"{count:,} parameters" in text


@pytest.mark.parametrize("name", stems("prune"))
def test_each_pruning_says_every_option(composed, name):
    config = composed("train", f"prune={name}").model.prune
    if name == "none":
        assert config is None
        return
    assert set(config) == {field.name for field in fields(Pruning)}
    assert set(config.criterion) == {field.name for field in fields(Criterion)}
    made = Pruning(**OmegaConf.to_container(config, resolve=True))
    has_cp3 = "cp3" in name
    assert (made.criterion["ce"] != "none", made.criterion["kr"] != "none") == (has_cp3, has_cp3)
    assert made.criterion["base"] == {"cp3": "chip", "cp3_corr": "chip"}.get(name, name.split("_")[0])
    assert (made.flops_cut, made.rate, made.split) == (0.578, None, "train")


@pytest.mark.parametrize("name", DATA)
def test_data_are_built_from_every_argument_and_take_the_seed_of_the_run(composed, name):
    config = composed("train", f"data={name}", "seed=7")
    made = build(config.data, "data")
    assert type(made) is getattr(data_file, DATA[name])
    assert made.seed == 7
    kinds = [kind for kind in (type(made), PublishedObjects, ObjectData, PointData) if isinstance(made, kind)]
    assert set(config.data) - {"_target_", "_convert_"} == arguments_of(*kinds)
    assert set(config.data.augment) <= set(AUGMENTATIONS)


@pytest.mark.slow
def test_data_and_networks_of_an_experiment_fit(composed):
    for name in stems("experiment"):
        config = composed("train", f"experiment={name}")
        made = build(config.data, "data")
        assert config.model.net.num_classes == made.num_classes, name
        assert config.model.net.get("in_channels", 4) == made.in_channels, name
        assert (config.model.net.name == "pointnext_seg") == (made.task != "classification"), name
        assert config.model.net.get("num_shapes", 0) == (16 if made.task == "parts" else 0), name
        # what is pruned needs weights: the shipped ones, or those that the command names
        asked = "model.init_from=<dense>" in (FOLDER / "configs" / "experiment" / f"{name}.yaml").read_text()
        assert (config.model.prune is not None) >= asked, name
        assert (asked or config.model.init_from is not None) >= (config.model.prune is not None), name


@pytest.mark.slow
def test_arms_of_the_claims_are_built_and_differ(composed):
    claims = [claim for claim in CARD["claims"] if "arms" in claim]
    assert len(claims) >= 3
    for claim in claims:
        known = []
        for name, overrides in claim["arms"].items():
            config = composed("train", *CARD["base"], *overrides)
            with torch.device("meta"):
                build(config.model, "model")
            assert config.model.prune.criterion.seed == config.seed
            assert (list(config.beside), list(config.tested)) == ([], ["last"])
            assert config.model not in known, f"{claim['id']}: {name}"
            known.append(config.model)
        assert composed("train", *CARD["base"], "seed=3").model.prune.criterion.seed == 3


def recipe(config):
    model = config.model
    return {
        "lr": model.optimizer.lr, "decay": model.optimizer.weight_decay, "batch": config.data.batch_size,
        "epochs": config.trainer.max_epochs, "cosine": model.scheduler.epochs, "min_lr": model.scheduler.min_lr,
        "clip": config.trainer.gradient_clip_val, "smoothing": model.smoothing,
    }  # fmt: skip


SCAN = {
    "lr": 2e-3,
    "decay": 0.05,
    "batch": 32,
    "epochs": 250,
    "cosine": 200,
    "min_lr": 1e-4,
    "clip": 10,
    "smoothing": 0.3,
}
MODELNET = {**SCAN, "lr": 1e-3, "epochs": 600, "cosine": None, "clip": 1, "smoothing": 0.2}
S3DIS = {"lr": 0.01, "decay": 1e-4, "epochs": 100, "clip": 10}
RECIPES = {
    "scanobjectnn_pointnext_s": SCAN, "scanobjectnn_pointnet2": SCAN, "modelnet40_pointnext_s": MODELNET,
    "modelnet40_pointnet2": {**MODELNET, "epochs": 250}, "s3dis_pointnext_s": S3DIS, "s3dis_pointnext_b": S3DIS,
    "s3dis_pointnext_l": S3DIS, "s3dis_pointnext_xl": S3DIS,
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_dense_networks_are_pointnexts(composed, name):
    config = composed("train", f"experiment={name}")
    found = recipe(config)
    assert {key: found[key] for key in RECIPES[name]} == RECIPES[name]
    assert config.model.prune is None
    augment = config.data.augment
    if name.startswith("scanobjectnn"):
        assert (augment.scale, augment.center) == ([0.9, 1.1], "unit_sphere")
        assert augment.rotation == pytest.approx(math.pi)
        assert (config.data.num_points, config.data.resample, config.data.test_points) == (1024, "first", "furthest")
        assert (config.data.variant, config.data.background) == ("pb_t50_rs", True)
    if name.startswith("modelnet40"):
        assert (augment.scale, augment.shift) == (pytest.approx([2 / 3, 3 / 2]), 0.2)
        assert (config.data.features, config.data.num_points) == ("xyz", 1024)
    if name.startswith("s3dis"):
        assert (config.data.voxel_size, config.data.num_points, config.data.loop) == (0.04, 24000, 30)
        assert (list(config.data.train_areas), list(config.data.test_areas)) == ([1, 2, 3, 4, 6], [5])


@pytest.mark.parametrize(("name", "rate", "base", "enhanced"), [
    ("scanobjectnn_pointnext_s_cp3", 0.35, "chip", True), ("scanobjectnn_pointnext_s_chip", 0.35, "chip", False),
    ("scanobjectnn_pointnext_s_hrank", 0.68, "hrank", False), ("scanobjectnn_pointnet2_cp3", 0.52, "chip", True),
    ("scanobjectnn_pointnext_s_hrank_cp3", 0.69, "hrank", True),
])  # fmt: skip
def test_recipes_of_pruned_networks_are_the_released_ones(composed, name, rate, base, enhanced):
    config = composed("train", f"experiment={name}")
    assert recipe(config) == {**SCAN, "min_lr": 2e-6}
    prune = config.model.prune
    assert (prune.rate, prune.flops_cut, prune.criterion.base, prune.steps) == (rate, None, base, 1)
    assert (prune.criterion.ce != "none", prune.criterion.kr != "none") == (enhanced, enhanced)


def test_evaluation_does_by_default_as_training_does(composed):
    training, evaluation = composed("train"), composed("evaluate")
    assert (evaluation.data, evaluation.trainer) == (training.data, training.trainer)
    clean, hard = composed("train", "data=procshape_clean").data, training.data
    assert clean.level == "clean"
    clean.level = hard.level
    assert clean == hard


def test_programs_of_the_claims_use_the_scans_of_the_default_run(composed):
    from projects.cp3.one_shot import scans

    made, config = scans(30, 10, "cache"), composed("train").data
    assert made.difficulty == config.difficulty
    assert (made.num_points, made.stored_points, made.level) == (config.num_points, config.stored_points, config.level)
    assert (made.resample, made.test_points, made.features) == (config.resample, config.test_points, config.features)


def test_shipped_weights_are_those_that_the_files_name(composed):
    config = composed("train")
    path = FOLDER.parents[1] / config.model.init_from
    assert path.is_file()
    net = load_published(path)
    with torch.device("meta"):
        wanted = build_network(OmegaConf.to_container(config.model.net))
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in wanted.state_dict().items()}
    assert (FOLDER / "weights" / f"{composed('predict').weights}.safetensors").is_file()
    assert composed("train", "experiment=smoke").model.init_from == config.model.init_from


def test_mistyped_keys_stop_at_composition_or_construction(composed):
    for override in ("sede=1", "seed=two", "besides=[]", "model.prune.rat=0.2", "model.optimizer.ll=1", "prune=cp"):
        with pytest.raises(ConfigCompositionException):
            composed("train", override)
    for override in ("model=pointnext_s", "nets=3", "topp=1"):
        with pytest.raises(ConfigCompositionException):
            composed("evaluate", override)
    for override in ("top=many", "num_points=half", "pictures=perhaps"):
        with pytest.raises(ConfigCompositionException):
            composed("predict", override)
    with pytest.raises(InputError, match="rat"):
        module(composed, "+model.prune.rat=0.2")
    with pytest.raises(InputError, match="cee"):
        module(composed, "+model.prune.criterion.cee=corr")
    with pytest.raises(InputError, match="widht"):
        module(composed, "+model.net.widht=8")
    with pytest.raises(InputError, match="levle"):
        build(composed("train", "+data.levle=hard").data, "data")


def test_hyperparameters_are_plain_so_that_the_checkpoint_loads_safely(composed, tmp_path):
    torch.save(dict(module(composed).hparams), tmp_path / "hparams.pt")
    found = torch.load(tmp_path / "hparams.pt", weights_only=True)
    assert (found["net"]["name"], found["prune"]["criterion"]["base"]) == ("pointnext", "chip")
    assert save_network.__doc__
