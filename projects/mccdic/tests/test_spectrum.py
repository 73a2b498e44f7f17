"""What spectra tell of the sampling, on heads."""

import numpy as np
import pytest
import torch

from ..degrade import Degradation
from ..fourier import fft2c
from ..phantom import PhantomSettings, phantom_volume
from ..predict import EVEN, MORE_UNEVEN, SHARPER, UNEVEN
from ..spectrum import line_unevenness, share_outside


def head(seed, size=96, anatomy="ellipses", noise=0.01):
    target, _, _ = phantom_volume(seed, 2, PhantomSettings(anatomy=anatomy, size=(size, size), noise=noise))
    return torch.from_numpy(np.ascontiguousarray(target.T))


HEADS = [(0, 96), (1, 96), (2, 160, "icbm152"), (3, 240, "icbm152", 0.04)]


@pytest.mark.parametrize("options", HEADS)
def test_heads_that_lack_columns_differ_from_whole_ones_and_from_those_that_lack_rows(options):
    whole = head(*options)
    assert max(line_unevenness(whole)) < EVEN
    for factor, mask in ((2, "random"), (4, "random"), (4, "equispaced"), (8, "random"), (8, "magic")):
        rows, columns = line_unevenness(Degradation("rec", factor, mask=mask)(whole).image)
        assert columns > max(UNEVEN, MORE_UNEVEN * rows)
    turned = Degradation("rec", 4)(whole.mT).image
    assert line_unevenness(turned.mT) == pytest.approx(line_unevenness(turned)[::-1])


@pytest.mark.parametrize("options", HEADS)
def test_heads_of_wide_pixels_have_nothing_outside_of_the_middle(options):
    whole = head(*options)
    for factor in (2, 4):
        assert share_outside(whole, factor) > 2 * SHARPER
        assert share_outside(Degradation("sr", factor)(whole).image, factor) < SHARPER / 2
    assert share_outside(Degradation("sr", 2)(whole).image, 4) > 2 * SHARPER


def test_values_by_hand():
    lines = 2.0 ** torch.tensor([0, 3, 1, 5, 4, 2, 6, 3, 0, 1])  # amplitudes, the zero frequency at 5
    image = torch.zeros(1, 8, 10)
    image[0] = torch.fft.fftshift(torch.fft.ifft(torch.fft.ifftshift(lines)).real)
    spectrum = fft2c(image)[0, 4].abs()
    # a real image has equal energies at opposite frequencies; from the third one on there are two second differences
    half = (spectrum[7:] ** 2).log()
    assert line_unevenness(image)[1] == pytest.approx(float(half.diff(n=2).abs().mean()), rel=1e-4)
    only = torch.zeros(1, 8, 8)
    only[0, 4, 4] = 1  # an equal amount everywhere
    assert share_outside(only, 2) == pytest.approx(0.75)
    assert line_unevenness(only) == pytest.approx((0, 0), abs=1e-5)


def test_large_volumes_are_looked_at_in_part_and_small_slices_give_nothing():
    images = torch.rand(65, 16, 16)
    assert share_outside(images, 2) == share_outside(images[::3], 2)
    assert line_unevenness(torch.rand(1, 6, 6)) == (0, 0)
