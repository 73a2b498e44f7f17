"""Every configuration composes, keeps what its files say, and builds what it names."""

from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from projects.fssm import schema  # noqa: F401  (registers the configuration's types)
from shared.errors import InputError
from shared.experiment import build

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
PAPER_COUNTS = {
    "table_x2": 1_363_320, "table_x3": 1_371_435, "table_x4": 1_382_796,
    "table_x2_2024": 905_016, "table_x3_2024": 913_131, "table_x4_2024": 924_492,
}  # fmt: skip


def composed(config_name="train", *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(config_name, overrides=list(overrides))


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_keeps_its_leaves_and_builds(name, tmp_path):
    config = composed("train", f"experiment={name}", f"run_dir={tmp_path}")
    file = yaml.safe_load((CONFIGS / "experiment" / f"{name}.yaml").read_text())
    file.pop("defaults", None)
    plain = OmegaConf.to_container(config, throw_on_missing=False)
    for path, value in leaves(file):
        node = plain
        for key in path.split("."):
            node = node[key]
        assert node == value, f"{path} was overridden"
    module = build(config.model, "model")
    build(config.data, "data")
    build(config.trainer, "trainer", logger=False, enable_checkpointing=False)
    if name in PAPER_COUNTS:
        assert sum(p.numel() for p in module.net.parameters()) == PAPER_COUNTS[name]
    assert {type(value) for value in module.hparams.net.values()} <= {int, float, str, list, bool}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_header_of_an_experiment_names_its_command(name):
    header = [
        line for line in (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines() if line.startswith("#")
    ]
    assert any("Command: make " in line for line in header)


@pytest.mark.parametrize("group", ["data", "model", "trainer", "callbacks", "logger"])
def test_every_choice_of_a_group_composes(group):
    for choice in sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")):
        assert composed("train", f"{group}={choice}").project == "fssm"


def test_mistyped_keys_stop_at_composition_or_construction():
    for override in ("sede=1", "scale=two", "model.optimizer.learning_rate.x=1"):
        with pytest.raises(ConfigCompositionException):
            composed("train", override)
    config = composed("train")
    OmegaConf.set_struct(config, False)
    config.model.net.holdd = "foh_1"
    with pytest.raises(InputError, match=r"model: .*holdd"):
        build(config.model, "model")


def test_hyperparameters_are_plain_so_that_the_checkpoint_loads_safely(tmp_path):
    module = instantiate(composed("train").model)
    torch.save(dict(module.hparams), tmp_path / "hparams.pt")
    assert torch.load(tmp_path / "hparams.pt", weights_only=True)["net"]["depths"] == [2, 2]


def test_default_network_has_the_parameters_that_the_readme_says():
    module = instantiate(composed("train").model)
    assert sum(p.numel() for p in module.net.parameters()) == 41_224
    assert "41,224 parameters" in (CONFIGS.parent / "README.md").read_text()


def test_recipe_is_the_light_models():
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
