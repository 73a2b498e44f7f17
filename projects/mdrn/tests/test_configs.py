"""Every configuration composes, keeps what its files say, and builds what it names."""

from pathlib import Path

import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from shared.errors import InputError
from shared.experiment import build
from shared.testing.project import ConfigPromises

CONFIGS = Path(__file__).parents[1] / "configs"
COUNTS = {
    "tiny": (56_569, 57_147), "small": (330_125, 331_279), "base": (978_881, 980_611), "wide": (1_737_297, 1_739_603),
    "large": (4_357_337, 4_359_643),
}  # fmt: skip


class TestConfigurations(ConfigPromises):
    project = "mdrn"
    extra_groups = ("distill",)


@pytest.mark.parametrize("size", COUNTS)
def test_networks_of_the_sizes_have_their_parameters(composed, size):
    for channels, count in zip((1, 3), COUNTS[size], strict=True):
        module = build(composed("train", f"model={size}", f"channels={channels}").model, "model")
        assert sum(p.numel() for p in module.net.parameters()) == count


@pytest.mark.parametrize("name", ["dncnn", "ffdnet", "ircnn", "drunet"])
def test_baselines_are_trained_by_the_same_code(composed, name):
    module = build(composed("train", f"model={name}", "channels=3").model, "model")
    assert type(module.net).__name__.lower() == name
    assert module.net.in_channels == 3


@pytest.mark.parametrize(("name", "sigma"), [("gray_15", 15), ("gray_50", 50), ("color_10", 10), ("color_70", 70)])
def test_table_rows_train_and_test_at_their_level(composed, name, sigma):
    model = composed("train", f"experiment={name}").model
    assert (model.noise.level, model.val_levels, model.test_levels) == (sigma, [sigma], [sigma])
    assert model.net.in_channels == (1 if name.startswith("gray") else 3)


def test_recipe_is_the_first_authors(composed):
    config = composed("train", "experiment=authors_gray_25")
    assert config.model.optimizer == {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8}
    assert config.model.scheduler.halve_every == 50 * config.data.steps_per_epoch
    assert (config.model.noise.kind, config.data.fixed_noise_level, config.data.batch_size) == ("clipped_u8", 25, 16)


def test_second_strategy_halves_the_level_and_the_first_keeps_it(composed):
    second = composed("train", "experiment=hmds2_gray_70").model
    assert (second.noise.level, second.distill.teacher_noise_level, second.distill.out_weight) == (70, 35, 0)
    first = composed("train", "experiment=hmds1_gray_50").model
    assert (first.distill.teacher_noise_level, first.distill.out_weight, first.distill.feat_weight) == (None, 0.5, 0.05)
    assert (first.net.width, second.net.width) == (16, 48)


def test_mistyped_keys_stop_at_composition_or_construction(composed):
    for override in ("sede=1", "channels=two", "model.optimizer.learning_rate.x=1"):
        with pytest.raises(ConfigCompositionException):
            composed("train", override)
    config = composed("train")
    OmegaConf.set_struct(config, False)
    config.model.net.widht = 16
    with pytest.raises(InputError, match=r"widht"):
        build(config.model, "model")


def test_hyperparameters_are_plain_so_that_the_checkpoint_loads_safely(composed, tmp_path):
    module = build(composed("train", "distill=capacity").model, "model")
    torch.save(dict(module.hparams), tmp_path / "hparams.pt")
    assert torch.load(tmp_path / "hparams.pt", weights_only=True)["net"]["width"] == 16


def test_default_network_has_the_parameters_that_the_readme_says():
    assert "56,569 parameters" in (CONFIGS.parent / "README.md").read_text()
