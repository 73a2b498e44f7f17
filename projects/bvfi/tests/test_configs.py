"""Every configuration composes, keeps what its files say, and builds what it names."""

import inspect

import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from projects.bvfi.blur import Blur
from projects.bvfi.data import Scenes, SlowFilm, VideoBenchmark, Videos
from projects.bvfi.model import BVFI
from projects.bvfi.sequential import ORDERS
from shared.errors import InputError
from shared.experiment import build
from shared.testing.project import ConfigPromises

COUNTS = {"reference": 5_002_753, "small": 782_833, "nano": 216_733}


class TestConfigurations(ConfigPromises):
    project = "bvfi"


def count(module):
    return sum(p.numel() for p in module.parameters())


def built(composed, *overrides):
    """The module as configured, without the numbers in it."""
    with torch.device("meta"):
        return build(composed("train", *overrides).model, "model")


@pytest.mark.parametrize("size", COUNTS)
def test_networks_of_the_sizes_have_their_parameters(composed, size):
    assert count(built(composed, f"model={size}").net) == COUNTS[size]


def test_reference_design_meets_the_size_that_the_claim_stands_for():
    # 32 % fewer than DeMFI-Net's 7.41 million
    assert COUNTS["reference"] / 7.41e6 == pytest.approx(1 - 0.32, abs=0.007)


@pytest.mark.parametrize("order", ORDERS)
def test_two_networks_have_an_embedding_more_than_one(composed, order):
    net, both = (built(composed, "model=nano", *o).net for o in ((), (f"model.net.training={order}",)))
    assert count(both) == count(net) + count(net.embed)


def test_defaults_of_the_network_are_those_of_the_reference_file(composed):
    configured = OmegaConf.to_container(composed("train", "model=reference").model.net)
    assert configured.pop("training") == "joint"
    assert configured == {name: p.default for name, p in inspect.signature(BVFI).parameters.items()}


def test_recipe_at_paper_scale_is_that_of_the_works_it_builds_on(composed):
    config = composed("train", "experiment=adobe240")
    assert (config.model.optimizer.lr, config.model.optimizer.betas) == (1e-4, [0.9, 0.99])
    assert (config.model.scheduler.kind, config.model.scheduler.warmup_steps) == ("halved", 0)
    assert config.model.offset_lr_factor == 0.25
    loss = config.model.loss
    assert (loss.kind, loss.coarse_weight, loss.coarse_target) == ("l1", 0.1, "sharp")
    assert config.trainer.max_steps == 420_000
    assert config.trainer.gradient_clip_val == 1
    assert (config.data.crop_size, config.data.num_inputs, config.data.num_times) == (256, 4, 1)
    assert config.data["_target_"].endswith(Videos.__name__)
    assert config.model.net == composed("train", "model=reference").model.net


def test_curriculum_differs_by_its_phases_alone(composed):
    plain, phased = (composed("train", f"experiment={name}") for name in ("adobe240", "adobe240_curriculum"))
    assert plain.model.curriculum == {"deblur_steps": 0, "interpolate_steps": 0}
    assert phased.model.curriculum == {"deblur_steps": 50_000, "interpolate_steps": 50_000}
    phased.model.curriculum = plain.model.curriculum
    assert phased == plain


@pytest.mark.parametrize("data", ["scenes", "adobe240", "gopro"])
def test_sets_to_train_on_take_the_seed_of_the_run(composed, data):
    made = build(composed("train", f"data={data}", "seed=7").data, "data")
    assert type(made) is (Scenes if data == "scenes" else Videos)
    assert made.seed == 7


@pytest.mark.parametrize(
    ("data", "kind"), [("youtube240", VideoBenchmark), ("sony", VideoBenchmark), ("clips", SlowFilm)]
)
def test_sets_to_test_on_are_built(composed, data, kind):
    made = build(composed("evaluate", f"data={data}").data, "data")
    assert type(made) is kind
    assert made.blur == (Blur("uti", 5, 8) if data == "sony" else Blur())


def test_blur_of_every_set_is_the_benchmarks(composed):
    for data in ("adobe240", "gopro", "youtube240", "clips"):
        assert composed("train", f"data={data}").data.blur == {
            "protocol": "bin", "window": 11, "stride": 8, "gamma": None, "quant": "trunc",
        }  # fmt: skip
    scenes = composed("train").data
    assert (scenes.windows, scenes.gamma, scenes.quant) == ([11], None, "trunc")


def test_mistyped_keys_stop_at_composition_or_construction(composed):
    for override in ("sede=1", "seed=two", "model.optimizer.learning_rate.x=1", "data.scenes.sise=[32,32]"):
        with pytest.raises(ConfigCompositionException):
            composed("train", override)
    for override in ("modes=multi", "orders=many", "ensemble=both", "peers=all"):
        with pytest.raises(ConfigCompositionException):
            composed("evaluate", override)
    with pytest.raises(InputError, match="sise"):
        build(composed("train", "+data.scenes.sise=[32,32]").data, "data")
    config = composed("train")
    OmegaConf.set_struct(config, False)
    config.model.net.chanels = 8
    with pytest.raises(InputError, match="chanels"):
        build(config.model, "model")


def test_evaluation_and_prediction_do_by_default_as_training_does(composed):
    model, evaluation = composed("train").model, composed("evaluate")
    for name in ("mode", "orders", "ensemble", "peers", "num_pictures"):
        assert evaluation[name] == model[name], name
    prediction = composed("predict")
    for name in ("mode", "orders", "ensemble"):
        assert prediction[name] == model[name], name


def test_hyperparameters_are_plain_so_that_the_checkpoint_loads_safely(composed, tmp_path):
    torch.save(dict(built(composed).hparams), tmp_path / "hparams.pt")
    found = torch.load(tmp_path / "hparams.pt", weights_only=True)
    assert (found["net"]["training"], found["curriculum"]["deblur_steps"]) == ("joint", 0)
