import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.metrics import imresize, imresize_uint8, psnr, resize

FIXTURES = json.loads((Path(__file__).parent / "fixtures" / "imresize.json").read_text(encoding="utf-8"))
MATLAB_UINT8 = FIXTURES["matlab_uint8"]
OCTAVE = FIXTURES["octave_double"]


def brute_force(image: np.ndarray, scale: float, antialias: bool = True) -> np.ndarray:
    """The definition, one output pixel after the other: no matrices, no cached weights, both dimensions at once."""

    def keys(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0

    def taps(out: int, length: int) -> list[tuple[int, float]]:
        stretch = 1 / scale if antialias and scale < 1 else 1.0
        centre = (out + 0.5) / scale - 0.5
        reach = range(math.floor(centre - 2 * stretch), math.ceil(centre + 2 * stretch) + 1)
        weights = [(i, keys((centre - i) / stretch)) for i in reach]
        total = math.fsum(weight for _, weight in weights)
        # reflect until inside, border pixel included
        found = []
        for i, weight in weights:
            while not 0 <= i < length:
                i = -1 - i if i < 0 else 2 * length - 1 - i
            found.append((i, weight / total))
        return found

    height, width = image.shape
    result = np.zeros((math.ceil(scale * height), math.ceil(scale * width)))
    for row in range(result.shape[0]):
        for column in range(result.shape[1]):
            result[row, column] = math.fsum(
                v * w * image[y, x] for y, v in taps(row, height) for x, w in taps(column, width)
            )
    return result


@pytest.mark.parametrize("case", MATLAB_UINT8["cases"], ids=lambda case: f"{case['scale']}-{case['antialias']}")
def test_uint8_agrees_with_matlab(case):
    image = torch.tensor(MATLAB_UINT8["input"], dtype=torch.uint8)
    expected = torch.tensor(case["output"])
    numerator, denominator = case["scale"]
    result = imresize_uint8(image, numerator / denominator, antialias=case["antialias"], round_between=True)
    assert result.shape == expected.shape
    difference = (result.int() - expected).abs()
    # one of 546 pixels differs by one level: see the fixture's note
    assert difference.max() <= 1
    assert (difference > 0).sum() <= case["pixels_off_by_one"]


@pytest.mark.parametrize("case", MATLAB_UINT8["cases"], ids=lambda case: f"{case['scale']}-{case['antialias']}")
def test_double_path_stays_within_a_level_of_matlab_uint8(case):
    image = torch.tensor(MATLAB_UINT8["input"], dtype=torch.uint8)
    numerator, denominator = case["scale"]
    result = imresize_uint8(image, numerator / denominator, antialias=case["antialias"])
    assert (result.int() - torch.tensor(case["output"])).abs().max() <= 1


def test_matlab_double_values():
    case = FIXTURES["matlab_double"]
    result = imresize(torch.tensor(case["input"], dtype=torch.float64), size=case["size"])
    np.testing.assert_allclose(result, np.broadcast_to(case["row"], (3, 3)), atol=1e-13)


@pytest.mark.parametrize("case", OCTAVE["cases"], ids=lambda case: f"{case['scale']}-{case['antialias']}")
def test_double_agrees_with_octave(case):
    image = torch.tensor(OCTAVE["input"], dtype=torch.float64)
    numerator, denominator = case["scale"]
    result = imresize(image, numerator / denominator, antialias=case["antialias"])
    expected = torch.tensor(case["output"], dtype=torch.float64)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, atol=1e-11)


@pytest.mark.parametrize("case", OCTAVE["cases"], ids=lambda case: f"{case['scale']}-{case['antialias']}")
def test_psnr_against_octave_output_is_the_same_to_a_thousandth(case):
    # the figure a paper would report, from either resizing
    image = torch.tensor(OCTAVE["input"], dtype=torch.float64)
    numerator, denominator = case["scale"]
    ours = imresize(image, numerator / denominator, antialias=case["antialias"])[None, None] / 255
    theirs = torch.tensor(case["output"], dtype=torch.float64)[None, None] / 255
    gt = torch.rand(ours.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"crop_border": 0, "channel": "gray"}
    np.testing.assert_allclose(psnr(ours, gt, **options), psnr(theirs, gt, **options), atol=1e-3)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("scale", [2, 3, 4, 1 / 2, 1 / 3, 1 / 4, 0.4, 0.91, 1.5, 4 / 3, 1.0])
