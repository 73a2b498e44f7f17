"""Two networks one after the other: what each sees and gives."""

import pytest
import torch

from projects.bvfi.model import BVFI
from projects.bvfi.sequential import ORDERS, SequentialBVFI
from shared.errors import InputError

NANO = {
    "channels": 8, "num_groups": 2, "num_embed_blocks": 1, "num_sweep_blocks": 1, "num_main_blocks": 1,
    "num_derivative_blocks": 1, "num_heads": 2, "orders": 2,
}  # fmt: skip
TIMES = torch.tensor([[0.125, 0.5, 0.75], [0.25, 0.375, 0.625]])


def network(order, amount=0.05, **arguments):
    torch.manual_seed(0)
    net = SequentialBVFI(order, **{**NANO, **arguments}).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=amount)
    return net


@pytest.fixture
def frames():
    return 0.4 + 0.2 * torch.rand(2, 4, 3, 16, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("order", ORDERS)
def test_parts_are_those_of_the_cascade_with_an_embedding_each(order):
    counts = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in (("both", network(order)), ("cascade", BVFI(**NANO)), ("embed", BVFI(**NANO).embed))
    }
    assert counts["both"] == counts["cascade"] + counts["embed"]
    net = network(order)
    assert net.first_part() is (net.deblurrer if order == "deblur_first" else net.interpolator)


@pytest.mark.parametrize("order", ORDERS)
def test_untrained_networks_give_the_blurry_frames_and_their_blend(order, frames):
    output = network(order, amount=0)(frames, TIMES)
    blend = torch.lerp(frames[:, 1:2], frames[:, 2:3], TIMES[:, :, None, None, None])
    assert torch.equal(output.frames, torch.cat((frames[:, 1:2], blend, frames[:, 2:3]), 1))


def test_deblurring_first_interpolates_between_sharp_frames(frames):
    net = network("deblur_first")
    found = net(frames, TIMES)
    sharp = net.deblur(frames)
    assert sharp.shape == frames.shape
    torch.testing.assert_close(found.frames[:, [0, -1]], sharp[:, 1:3])
    torch.testing.assert_close(found.frames[:, 1:-1], net.between(sharp, TIMES))
    assert torch.equal(found.coarse, found.frames[:, 1:-1])
    # the ends do not know of the times
    assert torch.equal(net(frames, TIMES[:, :1]).frames[:, 0], found.frames[:, 0])


def test_interpolating_first_deblurs_each_time_within_a_sequence_of_its_own(frames):
    net = network("interpolate_first")
    found = net(frames, TIMES)
    blurry = net.between(frames, TIMES)
    assert torch.equal(found.coarse, blurry)
    for k in range(3):
        row = torch.cat((frames[:, :2], blurry[:, k : k + 1], frames[:, 2:]), 1)
        sharp = net.deblur(row)
        torch.testing.assert_close(found.frames[:, 1 + k], sharp[:, 2], atol=1e-5, rtol=1e-5)
        if k == 1:
            torch.testing.assert_close(found.frames[:, [0, -1]], sharp[:, [1, 3]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_sources", [2, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_windows_of_a_batch_do_not_know_of_each_other(order, num_sources, frames):
    net = network(order, num_sources=num_sources)
    found = net(frames, TIMES)
    for b in range(2):
        alone = net(frames[b : b + 1], TIMES[b : b + 1])
        torch.testing.assert_close(found.frames[b], alone.frames[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("num_frames", [2, 6])
@pytest.mark.parametrize("order", ORDERS)
def test_no_times_are_deblurring_alone(order, num_frames):
    net, frames = network(order), torch.rand(1, num_frames, 3, 16, 16)
    output = net(frames, torch.empty(1, 0))
    assert output.coarse.shape == (1, 0, 3, 16, 16)
    middle = num_frames // 2
    torch.testing.assert_close(output.frames, net.deblur(frames)[:, middle - 1 : middle + 1])


@pytest.mark.parametrize("order", ORDERS)
def test_orders_reach_the_deblurring_network_and_modes_change_nothing(order, frames):
    net = network(order)
    plain = net(frames, TIMES).frames
    assert torch.equal(net(frames, TIMES, 2).frames, plain)
    assert not torch.equal(net(frames, TIMES, 0).frames, plain)
    assert torch.equal(net(frames, TIMES, mode="single").frames, plain)


def test_wrong_arguments_are_named(frames):
    with pytest.raises(InputError, match="unknown order 'both'; choose one of deblur_first, interpolate_first"):
        network("both")
    with pytest.raises(InputError, match="deblur_first trains stage I by itself; it goes with interpolation=deform"):
        network("deblur_first", interpolation="blend")
    with pytest.raises(InputError, match="multiples of 16"):
        network("deblur_first")(frames[..., :8], TIMES)
