"""Strong augmentation of batches on their device: two random operations an image, then a grey square.

RandAugment (Cubuk et al. 2020) with the operations and ranges of FixMatch (Sohn et al. 2020, table 12), followed by its
Cutout. A strong view is this on top of the usual crop and flip. Letters: n images that drew an operation; u (n,) in
[0, 1), from which its strength follows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import InputError

NUM_OPERATIONS = 2
GREY = 0.5
# largest angle in radians, shear along x and y, translation along x and y in shares of the side; all of either sign
MOTIONS = {"rotate": math.pi / 6, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.3, "translate_y": 0.3}


def strong_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply two operations drawn with replacement, then Cutout, to every image.

    Args:
        images: (B, 3, H, W) float RGB in [0, 1]; left as they are.
        generator: of all draws, on any device; its state alone decides the outcome.

    Returns:
        The same shape and type, in [0, 1].

    Raises:
        InputError: no batch of RGB images of a floating type.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(
            f"strong_view takes float images (B, 3, H, W) in 0..1, got {images.dtype} {tuple(images.shape)}; "
            "divide uint8 images by 255"
        )
    options = {"generator": generator, "device": generator.device}
    drawn = torch.randint(len(OPERATIONS), (NUM_OPERATIONS, len(images)), **options).cpu()
    draws = torch.rand((NUM_OPERATIONS + 3, len(images)), **options).to(images.device)
    strong = images.float()
    for operations, u in zip(drawn, draws[:NUM_OPERATIONS], strict=True):
        strong = operate(strong, operations, u)
    return cutout(strong, *draws[NUM_OPERATIONS:]).to(images.dtype)


def operate(images: Tensor, operations: Tensor, u: Tensor) -> Tensor:
    """Apply to every image the operation it drew.

    Args:
        images: (B, 3, H, W) in [0, 1].
        operations: (B,) int64, indices in `OPERATIONS`, on the CPU: groups are formed without waiting for the device.
        u: (B,).
    """
    out = images.clone()
    for name, enhance in ENHANCEMENTS.items():
        chosen = (operations == OPERATIONS.index(name)).nonzero()[:, 0].to(images.device)
        if len(chosen):
            out[chosen] = enhance(images[chosen], u[chosen])
    motions = operations - OPERATIONS.index("rotate")
    chosen = (motions >= 0).nonzero()[:, 0]
    if len(chosen):
        motions, chosen = motions[chosen].to(images.device), chosen.to(images.device)
        out[chosen] = move(images[chosen], u[chosen], motions)
    return out


def autocontrast(images: Tensor, u: Tensor) -> Tensor:
    """Stretch every channel to 0..1; a constant one stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images).clamp(0, 1)


def equalize(images: Tensor, u: Tensor) -> Tensor:
    """Equalise the histogram of 256 values of every channel; a channel of one value stays."""
    pixels = (255 * images).round().long().clamp(0, 255).flatten(2)
    counts = torch.zeros((*pixels.shape[:2], 256), dtype=torch.long, device=images.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    below = counts.cumsum(2) - counts
    # pixels per grey value when the brightest value's own are left out, as Pillow counts
    step = (pixels.shape[2] - counts.gather(2, pixels.amax(2, keepdim=True))) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return (table.gather(2, pixels) / 255).view_as(images)


def solarize(images: Tensor, u: Tensor) -> Tensor:
    """Invert what is at least u."""
    return torch.where(images >= u[:, None, None, None], 1 - images, images)


def posterize(images: Tensor, u: Tensor) -> Tensor:
    """Keep the highest 4 to 8 bits of 8."""
    step = 2.0 ** (4 - (5 * u).floor()[:, None, None, None])
    return ((255 * images).round() / step).floor() * step / 255


def color(images: Tensor, u: Tensor) -> Tensor:
    """Fade towards grey."""
    return fade(images, grey(images), u)


def contrast(images: Tensor, u: Tensor) -> Tensor:
    """Fade towards the image's mean grey."""
    return fade(images, grey(images).mean((2, 3), keepdim=True), u)


def brightness(images: Tensor, u: Tensor) -> Tensor:
    """Fade towards black."""
    return fade(images, torch.zeros_like(images), u)


def sharpness(images: Tensor, u: Tensor) -> Tensor:
    """Fade towards the image smoothed by 3x3, whose border stays."""
    kernel = images.new_ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel / 13, groups=3)
    return fade(images, smooth, u)


def fade(images: Tensor, faded: Tensor, u: Tensor) -> Tensor:
    """Leave 0.05 to 0.95 of the images, the rest `faded`."""
    return torch.lerp(faded.expand_as(images), images, 0.05 + 0.9 * u[:, None, None, None])


def grey(images: Tensor) -> Tensor:
    """Luma of (n, 3, H, W): (n, 1, H, W)."""
    return (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def move(images: Tensor, u: Tensor, motions: Tensor) -> Tensor:
    """Rotate, shear or translate, each image by the motion of its index (n,) in `MOTIONS`; what comes in is grey."""
    height, width = images.shape[2:]
    strength = F.one_hot(motions, len(MOTIONS)) * (2 * u - 1)[:, None] * images.new_tensor(list(MOTIONS.values()))
    angle, shear_x, shear_y, shift_x, shift_y = strength.unbind(1)
    # in coordinates of -1..1 on both sides: those of unlike sides differ in scale
    rows = [
        torch.stack([angle.cos(), (shear_x - angle.sin()) * height / width, 2 * shift_x], 1),
        torch.stack([(shear_y + angle.sin()) * width / height, angle.cos(), 2 * shift_y], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return (F.grid_sample(images - GREY, grid, align_corners=False) + GREY).clamp(0, 1)


def cutout(images: Tensor, size: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Paint a grey square on every image: side up to half of the shorter one, centre anywhere, clipped at the border.

    Args:
        images: (B, 3, H, W).
        size: (B,) in [0, 1), the side in units of its largest.
        row: (B,) in [0, 1), the centre in units of the height.
        column: (B,) in [0, 1), the centre in units of the width.
    """
    height, width = images.shape[2:]
    half = (size * min(height, width) / 4)[:, None]
    inside = []
    for centre, side in ((row, height), (column, width)):
        middles = torch.arange(side, device=images.device) + 0.5
        inside.append((middles - side * centre[:, None]).abs() < half)
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(square, GREY)


ENHANCEMENTS = {
    "autocontrast": autocontrast, "equalize": equalize, "solarize": solarize, "posterize": posterize, "color": color,
    "contrast": contrast, "brightness": brightness, "sharpness": sharpness,
}  # fmt: skip
OPERATIONS = ("identity", *ENHANCEMENTS, *MOTIONS)
