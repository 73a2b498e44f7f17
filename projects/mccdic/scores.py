"""Scores of restored slices, of the volumes they make up, and of the structures that were put in on purpose."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from shared.metrics import psnr, rmse, ssim, ssim_uniform

from .model import MCCDic


def slice_scores(found: Tensor, truth: Tensor, inside: Tensor | None = None) -> dict[str, float]:
    """Score one slice as papers on IXI and BraTS do: the whole slice, nothing clipped, on 0..255.

    Args:
        found: (1, 1, H, W) where 1 is the data range.
        truth: the same.
        inside: (1, 1, H, W) bool; `psnr_inside` leaves out the air, which flatters.
    """
    found, truth = found.double(), truth.double()
    options = {"crop_border": 0, "channel": "gray", "quantise": False}
    values = {"psnr": psnr(found, truth, **options), "ssim": ssim(found, truth, **options), "rmse": rmse(found, truth)}
    if inside is not None:
        values["psnr_inside"] = -10 * (found - truth)[inside].square().mean().log10()
    return {name: value.item() for name, value in values.items()}


def structure_scores(found: Tensor, truth: Tensor, structures: Tensor, amplitude: Tensor) -> dict[str, float]:
    """Give the mean error within the designed structures, as a share of their amplitude in the reference.

    In those that only the reference shows the error is what leaked: `leakage`.

    Args:
        found: (1, 1, H, W).
        truth: the same.
        structures: (1, 3, H, W) bool: in both contrasts, in the target only, in the reference only.
        amplitude: (1,) of the structures, in the units of the images.
    """
    error = (found - truth)[:, 0].abs() / amplitude
    names = ("error_common", "error_target_only", "leakage")
    return {
        name: error[mask].mean().item() for name, mask in zip(names, structures.unbind(1), strict=True) if mask.any()
    }


@torch.no_grad()
def unique_shares(net: MCCDic, batch: dict[str, Tensor]) -> dict[str, float]:
    """Give how much of the first reference's explanation is its own: energy of H'*V against that of B*C.

    Inside the structures that only the reference shows, which should be in V, as `unique_share`; inside those that both
    contrasts show, which should be in C, as `unique_share_common`: in the reference the two look alike. Energies are
    those of the feature maps less their means over the slice.

    Args:
        net: with a common code.
        batch: of one slice, as data.py makes it, with "structures".
    """
    maps = net.explained_features(batch["input"], batch["reference"])
    energies = [(part[0, 1] - part[0, 1].mean((-2, -1), keepdim=True)).square().sum(0).double() for part in maps]
    areas = {"unique_share": batch["structures"][0, 2], "unique_share_common": batch["structures"][0, 0]}
    sums = {name: [energy[area].sum().item() for energy in energies] for name, area in areas.items() if area.any()}
    return {name: unique / (common + unique) for name, (common, unique) in sums.items() if common + unique}


class VolumeScores:
    """fastMRI's scores of whole volumes, from slices in any order: PSNR with the volume's peak, NMSE, SSIM."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, volume: str, found: Tensor, truth: Tensor, peak: Tensor) -> None:
        """Note a slice (1, 1, H, W) in its own units; `peak` (1,) is the largest value of its volume."""
        error, energy = (found - truth).double().square().sum(), truth.double().square().sum()
        similarity = ssim_uniform(found, truth, data_range=peak)
        values = [error.item(), energy.item(), similarity.item(), 1, truth.numel()]
        kept = self.sums.get(volume, [0.0] * 6)
        self.sums[volume] = [*(a + b for a, b in zip(kept[:5], values, strict=True)), peak.item()]

    def merge(self, others: Iterable[dict[str, list[float]]]) -> None:
        """Take up the sums of other processes."""
        for sums in others:
            for volume, values in sums.items():
                kept = self.sums.get(volume, [0.0] * 6)
                self.sums[volume] = [*(a + b for a, b in zip(kept[:5], values[:5], strict=True)), values[5]]

    def means(self) -> dict[str, float]:
        """Average over the volumes."""
        rows = []
        for error, energy, similarity, slices, pixels, peak in self.sums.values():
            decibels = 10 * math.log10(peak**2 * pixels / error) if error else math.inf
            rows.append((decibels, similarity / slices, error / energy))
        names = ("volume_psnr", "volume_ssim", "volume_nmse")
        return dict(zip(names, torch.tensor(rows, dtype=torch.float64).mean(0).tolist(), strict=True))
