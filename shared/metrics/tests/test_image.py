import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr
from torchmetrics.functional.image import structural_similarity_index_measure as torchmetrics_ssim

from shared.io.images import read_rgb
from shared.metrics import high_frequency_error, interpolation_error, psnr, rgb_to_y, ssim, ssim_volume
from shared.metrics.image import gaussian_window

FIXTURES = Path(__file__).parent / "fixtures"
METRICS = json.loads((FIXTURES / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pair():
    """Smooth pictures and noisy versions, (3, 3, 48, 40) float32."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 6, 5, generator=generator)
    gt = torch.nn.functional.interpolate(coarse, size=(48, 40), mode="bilinear")
    return (gt + 0.1 * torch.randn(gt.shape, generator=generator)), gt


def quantised(image):
    return np.floor(image.double().clamp(0, 1).numpy() * 255 + 0.5)


def luma(image):
    return 16 + (image * np.array([65.481, 128.553, 24.966])[:, None, None]).sum(-3) / 255


def test_luma_agrees_with_octave_and_bt601():
    rgb = torch.tensor(METRICS["rgb_to_y"]["rgb"], dtype=torch.float64).T[:, :, None]
    np.testing.assert_allclose(rgb_to_y(rgb).flatten(), METRICS["rgb_to_y"]["y"], atol=1e-12)
    assert float(rgb_to_y(torch.ones(3, 1, 1, dtype=torch.float64))) == 235
    assert float(rgb_to_y(torch.zeros(3, 1, 1, dtype=torch.float64))) == 16


def test_psnr_by_hand():
    # one of four pixels differs by 51 levels: mse = 51^2 / 4, psnr = 20 log10(255 / 25.5) = 20 dB
    gt = torch.zeros(1, 1, 2, 2)
    sr = gt.clone()
    sr[..., 0, 0] = 51 / 255
    assert float(psnr(sr, gt, crop_border=0, channel="gray")) == pytest.approx(20, abs=1e-12)


def test_psnr_by_hand_on_luma():
    # green off by 1 everywhere moves Y by 128.553 / 255
    gt = torch.full((1, 3, 4, 4), 100 / 255)
    sr = gt.clone()
    sr[:, 1] = 101 / 255
    expected = 20 * math.log10(255 / (128.553 / 255))
    assert float(psnr(sr, gt, crop_border=1)) == pytest.approx(expected, abs=1e-9)


def test_psnr_agrees_with_octave():
    image = torch.tensor(json.loads((FIXTURES / "imresize.json").read_text())["octave_double"]["input"]).double()
    other = (255 - image / 2 + 0.5).floor()
    value = psnr(image[None, None] / 255, other[None, None] / 255, crop_border=0, channel="gray")
    assert float(value) == pytest.approx(METRICS["psnr"]["value"], abs=1e-9)


def test_ssim_agrees_with_octave():
    fixture = METRICS["ssim"]
    assert gaussian_window()[5] ** 2 == pytest.approx(fixture["window_centre"], rel=1e-13)
    assert gaussian_window()[0] ** 2 == pytest.approx(fixture["window_corner"], rel=1e-13)
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    p = (37 * x + 91 * y + x * y) % 256
    q = (37 * x + 91 * y + x * y + 11 * ((x + 2 * y) % 7)) % 256
    p, q = p[None, None].double() / 255, q[None, None].double() / 255
    options = {"crop_border": 0, "channel": "gray"}
    assert float(ssim(p, q, **options)) == pytest.approx(fixture["value"], abs=1e-11)
    assert float(psnr(p, q, **options)) == pytest.approx(fixture["psnr"], abs=1e-11)


def test_ssim_agrees_with_ipol():
    import skimage

    camera = read_rgb(Path(skimage.__file__).parent / "data" / "camera.png")[..., 0]
    noise = np.random.RandomState(5).randn(*camera.shape)
    noisy = np.clip(camera + 20.0 * noise, 0, 255).astype(np.uint8)
    value = ssim(
        torch.from_numpy(noisy)[None, None].double() / 255,
        torch.from_numpy(camera)[None, None].double() / 255,
        crop_border=0,
        channel="gray",
    )
    assert float(value) == pytest.approx(METRICS["ssim_ipol"]["value"], abs=1e-5)


@pytest.mark.parametrize("crop_border", [0, 2, 3])
def test_agrees_with_scikit_image_on_luma(pair, crop_border):
    sr, gt = pair
    ours = psnr(sr, gt, crop_border=crop_border), ssim(sr, gt, crop_border=crop_border)
    for i in range(len(gt)):
        inner = slice(crop_border, -crop_border or None)
        a, b = (luma(quantised(image[i]))[inner, inner] for image in (sr, gt))
        assert float(ours[0][i]) == pytest.approx(peak_signal_noise_ratio(b, a, data_range=255), abs=1e-9)
        reference = structural_similarity(
            b, a, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )[1]
        assert float(ours[1][i]) == pytest.approx(reference[5:-5, 5:-5].mean(), abs=1e-9)


def test_agrees_with_scikit_image_on_rgb(pair):
    sr, gt = pair
    ours = psnr(sr, gt, crop_border=0, channel="rgb"), ssim(sr, gt, crop_border=0, channel="rgb")
    for i in range(len(gt)):
        a, b = quantised(sr[i]), quantised(gt[i])
        assert float(ours[0][i]) == pytest.approx(peak_signal_noise_ratio(b, a, data_range=255), abs=1e-9)
        reference = structural_similarity(
            b, a, data_range=255, gaussian_weights=True, use_sample_covariance=False, channel_axis=0
        )
        assert float(ours[1][i]) == pytest.approx(reference, abs=1e-9)


def test_agrees_with_torchmetrics(pair):
    sr, gt = (torch.from_numpy(quantised(image)) for image in pair)
    options = {"crop_border": 0, "channel": "rgb"}
    theirs = torchmetrics_psnr(sr, gt, data_range=255.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(sr / 255, gt / 255, **options), theirs, rtol=0, atol=1e-5)
    _, full = torchmetrics_ssim(sr, gt, data_range=255.0, sigma=1.5, reduction="none", return_full_image=True)
    # its own mean takes in a mirrored border, which the convention leaves out
    theirs = full[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    torch.testing.assert_close(ssim(sr / 255, gt / 255, **options), theirs, rtol=0, atol=1e-9)


def test_equal_images(pair):
    _, gt = pair
    assert psnr(gt, gt, crop_border=2).tolist() == [math.inf] * 3
    np.testing.assert_allclose(ssim(gt, gt, crop_border=2), 1, atol=1e-12)


def test_quantisation_is_part_of_the_convention():
    gt = torch.full((1, 1, 12, 12), 100 / 255)
    sr = gt + 0.4 / 255
    options = {"crop_border": 0, "channel": "gray"}
    assert float(psnr(sr, gt, **options)) == math.inf
    assert float(psnr(sr, gt, quantise=False, **options)) == pytest.approx(20 * math.log10(255 / 0.4), abs=1e-3)
    # what lies outside [0, 1] is clamped, as in a saved picture
    assert float(psnr(torch.full_like(gt, 1.5), torch.ones_like(gt), **options)) == math.inf


def test_range_does_not_change_the_figure_without_quantisation(pair):
    sr, gt = pair
    for metric in (psnr, ssim):
        for channel in ("y", "rgb"):
            a = metric(sr, gt, crop_border=0, channel=channel, quantise=False)
            b = metric(sr, gt, crop_border=0, channel=channel, quantise=False, data_range=1)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_border_is_left_out(pair):
    sr, gt = pair
    spoilt = sr.clone()
    spoilt[..., :3, :] = 0
    spoilt[..., -3:] = 1
    assert torch.equal(psnr(spoilt, gt, crop_border=3), psnr(sr, gt, crop_border=3))
    assert torch.equal(ssim(spoilt, gt, crop_border=3), ssim(sr, gt, crop_border=3))


def test_type_and_batch(pair):
    sr, gt = pair
    together = psnr(sr, gt, crop_border=1)
    assert together.dtype == torch.float64
    assert together.shape == (3,)
    alone = torch.cat([psnr(sr[i : i + 1], gt[i : i + 1], crop_border=1) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert psnr(sr.half(), gt.half(), crop_border=1).dtype == torch.float64


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("sr", "gt", "options", "message"),
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 15), {}, "one shape"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), {}, "B, C, H, W"),
        (torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), {}, "3 channels"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), {"channel": "gray"}, "1 channels"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), {"channel": "Y"}, "channel must be"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), {"crop_border": 8}, "leaves nothing"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), {"crop_border": -1}, "leaves nothing"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), {"data_range": 1}, "data_range"),
        (torch.full((1, 3, 16, 16), math.nan), torch.zeros(1, 3, 16, 16), {}, "NaN"),
        (torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), math.inf), {}, "NaN"),
    ],
)
def test_bad_input(metric, sr, gt, options, message):
    with pytest.raises(ValueError, match=message):
        metric(sr, gt, **{"crop_border": 0, **options})


def test_image_smaller_than_the_window():
    image = torch.zeros(1, 3, 16, 12)
    assert ssim(image, image, crop_border=0).shape == (1,)
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(image, image, crop_border=1)


def slow_ssim_volume(a, b):
    """One image (3, H, W) as a volume, every sample of the 11x11x11 window on its own."""
    axis = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = axis[:, None, None] * axis[:, None] * axis
    window /= window.sum()

    def mean(x):
        return correlate(x, window, mode="nearest")

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))).mean()


def test_ssim_of_the_volume_agrees_with_a_slow_reference(pair):
    sr, gt = (images[..., :20, :17] for images in pair)
    expected = [slow_ssim_volume(a, b) for a, b in zip(sr.double().numpy(), gt.double().numpy(), strict=True)]
    np.testing.assert_allclose(ssim_volume(sr, gt, quantise=False), expected, rtol=0, atol=1e-9)
    expected = [slow_ssim_volume(a, b) for a, b in zip(quantised(sr) / 255, quantised(gt) / 255, strict=True)]
    np.testing.assert_allclose(ssim_volume(sr, gt, quantise=True), expected, rtol=0, atol=1e-9)


def test_ssim_of_the_volume_is_one_at_identity_and_tells_colours_apart(pair):
    sr, gt = pair
    torch.testing.assert_close(ssim_volume(gt, gt, quantise=False), torch.ones(3, dtype=torch.float64))
    assert (ssim_volume(sr, gt, quantise=False) < 0.9).all()
    assert (ssim_volume(gt.flip(1), gt, quantise=False) < 0.999).all()


def test_interpolation_error_by_hand():
    gt = torch.full((2, 3, 4, 4), 100 / 255)
    sr = gt.clone()
    sr[0, :, :2] = 103.4 / 255  # half of the pixels off by 3 once rounded
    sr[1] = 1.2  # 306 levels
    torch.testing.assert_close(
        interpolation_error(sr, gt, clip=False), torch.tensor([1.5, 206]).double(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        interpolation_error(sr, gt, clip=True), torch.tensor([1.5, 155]).double(), atol=1e-4, rtol=0
    )


def test_bad_input_of_the_interpolation_metrics():
    image = torch.zeros(1, 3, 16, 12)
    for metric, options in ((ssim_volume, {"quantise": True}), (interpolation_error, {"clip": True})):
        with pytest.raises(ValueError, match="one shape"):
            metric(image, image[..., 1:], **options)
        with pytest.raises(ValueError, match="NaN"):
            metric(image / 0, image, **options)
    with pytest.raises(ValueError, match="11 pixels"):
        ssim_volume(image[..., :10], image[..., :10], quantise=False)


def test_high_frequency_error_is_what_lies_above_half_nyquist():
    place = torch.arange(32)
    gt = torch.zeros(1, 3, 32, 32)
    for frequency, share in ((3 / 32, 0), (8 / 32, 0), (9 / 32, 1), (0.5, 2)):  # Nyquist's cosine has twice the energy
        wave = 0.2 * torch.cos(2 * math.pi * frequency * place)
        for sr in (wave.expand(1, 3, 32, 32), wave[:, None].expand(1, 3, 32, 32)):
            assert high_frequency_error(sr, gt).item() == pytest.approx(share * 0.02, abs=1e-7)


def test_high_frequency_error_is_at_most_the_squared_error(pair):
    _, gt = pair
    sr = gt + 0.1 * torch.randn(gt.shape, generator=torch.Generator().manual_seed(2))
    share = high_frequency_error(sr, gt) / (sr - gt).double().square().mean((1, 2, 3))
    # of white noise, three quarters of the spectrum
    assert ((share > 0.65) & (share < 0.85)).all()
    with pytest.raises(ValueError, match="one shape"):
        high_frequency_error(sr[:1], gt)
