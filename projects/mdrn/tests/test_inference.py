"""Running the network: tiles, symmetries, noise levels, arrays."""

import itertools
import json

import numpy as np
import pytest
import torch

from projects.mdrn.baselines import DnCNN, FFDNet
from projects.mdrn.checkpoints import save_network
from projects.mdrn.fold import fold
from projects.mdrn.inference import (
    denoise,
    denoise_array,
    estimate_level,
    load_denoiser,
    self_ensemble,
    shipped_weights,
    trained_levels,
)
from projects.mdrn.model import MDRN
from projects.mdrn.noise import protocol_noise
from shared.errors import InputError
from shared.io.photographs import load_photographs
from shared.io.tiles import apply_in_tiles_exactly
from shared.metrics import psnr


def network(**options):
    """An untrained network that changes the picture a little."""
    torch.manual_seed(0)
    settings = {"width": 4, "num_blocks": 2, "levels": 2, "window": 9, "attention": "none", "init_scale": 1.0}
    return MDRN(**settings | {"tail_init_scale": 1.0} | options).eval()


@pytest.fixture
def weights(tmp_path):
    """Weights of a small untrained universal network: weights(channels, **options)."""

    def save(channels=1, levels=(0, 70), **options):
        net = network(in_channels=channels, noise_map=True, tail_init_scale=0.1, **options)
        arguments = {"name": "mdrn", "in_channels": channels, "noise_map": True, "width": 4, "num_blocks": 2}
        arguments |= {"window": 9, "attention": "none"} | options
        save_network(net, arguments, tmp_path / "weights.safetensors", noise_levels=json.dumps(levels))
        return tmp_path / "weights.safetensors"

    return save


def photo(channels=1):
    (cat,) = [p for p in load_photographs("test") if p.name == "skimage_chelsea"]
    pixels = torch.from_numpy(np.array(cat.pixels[60:188, 120:280])).permute(2, 0, 1).float() / 255
    return pixels if channels == 3 else pixels.mean(0, keepdim=True)


SIZES = ((1, 130), (150, 1), (5, 9), (97, 83), (131, 60))


@pytest.mark.slow
@pytest.mark.parametrize(("levels", "folded"), [(0, False), (1, True), (2, False), (2, True), (3, True)])
def test_tiles_give_the_whole_picture_to_the_last_digits(levels, folded):
    net = network(levels=levels).double()
    halo, net = net.reach(), fold(net) if folded else net
    for size, tile in itertools.product(SIZES, (1, 40)):
        image, seen = torch.rand(1, 1, *size, dtype=torch.float64), []
        if tile == 1 and max(size) > 100:
            continue

        def run(x, seen=seen):
            seen.append(max(x.shape[2:]))
            return net(x)

        with torch.no_grad():
            expected = net(image)
            tiled = apply_in_tiles_exactly(run, image, tile=tile, halo=halo, multiple=2**levels)
        assert (tiled - expected).abs().max() < 1e-12
        assert max(seen) <= tile + sum(halo) + 3 * (2**levels - 1)


@pytest.mark.parametrize("folded", [False, True])
def test_tiles_with_local_attention(folded):
    net = network(attention="local_ca").double()
    halo, net = net.reach(), fold(net) if folded else net
    for size in ((150, 131), (1, 200)):
        image, pieces = torch.rand(1, 1, *size, dtype=torch.float64), []
        with torch.no_grad():
            tiled = apply_in_tiles_exactly(
                net, image, tile=32, halo=halo, multiple=4, progress=lambda *p, pieces=pieces: pieces.append(p)
            )
            assert (tiled - net(image)).abs().max() < 1e-6
        assert len(pieces) > 1


@pytest.mark.parametrize("net", [DnCNN(1, 3, 4), FFDNet(1, 3, 4)])
def test_baselines_tile_exactly_too(net):
    noisy = torch.rand(1, 75, 50, dtype=torch.float64)
    tiled, whole = (denoise(net.double().eval(), noisy, 25, tile=tile) for tile in (16, 200))
    assert (tiled - whole).abs().max() < 1e-12


