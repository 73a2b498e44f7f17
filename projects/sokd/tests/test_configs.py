"""Every configuration composes, keeps what its files say, and builds what it names."""

from inspect import signature
from pathlib import Path

import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from projects.sokd.dam import DAM
from projects.sokd.hosts import HOSTS, Pair, build_host
from projects.sokd.networks import build_network
from projects.sokd.operations import OPERATIONS
from projects.sokd.policy import Policy
from projects.sokd.search import hypergradient
from projects.sokd.student_oriented import StudentOriented
from projects.sokd.taps import tap_shapes
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
    "teacher": 278_324,
}  # fmt: skip
# teacher and student: learning rate, epochs of the search of 240, hint, weight of both terms of DAM, top-1 of FitNet
PAIRS = {
    "resnet56_resnet20": (0.05, 20, 2, 1000, "69.21"), "resnet110_resnet32": (0.05, 20, 2, 1000, "71.06"),
    "resnet32x4_resnet8x4": (0.05, 50, 2, 1000, "73.50"), "wrn_40_2_wrn_16_2": (0.05, 20, 2, 1000, "73.58"),
    "wrn_40_2_wrn_40_1": (0.05, 20, 2, 1000, "72.24"), "vgg13_vgg8": (0.05, 10, 3, 1, "71.02"),
    "vgg13_MobileNetV2": (0.01, 20, 3, 1, "64.14"), "ResNet50_MobileNetV2": (0.01, 20, 3, 1, "63.16"),
    "resnet32x4_ShuffleV1": (0.01, 20, 3, 1, "73.59"), "resnet32x4_ShuffleV2": (0.01, 20, 3, 1, "73.54"),
    "wrn_40_2_ShuffleV1": (0.01, 20, 3, 1, "73.73"),
}  # fmt: skip
EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))


class TestConfigurations(ConfigPromises):
    project = "sokd"
    extra_groups = ("host", "plugin", "distill")


@pytest.mark.parametrize("name", COUNTS)
def test_networks_have_the_published_parameters(name):
    content = OmegaConf.load(CONFIGS / "model" / f"{name}.yaml")
    content.num_classes = 1000 if name.startswith("imagenet") else 100
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
    assert (config.model.distill.ce_weight, config.without) == (1, False)


def assert_published_search(plugin):
    assert (plugin.dafa.ops, plugin.dafa.num_sub_policies) == (list(OPERATIONS), None)
    assert (plugin.dafa.lr, plugin.dafa.betas, plugin.dafa.weight_decay) == (3e-4, [0.5, 0.999], 1e-3)
    assert (plugin.dafa.temperature, plugin.dafa.probability, plugin.dafa.magnitude) == (0.5, 0.5, 0.5)
    assert (plugin.search.eta, plugin.search.weight_decay) == (0.01, 1e-4)
    assert (plugin.dam.areas, plugin.dam.kernel, plugin.heat_weight, plugin.dafa.rescale) == (8, 3, 0, False)


@pytest.mark.parametrize("pair", PAIRS)
def test_recipe_of_cifar_is_crds_and_the_search_the_published_one(composed, pair):
    lr, search_epochs, hint, weight, fitnet = PAIRS[pair]
    config = composed("train", f"experiment=cifar100_{pair}")
    assert_recipe(config, lr, 5e-4, [150, 180, 210], 240, 64)
    assert round(240 * config.model.search_share) == search_epochs
    distill = config.model.distill
    assert pair == f"{Path(distill.teacher).parent.name.removesuffix('_vanilla')}_{config.model.net.name}"
    assert distill.host == {"name": "fitnet", "weight": 100, "hint": hint, "depth": 3, "final_relu": True}
    assert_published_search(distill.plugin)
    weights = [distill.plugin[f"{name}_weight"] for name in ("host", "area", "consistency")]
    assert weights == [0 if weight == 1000 else 1, weight, weight]
    header = (CONFIGS / "experiment" / f"cifar100_{pair}.yaml").read_text()
    assert f"FitNet alone {fitnet}" in header


def test_every_pair_has_an_experiment_and_every_experiment_of_cifar_a_pair():
    others = {"cifar100", "cifar100_teacher", "cifar100_reviewkd_resnet56_resnet20"}
    assert {name for name in EXPERIMENTS if name.startswith("cifar100")} - others == {f"cifar100_{p}" for p in PAIRS}


