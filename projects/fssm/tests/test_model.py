"""The network: counts, keys, gradients, symmetries, footprints."""

import pytest
import torch

from projects.fssm.model import CAB, SS2D, ChannelAttention, FMambaIR, cross_merge, cross_scan, drop_path
from shared.errors import InputError
from shared.kernels.selective_scan import HOLDS

LIGHT_2023 = {"d_state": 16, "expand": 1.5, "cab": "plain"}
LIGHT_2024 = {"d_state": 10, "expand": 1.2, "cab": "depthwise"}
TINY = {"embed_dim": 12, "depths": [1, 1], "d_state": 3, "expand": 1.2, "cab": "depthwise", "drop_path_rate": 0.0}
COUNTS = [
    (LIGHT_2023, 2, 1_363_320), (LIGHT_2023, 3, 1_371_435), (LIGHT_2023, 4, 1_382_796),
    (LIGHT_2024, 2, 905_016), (LIGHT_2024, 3, 913_131), (LIGHT_2024, 4, 924_492),
]  # fmt: skip


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("config", "scale", "parameters"), COUNTS)
def test_parameter_count_is_the_published_networks(config, scale, parameters):
    net = FMambaIR(scale=scale, **config)
    assert count(net) == parameters
    ss2d, cab, rssb = (38_160, 11_172, 49_692) if config is LIGHT_2023 else (25_344, 4_892, 30_596)
    block = net.layers[0].residual_group.blocks[0]
    assert (count(block.self_attention), count(block.conv_blk), count(block)) == (ss2d, cab, rssb)


def test_published_count_leaves_raw_parameters_out():
    net = FMambaIR(scale=2, **LIGHT_2023)
    modules = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm)
    assert sum(count(m) for m in net.modules() if isinstance(m, modules)) == 859_320


def silent_parameters(net, lq):
    """Names of the parameters without a gradient, once the attention is lifted off the zero of its ReLU."""
    for module in net.modules():
        if isinstance(module, ChannelAttention):
            torch.nn.init.ones_(module.attention[1].bias)
    out = net(lq)
    (out * torch.randn_like(out)).sum().backward()
    return [name for name, p in net.named_parameters() if p.grad is None or not 0 < p.grad.abs().sum() < float("inf")]


def test_state_dict_is_the_same_in_every_hold_mode():
    shapes = [{k: v.shape for k, v in FMambaIR(hold=hold, **TINY).state_dict().items()} for hold in HOLDS]
    assert all(shape == shapes[0] for shape in shapes)


def test_keys_and_shapes_are_mambairs():
    state = FMambaIR(scale=2, **LIGHT_2024).state_dict()
    block = "layers.3.residual_group.blocks.5."
    expected = {
        "conv_first.weight": (60, 3, 3, 3), "patch_embed.norm.weight": (60,), "norm.bias": (60,),
        block + "ln_1.weight": (60,), block + "skip_scale2": (60,),
        block + "self_attention.in_proj.weight": (144, 60), block + "self_attention.conv2d.weight": (72, 1, 3, 3),
        block + "self_attention.x_proj_weight": (4, 24, 72), block + "self_attention.dt_projs_weight": (4, 72, 4),
        block + "self_attention.dt_projs_bias": (4, 72), block + "self_attention.A_logs": (288, 10),
        block + "self_attention.Ds": (288,), block + "self_attention.out_norm.bias": (72,),
        block + "self_attention.out_proj.weight": (60, 72), block + "conv_blk.cab.0.weight": (30, 60, 1, 1),
        block + "conv_blk.cab.4.bias": (60,), block + "conv_blk.cab.5.attention.1.weight": (2, 60, 1, 1),
        block + "conv_blk.cab.5.attention.3.bias": (60,), "layers.0.conv.weight": (60, 60, 3, 3),
        "conv_after_body.bias": (60,), "upsample.0.weight": (12, 60, 3, 3),
    }  # fmt: skip
    assert {key: tuple(state[key].shape) for key in expected} == expected
    assert not any(key.startswith("mean") for key in state)
    plain = CAB(60, "plain").state_dict()
    assert tuple(plain["cab.0.weight"].shape) == (10, 60, 3, 3)
    assert tuple(plain["cab.3.attention.1.weight"].shape) == (2, 60, 1, 1)


@pytest.mark.parametrize("hold", ["zoh_euler", "foh_1", "zoh_tap2"])
def test_every_parameter_receives_a_gradient(hold):
    torch.manual_seed(0)
    net = FMambaIR(scale=3, hold=hold, **TINY)
    lq = torch.rand(2, 3, 7, 9)
    assert net(lq).shape == (2, 3, 21, 27)
    assert silent_parameters(net, lq) == []


