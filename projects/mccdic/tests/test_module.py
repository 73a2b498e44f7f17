"""What one step, one validation and one score do, without a trainer around them."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from projects.mccdic import model
from projects.mccdic import module as module_file
from projects.mccdic.checkpoints import save_network
from projects.mccdic.degrade import Degradation
from projects.mccdic.fourier import fft2c
from projects.mccdic.loss import restoration_losses
from projects.mccdic.module import MultiContrastRestoration, load_module
from projects.mccdic.networks import build_network
from projects.mccdic.scores import VolumeScores, slice_scores, structure_scores, unique_shares
from projects.mccdic.slices import Slices, WholeSlices
from shared.errors import InputError

NET = {"name": "mccdic", "widths": [8, 6, 4], "features": 4, "stages": 3, "blocks": [1, 1, 1]}
PLAIN, CUNET = {"name": "plain", "width": 4, "blocks": 1}, {"name": "cunet"}
LOSS = {"kind": "psnr", "reference_weight": 0.1, "kspace_weight": 0.0, "least_error": 1e-5}
LR = 1e-3
REC = Degradation("rec", 4)


@pytest.fixture
def module(monkeypatch, tmp_path):
    """Make a module outside a trainer of 100 steps -> (module, what it logs)."""
    trainer = SimpleNamespace(
        estimated_stepping_batches=100, is_global_zero=True, world_size=1, default_root_dir=tmp_path
    )
    monkeypatch.setattr(MultiContrastRestoration, "trainer", trainer)
    # most of the time of a small network goes into the eigenvalues that it begins with
    monkeypatch.setattr(model, "largest_eigenvalue", lambda *_, **__: 4.0)

    def make(net=NET, loss=None, **options):
        torch.manual_seed(0)
        options = {"optimizer": {"lr": LR}, "scheduler": {"lr_min": LR / 10}, "num_pictures": 0} | options
        made = MultiContrastRestoration(net, LOSS | (loss or {}), **options)
        logged = {}
        made.log = lambda name, value, **options: logged.update({name: value})
        made.log_dict = lambda values, **options: logged.update(values)
        return made, logged

    return make


def sample(seed=0, references=1, size=(24, 20), joint=False, is_complex=False, batch=1, volume="a", **options):
    """Slices of noise as data.py gives them, with two structures of each kind."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(batch, *size, generator=generator)
    structures = torch.zeros(3, *size, dtype=torch.bool)
    for kind in range(3):
        structures[kind, 4 + 5 * kind : 7 + 5 * kind, 6:10] = True
    inside = torch.zeros(size, dtype=torch.bool)
    inside[2:-2, 2:-2] = True
    if is_complex:
        ramp = torch.linspace(0, 1, size[1])
        target = torch.polar(target, ramp.expand_as(target))
    slices = Slices(
        [f"{volume}_{seed}_{i}" for i in range(batch)], [volume] * batch, target.numpy(),
        torch.rand(batch, references, *size, generator=generator).numpy(), [0.9] * batch, [inside.numpy()] * batch,
        [structures.numpy()] * batch, [0.2] * batch,
    )  # fmt: skip
    return torch.utils.data.default_collate([*WholeSlices(slices, REC, joint, **options)])


def score_all(made, samples, set_name="noise"):
    made.eval().on_test_epoch_start()
    with torch.no_grad():
        for i, batch in enumerate(samples):
            made.score(batch, i, set_name)
    made.on_test_epoch_end()


# --- training ---


@pytest.mark.parametrize("kind", ["psnr", "l1", "l2"])
@pytest.mark.parametrize("kspace_weight", [0, 0.5])
def test_loss_is_the_sum_of_the_terms_that_it_logs(module, kind, kspace_weight):
    loss = LOSS | {"kind": kind, "kspace_weight": kspace_weight}
    made, logged = module(loss=loss)
    batch = sample(batch=2)
    found = made.training_step(batch, 0)
    expected = restoration_losses(
        made(batch["input"], batch["reference"]), batch["target"], batch["reference_target"], **loss
    )
    assert set(logged) == {"train/loss"} | {f"train/loss/{name}" for name in expected}
    assert ("kspace" in expected) == bool(kspace_weight)
    for name, value in expected.items():
        torch.testing.assert_close(logged[f"train/loss/{name}"], value)
    torch.testing.assert_close(found, sum(expected.values()))