@pytest.mark.parametrize("host", [name for name in HOSTS if name != "crd"])
@pytest.mark.parametrize("experiment", ["cifar100_vgg13_vgg8", "imagenet_resnet34_resnet18"])
def test_hosts_are_interchangeable_at_every_pair(composed, experiment, host):
    config = composed("train", f"experiment={experiment}", f"host={host}", "plugin=cifar")
    build(config.model, "model")
    teacher = {"cifar100_vgg13_vgg8": "vgg13_vanilla", "imagenet_resnet34_resnet18": "resnet34"}[experiment]
    assert teacher in config.model.distill.teacher


def test_recipe_of_imagenet(composed):
    config = composed("train", "experiment=imagenet_resnet34_resnet18")
    assert_recipe(config, 0.1, 1e-4, [30, 60, 90], 100, 256)
    assert (config.data.image_size, config.data.resize, config.num_classes) == (224, 256, 1000)
    distill = config.model.distill
    assert (distill.host, distill.preact) == ({"name": "reviewkd", "weight": 1, "warmup_epochs": 1}, True)
    assert round(100 * config.model.search_share) == 5
    assert_published_search(distill.plugin)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_plug_in_of_an_experiment_fits_its_pair_and_its_recipe_the_optimiser(composed, name):
    config = composed("train", f"experiment={name}")
    with torch.device("meta"):
        module = build(config.model, "model")
    torch.optim.SGD(module.parameters(), **module.hparams.optimizer)
    assert set(module.hparams.scheduler) == {"milestones", "gamma"}
    distill = module.hparams.distill
    if not distill or "weights/teacher" in distill["teacher"]:
        return
    stated, of_imagenet = Path(distill["teacher"]), name.startswith("imagenet")
    teacher = f"imagenet_{stated.name.split('-')[0]}" if of_imagenet else stated.parent.name.removesuffix("_vanilla")
    with torch.device("meta"):
        networks = [build_network(module.hparams.net), build_network({"name": teacher, "num_classes": 100})]
        pair = Pair(*(tap_shapes(net, 224 if of_imagenet else 32) for net in networks), preact=distill["preact"])
    plugin = dict(distill["plugin"])
    plugin["dam"] = {"heat_channels": 100, **plugin["dam"]}
    host = build_host(distill["host"], pair)
    oriented = StudentOriented(host, pair, torch.nn.Identity(), **plugin)
    assert oriented.shares_adapter == (host.adapter is not None)


def test_code_has_no_other_defaults_than_the_published_ones_the_experiments_state(composed):
    plugin = composed("train", "experiment=cifar100").model.distill.plugin
    for part, function in (("dafa", Policy), ("dam", DAM), ("search", hypergradient)):
        defaults = {key: p.default for key, p in signature(function).parameters.items() if p.default is not p.empty}
        for key, value in plugin[part].items():
            if key not in ("seed", "nonnegative"):  # the run's own, and what depends on the tap
                stated = list(defaults[key]) if isinstance(defaults[key], tuple) else defaults[key]
                assert stated == value, f"{part}.{key}"
    assert set(plugin) == set(signature(StudentOriented).parameters) - {"host", "pair", "teacher", "head", "reads"}


@pytest.mark.parametrize("name", ["shapes", "digits", "animals"])
def test_shipped_teachers_are_where_the_configurations_say(composed, name):
    teacher = composed("train", f"data={name}").model.distill.teacher
    assert teacher == f"projects/sokd/weights/teacher_{name}.safetensors"
    assert (CONFIGS.parents[2] / teacher).is_file()


def test_mistyped_keys_stop_at_composition_or_construction(composed):
    for override in ("sede=1", "num_classes=two", "without=maybe", "model.optimizer.lrr=1", "model.distill.teachr=a"):
        with pytest.raises(ConfigCompositionException):
            composed("train", override)
    for path, message in (
        ("model.net.widht", "takes no 'widht'"), ("model.distill.teachr", "'teachr'"),
        ("model.distill.host.tau", "host fitnet: .*'tau'"), ("model.distill.host.name", "unknown host 1"),
        ("model.serch_share", "serch_share"), ("data.batchsize", "batchsize"), ("data.knobs.noize", "noize"),
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
    assert found["distill"]["plugin"]["dafa"]["estimator"] == "gumbel_st"
