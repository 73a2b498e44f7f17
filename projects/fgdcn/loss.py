"""The losses of FGDCN. Frames are (B, 3, H, W) RGB in [0, 1], flows (B, 4, h, w) in px of their grid (t->0, t->1).

The published weights are tied to crops of 256x256: the frequency loss grows with the side of a crop unless it is
orthonormal, the Laplacian loss with the number of levels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.errors import InputError

from .model import Interpolation, resize

LAPLACIAN_LEVELS = 5
KERNELS = ("gaussian", "official")
NORMS = ("ortho", "backward")
FORMS = ("standard", "pyramid")
GRAY = (0.2989, 0.5870, 0.1140)


def blur_kernel(kind: str) -> Tensor:
    """Give the 5x5 kernel of the Laplacian pyramid.

    Args:
        kind: "gaussian", of sigma 2 cut off at 5x5; "official", the released code's, which adds the two profiles
            exp(-d^2 / 4) where it should multiply them: (g(i) + g(j)) / sum.
    """
    if kind not in KERNELS:
        raise InputError(f"unknown laplacian_kernel {kind!r}; choose one of {', '.join(KERNELS)}")
    distance = torch.arange(-2.0, 3.0)
    if kind == "official":
        profile = torch.exp(-(distance**2) / 4)
        kernel = profile[:, None] + profile
    else:
        profile = torch.exp(-(distance**2) / 8)
        kernel = profile[:, None] * profile
    return kernel / kernel.sum()


def laplacian_loss(prediction: Tensor, target: Tensor, kernel: str = "gaussian") -> Tensor:
    """Sum over the six bands of a Laplacian pyramid of the mean |difference|: five levels and what is left.

    A band is what blurring takes away; the blurred picture, averaged 2x2, goes on to the next level.

    Args:
        prediction: (B, C, H, W), H and W 32 or more.
        target: the same shape.
        kernel: see `blur_kernel`.

    Raises:
        InputError: sides below 32.
    """
    if min(prediction.shape[-2:]) < 2**LAPLACIAN_LEVELS:
        raise InputError(f"the Laplacian loss needs frames of 32x32 or more, not {tuple(prediction.shape[-2:])}")
    # the pyramid is linear, so that of the difference is the difference of the two
    rest = prediction - target
    channels = rest.shape[1]
    weight = blur_kernel(kernel).to(rest).expand(channels, 1, 5, 5)
    loss = rest.new_zeros(())
    for _ in range(LAPLACIAN_LEVELS):
        blurred = F.conv2d(F.pad(rest, (2, 2, 2, 2), mode="replicate"), weight, groups=channels)
        loss = loss + (rest - blurred).abs().mean()
        rest = F.avg_pool2d(blurred, 2)
    return loss + rest.abs().mean()


def distillation_loss(flows: tuple[Tensor, ...], teacher: Tensor) -> Tensor:
    """Half the sum over all estimates of the mean end-point errors of both flows; sqrt(du^2 + dv^2 + 1e-6).

    Args:
        flows: estimates (B, 4, h, w), px of their grids.
        teacher: (B, 4, H, W), px of its own grid.
    """
    loss = teacher.new_zeros(())
    for flow in flows:
        scale = flow.shape[-1] / teacher.shape[-1]
        wanted = F.interpolate(teacher, size=flow.shape[-2:], mode="bilinear", align_corners=False) * scale
        squared = (flow - wanted).unflatten(1, (2, 2)).square().sum(2)
        loss = loss + (squared + 1e-6).sqrt().mean((0, 2, 3)).sum()
    return loss / 2


def frequency_loss(prediction: Tensor, target: Tensor, norm: str = "ortho") -> Tensor:
    """Mean |real| + mean |imaginary part| of the spectrum of the difference, (B, C, H, W).

    Args:
        prediction: the frame.
        target: the same shape.
        norm: "ortho", or "backward" for the published form, not normalised: weight 0.1 there is 25.6 here, equal for
            crops of 256x256.
    """
    if norm not in NORMS:
        raise InputError(f"unknown frequency_norm {norm!r}; choose one of {', '.join(NORMS)}")
    spectrum = torch.fft.fft2((prediction - target).float(), norm=norm)
    return spectrum.real.abs().mean() + spectrum.imag.abs().mean()


def census_transform(frames: Tensor) -> Tensor:
    """Soft signs of the differences to the 7x7 neighbours, (B, 3, H, W) -> (B, 49, H, W): d / sqrt(0.81 + d^2)."""
    gray = (frames * frames.new_tensor(GRAY)[:, None, None]).sum(1, keepdim=True)
    neighbours = F.unfold(gray, 7, padding=3).unflatten(2, gray.shape[-2:])
    difference = neighbours - gray
    return difference / (0.81 + difference.square()).sqrt()


def census_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Compare the neighbourhoods of pixels, whatever the brightness: mean of d^2 / (0.1 + d^2), zero in a 1-px border.

    Args:
        prediction: (B, 3, H, W).
        target: the same shape.
    """
    squared = (census_transform(prediction) - census_transform(target)).square()
    distance = (squared / (0.1 + squared)).mean(1)
    return distance[:, 1:-1, 1:-1].sum() / distance.numel()


def interpolation_losses(
    output: Interpolation,
    target: Tensor,
    teacher: Tensor | None,
    weights: Mapping[str, float],
    form: str = "standard",
    laplacian_kernel: str = "gaussian",
    frequency_norm: str = "ortho",
) -> dict[str, Tensor]:
    """Give the weighted terms of the training loss.

    "standard" (the released step): L_lap + w_flow L_flow + w_frequency L_fft + w_census L_census. "pyramid" (the
    abstract's): L_lap + mean |difference| at 1/2 and 1/4 + w_frequency (L_fft at the three scales) + w_flow L_flow.

    Args:
        output: of the network.
        target: I_t, (B, 3, H, W).
        teacher: flows to distil, (B, 4, H, W); None leaves that term out.
        weights: of `laplacian`, `flow`, `frequency` and `census`; a term of weight 0 is not computed.
        form: "standard" or "pyramid".
        laplacian_kernel: see `blur_kernel`.
        frequency_norm: see `frequency_loss`.

    Raises:
        InputError: an unknown form, or "pyramid" without the network's coarser heads.
    """
    if form not in FORMS:
        raise InputError(f"unknown loss form {form!r}; choose one of {', '.join(FORMS)}")
    if form == "pyramid" and not output.pyramid:
        raise InputError("the pyramid loss needs model.net.pyramid_heads=true")
    frames, targets = [output.frame], [target]
    if form == "pyramid":
        frames += output.pyramid
        targets += [resize(target, 0.5**i) for i in range(1, len(frames))]
    terms = {}
    if weights["laplacian"]:
        image = laplacian_loss(frames[0], target, laplacian_kernel)
        for frame, truth in zip(frames[1:], targets[1:], strict=True):
            image = image + (frame - truth).abs().mean()
        terms["laplacian"] = weights["laplacian"] * image
    if weights["flow"] and teacher is not None:
        terms["flow"] = weights["flow"] * distillation_loss(output.flows, teacher)
    if weights["frequency"]:
        terms["frequency"] = weights["frequency"] * sum(
            frequency_loss(frame, truth, frequency_norm) for frame, truth in zip(frames, targets, strict=True)
        )
    if weights["census"] and form == "standard":
        terms["census"] = weights["census"] * census_loss(output.frame, target)
    return terms