@pytest.mark.parametrize("tile", [16, 200])
def test_ensemble_is_equivariant_and_tiles_do_not_change_it(tile):
    """Invariant 13: for H = W, here also where the sides are no multiple of four."""
    net = network(in_channels=3).double()
    noisy = torch.rand(3, 45, 45, dtype=torch.float64)
    expected = denoise(net, noisy, 25, ensemble=True, tile=200)
    plain = denoise(net, noisy, 25, tile=200)
    assert (plain - expected).abs().max() > 1e-3
    assert (denoise(net, plain.transpose(1, 2), 25) - denoise(net, plain, 25).transpose(1, 2)).abs().max() > 1e-3
    for transpose, dims in itertools.product((False, True), ((), (1,), (2,), (1, 2))):
        turned = torch.flip(noisy.transpose(1, 2) if transpose else noisy, dims)
        made = torch.flip(denoise(net, turned, 25, ensemble=True, tile=tile), dims)
        assert ((made.transpose(1, 2) if transpose else made) - expected).abs().max() < 1e-12


def test_ensemble_keeps_a_symmetric_operation():
    noisy = torch.rand(2, 3, 8, 11, dtype=torch.float64)
    torch.testing.assert_close(self_ensemble(torch.square, noisy), noisy.square())


def test_progress_counts_all_pieces_of_all_turns():
    calls = []
    denoise(network(), torch.rand(1, 130, 40), 25, tile=32, ensemble=True, progress=lambda *p: calls.append(p))
    assert len(calls) > 8
    assert calls == [(i, len(calls)) for i in range(1, len(calls) + 1)]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 5), (37, 61)])
@pytest.mark.parametrize("level", [None, 0, 25, 70])
def test_any_size_and_level(size, level):
    net = fold(network(in_channels=3, noise_map=True))
    noisy = torch.rand(3, *size)
    denoised = denoise(net, noisy, level, levels=(0, 70), tile=32)
    assert denoised.shape == noisy.shape
    assert ((denoised >= 0) & (denoised <= 1)).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("level", [None, 25])
def test_constant_picture_stays_as_it_is(channels, value, level):
    net = fold(network(in_channels=channels, noise_map=True, tail_init_scale=10.0))
    noisy = torch.full((channels, 40, 50), value)
    assert not torch.equal(net(noisy[None], torch.tensor([0.1]))[0].clamp(0, 1), noisy)  # the network alone changes it
    assert torch.equal(denoise(net, noisy, level), noisy)


def test_estimate_is_what_the_network_is_told_and_stays_within_its_levels():
    told = []

    class Recorder(torch.nn.Module):
        in_channels, levels, noise_map = 1, 0, True

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def reach(self):
            return 0, 0

        def forward(self, noisy, noise_std):
            told.append(255 * noise_std.item())
            return noisy

    noisy = protocol_noise(photo()[None], 50)[0]
    for levels in ((0, 255), (0, 30), (60, 70)):
        denoise(Recorder(), noisy, levels=levels)
    assert told[0] == pytest.approx(50, abs=3)
    assert told[0] == pytest.approx(estimate_level(noisy), abs=1e-4)
    assert told[1:] == pytest.approx([30, 60])


def test_channels_that_differ_from_the_network():
    """Gray in a colour network: three equal channels, averaged; colour in a gray one: channel by channel."""
    noisy = torch.rand(3, 20, 24)
    gray, color = network(), network(in_channels=3)
    one_by_one = torch.cat([denoise(gray, plane[None], 25) for plane in noisy])
    torch.testing.assert_close(denoise(gray, noisy, 25), one_by_one)
    with torch.no_grad():
        averaged = color(noisy[:1].expand(3, -1, -1)[None])[0].mean(0, keepdim=True).clamp(0, 1)
    torch.testing.assert_close(denoise(color, noisy[:1], 25), averaged)


def test_bad_pictures_and_levels_are_refused():
    net, good = network(noise_map=True), torch.rand(1, 8, 8)
    holed, endless = good.clone(), good.clone()
    holed[0, 2, 3], endless[0, 2, 3] = torch.nan, torch.inf
    cases = [
        (holed, 25, {}, "NaN"),
        (endless, 25, {}, "infinite"),
        (255 * good, 25, {}, "scale"),
        ((255 * good).byte(), 25, {}, "floats"),
        (torch.rand(8, 8), 25, {}, "picture"),
        (torch.rand(2, 8, 8), 25, {}, "picture"),
        (torch.rand(1, 0, 8), 25, {}, "picture"),
        (good, 71, {"levels": (0, 70)}, "trained for, 0..70"),
        (good, -1, {}, "noise_level=-1"),
        (good, float("nan"), {}, "noise_level=nan"),
        (good, 50, {"levels": (25, 25)}, "trained for, 25 of"),
        (good, 25, {"tile": 0}, "tile=0"),
    ]
    for picture, level, options, message in cases:
        with pytest.raises(InputError, match=message):
            denoise(net, picture, level, **options)
    with pytest.raises(InputError, match="local_ca"):
        denoise(fold(network(attention="ca")), torch.rand(1, 40, 40), 25, tile=16)


