"""Protocols and metrics of interpolated frames."""

import math

import pytest
import torch

from projects.fgdcn.scores import end_point_error, psnr_by_visibility, scores
from shared.errors import InputError


@pytest.fixture
def target():
    return torch.randint(0, 200, (2, 3, 16, 20), generator=torch.Generator().manual_seed(0)) / 255


def test_a_constant_error_of_a_tenth_is_20_db(target):
    found = scores(target + 0.1, target, "float")
    torch.testing.assert_close(found["psnr"], torch.full((2,), 20.0).double(), atol=1e-4, rtol=0)
    found = scores(target + 26.4 / 255, target, "float")
    torch.testing.assert_close(found["ie"], torch.full((2,), 26.0).double(), atol=1e-4, rtol=0)
    assert {name: value.shape for name, value in found.items()} == dict.fromkeys(("psnr", "ssim", "ie"), (2,))


def test_equal_frames_score_best_in_every_protocol(target):
    for protocol in ("float", "round8"):
        found = scores(target, target, protocol)
        assert found["psnr"].tolist() == [math.inf] * 2
        torch.testing.assert_close(found["ssim"], torch.ones(2).double())
        assert found["ie"].max() < 1e-4


def test_rounding_forgives_what_a_saved_picture_does_not_show(target):
    near = target + 0.4 / 255
    assert scores(near, target, "round8")["psnr"].tolist() == [math.inf] * 2
    assert scores(near, target, "float")["psnr"][0].item() == pytest.approx(20 * math.log10(255 / 0.4), abs=1e-3)
    white = torch.ones_like(target)
    assert scores(white + 0.2, white, "round8")["ie"].max() < 1e-4
    assert scores(white + 0.2, white, "float")["ie"].min() == pytest.approx(51, abs=1e-3)


def test_unknown_protocol_and_nan_are_named(target):
    with pytest.raises(InputError, match="metric_protocol is float or round8, not 'uint8'"):
        scores(target, target, "uint8")
    with pytest.raises(InputError, match="the network gives NaN or infinity"):
        scores(target * math.nan, target, "float")


def test_visibility_shares_the_error_out_and_loses_none(target):
    generator = torch.Generator().manual_seed(1)
    prediction = target + 0.1 * torch.randn(target.shape, generator=generator)
    visibility = (torch.rand((2, 2, 16, 20), generator=generator) < 0.7).float()
    found = psnr_by_visibility(prediction, target, visibility)
    assert list(found) == ["both", "one", "none"]
    error, pixels = sum(found.values())
    assert pixels == 2 * 16 * 20
    assert error / pixels == pytest.approx((prediction - target).square().mean().item(), rel=1e-6)
    pooled = sum(
        psnr_by_visibility(p[None], t[None], v[None])["one"]
        for p, t, v in zip(prediction, target, visibility, strict=True)
    )
    torch.testing.assert_close(pooled, found["one"])


def test_visibility_by_hand():
    target = torch.zeros(1, 3, 1, 4)
    prediction = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(1, 3, 1, 4)
    visibility = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]).reshape(1, 2, 1, 4)
    found = psnr_by_visibility(prediction, target, visibility)
    for name, expected in (("both", [0.01, 1]), ("one", [0.13, 2]), ("none", [0.16, 1])):
        assert found[name].tolist() == pytest.approx(expected, rel=1e-6)
    everywhere = psnr_by_visibility(prediction, target, torch.ones_like(visibility))
    assert everywhere["none"].tolist() == [0, 0]


def test_end_point_error_by_hand():
    truth = torch.zeros(1, 4, 2, 2)
    flow = torch.tensor([3.0, 4.0, 0.0, 1.0]).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    assert end_point_error(flow, truth).item() == 3  # 5 px and 1 px
    assert end_point_error(flow[:, :2], truth[:, :2]).item() == 5
    mask = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0]]).reshape(1, 2, 2, 2)
    assert end_point_error(flow, truth, mask).item() == 2
    assert end_point_error(flow, truth, torch.zeros_like(mask)).isnan().all()
    assert end_point_error(torch.where(mask[:, [0, 0, 1, 1]] > 0, flow, math.nan), truth, mask).item() == 2


def test_shapes_that_do_not_fit_are_refused(target):
    flow = torch.zeros(2, 4, 16, 20)
    for call in (
        lambda: psnr_by_visibility(target, target, target),
        lambda: psnr_by_visibility(target[..., 1:], target, target[:, :2]),
        lambda: end_point_error(flow[:1], flow),
        lambda: end_point_error(target, target),
        lambda: end_point_error(flow, flow, target),
        lambda: scores(target[:1], target, "float"),
    ):
        with pytest.raises(ValueError, match=r"must be|needs"):
            call()
