"""What became of the teacher's features: are they still distributed as before, and do areas lie on the object?"""

import numpy as np
import torch
from scipy.stats import ks_2samp, wasserstein_distance
from sklearn.decomposition import PCA
from torch import Tensor

COMPONENTS = 50
SAMPLES = 500  # p-values fall with their number, so it is fixed


def distribution_shift(plain: Tensor, refined: Tensor) -> tuple[float, float]:
    """Compare two sets of pooled features component by component of one PCA fitted on both.

    A PCA of each set, as the paper's analysis was published, would compare components that need not correspond.

    Args:
        plain: (N, C), of which the first `SAMPLES` are used.
        refined: (N, C), of the same images.

    Returns:
        Mean p-value of the Kolmogorov-Smirnov two-sample tests over at most `COMPONENTS` components, and the mean
        Wasserstein distance in standard deviations of the component.
    """
    taken = torch.linspace(0, len(plain) - 1, min(SAMPLES, len(plain))).round().long().to(plain.device)
    sets = [features[taken].double().cpu().numpy() for features in (plain, refined)]
    together = np.concatenate(sets)
    if not np.ptp(together, axis=0).any():
        return 1.0, 0.0  # the same features for every image
    components = min(COMPONENTS, *together.shape)
    projected = PCA(components, svd_solver="full").fit_transform(together)
    spread = projected.std(0)
    kept = np.flatnonzero(spread > 1e-6 * spread.max())  # rounding has no distribution
    first, second = projected[: len(sets[0])], projected[len(sets[0]) :]
    p_values = [ks_2samp(first[:, i], second[:, i], method="asymp").pvalue for i in kept]
    distances = [wasserstein_distance(first[:, i], second[:, i]) / spread[i] for i in kept]
    return float(np.mean(p_values)), float(np.mean(distances))


def inside_object(cover: Tensor, boxes: Tensor, image_size: int) -> tuple[Tensor, Tensor]:
    """Give the share of the covered weight that lies on the object, and the object's share of the picture.

    Args:
        cover: (B, 1, H, W), weights of cells.
        boxes: (B, 4) left, top, right, bottom of the object in pixels, inclusive.
        image_size: side of the picture in pixels.

    Returns:
        Both (B,); an uncovered picture counts as by chance.
    """
    side = cover.shape[-1]
    cell = image_size / side
    edges = torch.arange(side, device=cover.device)
    # of each cell the part that the box covers, along rows and along columns
    columns, rows = (
        ((boxes[:, high, None] + 1).clamp(max=image_size).minimum((edges + 1) * cell)
         - boxes[:, low, None].maximum(edges * cell)).clamp(min=0) / cell
        for low, high in ((0, 2), (1, 3))
    )  # fmt: skip
    part = rows[:, :, None] * columns[:, None]  # (B, H, W)
    weight = cover[:, 0].sum((1, 2))
    chance = part.mean((1, 2))
    return torch.where(weight > 0, (cover[:, 0] * part).sum((1, 2)) / weight.clamp(min=1e-12), chance), chance
