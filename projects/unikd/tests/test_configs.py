"""Every configuration composes, keeps what its files say, and builds what it names."""

from pathlib import Path

import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from projects.unikd.distill import METHODS, Pair
from projects.unikd.networks import build_network
from projects.unikd.taps import tap_shapes
from shared.errors import InputError
from shared.experiment import build
from shared.testing.project import ConfigPromises

CONFIGS = Path(__file__).parents[1] / "configs"
# parameters of 100 classes, of the ImageNet networks of 1000
COUNTS = {
    "resnet20": 278_324, "resnet32": 472_756, "resnet56": 861_620, "resnet110": 1_736_564, "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860, "wrn_16_2": 703_284, "wrn_40_1": 569_780, "wrn_40_2": 2_255_156, "vgg8": 3_965_028,
    "vgg13": 9_462_180, "MobileNetV2": 812_836, "ShuffleV1": 949_258, "ShuffleV2": 1_355_528, "ResNet50": 23_705_252,
    "imagenet_resnet18": 11_689_512, "imagenet_resnet34": 21_797_672, "imagenet_resnet50": 25_557_032,
    "MobileNetV1": 4_231_976, "teacher": 278_324,
}  # fmt: skip
# teacher and student: learning rate, beta of DKD, top-1 of KD, ReviewKD and DKD
PAIRS = {
    "resnet56_resnet20": (0.05, 2, 70.66, 71.89, 71.97), "resnet110_resnet32": (0.05, 2, 73.08, 73.89, 74.11),
    "resnet32x4_resnet8x4": (0.05, 8, 73.33, 75.63, 76.32), "wrn_40_2_wrn_16_2": (0.05, 6, 74.92, 76.12, 76.23),
    "wrn_40_2_wrn_40_1": (0.05, 6, 73.54, 75.09, 74.81), "vgg13_vgg8": (0.05, 6, 72.98, 74.84, 74.68),
    "vgg13_MobileNetV2": (0.01, 6, 67.37, 70.37, 69.71), "ResNet50_MobileNetV2": (0.01, 8, 67.35, 69.89, 70.35),
    "resnet32x4_ShuffleV1": (0.01, 8, 74.07, 77.45, 76.45), "resnet32x4_ShuffleV2": (0.01, 8, 74.45, 77.78, 77.07),
    "wrn_40_2_ShuffleV1": (0.01, 8, 74.83, 77.14, 76.70),
}  # fmt: skip
IMAGENET = {"resnet34_resnet18": ("resnet34", "imagenet_resnet18"), "resnet50_MobileNetV1": ("resnet50", "MobileNetV1")}
EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))


class TestConfigurations(ConfigPromises):
    project = "unikd"
    extra_groups = ("distill",)


@pytest.mark.parametrize("name", COUNTS)
def test_networks_have_the_published_parameters(name):
    content = OmegaConf.load(CONFIGS / "model" / f"{name}.yaml")
    content.num_classes = 1000 if name.startswith("imagenet") or name == "MobileNetV1" else 100
    with torch.device("meta"):
        net = build_network(OmegaConf.to_container(content.net, resolve=True))
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]


def test_every_network_but_the_small_students_is_counted():
    files = {file.stem for file in (CONFIGS / "model").glob("*.yaml")}
    assert files - {"recipe", "student", "shuffle_small"} == set(COUNTS)


def assert_recipe(config, lr, weight_decay, milestones, epochs, batch_size):
    assert config.model.optimizer == {"lr": lr, "momentum": 0.9, "weight_decay": weight_decay}
    assert config.model.scheduler == {"milestones": milestones, "gamma": 0.1}
    assert (config.trainer.max_epochs, config.data.batch_size) == (epochs, batch_size)
    assert config.model.distill.ce_weight == 1


@pytest.mark.parametrize("pair", PAIRS)
def test_recipe_of_cifar_is_crds_with_the_pairs_rate_and_beta(composed, pair):
    lr, beta, *reference = PAIRS[pair]
    config = composed("train", f"experiment=cifar100_{pair}")
    assert_recipe(config, lr, 5e-4, [150, 180, 210], 240, 64)
    assert (config.data.augment, config.data.num_validation, config.num_classes) == ("crop_flip", 0, 100)
    assert config.data.mean == [0.5071, 0.4867, 0.4408]
    assert config.data.std == [0.2675, 0.2565, 0.2761]
    distill = config.model.distill
    assert pair == f"{Path(distill.teacher).parent.name.removesuffix('_vanilla')}_{config.model.net.name}"
    assert distill.methods.dkd == {"alpha": 1, "beta": beta, "temperature": 4, "warmup_epochs": 20}
    unikd = distill.methods.unikd
    assert (unikd.feat_weight, unikd.supp_weight, unikd.warmup_epochs, unikd.temperature) == (1, 1, 0, 1)
    assert (distill.methods.kd, distill.preact) == (None, False)
    header = (CONFIGS / "experiment" / f"cifar100_{pair}.yaml").read_text()
    for method, value in zip(("KD", "ReviewKD", "DKD"), reference, strict=True):
        assert f" {method} {value:.2f}".removesuffix("0") in header


def test_every_pair_has_an_experiment_and_every_experiment_of_cifar_a_pair():
    others = {"cifar100", "cifar100_teacher", "cifar100_mlkd_resnet32x4_resnet8x4"}
    assert {name for name in EXPERIMENTS if name.startswith("cifar100")} - others == {f"cifar100_{p}" for p in PAIRS}