def test_degraded_references_are_to_be_restored(module):
    made, logged = module()
    batch = sample(joint=True)
    made.training_step(batch, 0)
    found = made(batch["input"], batch["reference"]).references
    assert not torch.equal(batch["reference"], batch["reference_target"])
    expected = 0.1 * ((found - batch["reference_target"]).square().mean() + 1e-5).log()
    torch.testing.assert_close(logged["train/loss/reference"], expected)


@pytest.mark.parametrize("net", [NET, NET | {"common": False}, NET | {"prox": "soft"}, NET | {"tie": True}], ids=str)
@pytest.mark.parametrize("guided", [True, False])
def test_every_parameter_is_in_the_graph_as_parallel_training_needs(module, net, guided):
    made, logged = module(net, guided=guided)
    made.training_step(sample(), 0).backward()
    assert [name for name, p in made.net.named_parameters() if p.requires_grad and p.grad is None] == []
    assert ("train/loss/reference" in logged) == guided


@pytest.mark.parametrize("net", [NET, NET | {"num_references": 2}, PLAIN, CUNET], ids=str)
def test_unguided_network_sees_nothing_of_the_references(module, net):
    made, _ = module(net, guided=False)
    batch = sample(references=net.get("num_references", 1))
    expected = made.restore(batch).target
    batch["reference"] = torch.rand_like(batch["reference"])
    assert torch.equal(made.restore(batch).target, expected)
    zeros = torch.zeros_like(batch["reference"])
    assert torch.equal(made.net(batch["input"], zeros).target, expected)
    guided, _ = module(net)
    assert not torch.equal(guided.restore(batch).target, expected)


@pytest.mark.parametrize(("net", "count"), [(NET, 2), (NET | {"num_references": 2}, 1), (PLAIN, 2), (CUNET, 2)])
def test_references_that_the_network_does_not_take_are_counted(module, net, count):
    made, _ = module(net)
    own = made.net.num_references
    with pytest.raises(InputError, match=rf"takes {own} references, the data have {count}; set model.net.num_ref"):
        made.training_step(sample(references=count), 0)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_consistency_needs_samples_and_an_image_whose_zero_is_zero(module, kind):
    made, _ = module(NET | {"consistency": kind})
    crops = {key: value for key, value in sample().items() if key not in ("kspace", "mask")}
    with pytest.raises(InputError, match=r"whole slices; say data.whole_slices=true"):
        made.training_step(crops, 0)
    with pytest.raises(InputError, match=r"whose zero is zero; say data.instance_norm=false"):
        made.training_step(sample(instance_norm=True), 0)
    made.training_step(sample(), 0)


def departure(image, batch):
    """How far the samples of an image, seen at the phase that was estimated, are from what was measured."""
    turn = torch.polar(torch.ones_like(image), batch.get("phase", torch.zeros_like(image)))
    return ((fft2c(image * turn) - batch["kspace"]) * batch["mask"]).norm() / batch["kspace"].norm()


@pytest.mark.parametrize("is_complex", [False, True])
def test_consistent_output_agrees_with_the_samples_better_than_without(module, is_complex):
    batch = sample(is_complex=is_complex, size=(32, 32))
    assert ("phase" in batch) == is_complex
    found = {}
    for kind in ("none", "soft", "hard"):
        made, _ = module(NET | {"consistency": kind})
        found[kind] = departure(made.restore(batch).target, batch).item()
    assert found["hard"] < found["soft"] < found["none"]
    if not is_complex:
        assert found["hard"] < 1e-6
    scaled = dict(batch)  # as if normalised by half: k-space stays in the units of the data
    scaled["scale"] = torch.tensor([0.5])
    scaled |= {key: batch[key] / 0.5 for key in ("target", "input", "reference", "reference_target")}
    assert departure(0.5 * made.restore(scaled).target, batch) < (found["soft"] if is_complex else 1e-6)


@pytest.mark.parametrize("net", [NET, NET | {"prox": "soft"}, PLAIN, CUNET], ids=str)
def test_bfloat16_gives_nearly_the_same_loss_and_gradient(module, net):
    losses, gradients = [], []
    for half in (False, True):
        made, _ = module(net, loss={"kind": "l1"})
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses.append(made.training_step(sample(), 0))
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.net.parameters() if p.grad is not None]))
    assert losses[0] != losses[1]
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.97


