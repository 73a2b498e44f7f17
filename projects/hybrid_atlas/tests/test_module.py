"""Steps, optimiser, scores and pictures of a training."""

import math

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image

from projects.hybrid_atlas.checkpoints import save_network
from projects.hybrid_atlas.cohort import nearest
from projects.hybrid_atlas.data import SyntheticCohorts
from projects.hybrid_atlas.deformation import build_deformation
from projects.hybrid_atlas.loss import energies
from projects.hybrid_atlas.model import build_network
from projects.hybrid_atlas.module import RegistrationPrior, load_module, middle
from projects.hybrid_atlas.priors import Prior
from projects.hybrid_atlas.registration import STEP, refine
from projects.hybrid_atlas.scores import dice
from shared.errors import InputError

NET = {"name": "flash_head", "dims": 2, "encoder": [8, 8, 8], "decoder": [8], "first_stride": 2, "num_modes": 7}
FLASH = {"name": "flash", "num_modes": 7, "steps": 6, "metric": {"alpha": 3.0, "gamma": 1.0, "power": 3.0}}
SVF = {"name": "svf", "steps": 6, "metric": {"alpha": 3.0, "gamma": 1.0, "power": 3.0}}
LOSS = {
    "kind": "energy", "noise_std": 0.03, "similarity": "ssd", "scale": 1e-4, "steps": 3, "teacher_steps": 4,
    "spectral_weight": False,
}  # fmt: skip


def module(net=None, deformation=None, optimizer=None, **loss):
    torch.manual_seed(0)
    options = {
        "net": {**NET, **(net or {})},
        "deformation": deformation or FLASH,
        "optimizer": optimizer or {"lr": 1e-3},
    }
    made = RegistrationPrior(**options, loss={**LOSS, **loss}, num_pictures=1)
    torch.nn.init.normal_(made.net.flow.weight, std=0.02)
    made.log = lambda name, value, **_: logged.update({name: float(value)})
    logged = made.logged = {}
    return made


def batch(count=2, shape=(24, 20)):
    generator = torch.Generator().manual_seed(1)
    rough = torch.rand(2, count, 1, 6, 5, generator=generator)
    moving, fixed = (torch.nn.functional.interpolate(image, shape, mode="bilinear") for image in rough)
    return {"moving": moving, "fixed": fixed}


def trainer(**options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", **quiet, **options)


def cohorts(**options):
    small = {"num_train": 4, "num_validation": 2, "num_atlas": 3, "batch_size": 2, "steps_per_epoch": 2}
    return SyntheticCohorts("bullseye", shape=[24, 20], amplitude=0.8, num_test_pairs=2, **{**small, **options})


@pytest.mark.parametrize("deformation", [FLASH, SVF], ids=["flash", "svf"])
@pytest.mark.parametrize("similarity", ["ssd", "ncc"])
def test_loss_is_the_mean_energy_of_what_the_network_says(deformation, similarity):
    made, images = module(deformation=deformation, similarity=similarity), batch()
    found = made.training_step(images, 0)
    steps = {} if deformation is SVF else {"steps": 3}
    model = build_deformation({**deformation, **steps}, (24, 20))
    predicted = Prior(made.net).predict(model, images["moving"], images["fixed"])
    expected = energies(model, predicted, images["moving"], images["fixed"], 0.03, similarity)
    torch.testing.assert_close(found, 1e-4 * expected.total.mean())
    assert made.logged["train/loss"] == pytest.approx(float(found))
    assert made.logged["train/energy/image"] == pytest.approx(float(expected.image.mean()))
    assert made.logged["train/energy/regulariser"] == pytest.approx(float(expected.regulariser.mean()))
    assert found.requires_grad


def test_training_integrates_with_its_own_steps_and_validation_with_those_of_the_model():
    made, images = module(), batch()
    made.training_step(images, 0)
    made.validation_step({**images, "name": ["a", "b"]}, 0)
    assert {key[1] for key in made._deformations} == {3, None}
    assert made.deformation((24, 20)).steps == 6
    assert made.deformation((24, 20), 3) is made.deformation((24, 20), 3)
    with torch.no_grad():
        expected = energies(
            made.deformation((24, 20)), made.prior.predict(made.deformation((24, 20)), *images.values()),
            *images.values(), 0.03,
        )  # fmt: skip
    assert made.logged["val/energy"] == pytest.approx(float(expected.total.mean()))


@pytest.mark.parametrize("weighted", [False, True])
def test_supervised_loss_is_the_distance_to_velocities_that_are_optimised(weighted):
    made, images = module(kind="supervised", spectral_weight=weighted), batch()
    found = made.training_step(images, 0)
    model = build_deformation({**FLASH, "steps": 3}, (24, 20))
    moving, fixed = images["moving"], images["fixed"]
    wanted = refine(model, model.zeros(2), torch.full((2,), STEP), moving, fixed, 4, 0.03, "ssd", "lbfgs").parameter
    difference = np.fft.rfftn((made.prior.predict(model, moving, fixed) - wanted).detach().numpy(), axes=(2, 3)) / 49
    weight = model.operator.numpy() if weighted else 1.0
    assert float(found) == pytest.approx(float((weight * np.abs(difference) ** 2).mean()), rel=1e-4)
    found.backward()
    assert made.net.flow.weight.grad.abs().max() > 0
    # with what was optimised the network would be right
    assert float(made.supervised_loss(model, wanted, moving, fixed)) == pytest.approx(0.0, abs=1e-10)


def test_rate_falls_to_nothing_as_a_cosine():
    made = RegistrationPrior(NET, FLASH, LOSS, {"lr": 2e-3, "betas": [0.8, 0.99]})
    rates = []
    made.on_train_batch_start = lambda *_: rates.append(made.optimizers().param_groups[0]["lr"])
    trainer(max_steps=6, num_sanity_val_steps=0, limit_val_batches=0).fit(made, datamodule=cohorts())
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])
    group = made.optimizers().param_groups[0]
    assert group["lr"] == pytest.approx(0.0, abs=1e-9)
    assert tuple(group["betas"]) == (0.8, 0.99)


