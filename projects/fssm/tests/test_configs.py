"""Every configuration composes, keeps what its files say, and builds what it names."""

from pathlib import Path

import pytest
import torch
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from shared.errors import InputError
from shared.experiment import build
from shared.testing.project import ConfigPromises

CONFIGS = Path(__file__).parents[1] / "configs"
PAPER_COUNTS = {
    "table_x2": 1_363_320, "table_x3": 1_371_435, "table_x4": 1_382_796,
    "table_x2_2024": 905_016, "table_x3_2024": 913_131, "table_x4_2024": 924_492,
}  # fmt: skip


class TestConfigurations(ConfigPromises):
    project = "fssm"


@pytest.mark.parametrize("name", PAPER_COUNTS)
def test_networks_of_the_tables_have_their_parameters(composed, name):
    module = build(composed("train", f"experiment={name}").model, "model")
    assert sum(p.numel() for p in module.net.parameters()) == PAPER_COUNTS[name]


def test_mistyped_keys_stop_at_composition_or_construction(composed):
    for override in ("sede=1", "scale=two", "model.optimizer.learning_rate.x=1"):
        with pytest.raises(ConfigCompositionException):
            composed("train", override)
    config = composed("train")
    OmegaConf.set_struct(config, False)
    config.model.net.holdd = "foh_1"
    with pytest.raises(InputError, match=r"model: .*holdd"):
        build(config.model, "model")


def test_hyperparameters_are_plain_so_that_the_checkpoint_loads_safely(composed, tmp_path):
    module = instantiate(composed("train").model)
    torch.save(dict(module.hparams), tmp_path / "hparams.pt")
    assert torch.load(tmp_path / "hparams.pt", weights_only=True)["net"]["depths"] == [2, 2]


def test_default_network_has_the_parameters_that_the_readme_says(composed):
    module = instantiate(composed("train").model)
    assert sum(p.numel() for p in module.net.parameters()) == 41_224
    assert "41,224 parameters" in (CONFIGS.parent / "README.md").read_text()


def test_recipe_is_the_light_models(composed):
    config = composed("train", "experiment=table_x4")
    assert config.model.optimizer == {"lr": 2e-4, "betas": [0.9, 0.99]}
    assert config.model.scheduler == {"milestones": [250000, 400000, 450000, 475000], "gamma": 0.5}
    assert (config.trainer.max_steps, config.data.batch_size, config.data.patch_size, config.seed) == (
        500000,
        32,
        48,
        10,
    )
    assert composed("train", "experiment=table_x3").data.patch_size == 64
