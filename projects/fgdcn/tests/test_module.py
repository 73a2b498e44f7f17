"""What one step, one validation and one score do, without a trainer around them."""

import math
from types import SimpleNamespace

import pytest
import torch

from projects.fgdcn.checkpoints import save_network
from projects.fgdcn.inference import interpolate
from projects.fgdcn.loss import distillation_loss, interpolation_losses
from projects.fgdcn.model import FGDCN, MAX_RESIDUAL, resize_flow
from projects.fgdcn.module import FrameInterpolation, load_module, start_from
from projects.fgdcn.scores import end_point_error, scores
from shared.errors import InputError
from shared.metrics import high_frequency_error

NET = {"block_channels": [8, 6, 4], "channels": 4, "offset_channels": 4, "num_groups": 2}
WEIGHTS = {"laplacian": 1.0, "flow": 0.01, "frequency": 25.6, "census": 2.0}
NOTHING = dict.fromkeys(WEIGHTS, 0.0)
LOSS = {"form": "standard", "laplacian_kernel": "gaussian", "frequency_norm": "ortho", "weights": WEIGHTS}
LR = 1e-3


@pytest.fixture
def module(monkeypatch):
    """Make a module outside a trainer of 110 steps -> (module, what it logs)."""
    trainer = SimpleNamespace(estimated_stepping_batches=110, is_global_zero=True)
    monkeypatch.setattr(FrameInterpolation, "trainer", trainer)

    def make(net=None, weights=WEIGHTS, form="standard", **options):
        torch.manual_seed(0)
        options = {"optimizer": {"lr": LR}, "scheduler": {"warmup_steps": 10, "lr_min": LR / 10}} | options
        made = FrameInterpolation(NET | (net or {}), LOSS | {"weights": weights, "form": form}, **options)
        logged = {}
        made.log = lambda name, value, **options: logged.update({name: value})
        made.log_dict = lambda values, **options: logged.update(values)
        made.all_gather = lambda value: value
        return made, logged

    return make


