"""The network: published sizes, what the parts promise, gradients, switches."""

import pytest
import torch

from projects.fgdcn.model import (
    FGDCN,
    GUIDANCES,
    MAX_RESIDUAL,
    FlowBlock,
    GridFusion,
    GuidedDeformConv,
    blend,
    resize,
    resize_flow,
    stack,
    swapped,
    unstack,
)
from shared.errors import InputError
from shared.kernels.backward_warp import backward_warp

NANO = {"block_channels": (8, 6, 4), "channels": 4, "offset_channels": 8, "num_groups": 2}
OFFICIAL = {"block_channels": (180, 120, 90), "channels": 24, "offset_channels": 64, "num_groups": 8}
DEAD = 37_131  # parameters of the published file that nothing uses


def count(module):
    return sum(p.numel() for p in module.parameters())


def network(**arguments):
    torch.manual_seed(0)
    return FGDCN(**{**NANO, **arguments}).eval()


@pytest.fixture
def frames():
    return torch.rand(2, 2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def test_published_size_has_the_published_parameters_part_by_part():
    with torch.device("meta"):
        net = FGDCN(**OFFICIAL, pyramid_heads=True, initialisation="torch")
    assert [count(block) for block in net.flow_net.blocks] == [2_498_404, 1_116_964, 631_174]
    assert count(net.context) == 162_024
    assert count(net.context) + count(net.refine) + DEAD == 1_424_220
    assert count(net.compensation) == 1_045_808
    assert count(net.fusion) == 7_646_372
    assert count(net) + DEAD == 14_362_942
    assert len(net.state_dict()) + 24 == 457


def test_flows_of_256x448_are_at_half_resolution_and_the_frame_at_full():
    with torch.device("meta"):
        output = FGDCN(**NANO, initialisation="torch").find_flow(torch.empty(1, 2, 3, 256, 448))
    assert [flow.shape for flow in output.flows] == 3 * [(1, 4, 128, 224)]
    assert output.flow.shape == (1, 4, 256, 448)
    assert output.mask.shape == (1, 1, 256, 448)


@pytest.mark.parametrize("mask_mode", ["logit", "sum"])
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_every_parameter_receives_a_gradient(frames, mask_mode, guidance):
    net = network(mask_mode=mask_mode, guidance=guidance, pyramid_heads=True)
    with torch.no_grad():  # what lies behind weights that start at zero has its gradient from the second step on
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    output = net(frames)
    sum(x.square().sum() for x in (output.frame, *output.pyramid)).backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_distillation_alone_trains_only_the_flow_network(frames):
    net = network(task_trains_flow=False)
    net(frames).frame.sum().backward()
    assert all(p.grad is None for p in net.flow_net.parameters())
    assert all(p.grad is not None for p in net.context.parameters())


# --- flow step ---


def test_flow_block_answers_at_half_resolution_whatever_its_scale():
    for scale in (1, 2, 4):
        assert FlowBlock(6, scale, 8)(torch.rand(1, 6, 64, 32)).shape == (1, 4, 32, 16)


def test_flows_are_px_of_the_grid_they_live_on():
    shift = torch.tensor([3.0, -2.0, 5.0, 1.0])[:, None, None].expand(1, 4, 16, 16)
    assert torch.equal(resize_flow(shift, 2)[0, :, 0, 0], 2 * shift[0, :, 0, 0])
    assert torch.equal(resize_flow(shift, 0.25)[0, :, 0, 0], shift[0, :, 0, 0] / 4)


def test_synthetic_translation_comes_through_the_factor_of_two(frames):
    """With a network that finds one constant flow, the anchor is made of frames shifted by exactly that flow."""
    net = network()
    with torch.no_grad():
        for block in net.flow_net.blocks:
            block.head.weight.zero_()
            block.head.bias.zero_()
        net.flow_net.blocks[0].head.bias.copy_(torch.tensor([1.0, 0.5, -1.0, -0.5]))  # px at half resolution
        for refine in net.refine:
            refine.flow_head[-1].weight.zero_()
            refine.flow_head[-1].bias.zero_()
    output = net(frames)
    assert output.flow[0, :, 0, 0].tolist() == pytest.approx([2.0, 1.0, -2.0, -1.0], abs=1e-5)
    first, last = frames[:, 0, :, 9, 12], frames[:, 1, :, 7, 8]  # seen from (8, 10)
    mask = output.mask[:, :, 8, 10]
    torch.testing.assert_close(output.anchor[:, :, 8, 10], mask * first + (1 - mask) * last, atol=1e-5, rtol=0)


def test_stacking_puts_first_frames_before_last_ones():
    pair = torch.arange(8.0).view(2, 4, 1, 1)
    assert stack(pair).flatten(1).tolist() == [[0, 1], [4, 5], [2, 3], [6, 7]]
    assert torch.equal(unstack(stack(pair)), pair)
    assert swapped(stack(pair)).flatten(1).tolist() == [[2, 3], [6, 7], [0, 1], [4, 5]]


def test_anchor_of_equal_frames_without_flow_is_the_frame_for_any_mask(frames):
    same = frames[:, :1].expand(-1, 2, -1, -1, -1)
    for value in (-0.7, 0.3, 2.5):
        output = network(compensation=False)(same, torch.zeros(2, 4, 32, 48), torch.full((2, 1, 32, 48), value))
        torch.testing.assert_close(output.anchor, same[:, 0], atol=1e-6, rtol=0)


def test_anchor_under_a_mask_of_one_is_the_first_frame_warped(frames):
    flow = torch.randn(2, 4, 32, 48, generator=torch.Generator().manual_seed(2))
    anchor = network()(frames, flow, torch.ones(2, 1, 32, 48)).anchor
    torch.testing.assert_close(anchor, backward_warp(frames[:, 0], flow[:, :2]))


def test_summed_mask_lies_in_0_to_3_and_that_of_logits_in_0_to_1(frames):
    summed = network(mask_mode="sum")(frames).mask
    assert summed.min() > 1 > summed.max() - 1
    assert 0 < network()(frames).mask.min() < network()(frames).mask.max() < 1


# --- deformation step ---


def test_guided_convolution_starts_as_half_a_convolution_of_what_the_flow_points_at():
    torch.manual_seed(0)
    conv, features, hints = GuidedDeformConv(4, 8, 2, "flow"), torch.rand(1, 4, 12, 14), torch.rand(1, 8, 12, 14)
    conv.bias.data.normal_()
    plain = torch.nn.functional.conv2d(features, conv.weight, padding=1)
    still = conv(features, hints, torch.zeros(1, 2, 12, 14))
    torch.testing.assert_close(still, plain / 2 + conv.bias[:, None, None])
    moved = conv(features, hints, torch.tensor([2.0, 1.0])[:, None, None].expand(1, 2, 12, 14))
    # (u, v) = (2, 1): the answer at a place is the one two to the right and one below
    torch.testing.assert_close(moved[..., 1:-2, 1:-3], still[..., 2:-1, 3:-1])


def test_learnt_offsets_stay_within_ten_px_of_the_flow():
    conv = GuidedDeformConv(4, 8, 2, "flow")
    conv.offset_mask.bias.data.fill_(50)
    conv.weight.data.zero_()
    conv.weight.data[0, 0, 1, 1] = 1
    ramp = torch.arange(64.0).expand(1, 4, 64, 64)
    sampled = conv(ramp, torch.zeros(1, 8, 64, 64), torch.zeros(1, 2, 64, 64))[0, 0, 30, 20]
    assert sampled.item() == pytest.approx(20 + MAX_RESIDUAL)


def test_unguided_offsets_ignore_the_flow(frames):
    flow = torch.full((1, 2, 12, 14), 3.0)
    features, hints = torch.rand(1, 4, 12, 14), torch.rand(1, 8, 12, 14)
    for guidance in ("none", "none_unbounded"):
        conv = GuidedDeformConv(4, 8, 2, guidance)
        torch.testing.assert_close(conv(features, hints, flow), conv(features, hints, 0 * flow))


def test_compensation_treats_both_frames_alike(frames):
    net = network()
    context = net.context(frames.transpose(0, 1).flatten(0, 1))
    flow = torch.randn(4, 2, 32, 48, generator=torch.Generator().manual_seed(3))
    found = net.compensation(context, context, flow)
    exchanged = [swapped(features) for features in context]
    other = net.compensation(exchanged, exchanged, swapped(flow))
    for a, b in zip(found, other, strict=True):
        torch.testing.assert_close(swapped(a), b)


@pytest.mark.parametrize("levels", [(1,), (3,), (1, 3), (1, 2)])
def test_levels_left_out_add_nothing(frames, levels):
    net = network(levels=levels)
    context = net.context(frames.transpose(0, 1).flatten(0, 1))
    found = net.compensation(context, context, torch.zeros(4, 2, 32, 48))
    assert [i for i, x in enumerate(found, 1) if x is not None] == list(levels)
    assert net(frames).frame.shape == (2, 3, 32, 48)


# --- fusion and the whole ---


def test_fusion_that_answers_zero_leaves_the_anchor(frames):
    net = network(pyramid_heads=True)
    for head in net.fusion.heads:
        torch.nn.init.zeros_(head[-1].weight)
        torch.nn.init.zeros_(head[-1].bias)
    output = net(frames)
    assert torch.equal(output.frame, output.anchor)
    torch.testing.assert_close(output.pyramid[1], resize(output.anchor, 0.25))


def test_grid_takes_every_path_once():
    """Of one row's features alone, the finest answer depends on all three rows through the upward columns."""
    torch.manual_seed(0)
    grid = GridFusion(4, pyramid_heads=False)
    features = [torch.rand(1, 8 * 2**i, 32 // 2**i, 32 // 2**i, requires_grad=True) for i in range(3)]
    (answer,) = grid(features)
    answer.sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in features)
    assert all(p.grad is not None for p in grid.parameters())


def test_flow_and_mask_from_elsewhere_give_the_same_frame(frames):
    net = network()
    own = net(frames)
    step = net.find_flow(frames)
    given = net(frames, step.flow, step.mask)
    torch.testing.assert_close(given.frame, own.frame)
    assert given.flows == ()


def test_flow_step_alone_gives_its_anchor(frames):
    output = network(compensation=False)(frames)
    assert output.frame is output.anchor


def test_a_batch_is_its_pictures_one_by_one(frames):
    net = network()
    together = net(frames).frame
    torch.testing.assert_close(together, torch.cat([net(one[None]).frame for one in frames]), atol=1e-5, rtol=0)


def test_black_frames_give_finite_numbers_and_gradients():
    net = network()
    output = net(torch.zeros(1, 2, 3, 32, 32))
    output.frame.sum().backward()
    assert output.frame.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_bfloat16_keeps_flows_in_float32(frames):
    with torch.autocast("cpu", torch.bfloat16):
        output = network()(frames)
    assert {output.flow.dtype, output.mask.dtype, output.flows[0].dtype} == {torch.float32}
    exact = network()(frames)
    assert (output.frame.float() - exact.frame).abs().max() < 0.1


def test_blend_weighs_the_first_frame():
    stacked = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    assert blend(torch.tensor(0.25).view(1, 1, 1, 1), stacked).item() == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mask_mode": "max"}, "unknown mask_mode 'max'"),
        ({"guidance": "full"}, "unknown guidance 'full'"),
        ({"initialisation": "zero"}, "unknown initialisation 'zero'"),
        ({"levels": ()}, "levels="),
        ({"levels": (1, 4)}, "levels="),
        ({"num_groups": 3}, "must divide channels"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(InputError, match=words):
        network(**arguments)


@pytest.mark.parametrize("shape", [(1, 2, 3, 30, 32), (2, 3, 32, 32), (1, 2, 1, 32, 32), (1, 2, 3, 0, 16)])
def test_frames_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match="frames"):
        network()(torch.zeros(shape))
