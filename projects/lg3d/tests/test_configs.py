"""Every configuration composes, keeps what its files say, and builds what it names."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from projects.lg3d import data as data_file
from projects.lg3d.checkpoints import read_network
from projects.lg3d.data import Augmentation, FolderScenes, SceneData
from projects.lg3d.detection import Postprocessing
from projects.lg3d.guidance import Guidance
from projects.lg3d.layouts import SCANNET_CLASSES, SCANNET_MEAN_SIZES, SUNRGBD_CLASSES, SUNRGBD_MEAN_SIZES
from projects.lg3d.model import Backbone, VoteHead, build_network
from projects.lg3d.module import GUIDANCE_LOSSES, NORM_MOMENTUM, PointDetector, build_guidance
from shared.errors import InputError
from shared.experiment import build
from shared.io.procroom import load_cached
from shared.testing.project import ConfigPromises

FOLDER = Path(__file__).parents[1]
ROOT = FOLDER.parents[1]
CARD = yaml.safe_load((FOLDER / "paper.yaml").read_text(encoding="utf-8"))
DATA = {"procroom": "ProcRoom", "procroom_scan": "ProcRoom", "sunrgbd": "SunRGBD", "scannet": "ScanNet"}
HEAD = {"procroom": "sunrgbd", "procroom_scan": "procroom_scan", "sunrgbd": "sunrgbd", "scannet": "scannet"}


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


class TestConfigurations(ConfigPromises):
    project = "lg3d"
    extra_groups = ("guidance", "head")

    def test_every_experiment_composes_keeps_its_leaves_and_builds(self, composed, tmp_path):
        with torch.device("meta"):  # networks of the published size, without the numbers in them
            super().test_every_experiment_composes_keeps_its_leaves_and_builds(composed, tmp_path)

    @pytest.mark.slow
    def test_every_choice_of_a_group_composes(self, composed):
        super().test_every_choice_of_a_group_composes(composed)


def test_tables_of_code_and_test_are_the_same():
    assert stems("data") == sorted(DATA)
    assert stems("head") == sorted({*HEAD.values()})


# --- Networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in stems("model") if name != "recipe"])
def test_each_model_says_every_argument(composed, name):
    config = composed("train", f"model={name}").model
    made = module(composed, f"model={name}", "guidance=none")
    assert set(config) - {"_target_", "_recursive_", "_convert_"} == arguments_of(PointDetector)
    # how the original's kernels sampled is of its own files alone
    assert set(config.net.backbone) == arguments_of(Backbone) - {"skip_origin"}
    assert set(config.net.head) == arguments_of(VoteHead) - {"skip_origin", "channels"}
    assert set(config.postprocessing) == arguments_of(Postprocessing)
    assert made.guidance is None
    assert made.how == Postprocessing()


def test_networks_of_the_published_size_have_the_published_number_of_parameters(composed):
    counts = CARD["network"]["parameters"]
    for head in ("sunrgbd", "scannet"):
        net = module(composed, "model=votenet", f"head={head}", "guidance=none").net
        assert sum(p.numel() for p in net.parameters()) == counts[f"votenet_{head}"]
        assert sum(p.numel() for p in net.backbone.parameters()) == counts["backbone"]
    assert counts == {"votenet_scannet": 953_828, "votenet_sunrgbd": 951_506, "backbone": 641_920}


@pytest.mark.parametrize(("name", "sizes", "classes", "num_headings"), [
    ("sunrgbd", SUNRGBD_MEAN_SIZES, SUNRGBD_CLASSES, 12), ("scannet", SCANNET_MEAN_SIZES, SCANNET_CLASSES, 1),
])  # fmt: skip
def test_heads_of_published_sets_have_their_mean_sizes(composed, name, sizes, classes, num_headings):
    head = composed("train", f"head={name}").model.net.head
    np.testing.assert_array_equal(np.array(head.mean_sizes, np.float32), sizes)
    assert head.num_headings == num_headings
    assert classes_of(name) == list(classes)


def classes_of(head):
    """What the comments of a head's file call its sizes."""
    lines = (FOLDER / "configs" / "head" / f"{head}.yaml").read_text().splitlines()
    return [line.split("# ")[1] for line in lines if line.lstrip().startswith("- [")]


@pytest.mark.slow
def test_mean_sizes_of_rooms_seen_from_several_places_are_those_of_the_training(composed):
    config = composed("train", "data=procroom_scan", "head=procroom_scan")
    data = config.data
    rooms = load_cached(ROOT / data.cache_dir, data.num_train, data.mode, data.stored_points, data.data_seed, "train")
    sizes = [rooms["boxes"][rooms["labels"] == label][:, 3:6].mean(0) for label in range(10)]
    np.testing.assert_allclose(config.model.net.head.mean_sizes, sizes, atol=0.0051)
    assert classes_of("procroom_scan") == list(SUNRGBD_CLASSES)