def batch(seed=0, height=32, width=32):
    """Two frames of noise, with random flows and visibilities."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "frames": torch.rand(1, 2, 3, height, width, generator=generator),
        "target": torch.rand(1, 3, height, width, generator=generator),
        "flows": 2 * torch.randn(1, 4, height, width, generator=generator),
        "visibility": (torch.rand(1, 2, height, width, generator=generator) < 0.6).float(),
        "name": [f"noise_{seed}"],
    }


def biased(net, value):
    """Make every predicted offset the same whatever is seen."""
    for conv in net.compensation.convs.values():
        torch.nn.init.constant_(conv.offset_mask.bias, value)


# --- training ---


def test_loss_is_the_sum_of_the_terms_that_it_logs(module):
    made, logged = module()
    loss = made.training_step(batch(), 0)
    expected = interpolation_losses(made.net(batch()["frames"]), batch()["target"], batch()["flows"], **LOSS)
    assert set(logged) == {"train/loss"} | {f"train/loss/{name}" for name in WEIGHTS}
    for name, value in expected.items():
        torch.testing.assert_close(logged[f"train/loss/{name}"], value)
    torch.testing.assert_close(loss, sum(expected.values()))


def test_without_flows_everything_but_the_distillation_trains(module):
    made, logged = module()
    sample = batch()
    del sample["flows"]
    made.training_step(sample, 0)
    assert {name.split("/")[-1] for name in logged} == {"loss", "laplacian", "frequency", "census"}


def test_distillation_alone_runs_and_changes_only_the_coarse_flow_network(module):
    made, logged = module(weights=NOTHING | {"flow": 0.5})
    expected = 0.5 * distillation_loss(made.net(batch()["frames"]).flows, batch()["flows"])
    before = {name: value.clone() for name, value in made.net.state_dict().items()}

    def refuse(*args):
        raise AssertionError("the distillation needs no context features")

    made.net.context.register_forward_pre_hook(refuse)
    optimizer = made.configure_optimizers()["optimizer"]
    loss = made.training_step(batch(), 0)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(loss, expected)
    assert set(logged) == {"train/loss", "train/loss/flow"}
    changed = {name for name, value in made.net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("flow_net.")}


@pytest.mark.parametrize(
    ("options", "flows"),
    [
        ({"weights": NOTHING}, True),
        ({"weights": NOTHING | {"flow": 1.0}}, False),
        # the pyramid form has no census term
        ({"weights": NOTHING | {"census": 1.0}, "form": "pyramid", "net": {"pyramid_heads": True}}, True),
    ],
)
def test_loss_with_no_term_left_is_refused(module, options, flows):
    sample = batch()
    if not flows:
        del sample["flows"]
    with pytest.raises(InputError, match="no term of the loss is left"):
        module(**options)[0].training_step(sample, 0)


def test_unknown_form_is_refused_before_anything_is_built(module):
    with pytest.raises(InputError, match=r"unknown loss\.form 'sum'"):
        module(form="sum")


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
    found = [first for first, *_ in rates(module()[0], 120)]
    # 1 % of it at once, half-way up at 5, half-way down between 10 and 110, a tenth from then on
    expected = {0: 0.01, 5: 0.505, 10: 1, 35: 0.55 + 0.45 * math.sqrt(0.5), 60: 0.55, 110: 0.1, 119: 0.1}
    assert {step: found[step] / LR for step in expected} == pytest.approx(expected)
    straight = rates(module(scheduler={"warmup_steps": 0, "lr_min": LR})[0], 3)
    assert straight == [[LR, LR, LR]] * 3


def test_offset_factor_reaches_only_the_convolutions_that_predict_offsets(module):
    made, _ = module(offset_lr_factor=0.1)
    optimizer = made.configure_optimizers()["optimizer"]
    names = {id(p): name for name, p in made.net.named_parameters()}
    rest, flow_step, offsets = ({names.pop(id(p)) for p in group["params"]} for group in optimizer.param_groups)
    assert not names
    assert len(offsets) == 6
    assert offsets == {name for name in rest | offsets if ".offset_mask." in name}
    assert all(name.startswith(("flow_net.", "context.", "refine.")) for name in flow_step)
    assert all(name.startswith(("compensation.", "fusion.")) for name in rest)
    assert all((flow, slow) == pytest.approx((fast, 0.1 * fast)) for fast, flow, slow in rates(made, 120))
    alone = module(net={"compensation": False})[0].configure_optimizers()["optimizer"]
    assert len(alone.param_groups) == 1


def test_flow_step_learns_at_its_own_rate_or_not_at_all(module):
    found = rates(module(flow_step_lr_factor=0.1)[0], 120)
    assert all((flow, slow) == pytest.approx((0.1 * fast, fast)) for fast, flow, slow in found)
    made, _ = module(flow_step_lr_factor=0.0)
    trained = {id(p) for group in made.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    still = {name for name, p in made.net.named_parameters() if id(p) not in trained}
    assert still == {n for n, _ in made.net.named_parameters() if n.startswith(("flow_net.", "context.", "refine."))}
    assert not any(p.requires_grad for n, p in made.net.named_parameters() if n in still)
    with pytest.raises(InputError, match="nothing to train"):
        module(flow_step_lr_factor=0.0, net={"compensation": False})


def test_optimizer_is_adam_with_what_the_configuration_says(module):
    optimizer = module(optimizer={"lr": LR, "betas": [0.9, 0.99]})[0].configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.Adam
    assert tuple(optimizer.defaults["betas"]) == (0.9, 0.99)
    assert optimizer.defaults["weight_decay"] == 0


def test_bfloat16_gives_nearly_the_same_loss_and_gradient(module):
    losses, gradients = [], []
    for half in (False, True):
        made, _ = module()
        biased(made.net, 0.3)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses.append(made.training_step(batch(), 0))
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in made.net.parameters()]))
    assert losses[0] != losses[1]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)
    assert gradients[1].isfinite().all()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


# --- weights to start from ---


def saved(path, **net):
    torch.manual_seed(1)
    made = FGDCN(**NET | net)
    save_network(made, NET | net, path)
    return made.state_dict()


def test_training_starts_from_the_same_network(module, tmp_path):
    state = saved(tmp_path / "whole.safetensors")
    made, _ = module()
    start_from(made.net, tmp_path / "whole.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in made.net.state_dict().items())


def test_training_starts_from_the_flow_step_and_keeps_its_own_deformation_step(module, tmp_path):
    state = saved(tmp_path / "flow.safetensors", compensation=False)
    made, _ = module()
    own = {name: value.clone() for name, value in made.net.state_dict().items()}
    start_from(made.net, tmp_path / "flow.safetensors")
    kept = [name for name in own if name.startswith(("compensation.", "fusion."))]
    assert len(kept) + len(state) == len(own)
    expected = state | {name: own[name] for name in kept}
    assert all(torch.equal(value, expected[name]) for name, value in made.net.state_dict().items())


@pytest.mark.parametrize("net", [{"channels": 6}, {"block_channels": [8, 6, 8]}, {"levels": [1, 2]}])
def test_training_does_not_start_from_another_network(module, tmp_path, net):
    saved(tmp_path / "other.safetensors", **net)
    with pytest.raises(InputError, match=r"other\.safetensors holds weights of another network"):
        start_from(module()[0].net, tmp_path / "other.safetensors")


# --- validation ---


@pytest.mark.parametrize(("height", "width"), [(32, 48), (40, 50)])
def test_validation_scores_frame_anchor_and_both_flows_at_any_size(module, height, width):
    made, logged = module()
    sample = batch(height=height, width=width)
    made.eval().validation_step(sample, 0)
    output = interpolate(made.net, sample["frames"])
    for name, frame in (("psnr", output.frame), ("psnr_anchor", output.anchor)):
        error = (frame - sample["target"]).double().square().mean()
        assert logged[f"val/{name}"].item() == pytest.approx(-10 * math.log10(error), abs=1e-4)
    found = end_point_error(output.flow, sample["flows"], sample["visibility"])
    assert logged["val/end_point_error"].item() == pytest.approx(found.item())
    assert 0 < logged["val/end_point_error_coarse"] != logged["val/end_point_error"]


def test_coarse_flow_is_scored_at_full_size(module):
    made, logged = module()
    sample = batch()
    coarse = made.eval().net(sample["frames"]).flows[-1]
    made.validation_step(sample | {"flows": resize_flow(coarse, 2).detach()}, 0)
    assert logged["val/end_point_error_coarse"].item() == pytest.approx(0, abs=1e-6)


def test_validation_without_flows_scores_frames_alone(module):
    made, logged = module()
    sample = batch()
    made.eval().validation_step({name: sample[name] for name in ("frames", "target")}, 0)
    assert set(logged) == {"val/psnr", "val/psnr_anchor"}


def residual(made, logged):
    made.on_validation_epoch_start()
    made.validation_step(batch(), 0)
    made.validation_step(batch(1), 1)
    made.on_validation_epoch_end()
    return logged["val/mean_residual"].item()


def test_residual_is_zero_at_the_start_and_measured_as_it_acts(module):
    for guidance, expected in (("flow", MAX_RESIDUAL), ("none", MAX_RESIDUAL), ("none_unbounded", 30)):
        made, logged = module(net={"guidance": guidance})
        assert residual(made, logged) == 0
        biased(made.net, 30.0)
        assert residual(made, logged) == pytest.approx(expected)
        biased(made.net, -0.1)
        assert residual(made, logged) == pytest.approx(0.1 if expected == 30 else MAX_RESIDUAL * math.tanh(0.1))


def test_residual_hooks_are_gone_after_the_validation(module):
    made, logged = module()
    residual(made, logged)
    convs = made.net.compensation.convs.values()
    assert not any(conv.offset_mask._forward_hooks for conv in convs)
    alone, logged = module(net={"compensation": False})
    alone.on_validation_epoch_start()
    alone.validation_step(batch(), 0)
    alone.on_validation_epoch_end()
    assert "val/mean_residual" not in logged


# --- test ---


def score_all(made, samples):
    made.eval().on_test_epoch_start()
    for i, sample in enumerate(samples):
        made.score(sample, i, "noise")
    made.on_test_epoch_end()


def test_psnr_by_visibility_is_of_the_pixels_of_all_triplets_together(module):
    made, logged = module(num_pictures=0)
    samples = [batch(1), batch(2, 40, 50)]
    samples[1]["target"] = (samples[1]["target"] + samples[1]["frames"].mean(1)) / 2  # an easier one
    score_all(made, samples)
    for stage in ("test", "baseline", "peer/anchor"):
        errors, seen = [], []
        for sample in samples:
            output = interpolate(made.net, sample["frames"])
            frame = {"test": output.frame, "baseline": sample["frames"].mean(1), "peer/anchor": output.anchor}[stage]
            errors.append((frame - sample["target"]).double().square().mean(1).flatten())
            seen.append(sample["visibility"].sum(1).flatten())
        errors, seen = torch.cat(errors), torch.cat(seen)
        for name, count in (("both", 2), ("one", 1), ("none", 0)):
            expected = -10 * math.log10(errors[seen == count].mean())
            assert logged[f"{stage}/noise/psnr_{name}"].item() == pytest.approx(expected, abs=1e-4)
    deficit = logged["test/noise/psnr_both"] - logged["test/noise/psnr_one"]
    assert logged["test/noise/occlusion_deficit"].item() == pytest.approx(deficit.item(), abs=1e-5)


def test_visibilities_that_no_pixel_has_are_left_out(module):
    made, logged = module(num_pictures=0, peers=False)
    score_all(made, [batch() | {"visibility": torch.ones(1, 2, 32, 32)}])
    assert "test/noise/psnr_both" in logged
    assert not [name for name in logged if "psnr_one" in name or "psnr_none" in name or "deficit" in name]


@pytest.mark.parametrize(
    "options",
    [{}, {"ensemble": True}, {"flow_scale": 0.5}, {"pad_mode": "zeros"}, {"metric_protocol": "round8"}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_scores_are_of_what_the_options_say(module, options):
    made, logged = module(num_pictures=0, peers=False, **options)
    biased(made.net, 0.3)
    sample = batch(height=36, width=50)
    score_all(made, [sample])
    protocol = options.get("metric_protocol", "float")
    given = {name: value for name, value in options.items() if name != "metric_protocol"}
    output = interpolate(made.net, sample["frames"], **given)
    expected = scores(output.frame, sample["target"], protocol)
    for name, value in expected.items():
        assert logged[f"test/noise/{name}"].item() == pytest.approx(value.item(), rel=1e-6)
    sharp = -10 * math.log10(high_frequency_error(output.frame, sample["target"]))
    assert logged["test/noise/psnr_fine"].item() == pytest.approx(sharp, rel=1e-6)
    error = end_point_error(output.flow, sample["flows"], sample["visibility"])
    assert logged["test/noise/end_point_error"].item() == pytest.approx(error.item(), rel=1e-6)
    plain = scores(interpolate(made.net, sample["frames"]).frame, sample["target"], "float")
    assert (plain["psnr"] != expected["psnr"]).item() == bool(options)


def test_scores_are_of_single_precision_whatever_the_training_was_in(module):
    found = []
    for half in (False, True):
        made, logged = module(num_pictures=0)
        made.trainer.datamodule = SimpleNamespace(test_names=["other", "noise"])
        made.eval().on_test_epoch_start()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            made.test_step(batch(), 0, dataloader_idx=1)
        found.append({name: value.item() for name, value in logged.items()})
    assert found[0] == found[1]
    assert "test/noise/psnr" in found[0]


def test_peers_are_scored_where_there_is_something_to_compare(module):
    names = {True: {"test", "baseline", "peer/anchor", "peer/flow_warp"}, False: {"test", "baseline", "peer/anchor"}}
    for peers, expected in names.items():
        made, logged = module(num_pictures=0, peers=peers)
        score_all(made, [batch()])
        assert {name.removesuffix("/noise/psnr") for name in logged if name.endswith("/psnr")} == expected
    made, logged = module(num_pictures=0, peers=False, net={"compensation": False})
    score_all(made, [batch()])
    assert not any(name.startswith("peer/") for name in logged)


def test_a_file_becomes_a_module_that_is_scored(module, tmp_path):
    state = saved(tmp_path / "a.safetensors")
    made = load_module(tmp_path / "a.safetensors", ensemble=True)
    assert made.hparams.ensemble
    assert all(torch.equal(value, state[name]) for name, value in made.net.state_dict().items())


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"net.conv.weight": torch.zeros(2)}, "hyper_parameters": {"net": {"name": "mdrn", "width": 8}}},
        {"state_dict": {"net.conv.weight": torch.zeros(2)}, "hyper_parameters": {"scale": 2}},
        {"conv.weight": torch.zeros(2)},
        {0: torch.zeros(2)},
    ],
    ids=["another project's", "no network", "no names of ours", "numbered"],
)
def test_files_that_hold_no_network_of_ours_are_refused_by_name(tmp_path, content):
    torch.save(content, tmp_path / "stranger.ckpt")
    with pytest.raises(InputError, match=r"stranger\.ckpt"):
        load_module(tmp_path / "stranger.ckpt")
