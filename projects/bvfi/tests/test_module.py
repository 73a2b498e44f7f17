"""What one step, one validation and one score do, without a trainer around them."""

import math
from types import SimpleNamespace

import pytest
import torch

from projects.bvfi import module as module_file
from projects.bvfi.baselines import exact_warp, flow_warp, linear_blend, oracle_warp
from projects.bvfi.checkpoints import build_network, save_network
from projects.bvfi.inference import restore
from projects.bvfi.layers import MAX_OFFSET, DeformConv
from projects.bvfi.loss import penalty, restoration_losses
from projects.bvfi.module import HALVED_AT, SCHEDULES, BlurryInterpolation, load_module
from projects.bvfi.scores import frame_scores, tof
from projects.bvfi.sequential import ORDERS
from shared.errors import InputError

NET = {
    "training": "joint", "channels": 8, "num_groups": 2, "num_embed_blocks": 1, "num_sweep_blocks": 1,
    "num_main_blocks": 1, "num_derivative_blocks": 1, "num_heads": 2, "orders": 2,
}  # fmt: skip
LOSS = {"kind": "l1", "coarse_weight": 0.25, "coarse_target": "sharp"}
LR = 1e-3
STAGES = {
    "I": ("pyramid.", "tdn.", "coarse_head."),
    "II and III": ("brda.", "tta.", "head."),
}


@pytest.fixture
def module(monkeypatch, tmp_path):
    """Make a module outside a trainer of 110 steps -> (module, what it logs)."""
    trainer = SimpleNamespace(
        estimated_stepping_batches=110, is_global_zero=True, world_size=1, default_root_dir=tmp_path
    )
    monkeypatch.setattr(BlurryInterpolation, "trainer", trainer)

    def make(net=None, loss=None, step=0, **options):
        torch.manual_seed(0)
        scheduler = {"kind": "cosine", "warmup_steps": 10, "lr_min": LR / 10}
        options = {"optimizer": {"lr": LR}, "scheduler": scheduler, "num_pictures": 0} | options
        made = BlurryInterpolation(NET | (net or {}), LOSS | (loss or {}), **options)
        monkeypatch.setattr(BlurryInterpolation, "global_step", step)
        logged = {}
        made.log = lambda name, value, **options: logged.update({name: value})
        made.log_dict = lambda values, **options: logged.update(values)
        return made, logged

    return make


def batch(seed=0, times=(0.25, 0.5, 0.75), height=16, width=32, scene="noise", is_last=True, size=1):
    """Windows of noise, with random flows and visibilities."""
    generator = torch.Generator().manual_seed(seed)
    count = len(times)

    def rand(*shape):
        return torch.rand(size, *shape, height, width, generator=generator)

    return {
        "frames": 0.4 + 0.2 * rand(4, 3),
        "times": torch.tensor([list(times)] * size),
        "targets": 0.4 + 0.2 * rand(count + 2, 3),
        "blurry_targets": 0.4 + 0.2 * rand(count, 3),
        "flows": 4 * rand(count, 4) - 2,
        "visibility": (rand(count, 2) < 0.6).float(),
        "name": [f"{scene}_{seed}"] * size,
        "scene": [scene] * size,
        "is_last": torch.tensor([is_last] * size),
    }