@pytest.mark.parametrize("shape", [(9, 13), (2, 5), (1, 1)])
def test_agrees_with_the_definition(shape, scale, antialias):
    image = np.random.default_rng(0).random(shape)
    expected = brute_force(image, scale, antialias)
    result = imresize(torch.from_numpy(image), scale, antialias=antialias)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, atol=1e-12)


@pytest.mark.parametrize(("size", "shape"), [((600, 3), (301, 5)), ((300, 700), (601, 350)), ((1, 1), (40, 40))])
def test_blocks_do_not_show(monkeypatch, size, shape):
    image = torch.rand(2, *shape, dtype=torch.float64)
    cut = imresize(image, size=size)
    monkeypatch.setattr(resize, "BLOCK_SIZE", 10_000)
    resize.resize_blocks.cache_clear()
    whole = imresize(image, size=size)
    resize.resize_blocks.cache_clear()
    assert cut.shape == (2, *size)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 0.3, 1, 2.5, 4])
def test_weights_sum_to_one_and_constants_are_kept(scale):
    for _, _, matrix in resize.resize_blocks(37, math.ceil(37 * scale), scale):
        torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64), rtol=0, atol=1e-14)
    result = imresize(torch.full((3, 37, 11), 0.7), scale)
    assert torch.equal(result, torch.full_like(result, 0.7))


def test_scale_one_changes_nothing():
    image = torch.rand(3, 7, 8)
    assert torch.equal(imresize(image, 1), image)
    assert torch.equal(imresize(image, size=(7, 8)), image)


def test_size_rounds_up_and_dtype_is_kept():
    assert imresize(torch.rand(1, 3, 7, 10), 1 / 3).shape == (1, 3, 3, 4)
    assert imresize(torch.rand(7, 10, dtype=torch.float16), 2).dtype == torch.float16
    assert imresize(torch.rand(7, 10), size=(5, 31)).shape == (5, 31)


def test_differentiable():
    image = torch.rand(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: imresize(x, 0.5), image)
    assert torch.autograd.gradcheck(lambda x: imresize(x, 1.5), image)


def test_channels_and_strides_do_not_matter():
    image = torch.rand(2, 3, 12, 16, dtype=torch.float64)
    result = imresize(image, 0.5)
    for b in range(2):
        for c in range(3):
            torch.testing.assert_close(result[b, c], imresize(image[b, c], 0.5), rtol=0, atol=1e-14)
    strided = image.permute(0, 1, 3, 2)
    torch.testing.assert_close(imresize(strided, 0.5), result.permute(0, 1, 3, 2), rtol=0, atol=1e-14)


def test_uint8_rounds_half_up_and_clips():
    # a step overshoots on both sides; two equal halves of 1 and 2 give exactly 1.5
    step = torch.tensor([[0, 0, 255, 255]], dtype=torch.uint8)
    assert imresize_uint8(step, size=(1, 8)).tolist()[0][0] == 0
    assert imresize_uint8(step, size=(1, 8)).max() == 255
    half = torch.tensor([[1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2]], dtype=torch.uint8)
    exact = imresize(half.double(), size=(1, 6))
    middle = exact[0, 2:4]
    assert torch.equal(imresize_uint8(half, size=(1, 6))[0, 2:4], (middle + 0.5).floor().to(torch.uint8))


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (torch.zeros(3, 4, dtype=torch.uint8), {"scale": 2}),
        (torch.zeros(4), {"scale": 2}),
        (torch.zeros(3, 0, 4), {"scale": 2}),
        (torch.zeros(3, 4), {}),
        (torch.zeros(3, 4), {"scale": 2, "size": (6, 8)}),
        (torch.zeros(3, 4), {"scale": 0}),
        (torch.zeros(3, 4), {"scale": float("nan")}),
        (torch.zeros(3, 4), {"size": (0, 4)}),
        (torch.zeros(3, 4), {"size": (4,)}),
    ],
)
def test_bad_input(image, options):
    with pytest.raises(ValueError):
        imresize(image, **options)


def test_uint8_refuses_floats():
    with pytest.raises(ValueError, match="uint8"):
        imresize_uint8(torch.zeros(3, 4), 2)