@pytest.mark.parametrize("config", [LIGHT_2023, LIGHT_2024])
def test_every_parameter_of_the_paper_size_network_receives_a_gradient(config):
    torch.manual_seed(0)
    assert silent_parameters(FMambaIR(scale=2, **config, drop_path_rate=0.0), torch.rand(1, 3, 6, 8)) == []


def test_cross_merge_undoes_cross_scan():
    x = torch.randn(2, 5, 4, 7)
    assert torch.equal(cross_merge(cross_scan(x), 4, 7), 4 * x)
    assert torch.equal(cross_merge(cross_scan(x, 2), 4, 7), 2 * x)
    sequences = cross_scan(torch.arange(6.0).view(1, 1, 2, 3))[0, :, 0]
    assert sequences.tolist() == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]


def permuted(block, order, kernel):
    """A copy of `block` with its directions in another order and its depthwise kernels turned."""
    other = SS2D(8, 3, 1.5, hold=block.hold).double()
    state = block.state_dict()
    for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
        state[name] = state[name][list(order)]
    for name in ("A_logs", "Ds"):
        state[name] = state[name].unflatten(0, (4, -1))[list(order)].flatten(0, 1)
    state["conv2d.weight"] = kernel(state["conv2d.weight"])
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("hold", ["zoh_euler", "foh_1", "foh_exact"])
def test_transposing_and_rotating_commute_with_permuted_directions(hold):
    torch.manual_seed(0)
    block = SS2D(8, 3, 1.5, hold=hold).double()
    with torch.no_grad():
        block.A_logs.add_(torch.rand_like(block.A_logs))
    x = torch.randn(1, 5, 7, 8, dtype=torch.float64)
    transposed = permuted(block, (1, 0, 3, 2), lambda k: k.transpose(2, 3))
    torch.testing.assert_close(transposed(x.transpose(1, 2)), block(x).transpose(1, 2), rtol=0, atol=1e-13)
    rotated = permuted(block, (2, 3, 0, 1), lambda k: k.flip(2, 3))
    torch.testing.assert_close(rotated(x.flip(1, 2)), block(x).flip(1, 2), rtol=0, atol=1e-13)


def test_initial_steps_lie_in_their_range():
    block = SS2D(60, 16, 1.5, dt_min=1e-3, dt_max=0.1)
    delta = torch.nn.functional.softplus(block.dt_projs_bias)
    assert delta.min() > 0.99e-3
    assert delta.max() < 0.101
    assert torch.equal(block.A_logs[7].exp().round(), torch.arange(1, 17.0))
    shifted = SS2D(60, 16, 1.5, a_log_shift=1.0)
    torch.testing.assert_close(shifted.A_logs, block.A_logs + 1)


def test_row_hold_keeps_rows_apart():
    """With rows held apart a pixel of the next row cannot leak into the end of this one through the hold."""
    torch.manual_seed(0)
    for row_hold, same in ((False, False), (True, True)):
        block = SS2D(8, 2, 1.5, hold="foh_exact", row_hold=row_hold).double()
        u = cross_scan(torch.randn(1, block.d_inner, 3, 4, dtype=torch.float64))
        changed = u.clone()
        changed[:, 0, :, 4] += 1  # first token of the second row, direction 0
        # the projections of the earlier tokens do not see it, so only the hold can carry it back
        before, after = block.scan(u, 3, 4), block.scan(changed, 3, 4)
        assert torch.equal(before[:, 0, :, 3], after[:, 0, :, 3]) is same


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    dropped = drop_path(x, 0.25, training=True)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (dropped.flatten(1).std(1) == 0).all()
    assert dropped.mean() == pytest.approx(1, abs=0.05)
    assert drop_path(x, 0.25, training=False) is x
    rates = [b.drop_prob for g in FMambaIR(drop_path_rate=0.1).layers for b in g.residual_group.blocks]
    assert rates == pytest.approx([0.1 * i / 23 for i in range(24)], abs=1e-7)


def test_zoh_weights_run_in_every_hold_mode():
    torch.manual_seed(0)
    state = FMambaIR(hold="zoh_euler", **TINY).state_dict()
    lq, outputs = torch.rand(1, 3, 8, 8), []
    for hold in ("zoh_euler", "foh_1", "foh_exact"):
        net = FMambaIR(hold=hold, **TINY)
        net.load_state_dict(state)
        outputs.append(net(lq))
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[1], outputs[2], rtol=0, atol=1e-3)


@pytest.mark.parametrize("wrong", [{"hold": "foh"}, {"scale": 5}, {"cab": "wide"}, {"num_directions": 3}])
def test_unknown_choice_is_an_input_error(wrong):
    with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
        FMambaIR(**{**TINY, **wrong})