@pytest.mark.parametrize(
    ("net", "loss", "message"),
    [
        (NET, {"kind": "l3"}, "unknown loss.kind 'l3'; choose one of l1, l2, psnr"),
        (NET | {"name": "unet"}, {}, "unknown network 'unet'"),
        (NET | {"prox": "hard"}, {}, "unknown prox 'hard'"),
        (PLAIN | {"widths": [8]}, {}, "network plain takes no 'widths'"),
    ],
)
def test_unknown_options_are_refused_before_the_training(module, net, loss, message):
    with pytest.raises(InputError, match=message):
        module(net, loss)


# --- learning rate ---


def test_learning_rate_falls_as_a_cosine(module):
    configured = module(optimizer={"lr": LR, "betas": [0.9, 0.99]})[0].configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    assert type(optimizer) is torch.optim.Adam
    assert (tuple(optimizer.defaults["betas"]), optimizer.defaults["weight_decay"]) == ((0.9, 0.99), 0)
    found = []
    for _ in range(101):
        found.append(optimizer.param_groups[0]["lr"] / LR)
        optimizer.step()
        schedule.step()
    expected = {0: 1, 25: 0.55 + 0.45 * math.sqrt(0.5), 50: 0.55, 100: 0.1}
    assert {step: found[step] for step in expected} == pytest.approx(expected)


def test_thresholds_of_constant_steps_are_left_alone(module):
    made, _ = module(NET | {"steps": "constant"})
    (group,) = made.configure_optimizers()["optimizer"].param_groups
    trained = {id(p) for p in group["params"]}
    left = {name for name, p in made.net.named_parameters() if id(p) not in trained}
    assert left == {name for name, _ in made.net.named_parameters() if "thresholds" in name}


@pytest.mark.parametrize(
    ("optimizer", "steps", "message"),
    [
        ({"lr": 0}, 100, "optimizer.lr above 0"),
        ({"lr": -1}, 100, "optimizer.lr above 0"),
        ({"lr": LR}, math.inf, "an end: trainer.max_steps"),
        ({"lr": LR, "betas": [2, 0.9]}, 100, "model.optimizer: Invalid beta"),
        ({"lr": LR, "betas": [0.9]}, 100, "model.optimizer: "),
        ({"lr": LR, "momentum": 0.9}, 100, "model.optimizer: .*'momentum'"),
    ],
)
def test_optimizer_that_cannot_be_is_refused_in_one_line(module, optimizer, steps, message):
    made, _ = module(optimizer=optimizer)
    made.trainer.estimated_stepping_batches = steps
    with pytest.raises(InputError, match=message):
        made.configure_optimizers()


# --- weights to start from ---


def started(made, path, ckpt_path=None):
    made.hparams.init_from = str(path)
    made.trainer.ckpt_path = ckpt_path
    made.on_fit_start()


def test_training_starts_from_the_weights_it_is_given_unless_it_is_resumed(module, tmp_path):
    torch.manual_seed(1)
    given = build_network(NET)
    save_network(given, NET, tmp_path / "given.safetensors")
    made, _ = module()
    before = {name: value.clone() for name, value in made.net.state_dict().items()}
    started(made, tmp_path / "given.safetensors", ckpt_path="last.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in made.net.state_dict().items())
    started(made, tmp_path / "given.safetensors")
    state = given.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made.net.state_dict().items())