@pytest.mark.parametrize(
    ("optimizer", "steps", "message"),
    [
        ({"lr": 0.0}, 2, r"optimizer\.lr above 0"), ({}, 2, r"optimizer\.lr above 0"),
        ({"lr": 1e-3}, -1, r"an end: trainer\.max_steps"), ({"lr": 1e-3, "beta": 1}, 2, r"model\.optimizer: .*beta"),
        ({"lr": 1e-3, "betas": [2, 3]}, 2, r"model\.optimizer: Invalid beta"),
    ],
)  # fmt: skip
def test_optimisers_that_cannot_be_are_refused(optimizer, steps, message):
    made = RegistrationPrior(NET, FLASH, LOSS, optimizer)
    with pytest.raises(InputError, match=message):
        trainer(max_steps=steps, max_epochs=-1).fit(made, datamodule=cohorts())


def test_other_losses_and_networks_are_refused():
    with pytest.raises(InputError, match=r"model\.loss\.kind is one of energy, supervised, not 'l1'"):
        module(kind="l1")
    with pytest.raises(InputError, match="unknown network 'unet'"):
        module(net={"name": "unet"})
    with pytest.raises(InputError, match="the prior is for 3-D images"):
        module(net={"dims": 3}).training_step(batch(), 0)
    with pytest.raises(InputError, match="similarity is one of"):
        module(similarity="mi").training_step(batch(), 0)


def test_training_starts_from_given_weights_but_not_when_it_is_resumed(tmp_path):
    given = build_network(NET)
    save_network(given, NET, tmp_path / "given.safetensors")
    made = RegistrationPrior(NET, FLASH, LOSS, {"lr": 1e-12}, init_from=str(tmp_path / "given.safetensors"))
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(made, datamodule=cohorts())
    assert all(torch.allclose(made.net.state_dict()[name], value) for name, value in given.state_dict().items())
    run.save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "given.safetensors").unlink()
    again = RegistrationPrior(NET, FLASH, LOSS, {"lr": 1e-12}, init_from=str(tmp_path / "given.safetensors"))
    trainer(max_steps=2, limit_val_batches=0).fit(again, datamodule=cohorts(), ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="no checkpoint"):
        trainer(max_steps=1).fit(
            RegistrationPrior(NET, FLASH, LOSS, {"lr": 1e-3}, init_from="absent.ckpt"), datamodule=cohorts()
        )


