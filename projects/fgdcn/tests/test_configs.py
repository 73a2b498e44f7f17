"""Every configuration composes, keeps what its files say, and builds what it names."""

import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from projects.fgdcn.data import RealClips, Scenes, Vimeo90K
from shared.errors import InputError
from shared.experiment import build
from shared.testing.project import ConfigPromises

COUNTS = {"official": 14_318_027, "small": 3_619_459, "tiny": 1_417_941, "micro": 785_039, "nano": 359_835}
# of the published file: the coarser heads of the fusion, and convolutions of the refinement that nothing uses
HEADS, DEAD = 7_784, 37_131


class TestConfigurations(ConfigPromises):
    project = "fgdcn"


def count(module):
    return sum(p.numel() for p in module.parameters())


def built(composed, *overrides):
    """The module as configured, without the numbers in it."""
    with torch.device("meta"):
        return build(composed("train", "model.net.initialisation=torch", *overrides).model, "model")


@pytest.mark.parametrize("size", COUNTS)
def test_networks_of_the_sizes_have_their_parameters(composed, size):
    assert count(built(composed, f"model={size}").net) == COUNTS[size]


def test_official_size_with_the_coarser_heads_is_the_published_files(composed):
    module = built(composed, "model=official", "model.net.pyramid_heads=true")
    assert count(module.net) + DEAD == COUNTS["official"] + HEADS + DEAD == 14_362_942


def test_flow_step_alone_is_what_the_sizes_share_of_it(composed):
    net = built(composed, "model=official").net
    alone = built(composed, "model=official", "model.net.compensation=false").net
    assert count(alone) == count(net) - count(net.compensation) - count(net.fusion) == 4_246_542 + 1_424_220 - DEAD


def test_recipe_at_paper_scale_is_the_published_one(composed):
    config = composed("train", "experiment=vimeo90k")
    assert config.model.optimizer.betas == [0.9, 0.99]
    assert config.model.loss.weights == {"laplacian": 1, "flow": 0.01, "frequency": 0.1, "census": 2}
    assert (config.model.loss.form, config.model.loss.frequency_norm) == ("standard", "backward")
    assert (config.data.crop_size, config.data.batch_size, config.data.steps_per_epoch) == (256, 4, 1000)
    assert (config.trainer.max_steps, config.trainer.accumulate_grad_batches) == (400_000, 1)
    assert (config.model.optimizer.lr, config.model.scheduler.lr_min) == (1e-4, 1e-5)
    assert config.data["_target_"].endswith(Vimeo90K.__name__)


def test_last_stage_is_the_released_configuration(composed):
    config = composed("train", "experiment=vimeo90k_finetune")
    assert config.model.optimizer.lr == config.model.scheduler.lr_min == 1e-5
    assert config.model.scheduler.warmup_steps == 0
    net = config.model.net
    assert (net.mask_mode, net.initialisation, config.model.loss.laplacian_kernel) == ("sum", "torch", "official")
    assert config.model.loss.weights == composed("train", "experiment=vimeo90k").model.loss.weights


def test_first_stage_is_the_flow_step_under_both_its_losses(composed):
    config = composed("train", "experiment=vimeo90k_flow")
    assert not config.model.net.compensation
    assert config.model.loss.weights == {"laplacian": 1, "flow": 0.01, "frequency": 0, "census": 0}
    assert config.trainer.max_steps == 100_000


def test_pyramid_loss_has_the_heads_it_needs(composed):
    config = composed("train", "experiment=vimeo90k_pyramid")
    assert (config.model.loss.form, config.model.net.pyramid_heads) == ("pyramid", True)
    assert config.model.loss.weights == {"laplacian": 1, "flow": 0.01, "frequency": 0.01, "census": 0}


def test_published_frequency_weight_is_ours_at_256(composed):
    ours, published = (composed("train", *o).model.loss for o in ((), ("experiment=vimeo90k",)))
    assert (ours.frequency_norm, published.frequency_norm) == ("ortho", "backward")
    assert ours.weights.frequency == pytest.approx(256 * published.weights.frequency)
    assert {**ours.weights, "frequency": 0} == {**published.weights, "frequency": 0}


@pytest.mark.parametrize(("data", "kind"), [("scenes", Scenes), ("clips", RealClips), ("vimeo90k", Vimeo90K)])
def test_sets_to_train_on_take_the_seed_of_the_run(composed, data, kind):
    made = build(composed("train", f"data={data}", "seed=7").data, "data")
    assert type(made) is kind
    assert made.seed == 7


def test_mistyped_keys_stop_at_composition_or_construction(composed):
    for override in ("sede=1", "seed=two", "model.optimizer.learning_rate.x=1", "data.scenes.sise=[32,32]"):
        with pytest.raises(ConfigCompositionException):
            composed("train", override)
    for override in ("metric_protocoll=float", "flow_scale=half", "peers=all"):
        with pytest.raises(ConfigCompositionException):
            composed("evaluate", override)
    with pytest.raises(InputError, match="sise"):
        build(composed("train", "+data.scenes.sise=[32,32]").data, "data")
    config = composed("train")
    OmegaConf.set_struct(config, False)
    config.model.net.chanels = 8
    with pytest.raises(InputError, match="chanels"):
        build(config.model, "model")


def test_evaluation_scores_by_default_as_training_does(composed):
    model, evaluation = composed("train", "model=official").model, composed("evaluate")
    for name in ("metric_protocol", "flow_scale", "pad_mode", "ensemble", "peers", "num_pictures"):
        assert evaluation[name] == model[name], name


def test_hyperparameters_are_plain_so_that_the_checkpoint_loads_safely(composed, tmp_path):
    torch.save(dict(built(composed).hparams), tmp_path / "hparams.pt")
    assert torch.load(tmp_path / "hparams.pt", weights_only=True)["net"]["levels"] == [1, 2, 3]