def test_shipped_weights_are_those_that_the_files_name(composed):
    config = composed("train")
    wanted = build_network(OmegaConf.to_container(config.model.net)).state_dict()
    arguments, state = read_network(ROOT / config.model.init_from)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in wanted.items()}
    assert arguments == OmegaConf.to_container(config.model.net)
    smoke = composed("train", "experiment=smoke")
    for given in (config, smoke):
        assert given.model.guidance.teacher == given.teacher
        arguments, _ = read_network(ROOT / given.teacher)
        assert arguments["backbone"] == OmegaConf.to_container(given.model.net.backbone)
    assert smoke.model.init_from == smoke.teacher
    assert (FOLDER / "weights" / f"{composed('predict').weights}.safetensors").is_file()


# --- Guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", stems("guidance"))
def test_each_form_of_guidance_says_every_option(composed, name):
    config = composed("train", f"guidance={name}", *([] if name == "none" else ["teacher=other.pth"]))
    if name == "none":
        assert config.model.guidance is config.teacher is None
        return
    assert config.model.guidance.teacher == "other.pth"  # it is named in one place
    options = config.model.guidance
    assert set(options) == {*GUIDANCE_LOSSES} | arguments_of(Guidance) - {"backbone", "head"}
    net = build_network(OmegaConf.to_container(config.model.net))
    made = build_guidance(net, OmegaConf.to_container(options, resolve=True))
    labels = {"imitation": (False, False), "points": (True, False), "annotations": (False, True)}
    assert (made.points, made.annotations) == labels.get(name, (True, True))
    assert made.released == (name == "released")
    if made.released:
        assert made.mapper is made.inducer
    assert (options.detection_weight > 0) == (name != "imitation")
    assert (options.imitation_weight, options.jitter) == (1.0, 0.0)
    # slips of the released code are of that form alone
    slips = (made.is_tiled, made.pad, made.frozen_norms, made.head_norms)
    expected = (True, "zero", "train", "shared") if name == "released" else (False, "wrap", "eval", "separate")
    assert slips == expected


@pytest.mark.slow
def test_arms_of_the_claims_are_built_and_differ(composed):
    claims = [claim for claim in CARD["claims"] if "arms" in claim]
    assert len(claims) >= 3
    for claim in claims:
        known = []
        assert claim["control"] in claim["arms"]
        for name, overrides in claim["arms"].items():
            config = composed("train", *CARD["base"], *overrides)
            with torch.device("meta"):
                build(config.model, "model")
            assert (list(config.beside), list(config.tested)) == ([], ["last"])
            assert (config.model, config.trainer) not in known, f"{claim['id']}: {name}"
            known.append((config.model, config.trainer))


# --- Data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA)
def test_data_are_built_from_every_argument_and_take_the_seed_of_the_run(composed, name):
    config = composed("train", f"data={name}", "seed=7")
    made = build(config.data, "data")
    assert type(made) is getattr(data_file, DATA[name])
    assert (made.seed, made.test_seed) == (7, 0)
    kinds = [kind for kind in (type(made), FolderScenes, SceneData) if isinstance(made, kind)]
    assert set(config.data) - {"_target_", "_convert_"} == arguments_of(*kinds)
    head = composed("train", f"head={HEAD[name]}").model.net.head
    assert (len(made.class_names), made.num_headings) == (len(head.mean_sizes), head.num_headings)
    sun = Augmentation(flip_x=True, rotation=30, scale=[0.85, 1.15])
    scan = Augmentation(flip_x=True, flip_y=True, rotation=5, scale=made.augmentation.scale)
    assert made.augmentation == (sun if made.num_headings == 12 else scan)
    assert tuple(made.augmentation.scale) == ((0.85, 1.15) if made.num_headings == 12 else (1, 1))


@pytest.mark.slow
def test_data_and_networks_of_an_experiment_fit(composed):
    for name in stems("experiment"):
        config = composed("train", f"experiment={name}")
        data, head = build(config.data, "data"), config.model.net.head
        assert (len(data.class_names), data.num_headings) == (len(head.mean_sizes), head.num_headings), name
        assert data.num_points >= config.model.net.backbone.num_points[0], name
        assert list(config.tested) == ["last"] or config.callbacks.checkpoint.monitor == "val/map_25", name
        asked = "teacher=<file>" in (FOLDER / "configs" / "experiment" / f"{name}.yaml").read_text()
        # a guided training names its teacher, or its command does
        if config.model.guidance is not None and name != "claims_gpu":
            assert (config.teacher is None) == asked, name


