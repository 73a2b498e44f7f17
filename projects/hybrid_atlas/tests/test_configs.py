"""Every configuration composes, keeps what its files say, and builds what it names."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from projects.hybrid_atlas import data as data_module
from projects.hybrid_atlas.atlas import AtlasOptions
from projects.hybrid_atlas.compare import atlas_options, checked
from projects.hybrid_atlas.data import Cohorts
from projects.hybrid_atlas.deformation import DEFORMATIONS, Deformation, build_deformation
from projects.hybrid_atlas.loss import energies
from projects.hybrid_atlas.metric import Metric
from projects.hybrid_atlas.model import NETWORKS
from projects.hybrid_atlas.module import RegistrationPrior
from shared.errors import InputError
from shared.experiment import build
from shared.testing.project import ConfigPromises

FOLDER = Path(__file__).parents[1]
CARD = yaml.safe_load((FOLDER / "paper.yaml").read_text())
DATA = {
    "mni2d": "SyntheticCohorts", "mni3d": "SyntheticCohorts", "bullseye": "SyntheticCohorts", "digits": "ToyCohorts",
    "scans": "ScanCohorts",
}  # fmt: skip


class TestConfigurations(ConfigPromises):
    project = "hybrid_atlas"
    extra_groups = ("deformation", "atlas")

    def test_every_experiment_composes_keeps_its_leaves_and_builds(self, composed, tmp_path):
        with torch.device("meta"):  # networks of the published size, without the numbers in them
            super().test_every_experiment_composes_keeps_its_leaves_and_builds(composed, tmp_path)


def stems(group):
    return sorted(path.stem for path in (FOLDER / "configs" / group).glob("*.yaml"))


def module(composed, *overrides):
    """The module as configured, without the numbers in it."""
    with torch.device("meta"):
        return build(composed("train", *overrides).model, "model")


def arguments_of(kind, *bases):
    """What a class and its bases with an __init__ of their own can be told."""
    names = set()
    for each in (kind, *bases):
        names |= set(inspect.signature(each.__init__).parameters)
    return names - {"self", "options"}


def test_groups_and_tables_of_code_and_test_are_the_same():
    assert stems("data") == sorted(DATA)
    assert stems("deformation") == sorted(DEFORMATIONS)
    assert {name for name in stems("model") if name != "recipe"} == set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_model_names_its_network_and_all_arguments_of_it(composed, name):
    config = composed("train", f"model={name}").model
    assert type(module(composed, f"model={name}").net) is NETWORKS[name]
    assert set(config.net) == {"name", *arguments_of(NETWORKS[name])}
    assert set(config) - {"_target_", "_recursive_", "_convert_"} == arguments_of(RegistrationPrior)


@pytest.mark.parametrize("name", CARD["network"]["parameters"])
def test_networks_have_the_parameters_that_the_card_and_their_files_say(composed, name):
    network, dims = re.fullmatch(r"(.+)_([23])d", name).groups()
    net = module(composed, f"model={network}", f"dims={dims}").net
    count = sum(p.numel() for p in net.parameters())
    assert CARD["network"]["parameters"][name] == count
    for shown, axes in re.findall(
        r"([\d,]+) parameters in ([23])-D", (FOLDER / "configs" / "model" / f"{network}.yaml").read_text()
    ):
        assert axes != dims or int(shown.replace(",", "")) == count


@pytest.mark.slow
def test_arms_of_the_claims_are_built_and_differ(composed):
    claims = [claim for claim in CARD["claims"] if "arms" in claim]
    assert len(claims) >= 3
    for claim in claims:
        known = []
        for name, overrides in claim["arms"].items():
            config = checked(composed("train", *CARD["base"], *overrides))
            with torch.device("meta"):
                build(config.model, "model")
            build_deformation(OmegaConf.to_container(config.deformation, resolve=True), (96, 112))
            build(config.data, "data")
            assert config not in known, f"{claim['id']}: {name}"
            known.append(config)


@pytest.mark.parametrize("name", DEFORMATIONS)
def test_each_deformation_is_built_from_all_its_arguments(composed, name):
    config = composed("train", f"deformation={name}")
    options = OmegaConf.to_container(config.deformation, resolve=True)
    made = build_deformation(options, (12, 14))
    assert type(made) is DEFORMATIONS[name]
    # dtype and dealias are for checks; the shape is that of the images
    assert set(options) == {"name", *arguments_of(DEFORMATIONS[name])} - {"shape", "spacing", "dtype", "dealias"}
    assert set(options["metric"]) <= {field.name for field in fields(Metric)}
    assert config.model.deformation == config.deformation
    assert isinstance(made, Deformation)
    assert composed("evaluate", f"deformation={name}").deformation == config.deformation


@pytest.mark.parametrize("name", stems("atlas"))
def test_atlas_says_every_option_and_its_noise_is_that_of_the_training(composed, name):
    config = composed("train", f"atlas={name}", "atlas.noise_std=0.07")
    assert set(config.atlas) == {field.name for field in fields(AtlasOptions)}
    options = atlas_options(config.atlas)
    assert options.noise_std == config.model.loss.noise_std == 0.07
    assert checked(config) is config
    if name == "none":
        with pytest.raises(InputError, match="at least one iteration"):
            options.schedule(True)
    else:
        assert options.schedule(True)


def test_without_a_prior_nothing_is_trained_and_predictions_alone_are_refused(composed):
    config = composed("train", "prior=none")
    made = checked(config)
    assert (made.trainer.max_steps, made.trainer.limit_test_batches) == (0, 0)
    made.trainer = config.trainer
    assert made == config
    for atlas in ("prediction", "none"):
        with pytest.raises(InputError, match="prior=none leaves"):
            checked(composed("train", "prior=none", f"atlas={atlas}"))
    with pytest.raises(InputError, match="prior is trained or none, not 'some'"):
        checked(composed("evaluate", "prior=some"))
    with pytest.raises(InputError, match=r"atlas\.center is one of"):
        checked(composed("evaluate", "atlas.center=middle"))


@pytest.mark.parametrize("name", DATA)
def test_data_are_built_from_every_argument_and_take_the_seed_of_the_run(composed, name):
    config = composed("train", f"data={name}", "seed=7")
    made = build(config.data, "data")
    assert type(made) is getattr(data_module, DATA[name])
    assert made.seed == 7
    assert set(config.data) - {"_target_", "_convert_"} == arguments_of(type(made), Cohorts)


def test_evaluation_does_by_default_as_training_does(composed):
    training, evaluation = composed("train"), composed("evaluate")
    for name in ("data", "deformation", "atlas", "trainer", "dims", "prior", "iterative", "classical"):
        assert evaluation[name] == training[name], name
    assert evaluation.num_pictures == training.model.num_pictures
    for name, value in evaluation.loss.items():
        assert training.model.loss[name] == value, name


def test_recipe_of_voxelmorph_is_its_error_and_a_hundredth_of_its_penalty(composed):
    config = composed("train", "experiment=vxm_oasis")
    options, loss = OmegaConf.to_container(config.deformation, resolve=True), config.model.loss
    assert (loss.kind, loss.similarity, config.model.optimizer.lr) == ("energy", "ssd", 1e-4)
    assert (config.data.batch_size, config.trainer.max_steps, config.trainer.gradient_clip_val) == (1, 150_000, None)
    shape = (12, 10, 14)
    model, w = build_deformation(options, shape), torch.randn(1, 3, 6, 5, 7)
    moving, fixed = torch.rand(2, 1, 1, *shape)
    parameter = w * model.coarse_length
    found = energies(model, parameter, moving, fixed, loss.noise_std, loss.similarity).total
    scale = loss.scale * (160 * 192 * 224) / moving.numel()  # of this size
    error = (model.warp(moving, parameter) - fixed).square().mean()
    penalty = sum(w.diff(dim=axis).square().mean() for axis in (2, 3, 4)) / 3
    assert float(scale * found) == pytest.approx(float(error + 0.01 * 2 * penalty), rel=1e-3)


def test_recipe_of_deepflash_is_the_published_one(composed):
    for name, rate, batch in (("deepflash_supervised_3d", 5e-3, 16), ("deepflash_2d", 1e-3, 4)):
        config = composed("train", f"experiment={name}")
        assert config.model.optimizer == {"lr": rate, "weight_decay": 1e-6}
        assert (config.data.batch_size, config.model.loss.kind) == (batch, "supervised")
        assert (config.model.net.two_nets, config.model.net.spectrum_size) == (True, 128)


def test_experiments_on_volumes_say_so(composed):
    for name in ("oasis_3d", "vxm_oasis", "deepflash_supervised_3d"):
        config = composed("train", f"experiment={name}")
        assert config.dims == config.model.net.dims == 3
        assert config.model.loss.noise_std == config.atlas.noise_std


def test_mistyped_keys_stop_at_composition_or_construction(composed):
    for override in ("sede=1", "seed=two", "dims=flat", "iterative=perhaps", "atlas.refin=2", "model.optimizer.lr.x=1"):
        with pytest.raises(ConfigCompositionException):
            composed("train", override)
    for override in ("priors=none", "num_pictures=many", "model=vxm"):
        with pytest.raises(ConfigCompositionException):
            composed("evaluate", override)
    with pytest.raises(InputError, match="amplitud"):
        build(composed("train", "+data.amplitud=1").data, "data")
    with pytest.raises(InputError, match="refin"):
        atlas_options(composed("train", "+atlas.refin=2").atlas)
    with pytest.raises(InputError, match="network vxm takes no 'widht'"):
        module(composed, "model=vxm", "+model.net.widht=8")
    with pytest.raises(InputError, match="takes no 'stepps'"):
        build_deformation(OmegaConf.to_container(composed("train", "+deformation.stepps=3").deformation), (12, 12))
    with pytest.raises(InputError, match=r"model\.loss\.kind is one of"):
        module(composed, "model.loss.kind=l1")


def test_hyperparameters_are_plain_so_that_the_checkpoint_loads_safely(composed, tmp_path):
    torch.save(dict(module(composed).hparams), tmp_path / "hparams.pt")
    found = torch.load(tmp_path / "hparams.pt", weights_only=True)
    assert (found["net"]["name"], found["deformation"]["name"]) == ("flash_head", "flash")