def stirred(net, amount=0.05):
    """Move every parameter, so that nothing is zero."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=amount)


def trained_by(made, sample):
    """Names of the weights that one step gives a gradient."""
    made.zero_grad()
    loss = made.training_step(sample, 0)
    loss.backward()
    return loss, {name for name, p in made.net.named_parameters() if p.grad is not None and p.grad.any()}


# --- training ---


@pytest.mark.parametrize("kind", ["l1", "charbonnier", "psnr"])
@pytest.mark.parametrize("coarse_target", ["sharp", "blur", "none"])
def test_loss_is_the_sum_of_the_terms_that_it_logs(module, kind, coarse_target):
    made, logged = module(loss={"kind": kind, "coarse_target": coarse_target})
    stirred(made.net)
    sample = batch(size=2)
    loss = made.training_step(sample, 0)
    output = made(sample["frames"], sample["times"])
    expected = restoration_losses(
        output, sample["targets"], sample["blurry_targets"], kind=kind, coarse_weight=0.25, coarse_target=coarse_target
    )
    names = {"frames"} if coarse_target == "none" else {"frames", "coarse"}
    assert set(logged) == {"train/loss"} | {f"train/loss/{name}" for name in names}
    for name in names:
        torch.testing.assert_close(logged[f"train/loss/{name}"], expected[name])
    torch.testing.assert_close(loss, sum(expected.values()))


def test_blurry_frames_between_are_asked_for_by_name(module):
    made, _ = module(loss={"coarse_target": "blur"})
    sample = batch()
    del sample["blurry_targets"]
    with pytest.raises(InputError, match=r"loss.coarse_target=blur needs blurry frames between; say data.blurry_tar"):
        made.training_step(sample, 0)
    module(loss={"coarse_target": "sharp"})[0].training_step(sample, 0)


def test_samples_without_times_train_deblurring_alone(module):
    made, logged = module()
    stirred(made.net)
    sample = batch(times=())
    _, names = trained_by(made, sample)
    assert set(logged) == {"train/loss", "train/loss/frames"}
    assert not any(name.startswith(STAGES["I"]) for name in names)


CURRICULUM = {"deblur_steps": 3, "interpolate_steps": 2}


def test_curriculum_trains_deblurring_then_stage_one_then_all(module):
    sample = batch(size=2)
    for step, kinds in ((0, "frames"), (2, "frames"), (3, "coarse"), (4, "coarse"), (5, "both"), (100, "both")):
        made, logged = module(step=step, curriculum=CURRICULUM)
        stirred(made.net)
        loss, names = trained_by(made, sample)
        output = made.net(sample["frames"], sample["times"])
        every = {name for name, _ in made.net.named_parameters()}
        stage_one, others = ({n for n in every if n.startswith(starts)} for starts in STAGES.values())
        if kinds == "frames":
            ends = made.net(sample["frames"], sample["times"][:, :0]).frames
            expected = penalty(ends, sample["targets"][:, [0, -1]], "l1")
            assert names == every - stage_one
        elif kinds == "coarse":
            expected = 0.25 * penalty(output.coarse, sample["targets"][:, 1:-1], "l1")
            assert names == every - others
        else:
            expected = sum(restoration_losses(output, sample["targets"], None, **LOSS).values())
            assert names == every
        torch.testing.assert_close(loss, expected)
        shown = {"frames", "coarse"} if kinds == "both" else {kinds}
        assert set(logged) == {"train/loss"} | {f"train/loss/{name}" for name in shown}


def test_steps_of_a_phase_leave_the_other_stages_weights(module):
    for step, starts in ((0, STAGES["I"]), (3, STAGES["II and III"])):
        made, _ = module(step=step, curriculum=CURRICULUM)
        stirred(made.net)
        before = {name: value.clone() for name, value in made.net.state_dict().items()}
        optimizer = made.configure_optimizers()["optimizer"]
        trained_by(made, batch())
        optimizer.step()
        same = {name for name, value in made.net.state_dict().items() if torch.equal(value, before[name])}
        assert same == {name for name in before if name.startswith(starts)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": {"coarse_target": "none"}}, "need a loss.coarse_target"),
        ({"loss": {"coarse_weight": 0}}, "need a loss.coarse_target and a loss.coarse_weight"),
        ({"net": {"interpolation": "blend"}}, "needs net.interpolation=deformable"),
        ({"net": {"training": "deblur_first"}}, "a sequential training has no curriculum"),
    ],
)
def test_curriculum_that_cannot_be_is_refused_before_the_training(module, options, message):
    with pytest.raises(InputError, match=message):
        module(curriculum=CURRICULUM, **options)
    # deblurring first needs none of it
    if "training" not in options.get("net", {}):
        module(curriculum={"deblur_steps": 3, "interpolate_steps": 0}, **options)


def test_phase_of_stage_one_needs_times(module):
    made, _ = module(step=3, curriculum=CURRICULUM)
    with pytest.raises(InputError, match=r"set data.num_times above 0"):
        made.training_step(batch(times=()), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": {"kind": "l2"}}, "unknown loss.kind 'l2'"),
        ({"loss": {"coarse_target": "soft"}}, "unknown loss.coarse_target 'soft'"),
        ({"scheduler": {"kind": "step"}}, "unknown scheduler.kind 'step'; choose one of cosine, halved"),
        ({"mode": "both"}, "unknown mode 'both'"),
        ({"net": {"training": "apart"}}, "unknown net.training 'apart'"),
    ],
)
def test_unknown_options_are_refused_before_anything_is_built(module, options, message):
    with pytest.raises(InputError, match=message):
        module(**options)


# --- two networks ---


@pytest.mark.parametrize("order", ORDERS)
def test_first_half_trains_one_network_and_the_second_half_the_other(module, order):
    sample = batch(size=2)
    frames, times, targets = sample["frames"], sample["times"], sample["targets"]
    for step, is_second in ((0, False), (54, False), (55, True), (109, True)):
        made, logged = module(net={"training": order}, step=step)
        stirred(made.net)
        net = made.net
        first, second = ("deblurrer.", "interpolator.") if order == "deblur_first" else ("interpolator.", "deblurrer.")
        loss, names = trained_by(made, sample)
        assert names == {name for name, _ in net.named_parameters() if name.startswith(second if is_second else first)}
        if order == "deblur_first":
            sharp = net.deblur(frames)
            made_now = net.between(sharp, times) if is_second else sharp[:, 1:3]
            expected = penalty(made_now, targets[:, 1:-1] if is_second else targets[:, [0, -1]], "l1")
        elif is_second:
            expected = penalty(net(frames, times).frames, targets, "l1")
        else:
            expected = penalty(net.between(frames, times), sample["blurry_targets"], "l1")
        torch.testing.assert_close(loss, expected)
        assert set(logged) == {"train/loss", "train/loss/frames"}


@pytest.mark.parametrize("order", ORDERS)
def test_sequential_training_needs_times_and_interpolating_first_blurry_targets(module, order):
    made, _ = module(net={"training": order})
    with pytest.raises(InputError, match=r"a sequential training interpolates; set data.num_times above 0"):
        made.training_step(batch(times=()), 0)
    sample = batch()
    del sample["blurry_targets"]
    if order == "interpolate_first":
        with pytest.raises(InputError, match=r"interpolate_first needs blurry frames between; say data.blurry_targets"):
            made.training_step(sample, 0)
    else:
        made.training_step(sample, 0)


# --- learning rates ---


def rates(made, steps):
    """Learning rates of each group at each step."""
    configured = made.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def test_learning_rate_warms_up_and_falls_as_a_cosine(module):
    found = [first for first, _ in rates(module()[0], 120)]
    # 1 % of it at once, half-way up at 5, half-way down between 10 and 110, a tenth from then on
    expected = {0: 0.01, 5: 0.505, 10: 1, 35: 0.55 + 0.45 * math.sqrt(0.5), 60: 0.55, 110: 0.1, 119: 0.1}
    assert {step: found[step] / LR for step in expected} == pytest.approx(expected)


def test_learning_rate_is_halved_at_three_places(module):
    assert (SCHEDULES, HALVED_AT) == (("cosine", "halved"), (0.5, 0.83, 0.97))
    scheduler = {"kind": "halved", "warmup_steps": 10, "lr_min": 0}
    found = [first / LR for first, _ in rates(module(scheduler=scheduler)[0], 120)]
    # of 110 steps at 55, 91.3 and 106.7
    expected = {0: 0.01, 9: 0.901, 10: 1, 54: 1, 55: 0.5, 91: 0.5, 92: 0.25, 106: 0.25, 107: 0.125, 119: 0.125}
    assert {step: found[step] for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("total", [110, 111])
@pytest.mark.parametrize("order", ORDERS)
def test_schedule_begins_again_with_the_second_network(module, order, total):
    made, _ = module(net={"training": order}, scheduler={"kind": "cosine", "warmup_steps": 5, "lr_min": 0})
    made.trainer.estimated_stepping_batches = total
    found = [first / LR for first, _ in rates(made, total + 5)]
    half = total - total // 2
    assert found[0] == found[half] == pytest.approx(0.01)
    assert found[5] == found[half + 5] == pytest.approx(1)
    assert found[half - 1] < 0.01
    assert found[total - 1] < 0.01
    assert found[total:] == pytest.approx([0] * 5)
    halved = {"kind": "halved", "warmup_steps": 0, "lr_min": 0}
    made, _ = module(net={"training": order}, scheduler=halved)
    made.trainer.estimated_stepping_batches = total
    found = [first / LR for first, _ in rates(made, total)]
    assert (found[0], found[27], found[28], found[half - 1]) == (1, 1, 0.5, 0.125)
    assert (found[half], found[half + 27], found[half + 28], found[-1]) == (1, 1, 0.5, 0.125)


@pytest.mark.parametrize("net", [{}, {"cell": "convlstm"}, {"training": "deblur_first"}])
def test_offset_factor_reaches_only_the_convolutions_that_predict_offsets(module, net):
    made, _ = module(net=net, offset_lr_factor=0.1)
    optimizer = made.configure_optimizers()["optimizer"]
    names = {id(p): name for name, p in made.net.named_parameters()}
    rest, offsets = ({names.pop(id(p)) for p in group["params"]} for group in optimizer.param_groups)
    assert not names
    # weight and bias of three levels of stage I and of each sweep's alignment, of h and of c
    assert len(offsets) == 2 * (3 + (4 if net.get("cell") == "convlstm" else 2))
    assert offsets == {name for name in rest | offsets if ".offset_mask." in name}
    assert all(slow == pytest.approx(0.1 * fast) for fast, slow in rates(made, 120))


def test_network_without_deformable_convolutions_has_one_rate(module):
    made, _ = module(net={"interpolation": "blend", "fusion": "none"})
    assert len(made.configure_optimizers()["optimizer"].param_groups) == 1


def test_optimizer_is_adam_with_what_the_configuration_says(module):
    optimizer = module(optimizer={"lr": LR, "betas": [0.9, 0.99]})[0].configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.Adam
    assert tuple(optimizer.defaults["betas"]) == (0.9, 0.99)
    assert optimizer.defaults["weight_decay"] == 0


@pytest.mark.parametrize(("lr", "total"), [(0, 110), (-1, 110), (LR, math.inf)])
def test_schedule_without_a_rate_or_an_end_is_refused(module, lr, total):
    made, _ = module(optimizer={"lr": lr})
    made.trainer.estimated_stepping_batches = total
    with pytest.raises(InputError, match=r"the schedule needs optimizer.lr above 0 and an end"):
        made.configure_optimizers()


@pytest.mark.parametrize("training", ["joint", *ORDERS])
def test_bfloat16_gives_nearly_the_same_loss_and_gradient(module, training):
    losses, gradients = [], []
    for half in (False, True):
        made, _ = module(net={"training": training})
        stirred(made.net, 0.02)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses.append(made.training_step(batch(), 0))
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.net.parameters() if p.grad is not None]))
    assert losses[0] != losses[1]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    assert gradients[1].isfinite().all()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


# --- weights to start from ---


def started(made, path, ckpt_path=None):
    made.hparams.init_from = str(path)
    made.trainer.ckpt_path = ckpt_path
    made.on_fit_start()


@pytest.mark.parametrize("training", ["joint", *ORDERS])
def test_training_starts_from_the_weights_it_is_given_unless_it_is_resumed(module, tmp_path, training):
    given = build_network({**NET, "training": training})
    stirred(given)
    save_network(given, {**NET, "training": training}, tmp_path / "given.safetensors")
    made, _ = module(net={"training": training})
    before = {name: value.clone() for name, value in made.net.state_dict().items()}
    started(made, tmp_path / "given.safetensors", ckpt_path="last.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in made.net.state_dict().items())
    started(made, tmp_path / "given.safetensors")
    state = given.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made.net.state_dict().items())


def test_training_does_not_start_from_another_network(module, tmp_path):
    arguments = {**NET, "channels": 4}
    save_network(build_network(arguments), arguments, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors holds weights of another network"):
        started(module()[0], tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="absent"):
        started(module()[0], tmp_path / "absent.ckpt")


# --- validation ---


def plain_psnr(prediction, target):
    return -10 * (prediction - target).double().square().mean((-3, -2, -1)).log10()


@pytest.mark.parametrize("mode", ["multi", "single"])
@pytest.mark.parametrize(("height", "width"), [(32, 48), (40, 50)])
def test_validation_weighs_both_tasks_as_the_benchmark_does(module, height, width, mode):
    made, logged = module(mode=mode)
    stirred(made.net)
    sample = batch(height=height, width=width)
    made.eval().validation_step(sample, 0)
    each = plain_psnr(restore(made.net, sample["frames"], sample["times"], mode=mode), sample["targets"])[0]
    deblur, between = each[[0, 4]].mean().item(), each[1:4].mean().item()
    expected = {"psnr_deblur": deblur, "psnr_mfi": between, "psnr": (7 * between + deblur) / 8}
    assert {name: value.item() for name, value in logged.items()} == {
        f"val/{name}": pytest.approx(value, abs=1e-4) for name, value in expected.items()
    }
    other = {"multi": "single", "single": "multi"}[mode]
    again = plain_psnr(restore(made.net, sample["frames"], sample["times"], mode=other), sample["targets"])[0]
    assert abs(again[1:4].mean().item() - between) > 1e-4


def test_validation_without_times_is_of_deblurring(module):
    made, logged = module()
    made.eval().validation_step(batch(times=()), 0)
    assert set(logged) == {"val/psnr", "val/psnr_deblur"}
    assert logged["val/psnr"] == logged["val/psnr_deblur"]


def mean_offset(made, logged):
    made.eval().on_validation_epoch_start()
    made.validation_step(batch(), 0)
    made.validation_step(batch(1), 1)
    made.on_validation_epoch_end()
    return logged["val/mean_offset"].item()


@pytest.mark.parametrize(
    ("net", "largest"),
    [
        ({}, MAX_OFFSET), ({"time_cond": "linear"}, MAX_OFFSET), ({"guidance": "flow"}, MAX_OFFSET),
        ({"bounded_offsets": False}, 30), ({"guidance": "flow", "bounded_offsets": False}, 30),
        ({"training": "interpolate_first"}, MAX_OFFSET),
    ],
)  # fmt: skip
def test_mean_offset_is_zero_at_the_start_and_measured_as_it_acts(module, net, largest):
    made, logged = module(net=net)
    assert mean_offset(made, logged) == 0
    for value, expected in ((30.0, largest), (-0.1, 0.1 if largest == 30 else MAX_OFFSET * math.tanh(0.1))):
        for conv in made.net.modules():
            if isinstance(conv, DeformConv):
                torch.nn.init.constant_(conv.offset_mask.bias, value)
        assert mean_offset(made, logged) == pytest.approx(expected)


def test_offset_hooks_are_gone_after_the_validation(module):
    made, logged = module()
    mean_offset(made, logged)
    convs = [m for m in made.net.modules() if isinstance(m, DeformConv)]
    assert len(convs) == 5
    assert not any(conv.offset_mask._forward_hooks for conv in convs)
    alone, logged = module(net={"interpolation": "blend", "fusion": "none"})
    alone.on_validation_epoch_start()
    alone.eval().validation_step(batch(), 0)
    alone.on_validation_epoch_end()
    assert "val/mean_offset" not in logged


# --- test ---


def score_all(made, samples, set_name="noise"):
    made.eval().on_test_epoch_start()
    for i, sample in enumerate(samples):
        made.score(sample, i, set_name)
    made.on_test_epoch_end()


def test_scores_are_means_within_videos_then_over_them_with_every_input_deblurred_once(module):
    made, logged = module()
    stirred(made.net)
    samples = [
        batch(0, scene="a", is_last=False), batch(1, scene="a", is_last=True, height=40, width=50),
        batch(2, scene="b", is_last=True),
    ]  # fmt: skip
    # one video is easier, so that it matters how the averages are taken
    samples[2]["targets"] = linear_blend(samples[2]["frames"], samples[2]["times"]) + 0.01
    score_all(made, samples)
    methods = {
        "test": lambda s: restore(made.net, s["frames"], s["times"]),
        "baseline": lambda s: linear_blend(s["frames"], s["times"]),
        "peer/flow_warp": lambda s: flow_warp(s["frames"], s["times"]),
        "peer/exact_warp": lambda s: exact_warp(s["frames"], s["times"], s["flows"], s["visibility"]),
        "peer/sharp_warp": lambda s: oracle_warp(s["targets"], s["times"], s["flows"], s["visibility"]),
    }
    for stage, method in methods.items():
        each = [frame_scores(method(s), s["targets"]) for s in samples]
        quality = [scores["psnr"][0] for scores in each]
        mfi = ((quality[0][1:4].mean() + quality[1][1:4].mean()) / 2 + quality[2][1:4].mean()) / 2
        assert logged[f"{stage}/noise/psnr_mfi"] == pytest.approx(mfi.item())
        if stage == "peer/sharp_warp":
            assert [name for name in logged if name.startswith(stage)] == [f"{stage}/noise/psnr_mfi"]
            continue
        # of the first video two inputs and its last window's second, of the other one and its second
        deblur = (torch.stack([quality[0][0], quality[1][0], quality[1][4]]).mean() + quality[2][[0, 4]].mean()) / 2
        assert logged[f"{stage}/noise/psnr_deblur"] == pytest.approx(deblur.item())
        assert logged[f"{stage}/noise/psnr"] == pytest.approx(((3 * mfi + deblur) / 4).item())
        profile = ((quality[0] + quality[1]) / 2 + quality[2]) / 2
        assert logged[f"{stage}/noise/psnr_range"] == pytest.approx((profile.max() - profile.min()).item())
        assert logged[f"{stage}/noise/psnr_middle"] == pytest.approx(profile[2].item())
        flows = [tof(method(s), s["targets"])[0].mean() for s in samples]
        assert logged[f"{stage}/noise/tof"] == pytest.approx((((flows[0] + flows[1]) / 2 + flows[2]) / 2).item())
        for name, metric in (("ssim", "ssim"), ("psnr_fine", "high_frequency_error")):
            values = [scores[metric][0] for scores in each]
            inner = ((values[0][1:4].mean() + values[1][1:4].mean()) / 2 + values[2][1:4].mean()) / 2
            ends = (torch.stack([values[0][0], values[1][0], values[1][4]]).mean() + values[2][[0, 4]].mean()) / 2
            mean = ((3 * inner + ends) / 4).item()
            expected = -10 * math.log10(mean) if name == "psnr_fine" else mean
            assert logged[f"{stage}/noise/{name}"] == pytest.approx(expected)


@pytest.mark.parametrize("options", [{}, {"ensemble": True}, {"mode": "single"}, {"orders": 0}, {"orders": 4}], ids=str)
def test_scores_are_of_what_the_options_say(module, options):
    made, logged = module(peers=False, **options)
    stirred(made.net)
    sample = batch(height=36, width=50)
    score_all(made, [sample])
    quality = frame_scores(restore(made.net, sample["frames"], sample["times"], **options), sample["targets"])["psnr"]
    assert logged["test/noise/psnr_mfi"] == pytest.approx(quality[0, 1:4].mean().item(), rel=1e-9)
    plain = frame_scores(restore(made.net, sample["frames"], sample["times"]), sample["targets"])["psnr"]
    assert bool((plain != quality).any()) == bool(options)


def test_scores_are_of_single_precision_whatever_the_training_was_in(module):
    found = []
    for half in (False, True):
        made, logged = module()
        stirred(made.net)
        made.trainer.datamodule = SimpleNamespace(test_names=["other", "noise"])
        made.eval().on_test_epoch_start()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            made.test_step(batch(), 0, dataloader_idx=1)
            made.on_test_epoch_end()
        found.append(dict(logged))
    assert found[0] == found[1]
    assert "test/noise/psnr" in found[0]


def test_peers_are_scored_where_there_is_something_to_compare(module):
    without = batch()
    del without["flows"], without["visibility"]
    always = {"test", "baseline"}
    for sample, peers, expected in (
        (batch(), True, always | {"peer/flow_warp", "peer/exact_warp", "peer/sharp_warp"}),
        (without, True, always | {"peer/flow_warp"}),
        (batch(), False, always),
    ):
        made, logged = module(peers=peers)
        score_all(made, [sample])
        assert {name.removesuffix("/noise/psnr_mfi") for name in logged if name.endswith("/psnr_mfi")} == expected


def test_film_that_stands_still_has_infinite_scores(module):
    made, logged = module(peers=False)
    sample = batch()
    sample["frames"] = sample["frames"][:, :1].expand(-1, 4, -1, -1, -1)
    sample["targets"] = sample["frames"][:, :1].expand(-1, 5, -1, -1, -1)
    score_all(made, [sample])
    assert {logged[f"baseline/noise/{name}"] for name in ("psnr", "psnr_fine")} == {math.inf}


def test_processes_score_their_own_windows_and_log_the_means_of_all(module, monkeypatch):
    samples = [batch(i, scene="ab"[i % 2], is_last=i > 1) for i in range(4)]
    made, alone = module(peers=False)
    score_all(made, samples)
    sums = []
    for rank in range(2):
        made, _ = module(peers=False)
        made.eval().on_test_epoch_start()
        for i in range(rank, 4, 2):
            made.score(samples[i], i, "noise")
        sums.append({key: mean.sums for key, mean in made._means.items()})
    made, logged = module(peers=False)
    made.eval().on_test_epoch_start()
    made.trainer.world_size = 2
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(module_file.dist, name, lambda: True)

    def gather(found, mine):
        assert mine == {}
        found[:] = sums

    monkeypatch.setattr(module_file.dist, "all_gather_object", gather)
    made.on_test_epoch_end()
    assert logged == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize(
    ("restoration", "training"), [("taylor", "joint"), ("none", "joint"), ("taylor", "deblur_first")]
)
def test_pictures_are_drawn_of_the_first_windows_of_each_set(module, tmp_path, restoration, training):
    made, _ = module(net={"restoration": restoration, "training": training}, peers=False, num_pictures=1)
    made.eval().on_test_epoch_start()
    for set_name in ("slow", "fast"):
        for i in range(2):
            made.score(batch(i), i, set_name)
    made.on_test_epoch_end()
    names = {f"{name}_{end}" for name in ("slow", "fast") for end in ("noise_0", "profile")}
    if (restoration, training) == ("taylor", "joint"):
        names |= {"slow_noise_0_taylor", "fast_noise_0_taylor"}
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == names


def test_terms_that_are_drawn_add_up_from_the_blend_to_the_frame(module, monkeypatch):
    made, _ = module()
    stirred(made.net, 0.02)
    sample = batch(times=[k / 8 for k in range(1, 8)])
    made.eval()
    shown = {}
    monkeypatch.setattr(module_file, "picture_grid", lambda rows, labels: shown.update(rows=rows, labels=labels))
    made.taylor_terms(sample)
    assert shown["labels"] == ["blend", "0 orders", "1 orders", "2 orders", "truth"]
    whole = restore(made.net, sample["frames"], [0.5])[0, 1].clamp(0, 1)
    torch.testing.assert_close(shown["rows"][0][3], whole)
    torch.testing.assert_close(shown["rows"][0][0], linear_blend(sample["frames"], torch.tensor([[0.5]]))[0, 1])
    assert torch.equal(shown["rows"][0][4], sample["targets"][0, 4])


# --- files ---


@pytest.mark.parametrize("training", ["joint", *ORDERS])
def test_a_file_becomes_a_module_that_is_scored(module, tmp_path, training):
    arguments = {**NET, "training": training}
    given = build_network(arguments)
    save_network(given, arguments, tmp_path / "a.safetensors")
    made = load_module(tmp_path / "a.safetensors", ensemble=True, orders=1)
    assert (made.hparams.ensemble, made.hparams.orders) == (True, 1)
    state = given.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made.net.state_dict().items())


def test_files_that_hold_no_network_of_ours_are_refused_by_name(tmp_path):
    for content in ({"conv.weight": torch.zeros(2)}, {"state_dict": {}, "hyper_parameters": {"net": {"width": 8}}}):
        torch.save(content, tmp_path / "stranger.ckpt")
        with pytest.raises(InputError, match=r"stranger\.ckpt"):
            load_module(tmp_path / "stranger.ckpt")
