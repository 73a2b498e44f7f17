"""The network: its size part by part, time reversal, what each stage promises, every switch, gradients."""

import copy
import inspect
import itertools

import pytest
import torch
from torch.nn import functional as F

from projects.bvfi.layers import MAX_OFFSET, DeformConv, ResidualBlock
from projects.bvfi.model import (
    BVFI,
    CHOICES,
    RecurrentAlignment,
    TemporalDeformable,
    TimedConv,
    source_weights,
)
from projects.bvfi.taylor import BODIES, TAYLOR_FORMS, Derivative, TransformerBlock
from shared.errors import InputError

NANO = {
    "channels": 8, "num_groups": 2, "num_embed_blocks": 1, "num_sweep_blocks": 1, "num_main_blocks": 1,
    "num_derivative_blocks": 1, "num_heads": 2, "orders": 2,
}  # fmt: skip
# every value of every switch of BVFI but its first, which the default network has; "mode" is not of the network
SWITCHES = [
    *({name: value} for name, values in CHOICES.items() if name != "mode" for value in values[1:]),
    *({"taylor": value} for value in TAYLOR_FORMS[1:]), *({"derivative_body": value} for value in BODIES[1:]),
    {"feature_stride": 1}, {"num_sources": 4}, {"bounded_offsets": False}, {"second_order": True},
    {"share_derivative": False}, {"orders": 0}, {"cell": "convlstm", "second_order": True},
    {"guidance": "flow", "time_cond": "linear"}, {"guidance": "flow", "bounded_offsets": False},
    {"num_sources": 4, "time_cond": "linear", "guidance": "flow"},
]  # fmt: skip
KINDS = {
    "interpolation": 2, "fusion": 2, "restoration": 2, "time_cond": 3, "guidance": 2, "sweeps": 3, "cell": 2,
    "centring": 2, "mode": 2,
}  # fmt: skip


def count(module):
    return sum(p.numel() for p in module.parameters())


