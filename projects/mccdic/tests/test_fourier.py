"""The centred orthonormal transform."""

import numpy as np
import pytest
import torch

from projects.mccdic.fourier import fft2c, ifft2c, mirror

SIZES = [(240, 240), (256, 256), (241, 241), (241, 256), (7, 8)]


def complex_image(height, width, seed=0):
    return torch.randn(2, height, width, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_energy_stays_and_the_inverse_brings_the_image_back(height, width):
    image = complex_image(height, width)
    kspace = fft2c(image)
    assert kspace.abs().square().sum().item() == pytest.approx(image.abs().square().sum().item(), rel=1e-12)
    torch.testing.assert_close(ifft2c(kspace), image, rtol=0, atol=1e-12)
    torch.testing.assert_close(fft2c(ifft2c(image)), image, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 7), (5, 8)])
def test_is_the_sum_of_waves_about_the_middle(height, width):
    image = complex_image(height, width)[0]
    rows, columns = np.arange(height) - height // 2, np.arange(width) - width // 2
    left = np.exp(-2j * np.pi * np.outer(rows, rows) / height)
    right = np.exp(-2j * np.pi * np.outer(columns, columns) / width)
    expected = left @ image.numpy() @ right / np.sqrt(height * width)
    np.testing.assert_allclose(fft2c(image).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_constant_image_is_its_zero_frequency(height, width):
    kspace = fft2c(torch.ones(height, width, dtype=torch.float64))
    expected = torch.zeros(height, width, dtype=torch.complex128)
    expected[height // 2, width // 2] = (height * width) ** 0.5
    torch.testing.assert_close(kspace, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (7, 8), (8, 5)])
def test_mirror_gives_each_frequency_its_opposite(height, width):
    kspace = complex_image(height, width)[0]
    opposite = mirror(kspace)
    for row, column in np.ndindex(height, width):
        other = (2 * (height // 2) - row) % height, (2 * (width // 2) - column) % width
        assert opposite[row, column] == kspace[other]
    real = fft2c(complex_image(height, width).real)
    torch.testing.assert_close(mirror(real).conj(), real, rtol=0, atol=1e-12)