def test_recipe_of_the_longest_runs_is_the_first_authors(composed):
    config = composed("train", "experiment=cifar100_mlkd_resnet32x4_resnet8x4")
    assert_recipe(config, 0.025, 5e-4, [150, 180, 210], 480, 64)
    methods = config.model.distill.methods
    assert methods.mlkd == {"weight": 1, "temperatures": [2, 3, 4, 5, 6]}
    assert methods.kd is None
    assert "dkd" not in methods


@pytest.mark.parametrize("method", ["alone", "kd", "review_dkd"])
@pytest.mark.parametrize("experiment", ["cifar100_vgg13_vgg8", "imagenet_resnet34_resnet18"])
def test_methods_are_interchangeable_at_every_pair(composed, experiment, method):
    config = composed("train", f"experiment={experiment}", f"distill={method}")
    build(config.model, "model")
    teacher = {"cifar100_vgg13_vgg8": "vgg13_vanilla", "imagenet_resnet34_resnet18": "resnet34"}[experiment]
    assert teacher in config.model.distill.teacher


@pytest.mark.parametrize("pair", IMAGENET)
def test_recipe_of_imagenet(composed, pair):
    teacher, student = IMAGENET[pair]
    config = composed("train", f"experiment=imagenet_{pair}")
    assert_recipe(config, 0.1, 1e-4, [30, 60, 90], 100, 256)
    assert (config.data.image_size, config.data.resize, config.num_classes) == (224, 256, 1000)
    assert config.model.net.name == student
    distill = config.model.distill
    assert distill.teacher.split("-")[0] == teacher
    assert distill.preact
    assert distill.methods.dkd == {"alpha": 1, "beta": 0.5, "temperature": 1, "warmup_epochs": 1}
    assert (distill.methods.unikd.temperature, distill.methods.unikd.warmup_epochs) == (1, 0)


def test_student_and_kd_are_those_of_the_tables(composed):
    kd = composed("train", "experiment=cifar100_teacher", "model=resnet8x4", "distill=kd")
    assert kd.model.distill.ce_weight == 0.1
    assert kd.model.distill.methods == {"kd": {"weight": 0.9, "temperature": 4}}
    alone = composed("train", "experiment=cifar100_teacher", "model=resnet8x4")
    assert alone.model.distill is None
    for name, methods in {
        "fitnet": {"fitnet": {"weight": 100, "hint": 2}}, "at": {"at": {"weight": 1000}},
        "fitnet_kd": {"kd": {"weight": 1, "temperature": 4}, "fitnet": {"weight": 100, "hint": 2}},
    }.items():  # fmt: skip
        distill = composed("train", f"distill={name}").model.distill
        assert (distill.ce_weight, distill.methods) == (1, methods)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_methods_of_an_experiment_fit_its_pair_and_its_recipe_the_optimiser(composed, name):
    config = composed("train", f"experiment={name}")
    with torch.device("meta"):
        module = build(config.model, "model")
    torch.optim.SGD(module.parameters(), **module.hparams.optimizer)
    assert set(module.hparams.scheduler) == {"milestones", "gamma"}
    distill = module.hparams.distill
    if not distill or "weights/teacher" in distill["teacher"]:
        return
    stated = Path(distill["teacher"])
    of_imagenet = name.startswith("imagenet")
    teacher = f"imagenet_{stated.name.split('-')[0]}" if of_imagenet else stated.parent.name.removesuffix("_vanilla")
    size = 224 if of_imagenet else 32
    with torch.device("meta"):
        networks = [build_network(module.hparams.net), build_network({"name": teacher, "num_classes": 100})]
        pair = Pair(*(tap_shapes(net, size) for net in networks), 100, distill["preact"])
        for method, options in distill["methods"].items():
            if options is not None:
                METHODS[method](pair, **options)


@pytest.mark.parametrize("name", ["shapes", "digits"])
def test_shipped_teachers_are_where_the_configurations_say(composed, name):
    teacher = composed("train", f"data={name}").model.distill.teacher
    assert teacher == f"projects/unikd/weights/teacher_{name}.safetensors"
    assert (CONFIGS.parents[2] / teacher).is_file()


def test_mistyped_keys_stop_at_composition_or_construction(composed):
    for override in ("sede=1", "num_classes=two", "tested=best", "model.optimizer.lrr=1", "model.distill.teachr=a"):
        with pytest.raises(ConfigCompositionException):
            composed("train", override)
    for path, message in (
        ("model.net.widht", "takes no 'widht'"), ("model.distill.teachr", "'teachr'"),
        ("model.distill.methods.kd.tau", r"methods\.kd: .*'tau'"), ("model.distill.methods.kdd", "method 'kdd'"),
        ("model.cosine_evry", "cosine_evry"), ("data.batchsize", "batchsize"), ("data.knobs.noize", "noize"),
    ):  # fmt: skip
        config = composed("train")
        OmegaConf.update(config, path, 1, force_add=True)
        node = path.split(".")[0]
        with pytest.raises(InputError, match=message):
            build(config[node], node)


def test_hyperparameters_are_plain_so_that_the_checkpoint_loads_safely(composed, tmp_path):
    module = build(composed("train").model, "model")
    torch.save(dict(module.hparams), tmp_path / "hparams.pt")
    found = torch.load(tmp_path / "hparams.pt", weights_only=True)
    assert found["net"] == {"name": "resnet8", "num_classes": 100, "filters": [8, 8, 16, 32]}
    assert found["distill"]["methods"]["unikd"]["feature_loss"] == "sampled_kl"
