"""Optical flow as pictures in the Middlebury colour code, and the file formats .flo and KITTI's PNG.

Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011: hue is the direction, saturation
the length. A flow is (2, H, W) in px, x to the right, y down.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError
from shared.io.files import atomic_path
from shared.io.images import read_pixels

__all__ = ["color_wheel", "flow_to_rgb", "read_flo", "read_kitti_flow", "write_flo"]

# hues from red to yellow, to green, to cyan, to blue, to magenta, and back to red: where the eye tells more apart
STEPS = (15, 6, 4, 11, 13, 6)
ANCHORS = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255))
FLO_MAGIC = 202021.25
# longer than this marks a flow as unknown in .flo files
UNKNOWN = 1e9


def color_wheel() -> Tensor:
    """The 55 hues: (55, 3) in 0 .. 255, whole numbers as float64, from an anchor linearly to the next."""
    hues = []
    for start, end, steps in zip(ANCHORS, (*ANCHORS[1:], ANCHORS[0]), STEPS, strict=True):
        share = torch.arange(steps, dtype=torch.float64)[:, None] / steps
        start, end = (torch.tensor(anchor, dtype=torch.float64) for anchor in (start, end))
        # rounded towards the start, so that what falls mirrors what rises
        hues.append(start + (end - start).sign() * (255 * share).floor())
    return torch.cat(hues)


def flow_to_rgb(flow: Tensor, max_length: float | None = None) -> np.ndarray:
    """Paint a flow: white stands still, red goes right, and the colour is full at `max_length`.

    Args:
        flow: (2, H, W) floating point, px; unknown where it is NaN or longer than 1e9.
        max_length: px; None takes the 99th percentile of the lengths. Longer flow is darkened.

    Returns:
        (H, W, 3) uint8; unknown flow is black.

    Raises:
        ValueError: another shape, a `max_length` that is not positive.
    """
    if flow.ndim != 3 or flow.shape[0] != 2 or not flow.numel() or not flow.is_floating_point():
        raise ValueError(f"flow_to_rgb needs floating-point (2, H, W), got {flow.dtype} {tuple(flow.shape)}")
    if max_length is not None and not max_length > 0:
        raise ValueError(f"max_length must be positive, got {max_length}")
    flow = flow.detach().cpu().double()
    known = flow.abs().amax(0) <= UNKNOWN
    x, y = torch.where(known, flow, 0)
    length = torch.hypot(x, y)
    if max_length is None:
        max_length = float(np.percentile(length[known].numpy(), 99)) if known.any() else 1.0
    saturation = (length / max(max_length, torch.finfo(torch.float64).tiny))[..., None]

    wheel = color_wheel() / 255
    place = (torch.atan2(-y, -x) / torch.pi + 1) / 2 * (len(wheel) - 1)
    lower = place.floor().long()
    share = (place - lower)[..., None]
    hue = (1 - share) * wheel[lower] + share * wheel[(lower + 1) % len(wheel)]
    color = torch.where(saturation <= 1, 1 - saturation * (1 - hue), 0.75 * hue)
    return (255 * color * known[..., None]).floor().byte().numpy()


def read_flo(path: str | os.PathLike) -> Tensor:
    """Read a Middlebury .flo file: (2, H, W) float32, px; unknown flow is longer than 1e9.

    Raises:
        InputError: the file is missing, cut short or no .flo file.
    """
    data = read_bytes(path)
    if len(data) < 12 or np.frombuffer(data, "<f4", 1)[0] != FLO_MAGIC:
        raise InputError(f"{path} is no .flo file; give one that starts with the number {FLO_MAGIC}")
    width, height = np.frombuffer(data, "<i4", 2, offset=4).tolist()
    if min(width, height) < 1 or len(data) != 12 + 8 * width * height:
        raise InputError(f"{path} is damaged or cut short: {len(data)} bytes for {width}x{height}; copy it again")
    vectors = np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2)
    return torch.from_numpy(vectors.astype(np.float32).transpose(2, 0, 1).copy())


def write_flo(path: str | os.PathLike, flow: Tensor) -> None:
    """Write a flow (2, H, W), px, as a Middlebury .flo file, whole or not at all.

    Raises:
        InputError: the file cannot be written.
        ValueError: another shape.
    """
    if flow.ndim != 3 or flow.shape[0] != 2:
        raise ValueError(f"write_flo needs (2, H, W), got {tuple(flow.shape)}")
    _, height, width = flow.shape
    head = np.float32(FLO_MAGIC).astype("<f4").tobytes() + np.array([width, height], "<i4").tobytes()
    with atomic_path(path) as temporary:
        temporary.write_bytes(head + flow.detach().cpu().permute(1, 2, 0).numpy().astype("<f4").tobytes())


def read_kitti_flow(path: str | os.PathLike) -> tuple[Tensor, Tensor]:
    """Read KITTI's flow (Menze and Geiger, CVPR 2015), a 16-bit PNG: red and green are 64 times x and y plus 2^15.

    Returns:
        Flow (2, H, W) float32, px, 0 where it is not known; (H, W) bool, where it is known.

    Raises:
        InputError: the file is missing, damaged or no 16-bit RGB PNG.
    """
    pixels, _, _ = read_pixels(Path(path))
    if pixels.dtype != np.uint16 or pixels.shape[2:] != (3,):
        raise InputError(f"{path} holds {pixels.dtype} {pixels.shape}; KITTI's flow is a 16-bit RGB PNG")
    planes = torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1).copy())
    known = planes[2] > 0
    return (planes[:2] - 2**15) / 64 * known, known


def read_bytes(path: str | os.PathLike) -> bytes:
    """A file's content."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a flow file that you may read") from error
