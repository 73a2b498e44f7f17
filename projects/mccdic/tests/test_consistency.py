"""Data consistency: samples that are kept, images that stay real, phases that stay."""

import pytest
import torch

from projects.mccdic.consistency import DataConsistency, complete, data_consistency
from projects.mccdic.fourier import fft2c, ifft2c
from projects.mccdic.masks import box_mask, cartesian_mask
from projects.mccdic.model import MCCDic

SIZES = [(24, 20), (25, 21), (24, 21), (25, 20)]
TINY = {"widths": [6, 5, 4], "features": 4, "stages": 3, "blocks": [1, 1, 1], "skip": True}


def measured(height, width, dtype=torch.float64, box=False, seed=0):
    """An image (2, 1, height, width), its samples and their mask."""
    image = torch.rand(2, 1, height, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    mask = box_mask(height, width, 2) if box else cartesian_mask(width, 4, center_fraction=0.1)
    mask = mask.expand(height, width)
    return image, fft2c(image) * mask, mask


def estimate(image):
    return image + 0.1 * torch.randn(image.shape, dtype=image.dtype, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_hard_consistency_leaves_the_samples_and_is_idempotent(height, width, box):
    image, kspace, mask = measured(height, width, torch.float32, box)
    found = data_consistency(estimate(image), kspace, mask)
    after = fft2c(found)
    assert (after - kspace)[..., mask].abs().max() < 1e-6
    torch.testing.assert_close(after[..., ~mask], fft2c(estimate(image))[..., ~mask], rtol=0, atol=1e-6)
    torch.testing.assert_close(data_consistency(found, kspace, mask), found, rtol=0, atol=1e-6)


def test_mask_of_ones_gives_the_truth_and_one_of_nothing_the_estimate():
    image, _, mask = measured(24, 21)
    full, guess = fft2c(image), estimate(image)
    torch.testing.assert_close(data_consistency(guess, full, torch.ones_like(mask)).real, image)
    torch.testing.assert_close(data_consistency(guess, full * 0, torch.zeros_like(mask)).real, guess)


def test_soft_consistency_is_the_weighted_mean():
    image, kspace, mask = measured(24, 21)
    guess, weight = estimate(image), torch.tensor(3.0, dtype=torch.float64)
    found = fft2c(data_consistency(guess, kspace, mask, weight))
    expected = torch.where(mask, (fft2c(guess) + 3 * kspace) / 4, fft2c(guess))
    torch.testing.assert_close(found, expected)
    for weight, same in ((0.0, guess), (1e12, data_consistency(guess, kspace, mask).real)):
        near = data_consistency(guess, kspace, mask, torch.tensor(weight, dtype=torch.float64))
        # what the conjugate lines miss is imaginary
        torch.testing.assert_close(near.real, same, rtol=0, atol=1e-9)


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_completed_samples_keep_a_real_image_real(height, width, box):
    image, kspace, mask = measured(height, width, box=box)
    full, known = complete(kspace, mask)
    torch.testing.assert_close(full, fft2c(image) * known, rtol=0, atol=1e-12)
    assert (known | ~mask).all()
    assert int(known.sum()) > int(mask.sum())
    found = data_consistency(estimate(image), full, known)
    assert found.imag.abs().max() < 1e-12
    assert data_consistency(estimate(image), kspace, mask).imag.abs().max() > 1e-3
    again, same = complete(full, known)
    torch.testing.assert_close(again, full, rtol=0, atol=1e-12)
    assert torch.equal(same, known)


def test_completion_of_noisy_samples_takes_their_mean():
    noisy = torch.randn(1, 1, 8, 7, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    full, known = complete(noisy, torch.ones(1, 1, 8, 7, dtype=torch.bool))
    assert known.all()
    # the real part of the image has the mean of both sides as its spectrum
    torch.testing.assert_close(ifft2c(full), ifft2c(noisy).real + 0j, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_layer_brings_a_real_image_nearer_to_its_samples(kind):
    image, kspace, mask = measured(24, 21)
    guess, layer = estimate(image), DataConsistency(kind).double()
    found = layer(guess, kspace, mask)
    assert found.dtype == guess.dtype
    before, after = ((fft2c(x) - kspace)[..., mask].abs() for x in (guess, found))
    assert after.max() < (1e-12 if kind == "hard" else before.max())
    torch.testing.assert_close(after, (0 if kind == "hard" else 0.5) * before, rtol=1e-3, atol=1e-12)
    assert (found - image).norm() < (guess - image).norm()


def test_weight_of_soft_consistency_begins_at_one_and_learns():
    layer = DataConsistency("soft")
    assert torch.nn.functional.softplus(layer.raw_weight).item() == pytest.approx(1, abs=1e-3)
    image, kspace, mask = measured(24, 20, torch.float32)
    (layer(estimate(image), kspace, mask) - image).square().sum().backward()
    assert layer.raw_weight.grad < 0  # what was measured is right, so it shall count more
    assert not list(DataConsistency("hard").parameters())


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_complex_image_stays_at_its_phase(kind):
    magnitude, _, mask = measured(24, 21)
    phase = torch.linspace(-1, 2, 21, dtype=torch.float64).expand_as(magnitude)
    kspace = fft2c(torch.polar(magnitude, phase)) * mask
    layer = DataConsistency(kind).double()
    torch.testing.assert_close(layer(magnitude, kspace, mask, phase), magnitude)
    guess = estimate(magnitude)
    found = layer(guess, kspace, mask, phase)
    assert (found - magnitude).norm() < (guess - magnitude).norm()
    # what has no samples keeps its sign
    torch.testing.assert_close(layer(-guess, kspace * 0, mask & False, phase), -guess)
    # taking the image to be real is wrong here
    assert (layer(guess, kspace, mask) - magnitude).norm() > (found - magnitude).norm()


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_network_ends_with_its_consistency(kind):
    torch.manual_seed(0)
    net = MCCDic(**TINY, consistency=kind).double()
    image, kspace, mask = measured(24, 21)
    masks = mask.expand_as(image)
    found = net(ifft2c(kspace).abs(), image.flip(-1), kspace, masks)
    plain = MCCDic(**TINY).double()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("consistency.")})
    before = plain(ifft2c(kspace).abs(), image.flip(-1))
    torch.testing.assert_close(found.target, net.consistency(before.target, kspace, masks))
    assert torch.equal(found.references, before.references)
    if kind == "hard":
        assert (fft2c(found.target) - kspace)[..., mask].abs().max() < 1e-12
    with pytest.raises(ValueError, match="needs k-space and mask"):
        net(image, image)