def test_training_does_not_start_from_another_network(module, tmp_path):
    other = NET | {"stages": 4}
    save_network(build_network(other), other, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors holds weights of another network"):
        started(module()[0], tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="absent"):
        started(module()[0], tmp_path / "absent.ckpt")


# --- validation ---


def test_validation_is_of_whole_slices_in_the_range_of_their_volume(module):
    for norm in (False, True):
        made, logged = module()
        batch = sample(instance_norm=norm)
        made.eval().validation_step(batch, 0)
        error = (made.restore(batch).target - batch["target"]) * batch["scale"]
        assert logged["val/psnr"].item() == pytest.approx(
            20 * math.log10(0.9) - 10 * error.double().square().mean().log10().item(), abs=1e-4
        )


@pytest.mark.parametrize("net", [NET, NET | {"common": False}, NET | {"steps": "constant"}, PLAIN], ids=str)
def test_step_sizes_of_the_iterations_are_shown(module, net):
    made, logged = module(net)
    made.on_validation_epoch_end()
    names = set() if net is PLAIN else {"target"} if "common" in net else {"target", "common"}
    assert set(logged) == {f"val/step_size_{name}" for name in names}
    if names:
        torch.testing.assert_close(logged["val/step_size_target"], made.net.unique[0].steps[1:].mean())


# --- test ---


def test_scores_are_means_over_slices_and_volumes_of_network_and_zero_filled_input(module):
    made, logged = module()
    samples = [sample(0), sample(1), sample(2, volume="b", size=(20, 24))]
    samples[1]["structures"][:, 2] = False
    score_all(made, samples)
    each = {"test": [], "baseline": []}
    volumes = {"test": VolumeScores(), "baseline": VolumeScores()}
    for batch in samples:
        images = {"test": made.restore(batch).target.detach(), "baseline": batch["input"]}
        for stage, image in images.items():
            pair = image / 0.9, batch["target"] / 0.9
            scores = slice_scores(*pair, batch["inside"])
            scores |= structure_scores(*pair, batch["structures"], batch["amplitude"])
            scores |= unique_shares(made.net, batch) if stage == "test" else {}
            each[stage].append(scores)
            volumes[stage].add(batch["volume"][0], image, batch["target"], batch["peak"])
    expected = {}
    for stage, found in each.items():
        for name in found[0]:
            known = [scores[name] for scores in found if name in scores]
            expected[f"{stage}/noise/{name}"] = sum(known) / len(known)
        expected |= {f"{stage}/noise/{name}": value for name, value in volumes[stage].means().items()}
    assert logged == pytest.approx(expected, rel=1e-6)
    names = {name.removeprefix("test/noise/") for name in logged if name.startswith("test/")}
    assert names == {
        "psnr", "ssim", "rmse", "psnr_inside", "error_common", "error_target_only", "leakage", "unique_share",
        "unique_share_common", "volume_psnr", "volume_ssim", "volume_nmse",
    }  # fmt: skip
    others = {name.removeprefix("baseline/noise/") for name in logged if name.startswith("baseline/")}
    assert others == names - {"unique_share", "unique_share_common"}


@pytest.mark.parametrize(
    ("net", "options"), [(NET, {"guided": False}), (NET | {"common": False}, {}), (PLAIN, {}), (CUNET, {})], ids=str
)
def test_shares_are_of_networks_that_look_at_a_reference_through_a_common_code(module, net, options):
    made, logged = module(net, **options)
    score_all(made, [sample()])
    assert "test/noise/leakage" in logged
    assert not [name for name in logged if "unique_share" in name]


@pytest.mark.parametrize("change", [{"num_references": 2}, {"prox": "soft"}, {"consistency": "hard"}, {"tie": True}])
def test_shares_are_known_of_every_network_with_a_common_code(module, change):
    made, logged = module(NET | change)
    score_all(made, [sample(references=change.get("num_references", 1))])
    assert 0 < logged["test/noise/unique_share"] < 1
    assert 0 < logged["test/noise/unique_share_common"] < 1


def test_slices_without_structures_or_a_mask_have_the_common_scores(module):
    made, logged = module()
    batch = {k: v for k, v in sample().items() if k not in ("structures", "amplitude", "inside")}
    score_all(made, [batch])
    names = {"psnr", "ssim", "rmse", "volume_psnr", "volume_ssim", "volume_nmse"}
    assert set(logged) == {f"{stage}/noise/{name}" for stage in ("test", "baseline") for name in names}


def test_normalised_slices_are_scored_in_the_units_of_the_data(module):
    found = []
    for norm in (False, True):
        made, logged = module(NET | {"zero_heads": True})  # which gives its input
        score_all(made, [sample(instance_norm=norm)])
        found.append({name: value for name, value in logged.items() if "unique" not in name})
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_each_slice_has_a_row_for_each_method(module, tmp_path):
    made, logged = module()
    samples = [sample(0), sample(1)]
    samples[0]["structures"][:, 2] = False
    score_all(made, samples)
    with open(tmp_path / "slices.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["set"], row["name"]) for row in rows] == [
        (method, "noise", name) for name in ("a_0_0", "a_1_0") for method in ("network", "zero_filled")
    ]
    for method, stage in (("network", "test"), ("zero_filled", "baseline")):
        of_method = [row for row in rows if row["method"] == method]
        for name in set(of_method[0]) - {"method", "set", "name"}:
            values = [float(row[name]) for row in of_method if row[name]]
            if values:
                assert logged[f"{stage}/noise/{name}"] == pytest.approx(sum(values) / len(values))
    assert rows[0]["leakage"] == "" != rows[2]["leakage"]


def test_scores_are_of_single_precision_whatever_the_training_was_in(module):
    found = []
    for half in (False, True):
        made, logged = module()
        made.trainer.datamodule = SimpleNamespace(test_names=["other", "noise"])
        made.eval().on_test_epoch_start()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            made.test_step(sample(), 0, dataloader_idx=1)
            made.on_test_epoch_end()
        found.append(dict(logged))
    assert found[0] == found[1]
    assert "test/noise/psnr" in found[0]


def test_processes_score_their_own_slices_and_log_the_means_of_all(module, monkeypatch, tmp_path):
    samples = [sample(i, volume="ab"[i % 2]) for i in range(3)]
    made, alone = module()
    score_all(made, samples)
    rows = (tmp_path / "slices.csv").read_text()
    parts = []
    for numbers in ((0, 2), (1, 0)):  # a sampler gives each process as many
        made, _ = module()
        made.eval().on_test_epoch_start()
        with torch.no_grad():
            for i in numbers:
                made.score(samples[i], i, "noise")
        parts.append(made._scored)
    made, logged = module()
    made.eval().on_test_epoch_start()
    made.trainer.world_size = 2
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(module_file.dist, name, lambda: True)

    def gather(found, mine):
        assert mine == {}
        found[:] = parts

    monkeypatch.setattr(module_file.dist, "all_gather_object", gather)
    made.on_test_epoch_end()
    assert logged == pytest.approx(alone, rel=1e-12)
    assert sorted((tmp_path / "slices.csv").read_text().splitlines()) == sorted(rows.splitlines())


def test_zero_filled_slice_that_is_perfect_has_infinite_scores(module):
    made, logged = module(NET | {"zero_heads": True})
    batch = sample()
    batch["input"] = batch["target"]
    score_all(made, [batch])
    assert {logged[f"{stage}/noise/{name}"] for stage in ("test", "baseline") for name in ("psnr", "volume_psnr")} == {
        math.inf
    }
    assert logged["test/noise/rmse"] == 0


@pytest.mark.parametrize("net", [NET, CUNET, PLAIN, NET | {"num_references": 2}], ids=str)
def test_two_pictures_are_drawn_of_the_first_slices_of_each_set(module, tmp_path, net):
    made, _ = module(net, num_pictures=1)
    made.eval().on_test_epoch_start()
    with torch.no_grad():
        for set_name in ("aligned", "beside"):
            for i in range(2):
                made.score(sample(i, references=net.get("num_references", 1)), i, set_name)
    made.on_test_epoch_end()
    names = {f"{set_name}_a_0_0" for set_name in ("aligned", "beside")}
    names |= set() if net is PLAIN else {f"{name}_parts" for name in names}
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == names
    with Image.open(tmp_path / "pictures" / "aligned_a_0_0.png") as picture:
        assert picture.width > 5 * 20


# --- files ---


@pytest.mark.parametrize("net", [NET, PLAIN, CUNET], ids=str)
def test_a_file_becomes_a_module_that_is_scored(module, tmp_path, net):
    given = build_network(net)
    save_network(given, net, tmp_path / "a.safetensors")
    made = load_module(tmp_path / "a.safetensors", guided=False, num_pictures=1)
    assert (made.hparams.guided, made.hparams.num_pictures) == (False, 1)
    state = given.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made.net.state_dict().items())


def test_checkpoint_of_a_run_is_scored_as_it_was_trained_unless_asked_otherwise(module, tmp_path):
    state = {f"net.{name}": value for name, value in module()[0].net.state_dict().items()}
    for guided in (True, False):
        path = tmp_path / f"{guided}.ckpt"
        torch.save({"state_dict": state, "hyper_parameters": {"net": NET, "guided": guided}}, path)
        assert load_module(path).hparams.guided is load_module(path, guided=None).hparams.guided is guided
        assert load_module(path, guided=not guided).hparams.guided is not guided