def test_checkpoint_holds_the_network_once_and_plain_options():
    made = RegistrationPrior(NET, FLASH, LOSS, {"lr": 1e-3})
    assert set(made.state_dict()) == {f"net.{name}" for name in made.net.state_dict()}
    assert dict(made.hparams)["net"] == NET
    assert [p is q for p, q in zip(made.parameters(), made.prior.parameters(), strict=True)]


def test_scores_are_those_of_an_independent_computation(tmp_path):
    made, data = module(), cohorts()
    del made.log
    run = trainer(default_root_dir=tmp_path)
    (found,) = run.test(made, datamodule=data, verbose=False)
    cohort, model, rows = data.cohort("atlas"), build_deformation(FLASH, (24, 20)), []
    for moving, fixed in ((0, 1), (1, 2)):
        images = cohort.images([moving, fixed])
        with torch.no_grad():
            predicted = Prior(made.net).predict(model, images[:1], images[1:])
            u = model.displacement(predicted)
        labels = cohort.labels(moving)
        places = [
            torch.arange(size).reshape(shape).float() + part
            for size, shape, part in zip((24, 20), ((-1, 1), (1, -1)), u[0], strict=True)
        ]
        grid = torch.stack([2 * y / 19 - 1 if axis == 0 else 2 * y / 23 - 1 for axis, y in enumerate(places[::-1])], -1)
        warped = torch.nn.functional.grid_sample(
            images[:1], grid[None], padding_mode="border", align_corners=True
        ).numpy()  # fmt: skip
        row = {}
        for stage, image, shift in (("test", warped, u[0]), ("baseline", images[:1].numpy(), 0 * u[0])):
            error = image[0, 0] - images[1, 0].numpy()
            cost = model.regulariser(predicted) if stage == "test" else 0.0
            row[f"{stage}/pairs/psnr"] = -10 * np.log10((error**2).mean())
            row[f"{stage}/pairs/ncc"] = np.corrcoef(image.ravel(), images[1].numpy().ravel())[0, 1]
            row[f"{stage}/pairs/energy"] = (error**2).sum() / (2 * 0.03**2) + float(cost)
            row[f"{stage}/pairs/dice"] = dice(nearest(labels, shift), cohort.labels(fixed))
        rows.append(row)
    assert found.keys() - rows[0].keys() == {"test/pairs/folding", "test/pairs/folding_cells"}
    for name in rows[0]:
        assert found[name] == pytest.approx(np.mean([row[name] for row in rows]), rel=1e-3), name
    assert found["test/pairs/psnr"] != found["baseline/pairs/psnr"]


def test_pictures_show_as_many_pairs_as_asked(tmp_path):
    made = module()
    del made.log
    trainer(default_root_dir=tmp_path).test(made, datamodule=cohorts(), verbose=False)
    (picture,) = (tmp_path / "pictures").iterdir()
    assert picture.name == "subject_0000_to_subject_0001.png"
    width, height = Image.open(picture).size
    assert width >= 5 * 24
    assert height >= 20


def test_pictures_show_the_front_above_and_the_right_of_the_head_on_the_left():
    image = torch.zeros(1, 1, 10, 14)
    image[0, 0, 9, 13] = 1.0  # right, front
    shown = middle(image)
    assert shown.shape == (1, 14, 10)
    assert shown[0, 0, 0] == 1
    assert shown.sum() == 1
    volume = torch.zeros(1, 1, 10, 14, 8)
    volume[0, 0, 9, 13, 4] = 2.0
    assert torch.equal(middle(volume), shown)


def test_network_without_labels_is_scored_on_images_alone(tmp_path):
    made, data = module(), cohorts()
    del made.log
    data.cohort("atlas").labels = lambda index: None
    (found,) = trainer(default_root_dir=tmp_path).test(made, datamodule=data, verbose=False)
    assert "test/pairs/dice" not in found
    assert "test/pairs/psnr" in found


def test_file_is_wrapped_for_the_test_with_other_options(tmp_path):
    made = module()
    save_network(made.net, NET, tmp_path / "a.safetensors")
    loaded = load_module(str(tmp_path / "a.safetensors"), SVF, {**LOSS, "noise_std": 0.1}, num_pictures=3)
    assert (loaded.hparams.num_pictures, loaded.hparams.deformation["name"]) == (3, "svf")
    assert all(torch.equal(value, made.net.state_dict()[name]) for name, value in loaded.net.state_dict().items())