@pytest.mark.parametrize("shape", [(30, 41), (30, 41, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_arrays_of_every_type(weights, shape, dtype):
    white = 1 if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
    image = (np.random.default_rng(0).random(shape) * white).astype(dtype)
    path = weights(3 if len(shape) == 3 else 1)
    denoised = denoise_array(image, 25, ckpt_path=path)
    assert denoised.dtype == image.dtype
    assert denoised.shape == image.shape
    pixels = torch.from_numpy(image.astype(np.float32).reshape(30, 41, -1) / white).permute(2, 0, 1)
    expected = denoise(load_denoiser(path)[0], pixels, 25).permute(1, 2, 0).numpy().reshape(shape)
    assert np.abs(denoised / white - expected).max() < 0.51 / 255 * 255 / max(white, 255)


def test_bad_arrays_are_refused(weights):
    path = weights()
    for image, message in (
        (np.zeros((4, 4, 4)), r"\(4, 4, 4\)"),
        (np.zeros(4), r"\(4,\)"),
        (np.zeros((0, 4)), r"\(0, 4\)"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4), bool), "bool"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.full((4, 4), 128.0), "scale"),
    ):
        with pytest.raises(InputError, match=message):
            denoise_array(image, 25, ckpt_path=path)
    with pytest.raises(InputError, match="size=huge"):
        denoise_array(np.zeros((4, 4)), 25, size="huge")


def test_loading_folds_and_takes_attention_locally(weights):
    path = weights(attention="ca")
    noisy = torch.rand(1, 60, 44)
    (folded, levels), (plain, _) = (load_denoiser(path, folded=f) for f in (True, False))
    assert levels == (0, 70)
    assert (denoise(folded, noisy, 25) - denoise(plain, noisy, 25)).abs().max() < 1e-5
    whole, tiled = (denoise(folded, noisy, 25, tile=tile) for tile in (60, 16))
    assert (whole - tiled).abs().max() < 1e-5


def test_trained_levels_of_a_run_and_of_a_published_file(tmp_path):
    for noise, expected in (
        ({"kind": "gaussian", "level": [0, 70]}, (0, 70)),
        ({"kind": "clipped_u8", "level": 25}, (25, 25)),
        ({"kind": "camera", "level": 25}, (0, 255)),
    ):
        torch.save({"hyper_parameters": {"noise": noise}, "state_dict": {}}, tmp_path / "run.ckpt")
        assert trained_levels(tmp_path / "run.ckpt") == expected
    torch.save(DnCNN(1, 3, 4).state_dict(), tmp_path / "published.pth")
    assert trained_levels(tmp_path / "published.pth") == (0, 255)


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("channels", [1, 3])
def test_shipped_weights_denoise_and_keep_what_is_constant(size, channels):
    net, levels = load_denoiser(shipped_weights(size, channels))
    assert levels == (0, 70)
    clean = photo(channels)
    for level, gain in ((15, 5), (50, 9)):
        noisy = protocol_noise(clean[None], level)[0]
        ours, floor = (psnr(x[None], clean[None], crop_border=0, channel="gray" if channels == 1 else "rgb").item()
                       for x in (denoise(net, noisy, level, levels=levels), noisy))  # fmt: skip
        assert ours > floor + gain
        estimated = denoise(net, noisy, levels=levels)
        assert (estimated - denoise(net, noisy, level, levels=levels)).abs().mean() < 1 / 255
    for value in (0.0, 0.5, 1.0):
        flat = torch.full((channels, 64, 80), value)
        assert (denoise(net, flat, levels=levels) - flat).abs().max() <= 1 / 255


@pytest.mark.gpu
@pytest.mark.parametrize("folded", [False, True])
def test_gpu_gives_what_the_cpu_gives(folded):
    net = network(in_channels=3, noise_map=True)
    net = fold(net) if folded else net
    noisy = torch.rand(3, 70, 90)
    expected = denoise(net, noisy, 25, tile=32)
    assert (denoise(net.cuda(), noisy.cuda(), 25, tile=32).cpu() - expected).abs().max() < 1e-3  # TF32