def noisy(module, amount=0.05):
    """Move every parameter a little, so that nothing is zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=amount)
    return module


def network(amount=0.0, **arguments):
    torch.manual_seed(0)
    return noisy(BVFI(**{**NANO, **arguments}), amount).eval()


def label(arguments):
    return "-".join(f"{name}={value}" for name, value in arguments.items())


@pytest.fixture
def frames():
    return 0.4 + 0.2 * torch.rand(2, 4, 3, 16, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def times():
    return torch.tensor([[0.125, 0.5, 0.75], [0.25, 0.375, 0.625]])


def blurred(height, width, num_frames=4):
    """Smooth frames (1, n, 3, H, W)."""
    small = torch.rand(num_frames, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(3))
    return F.interpolate(small, (height, width), mode="bilinear", align_corners=False)[None]


# --- size ---


def test_reference_design_has_the_parameters_of_its_table_part_by_part():
    with torch.device("meta"):
        net = BVFI()
    assert count(net.embed) + count(net.pyramid) == 523_968
    tdn = net.tdn
    assert count(tdn.offsets) == 518_400
    assert count(tdn.convs) == 484_680
    assert count(tdn.cascade) == 147_584
    assert count(tdn.weigh) + count(tdn.logit) + count(tdn.last) == 75_009
    assert count(net.coarse_head) == 6_924
    assert count(tdn) + count(net.coarse_head) == 1_232_597
    assert count(net.brda.fwd) + count(net.brda.bwd) == 1_799_984
    assert count(net.brda.fusion) == 12_352
    assert count(net.tta.main) == 738_560
    assert count(net.tta.derivatives) == 651_440
    assert count(net.head) == 43_852
    assert count(net) == 5_002_753
    assert count(TransformerBlock(64, 4)) == 54_072


@pytest.mark.parametrize(
    ("expected", "sizes"), [(782_833, (32, 4, 2, 2, 3, 2)), (216_733, (16, 4, 1, 1, 2, 1))], ids=["small", "nano"]
)
def test_smaller_sizes_have_their_parameters(expected, sizes):
    names = ("channels", "num_groups", "num_embed_blocks", "num_sweep_blocks", "num_main_blocks")
    with torch.device("meta"):
        net = BVFI(**dict(zip((*names, "num_derivative_blocks"), sizes, strict=True)))
    assert count(net) == expected


# --- switches ---


def test_switches_are_the_ones_listed_here():
    """A new choice must come into SWITCHES and KINDS."""
    assert {name: len(values) for name, values in CHOICES.items()} == KINDS
    assert (len(TAYLOR_FORMS), len(BODIES)) == (2, 2)
    listed = {name for arguments in SWITCHES for name in arguments}
    assert listed | set(NANO) == set(inspect.signature(BVFI).parameters)


@pytest.mark.parametrize("arguments", [{}, *SWITCHES], ids=label)
def test_every_switch_runs_and_every_parameter_receives_a_gradient(frames, times, arguments):
    net = network(0.02, **arguments)
    output = net(frames, times)
    assert output.frames.shape == (2, 5, 3, 16, 32)
    assert output.coarse.shape == (2, 3, 3, 16, 32)
    assert output.frames.isfinite().all()
    output.frames.square().sum().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("arguments", [{}, {"cell": "convlstm"}, {"guidance": "flow"}], ids=label)
def test_equal_seeds_give_equal_bits(frames, times, arguments):
    first, second = (network(0.02, **arguments)(frames, times) for _ in range(2))
    assert torch.equal(first.frames, second.frames)
    torch.manual_seed(1)
    other = noisy(BVFI(**{**NANO, **arguments}), 0.02)(frames, times)
    assert not torch.equal(first.frames, other.frames)


@pytest.mark.parametrize("arguments", [{"restoration": "none"}, {"fusion": "none"}, {"interpolation": "blend"}])
def test_stages_left_out_are_not_there(arguments):
    whole, part = network(), network(**arguments)
    assert count(part) < count(whole)
    assert set(part.state_dict()) < set(whole.state_dict())


def test_names_of_weights_are_a_contract():
    names = {name.split(".")[0] for name in network(guidance="flow").state_dict()}
    assert names == {"embed", "pyramid", "tdn", "coarse_head", "brda", "tta", "head"}
    assert {"brda.fwd.align.offset_mask.weight", "brda.bwd.align.weight", "tta.derivatives.0.last.bias"} < set(
        network().state_dict()
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(({name: "other"}, f"unknown {name} 'other'; choose one of") for name in CHOICES if name != "mode"),
        ({"taylor": "other"}, "unknown taylor form 'other'"),
        ({"derivative_body": "other"}, "unknown derivative_body 'other'"),
        ({"num_groups": 3}, "num_groups=3 must divide channels=8"),
        ({"num_groups": 0}, "num_groups=0 must divide"),
        ({"channels": 0}, "must divide channels=0"),
        ({"num_heads": 3}, "num_heads=3 must divide channels=8"),
        ({"num_heads": 0}, "num_heads=0 must divide"),
        ({"feature_stride": 4}, "feature_stride=4 is 1 or 2"),
        ({"num_sources": 3}, "num_sources=3 is 2 or 4"),
        ({"orders": -1}, "orders=-1 must be 0 .. 16"),
        ({"orders": 17}, "orders=17 must be"),
        ({"orders": 1.5}, "orders=1.5 must be"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(InputError, match=words):
        network(**arguments)


@pytest.mark.parametrize(
    ("shape", "arguments", "words"),
    [
        ((1, 4, 3, 30, 32), {}, "frames of 30x32 must be padded to multiples of 16"),
        ((1, 4, 3, 0, 16), {}, "frames of 0x16"),
        ((4, 3, 32, 32), {}, "an even number of RGB frames"),
        ((1, 3, 3, 32, 32), {}, "an even number of RGB frames"),
        ((1, 0, 3, 32, 32), {}, "an even number of RGB frames"),
        ((1, 4, 1, 32, 32), {}, "an even number of RGB frames"),
        ((1, 2, 3, 32, 32), {"num_sources": 4}, "n >= 4"),
    ],
)
def test_frames_of_another_shape_are_refused(shape, arguments, words):
    with pytest.raises(InputError, match=words):
        network(**arguments)(torch.zeros(shape), torch.full((1, 1), 0.5))


def test_mode_and_orders_that_do_not_exist_are_refused(frames, times):
    with pytest.raises(InputError, match="unknown mode 'both'"):
        network()(frames, times, mode="both")
    with pytest.raises(InputError, match=r"orders=17 must be 0 \.\. 16 for this network"):
        network()(frames, times, orders=17)
    with pytest.raises(InputError, match="orders=1 is for networks with restoration=taylor"):
        network(restoration="none")(frames, times, orders=1)


# --- embedding ---


def test_centring_shows_the_difference_from_the_windows_mean(frames):
    net, plain = network(), network(centring="none")
    mean = frames.mean(1, keepdim=True)
    shown = 10 * (frames - mean) + 0.5 * (mean - 0.5)
    assert torch.equal(net.encode(frames), plain.encode(shown))
    assert not torch.allclose(net.encode(frames), plain.encode(frames))


def test_residual_blocks_start_near_the_identity():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8)
    change = ResidualBlock(16)(x) - x
    assert 0 < change.std() < 0.1 * x.std()


# --- stage I ---


def test_timed_convolution_is_that_of_the_features_and_a_map_of_the_time():
    torch.manual_seed(0)
    conv, features = TimedConv(6, 5).double(), torch.randn(3, 6, 9, 7, dtype=torch.float64)
    times = torch.rand(3, 4, dtype=torch.float64)
    found = conv(features, times).unflatten(0, (3, 4))
    for k in range(4):
        maps = times[:, k, None, None, None].expand(-1, 1, 9, 7)
        expected = F.conv2d(torch.cat((features, maps), 1), conv.weight, conv.bias, padding=1)
        torch.testing.assert_close(found[:, k], expected)
    conv(features, times).square().sum().backward()
    assert conv.weight.grad[:, -1].any()


def stage(num_sources=2, time_cond="concat", guidance="none", bounded=True, amount=0.1):
    torch.manual_seed(0)
    return noisy(TemporalDeformable(6, 2, time_cond, guidance, num_sources, bounded), amount)


def pyramids(num_sources, batch=2):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(batch, num_sources, 6, 16 // 2**i, 24 // 2**i, generator=generator) for i in range(3)]


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("guidance", CHOICES["guidance"])
@pytest.mark.parametrize("time_cond", CHOICES["time_cond"])
@pytest.mark.parametrize("num_sources", [2, 4])
def test_playing_backwards_leaves_the_frame_between_as_it_is(times, num_sources, time_cond, guidance, bounded):
    net, levels = stage(num_sources, time_cond, guidance, bounded), pyramids(num_sources)
    found = net(levels, times)
    again = net([level.flip(1) for level in levels], (1 - times).flip(1)).flip(1)
    torch.testing.assert_close(again, found, atol=2e-5, rtol=1e-5)
    # neither the order of the sources nor the time alone is without effect
    assert not torch.allclose(net([level.flip(1) for level in levels], times), found, atol=1e-3)
    assert not torch.allclose(net(levels, 1 - times), found, atol=1e-3)


@pytest.mark.parametrize("arguments", [{}, {"num_sources": 4}, {"centring": "none"}], ids=label)
def test_coarse_picture_is_the_same_backwards(frames, times, arguments):
    net = network(0.05, **arguments)
    found = net(frames, times).coarse
    again = net(frames.flip(1), (1 - times).flip(1)).coarse.flip(1)
    torch.testing.assert_close(again, found, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("num_sources", [2, 4])
@pytest.mark.parametrize("side", [0, 1])
def test_at_an_end_of_the_interval_its_frame_alone_is_taken(num_sources, side):
    time, middle = (1e-9, 1 - 2e-8)[side], num_sources // 2
    weights = source_weights(torch.tensor([[time]], dtype=torch.float64), num_sources).clamp(min=1e-6)[0, :, 0]
    assert weights[middle - 1 + side] == pytest.approx(1)
    net, levels = stage(num_sources), pyramids(num_sources)
    seen = []
    hook = net.last.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    net(levels, torch.full((2, 1), time))
    others = [s for s in range(num_sources) if s not in (middle - 1, middle)]
    for level in levels:
        level[:, others] = 0
    net(levels, torch.full((2, 1), time))
    hook.remove()
    assert (seen[0] - seen[1]).abs().max() < 1e-3 * seen[0].abs().max()


def test_source_weights_are_linear_and_of_four_beside_these_those_of_a_cubic():
    t = torch.tensor([[0.25, 0.5]])
    assert source_weights(t, 2).tolist() == [[[0.75, 0.5], [0.25, 0.5]]]
    outer, first, last, other = source_weights(t, 4)[0].tolist()
    assert (first, last) == ([0.75, 0.5], [0.25, 0.5])
    # -t (1-t)^2 / 2 and -t^2 (1-t) / 2 without their signs
    assert outer == pytest.approx([0.0703125, 0.0625])
    assert other == pytest.approx([0.0234375, 0.0625])


@pytest.mark.parametrize("bounded", [True, False])
def test_deformable_convolution_starts_as_half_a_convolution(bounded):
    torch.manual_seed(0)
    conv, features, hints = DeformConv(4, 6, 8, 2, bounded), torch.rand(2, 4, 12, 14), torch.rand(2, 8, 12, 14)
    conv.bias.data.normal_()
    plain = F.conv2d(features, conv.weight, padding=1)
    torch.testing.assert_close(conv(features, hints), plain / 2 + conv.bias[:, None, None])


@pytest.mark.parametrize("bounded", [True, False])
def test_flow_moves_what_is_sampled_and_the_scale_moves_it_less(bounded):
    torch.manual_seed(0)
    conv, features, hints = DeformConv(4, 6, 8, 2, bounded), torch.rand(1, 4, 12, 14), torch.rand(1, 8, 12, 14)
    still = conv(features, hints)
    flow = torch.tensor([2.0, 1.0])[:, None, None].expand(1, 2, 12, 14)
    # (u, v) = (2, 1): the answer at a place is the one two to the right and one below
    torch.testing.assert_close(conv(features, hints, flow)[..., 1:-2, 1:-3], still[..., 2:-1, 3:-1])
    half = conv(features, hints, 2 * flow, torch.full((1, 1, 1, 1), 0.5))
    torch.testing.assert_close(half, conv(features, hints, flow))
    torch.testing.assert_close(conv(features, hints, 3 * flow, torch.zeros(1, 1, 1, 1)), still)


def reach(conv, scale=None):
    """How far to the right a convolution samples that takes what is at its place."""
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0, 1, 1] = 2
        conv.bias.zero_()
    ramp = torch.arange(64.0).expand(1, 4, 64, 64)
    answer = conv(ramp, torch.zeros(1, 8, 64, 64), scale=scale)[0, 0, 30, 20]
    mask = conv.offset_mask.bias[36:].sigmoid()[0]
    return answer.item() / (2 * mask.item()) - 20


def test_bounded_offsets_reach_ten_px_and_free_ones_further():
    for bounded, expected in ((True, MAX_OFFSET), (False, 15)):
        conv = DeformConv(4, 6, 8, 2, bounded)
        conv.offset_mask.bias.data[:36] = 15
        assert reach(conv) == pytest.approx(expected, abs=1e-4)
        # a quarter of the time is a quarter of the way, however far that is
        assert reach(conv, torch.full((1, 1, 1, 1), 0.25)) == pytest.approx(expected / 4, abs=1e-4)


def test_offsets_of_a_linear_stage_are_those_of_the_unit_time_scaled(monkeypatch):
    net, levels, asked = stage(time_cond="linear"), pyramids(2), []
    for conv in net.convs.values():
        monkeypatch.setattr(
            conv, "forward", lambda x, hints, flow, scale: asked.append((hints, scale)) or torch.zeros_like(x)
        )
    net(levels, torch.tensor([[0.25, 0.5], [0.125, 1.0]]))
    for hints, scale in asked:
        both = hints.unflatten(0, (2, 2, 2))  # (B, S, T): the same for every time
        assert torch.equal(both[:, :, 0], both[:, :, 1])
        assert scale.unflatten(0, (2, 2, 2)).flatten().tolist() == [0.25, 0.5, 0.75, 0.5, 0.125, 1.0, 0.875, 0.0]


def test_without_conditioning_only_the_weights_of_the_blend_see_the_time(times):
    net, levels, sampled = stage(time_cond="none"), pyramids(2), []
    net.cascade["1"].register_forward_hook(lambda module, args, output: sampled.append(output))
    net(levels, times)
    (found,) = sampled
    found = found.unflatten(0, (2, 2, 3))
    assert torch.equal(found[:, :, 0], found[:, :, 2])


@pytest.mark.parametrize("arguments", [{}, *({"time_cond": x} for x in ("linear", "none")), {"num_sources": 4}])
def test_times_of_stage_one_do_not_know_of_each_other(times, arguments):
    net = stage(guidance="flow", **arguments)
    levels = pyramids(arguments.get("num_sources", 2))
    together = net(levels, times)
    for b in range(2):
        for k in range(3):
            alone = net([level[b : b + 1] for level in levels], times[b : b + 1, k : k + 1])
            torch.testing.assert_close(together[b, k], alone[0, 0], atol=1e-5, rtol=1e-5)


def test_blending_instead_of_stage_one_is_linear(frames, times):
    net = network(0.05, interpolation="blend")
    features = net.encode(frames)
    between, coarse = net.interpolate(features, frames, times)
    t = times[:, :, None, None, None]
    torch.testing.assert_close(between, (1 - t) * features[:, 1:2] + t * features[:, 2:3])
    torch.testing.assert_close(coarse, (1 - t) * frames[:, 1:2] + t * frames[:, 2:3])


# --- stage II ---


def alignment(sweeps="both", cell="residual", second_order=False, amount=0.05):
    torch.manual_seed(0)
    options = {"num_groups": 2, "num_blocks": 1, "cell": cell, "second_order": second_order, "bounded": True}
    return noisy(RecurrentAlignment(6, sweeps, **options), amount)


def sequence(length, batch=2):
    return torch.randn(batch, length, 6, 8, 12, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("cell", "second_order"), [("residual", False), ("residual", True), ("convlstm", False)])
def test_reversed_sequences_with_exchanged_sweeps_give_reversed_answers(cell, second_order):
    net, x = alignment(cell=cell, second_order=second_order), sequence(5)
    other = copy.deepcopy(net)
    other.fwd, other.bwd = other.bwd, other.fwd
    weight = net.fusion.weight
    other.fusion.weight.data = torch.cat((weight[:, 6:12], weight[:, :6], weight[:, 12:]), 1)
    torch.testing.assert_close(other(x.flip(1)).flip(1), net(x))
    assert not torch.allclose(net(x.flip(1)).flip(1), net(x), atol=1e-3)


@pytest.mark.parametrize(("cell", "second_order"), [("residual", False), ("residual", True), ("convlstm", True)])
@pytest.mark.parametrize("sweeps", CHOICES["sweeps"])
def test_sequences_of_any_length_work_and_know_no_other_of_the_batch(sweeps, cell, second_order):
    net = alignment(sweeps, cell, second_order)
    for length in (1, 2, 3):
        x = sequence(length, 3)
        found = net(x)
        assert found.shape == x.shape
        torch.testing.assert_close(net(x.flip(0)).flip(0), found)
        torch.testing.assert_close(net(x[1:2]), found[1:2], rtol=1e-4, atol=1e-4)


def test_what_a_frame_knows_of():
    """Forwards of what came before, backwards of what comes after, both of all."""
    x = sequence(4).requires_grad_()
    for sweeps, known in (("forward", [1, 1, 0, 0]), ("both", [1] * 4), ("shared", [1] * 4)):
        x.grad = None
        alignment(sweeps)(x)[:, 1].sum().backward()
        assert [int(bool(x.grad[:, j].any())) for j in range(4)] == known


def test_first_order_sweep_is_its_equation_written_out():
    net, x = alignment().fwd, sequence(3)
    state = x[:, 0] + net.blocks(
        F.leaky_relu(net.merge(torch.cat((x[:, 0], torch.zeros_like(x[:, 0])), 1)), 0.1)
    )  # fmt: skip
    states = [state]
    for j in (1, 2):
        aligned = net.align(state, net.offsets(torch.cat((x[:, j], x[:, j - 1]), 1)))
        state = x[:, j] + net.blocks(F.leaky_relu(net.merge(torch.cat((x[:, j], aligned), 1)), 0.1))
        states.append(state)
    torch.testing.assert_close(net(x), torch.stack(states, 1))


def test_second_order_sweep_looks_two_frames_back():
    net, x, seen = alignment(second_order=True).fwd, sequence(4), []
    net.align.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    found = net(x)
    nothing = torch.zeros_like(x[:, 0])
    expected = [(found[:, 0], nothing), (found[:, 1], found[:, 0]), (found[:, 2], found[:, 1])]
    assert all(torch.equal(a, torch.cat(b, 1)) for a, b in zip(seen, expected, strict=True))


# --- the whole ---


@pytest.mark.parametrize("arguments", [{}, {"num_sources": 4}, {"cell": "convlstm"}], ids=label)
def test_single_mode_is_each_time_by_itself(frames, times, arguments):
    net = network(0.05, **arguments)
    found = net(frames, times, mode="single")
    each = [net(frames, times[:, k : k + 1]) for k in range(3)]
    for k, alone in enumerate(each):
        torch.testing.assert_close(found.frames[:, 1 + k], alone.frames[:, 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.coarse[:, k], alone.coarse[:, 0], atol=1e-5, rtol=1e-5)
    # the ends are of the time in the middle
    torch.testing.assert_close(found.frames[:, [0, -1]], each[1].frames[:, [0, -1]], atol=1e-5, rtol=1e-5)
    together = net(frames, times).frames
    assert not torch.allclose(together, found.frames, atol=1e-4)
    assert torch.equal(net(frames, times[:, :1], mode="single").frames, each[0].frames)


@pytest.mark.parametrize("mode", CHOICES["mode"])
def test_a_batch_is_its_windows_one_by_one(frames, times, mode):
    net = network(0.05)
    together = net(frames, times, mode=mode)
    for b in range(2):
        alone = net(frames[b : b + 1], times[b : b + 1], mode=mode)
        torch.testing.assert_close(together.frames[b], alone.frames[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.coarse[b], alone.coarse[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arguments", [{}, *SWITCHES], ids=label)
def test_head_that_answers_zero_leaves_the_skip_images(frames, times, arguments):
    net = network(0.05, **arguments)
    torch.nn.init.zeros_(net.head.last.weight)
    torch.nn.init.zeros_(net.head.last.bias)
    output = net(frames, times)
    assert torch.equal(output.frames[:, 0], frames[:, 1])
    assert torch.equal(output.frames[:, -1], frames[:, 2])
    assert torch.equal(output.frames[:, 1:-1], output.coarse)


def test_untrained_network_gives_the_blurry_frames_and_their_blend(frames, times):
    t = times[:, :, None, None, None]
    expected = torch.cat((frames[:, 1:2], torch.lerp(frames[:, 1:2], frames[:, 2:3], t), frames[:, 2:3]), 1)
    assert torch.equal(network()(frames, times).frames, expected)


@pytest.mark.parametrize("arguments", [{}, {"interpolation": "blend"}, {"fusion": "none"}, {"restoration": "none"}])
@pytest.mark.parametrize("num_frames", [2, 4, 6])
def test_no_times_are_deblurring_alone(num_frames, arguments):
    net = network(0.05, **arguments)
    frames, none = torch.rand(2, num_frames, 3, 16, 32), torch.empty(2, 0)
    for mode in CHOICES["mode"]:
        output = net(frames, none, mode=mode)
        assert output.frames.shape == (2, 2, 3, 16, 32)
        assert output.coarse.shape == (2, 0, 3, 16, 32)
    middle = num_frames // 2
    expected = net.restore(net.fuse(net.encode(frames)), frames)[:, middle - 1 : middle + 1]
    torch.testing.assert_close(output.frames, expected)


def test_more_orders_than_trained_change_the_frames(frames, times):
    net = network(0.05)
    found = [net(frames, times, orders=n).frames for n in range(4)]
    assert torch.equal(found[2], net(frames, times).frames)
    assert all((a - b).abs().max() > 1e-6 for a, b in itertools.pairwise(found))


def test_pieces_agree_with_the_whole_beyond_the_reach_of_stages_one_and_two():
    """The attention of stage three looks at all pixels, so that with it they differ everywhere."""
    frames, times = blurred(32, 416), torch.tensor([[0.25]])
    inside, middle = slice(80, 336), slice(120, 136)
    for restoration, is_local in (("none", True), ("taylor", False)):
        net = network(restoration=restoration)
        for layer in (net.head.last, net.coarse_head):
            torch.nn.init.normal_(layer.weight, std=0.1)
        with torch.no_grad():
            whole = net(frames, times).frames[..., inside]
            piece = net(frames[..., inside], times).frames
        assert not torch.allclose(piece[..., :8], whole[..., :8], atol=1e-3)
        assert torch.allclose(piece[..., middle], whole[..., middle], atol=3e-5) == is_local


@pytest.mark.parametrize("centring", CHOICES["centring"])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_flat_frames_give_finite_numbers_and_gradients(centring, level):
    net = network(centring=centring)
    output = net(torch.full((1, 4, 3, 16, 16), level), torch.tensor([[0.5]]))
    output.frames.sum().backward()
    assert output.frames.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"guidance": "flow", "time_cond": "linear"}, {"cell": "convlstm"}, {"bounded_offsets": False}],
    ids=label,
)
def test_half_precision_is_near_single_and_trains(frames, times, dtype, arguments):
    net = network(0.02, **arguments)
    with torch.autocast("cpu", dtype):
        output = net(frames, times)
    output.frames.square().mean().backward()
    assert output.frames.dtype == output.coarse.dtype == torch.float32
    exact = net(frames, times)
    change = (exact.frames - frames[:, 1:2]).abs().mean()
    assert 0 < (output.frames - exact.frames).abs().mean() < 0.05 * change
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.slow
def test_gradients_are_those_of_differences(frames, monkeypatch):
    """Through both modes' gathering of times, on one weight of each stage."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # whose rounding would drown such small steps
    times = torch.tensor([[0.25, 0.625]], dtype=torch.float64)
    net, window = network(0.05).double(), frames[:1, ..., :16].double()

    def loss(mode):
        return net(window, times, mode=mode).frames.square().sum()

    for mode in CHOICES["mode"]:
        net.zero_grad()
        loss(mode).backward()
        stages = net.embed.first, net.tdn.weigh, net.tdn.convs["1"].offset_mask, net.brda.fusion, net.tta.main[0].first
        for parameter in (layer.weight for layer in stages):
            place = parameter.grad.abs().flatten().argmax()
            step = 1e-7
            with torch.no_grad():
                flat = parameter.view(-1)
                flat[place] += step
                above = loss(mode)
                flat[place] -= 2 * step
                below = loss(mode)
                flat[place] += step
            slope = ((above - below) / (2 * step)).item()
            assert parameter.grad.view(-1)[place].item() == pytest.approx(slope, rel=1e-4)


def test_derivative_sees_the_term_and_the_features():
    torch.manual_seed(0)
    term, fused = torch.randn(1, 8, 8, 8, requires_grad=True), torch.randn(1, 8, 8, 8, requires_grad=True)
    Derivative(8, 1, 2, "restormer")(term, fused).sum().backward()
    assert term.grad.any()
    assert fused.grad.any()