# --- Recipes ----------------------------------------------------------------------------------------------------------


def recipe(config):
    model = config.model
    return {
        "lr": model.optimizer.lr, "decay": model.optimizer.weight_decay, "kind": model.optimizer.name,
        "epochs": config.trainer.max_epochs, "steps": list(model.scheduler.milestones), "gamma": model.scheduler.gamma,
        "clip": config.trainer.gradient_clip_val, "batch": config.data.batch_size, "loop": config.data.loop,
        "points": config.data.num_points, "guided": model.guidance is not None,
    }  # fmt: skip


MMDET = {
    "lr": 8e-3, "decay": 0.01, "kind": "adamw", "epochs": 36, "steps": [24, 32], "gamma": 0.1, "clip": 10, "batch": 8,
    "loop": 5, "points": 40000, "guided": False,
}  # fmt: skip
LG3D = {**MMDET, "lr": 4e-3, "epochs": 72, "steps": [48, 64], "guided": True}
ORIGINAL = {
    **MMDET, "lr": 1e-3, "decay": 0, "kind": "adam", "epochs": 180, "steps": [80, 120, 160], "clip": None, "loop": 1,
}  # fmt: skip
SUN = {"points": 20000, "batch": 16}
RECIPES = {
    "scannet_votenet": MMDET, "scannet_votenet_lg3d": LG3D, "scannet_votenet_original": ORIGINAL,
    "sunrgbd_votenet": {**MMDET, **SUN}, "sunrgbd_votenet_lg3d": {**LG3D, **SUN},
    "sunrgbd_votenet_original": {**ORIGINAL, "points": 20000},
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(composed, name):
    config = composed("train", f"experiment={name}")
    assert recipe(config) == RECIPES[name]
    assert config.data.test_rounds >= 3  # the points of a test are drawn
    assert config.model.init_from is None
    how = config.model.norm_momentum
    if name.endswith("original"):
        assert dict(how) == dict(zip(NORM_MOMENTUM, (0.5, 0.5, 20, 0.001), strict=True))
    else:
        assert how is None
    net = config.model.net
    assert net.head.num_proposals == 256
    assert list(net.backbone.radii) == [0.2, 0.4, 0.8, 1.2]
    assert config.trainer.max_epochs % config.trainer.check_val_every_n_epoch == 0


def test_start_is_the_teachers_training_cut_short(composed):
    teacher, start = composed("train", "experiment=teacher"), composed("train", "experiment=start")
    assert start.trainer.max_epochs < min(teacher.model.scheduler.milestones)
    start.trainer.max_epochs, start.tested = teacher.trainer.max_epochs, teacher.tested
    assert start == teacher
    assert teacher.model.init_from is None


# --- What the user got wrong ------------------------------------------------------------------------------------------


def test_evaluation_does_by_default_as_training_does(composed):
    training, evaluation = composed("train"), composed("evaluate")
    assert evaluation.data == training.data
    assert evaluation.trainer == training.trainer
    assert evaluation.net is None


@pytest.mark.parametrize(("entry", "override"), [
    ("train", "seed=two"), ("train", "besides=[]"), ("train", "beside=null"), ("train", "model.guidance.varient=paper"),
    ("train", "head=kitti"), ("evaluate", "model=votenet"), ("evaluate", "teacher=a"),
])  # fmt: skip
def test_mistyped_keys_stop_at_composition(composed, entry, override):
    with pytest.raises(ConfigCompositionException):
        composed(entry, override)


@pytest.mark.parametrize(("override", "name"), [
    ("+model.guidance.varient=paper", "varient"), ("+model.net.head.widht=8", "widht"), ("+model.guide=1", "guide"),
])  # fmt: skip
def test_mistyped_keys_stop_at_construction(composed, override, name):
    with pytest.raises(InputError, match=name):
        module(composed, override)


def test_mistyped_keys_of_data_stop_at_construction(composed):
    for override, name in (("+data.levle=hard", "levle"), ("+data.augment.turn=3", "turn")):
        with pytest.raises(InputError, match=name):
            build(composed("train", override).data, "data")


def test_hyperparameters_are_plain_so_that_the_checkpoint_loads_safely(composed, tmp_path):
    torch.save(dict(module(composed).hparams), tmp_path / "hparams.pt")
    found = torch.load(tmp_path / "hparams.pt", weights_only=True)
    assert (found["net"]["name"], found["guidance"]["variant"]) == ("votenet", "paper")
