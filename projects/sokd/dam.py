"""Distinctive area detection (DAM): where student and teacher are compared (Shen et al., ACM Multimedia 2024).

Letters: B batch, C channels, K classes of the heatmap, P areas, (H, W) the side lengths of a map; x, w, dx count
columns, y, h, dy rows. The heads are those of CenterNet (Zhou et al. 2019); one DAM looks at both networks.
"""

from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError

SOURCES = ("student", "teacher", "intersection", "union")
MASK_MODES = ("sum_of_losses", "fork", "union")


class Detection(NamedTuple):
    """What the three heads say of a map.

    Attributes:
        heat: (B, K, H, W), before the sigmoid.
        size: (B, 2, H, W), width and height of the area centred at a cell, in cells, not negative.
        offset: (B, 2, H, W), dx and dy from a cell to the centre of its area, in cells.
    """

    heat: Tensor
    size: Tensor
    offset: Tensor


class DAM(nn.Module):
    """Three heads, conv3x3 (C -> C), ReLU, conv1x1 on features (B, C, H, W), and the areas that they point at.

    With C = 128 and K = 100 it has 456,168 parameters. The boxes are whole numbers without gradient: the heads learn
    from `loss.consistency_loss` alone.

    Args:
        channels: C.
        heat_channels: K.
        areas: P, how many areas to look for in each map.
        kernel: odd side of the neighbourhood of which a peak is the maximum.
        source: whose areas count: `student`, `teacher`, `intersection` or `union`.
        mask_mode: what a cell under n boxes weighs: n (`sum_of_losses`, the paper's sum over areas), n² (`fork`, the
            authors' code: the sum of the masks times both features, then squared) or 1 (`union`).
        final_relu: end each head in a ReLU, as the authors' code does: no heat is below sigmoid(0) = 1/2, and heads
            die easily. Otherwise heat and offset end in nothing, the size in a softplus.

    Raises:
        InputError: a size below 1, an even kernel, an unknown source or mask mode.
    """

    def __init__(
        self, channels: int, heat_channels: int, areas: int = 8, kernel: int = 3, source: str = "student",
        mask_mode: str = "sum_of_losses", final_relu: bool = False,
    ):  # fmt: skip
        super().__init__()
        sizes = {"channels": channels, "heat_channels": heat_channels, "areas": areas, "kernel": kernel}
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"dam.{name}={size}; it must be at least 1")
        if kernel % 2 == 0:
            raise InputError(f"dam.kernel={kernel}; a neighbourhood of a cell has an odd side, for instance 3")
        for name, value, known in (("source", source, SOURCES), ("mask_mode", mask_mode, MASK_MODES)):
            if value not in known:
                raise InputError(f"unknown dam.{name} {value!r}; choose one of {', '.join(known)}")
        self.num_areas, self.kernel, self.source, self.mask_mode = areas, kernel, source, mask_mode
        self.final_relu = final_relu
        self.heatmap_head = head(channels, heat_channels, final_relu)
        self.size_head = head(channels, 2, final_relu)
        self.offset_head = head(channels, 2, final_relu)

    def forward(self, feat: Tensor) -> Detection:
        """Give the three maps of features (B, C, H, W)."""
        # one convolution for the three heads was measured: no faster
        size = self.size_head(feat)
        return Detection(self.heatmap_head(feat), size if self.final_relu else F.softplus(size), self.offset_head(feat))

    def check_size(self, height: int, width: int) -> None:
        """Say whether maps of (height, width) cells have as many peaks as areas are looked for.

        Raises:
            InputError: they have fewer.
        """
        classes = self.heatmap_head[2].out_channels
        if self.num_areas > classes * height * width:
            raise InputError(
                f"dam.areas={self.num_areas} of maps of {classes} classes and {height} x {width} cells; choose at most "
                f"{classes * height * width}"
            )

    @torch.no_grad()
    def areas(self, detection: Detection) -> Tensor:
        """Give the boxes of the P highest peaks of the heat over all classes and cells.

        A peak is nowhere exceeded in its neighbourhood of its class; where a map has fewer than P, the highest other
        cells follow. The box of the cell (x, y) has its centre at (x + dx, y + dy) and reaches (w, h) / 2 from there,
        clamped to the map, then truncated.

        Returns:
            (B, P, 4) int64: left, top, right, bottom, the last two inclusive; a box without size covers one cell.

        Raises:
            InputError: P exceeds K·H·W.
        """
        heat = detection.heat.float()
        height, width = heat.shape[2:]
        self.check_size(height, width)
        is_peak = heat == neighbourhood_max(heat, self.kernel)
        score = heat.sigmoid() - (~is_peak).float()
        cells = score.flatten(1).topk(self.num_areas, 1).indices % (height * width)  # (B, P)
        shape = torch.cat(detection[1:], 1).float().flatten(2)
        w, h, dx, dy = shape.take_along_dim(cells[:, None], 2).unbind(1)
        x, y = cells % width + dx, cells // width + dy
        columns = torch.stack([x - w / 2, x + w / 2], -1).clamp(0, width - 1)
        rows = torch.stack([y - h / 2, y + h / 2], -1).clamp(0, height - 1)
        return torch.stack([columns, rows], -1).flatten(2).long()

    @torch.no_grad()
    def cover(self, student: Detection, teacher: Detection) -> Tensor:
        """Weigh each cell by the boxes over it, by `source`, then by `mask_mode`: (B, 1, H, W) float32, no gradient.

        `intersection` counts at each cell the smaller of the two numbers of boxes, `union` the larger.

        Raises:
            InputError: see `areas`.
        """
        height, width = student.heat.shape[2:]
        sides = {"student": (student,), "teacher": (teacher,)}.get(self.source, (student, teacher))
        counts = torch.stack([box_counts(self.areas(side), height, width) for side in sides])
        count = (counts.amin(0) if self.source == "intersection" else counts.amax(0))[:, None]
        if self.mask_mode == "fork":
            return count.square()
        return count if self.mask_mode == "sum_of_losses" else count.clamp(max=1)


def head(channels: int, out_channels: int, final_relu: bool) -> nn.Sequential:
    """Build conv3x3, ReLU, conv1x1 and, where asked for, a last ReLU."""
    layers = [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, out_channels, 1)]
    return nn.Sequential(*layers, *([nn.ReLU()] if final_relu else []))


def neighbourhood_max(x: Tensor, kernel: int) -> Tensor:
    """Give the maximum of the kernel x kernel cells (odd) around each cell of (B, K, H, W), as far as the map reaches.

    What F.max_pool2d gives with stride 1; on a CPU that takes more than ten times as long.
    """
    height, width = x.shape[2:]
    x = F.pad(x, [kernel // 2] * 4, value=-torch.inf)
    x = reduce(torch.maximum, [x[..., shift : shift + width] for shift in range(kernel)])
    return reduce(torch.maximum, [x[..., shift : shift + height, :] for shift in range(kernel)])


def box_counts(boxes: Tensor, height: int, width: int) -> Tensor:
    """Count the boxes over each cell.

    Args:
        boxes: (B, P, 4) left, top, right, bottom, all inclusive.
        height: H of the map.
        width: W of the map.

    Returns:
        (B, H, W) float32, whole numbers from 0 to P.
    """
    left, top, right, bottom = boxes[..., None].unbind(2)
    x, y = (torch.arange(side, device=boxes.device) for side in (width, height))
    in_columns = (left <= x) & (x <= right)  # (B, P, W)
    in_rows = (top <= y) & (y <= bottom)  # (B, P, H)
    return (in_rows[..., None] & in_columns[:, :, None]).sum(1, dtype=torch.float32)
