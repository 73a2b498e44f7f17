"""Cohorts: where the scans of an atlas come from, a few at a time.

A cohort gives images (b, 1, *S) in [0, 1] and label maps by subject index, so that the atlas streams through any number
of scans. `Synthetic` deforms a known template, and makes each subject anew from (seed, index) on any worker.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError
from shared.kernels.image_warp import image_warp

from .deformation import Flash
from .metric import Metric

SMALLEST_DETERMINANT = 0.05
ATTEMPTS = 30
CHUNK = 32


class Cohort:
    """Scans on one grid.

    Attributes:
        shape: S, voxels per axis.
        names: of the subjects.
        truth: the template that the subjects were made of, (1, 1, *S), where there is one.
        truth_labels: (*S,) its labels.
        label_names: what label values mean.
    """

    shape: tuple[int, ...]
    names: list[str]
    truth: Tensor | None = None
    truth_labels: Tensor | None = None
    label_names: dict[int, str]

    def __len__(self) -> int:
        return len(self.names)

    def images(self, indices: Sequence[int]) -> Tensor:
        """Give images (b, 1, *S) float32 in [0, 1]."""
        raise NotImplementedError

    def labels(self, index: int) -> Tensor | None:
        """Give the label map (*S,) int64 of a subject; None where it has none."""
        raise NotImplementedError


class Synthetic(Cohort):
    """Subjects J = T o phi^{-1} + noise, with random geodesics phi whose mean velocity is 0.

    Args:
        template: (*S) float32 in [0, 1].
        labels: (*S) whole numbers.
        label_names: by value.
        num_subjects: N.
        seed: of velocities, noise and contrasts.
        amplitude: root mean square length of the velocities, voxels.
        num_modes: frequencies of the velocities, per axis.
        alpha: of the metric that the velocities are drawn from, with gamma 1 and power 3.
        noise_std: of the added noise.
        gamma: largest change of contrast, intensities to the power exp(uniform(-gamma, gamma)).
        bias: largest change of brightness over the field of view.
        keep: hold the images once they are made.

    Raises:
        InputError: sizes out of range, or an amplitude at which nearly all warps fold.
    """

    def __init__(
        self, template: np.ndarray, labels: np.ndarray, label_names: dict[int, str], num_subjects: int, seed: int,
        amplitude: float = 2.5, num_modes: int = 15, alpha: float = 20.0, noise_std: float = 0.02, gamma: float = 0.0,
        bias: float = 0.0, keep: bool = True,
    ):  # fmt: skip
        if num_subjects < 1:
            raise InputError("a cohort has at least one subject: data.num_subjects")
        self.truth = torch.from_numpy(np.ascontiguousarray(template, np.float32))[None, None]
        self.truth_labels = torch.from_numpy(np.ascontiguousarray(labels).astype(np.int64))
        self.label_names = dict(label_names)
        self.shape = tuple(self.truth.shape[2:])
        self.names = [f"subject_{index:04d}" for index in range(num_subjects)]
        self.seed, self.noise_std, self.gamma, self.bias, self.keep = seed, noise_std, gamma, bias, keep
        self.model = Flash(self.shape, num_modes, Metric(alpha=alpha))
        self.velocities = self._draw_velocities(num_subjects, amplitude)
        self._kept: dict[int, Tensor] = {}

    def images(self, indices: Sequence[int]) -> Tensor:
        missing = [index for index in indices if index not in self._kept]
        made = dict(zip(missing, self._make(missing), strict=True)) if missing else {}
        if self.keep:
            self._kept |= made
        return torch.stack([made[index] if index in made else self._kept[index] for index in indices])

    def labels(self, index: int) -> Tensor:
        return nearest(self.truth_labels, self.displacement([index])[0])

    @torch.no_grad()
    def displacement(self, indices: Sequence[int]) -> Tensor:
        """Give the true u (b, d, *S) of subjects."""
        return self.model.displacement(self.velocities[list(indices)])

    def _make(self, indices: Sequence[int]) -> Tensor:
        images = image_warp(self.truth, self.displacement(indices))
        for image, index in zip(images, indices, strict=True):
            random = self._random(index, 1)
            image.copy_(self._change_contrast(image, random))
            image += self.noise_std * torch.randn(image.shape, generator=random)
        return images

    def _change_contrast(self, image: Tensor, random: torch.Generator) -> Tensor:
        exponent, *slopes = (2 * torch.rand(1 + len(self.shape), generator=random) - 1).tolist()
        image = image.clamp(min=0) ** math.exp(self.gamma * exponent)
        for axis, slope in enumerate(slopes):
            ramp = torch.linspace(-1, 1, self.shape[axis]).reshape(-1, *[1] * (len(self.shape) - 1 - axis))
            image = image * (1 + self.bias * slope * ramp / len(self.shape))
        return image

    def _random(self, index: int, purpose: int) -> torch.Generator:
        entropy = np.random.SeedSequence((self.seed, index, purpose)).generate_state(2, np.uint32)
        return torch.Generator().manual_seed(int(entropy[0]) << 32 | int(entropy[1]))

    @torch.no_grad()
    def _draw_velocities(self, count: int, amplitude: float) -> Tensor:
        """Draw velocities; those whose warp nearly folds are drawn again, and the mean is taken off."""
        found = torch.empty(count, len(self.shape), *self.model.parameter_shape)
        # of white noise: the expected length of a smoothed vector
        length = math.sqrt(len(self.shape) * full_mean(self.model.inverse_operator, found.shape[-1]))
        redraw = list(range(count))
        for attempt in range(ATTEMPTS):
            for index in redraw:
                found[index] = torch.randn(found.shape[1:], generator=self._random(index, 2 + attempt))
            chosen, folded = redraw, []
            for start in range(0, len(chosen), CHUNK):
                part = chosen[start : start + CHUNK]
                found[part] = self.model.whiten(found[part], back=True) * (amplitude / length)
                smallest = self.model.coarse_determinant(found[part]).flatten(1).amin(1)
                sound = (smallest > SMALLEST_DETERMINANT).tolist()  # false where it is not a number
                folded += [index for index, is_sound in zip(part, sound, strict=True) if not is_sound]
            redraw = folded
            if not redraw:
                return found - found.mean(0) if count > 1 else found
        raise InputError(f"{len(redraw)} of {count} random warps fold at amplitude {amplitude}; choose a smaller one")


def full_mean(symbol: Tensor, last: int) -> float:
    """Give the mean over all frequencies of a symbol over the half spectrum, the last axis having `last` of them."""
    weights = torch.full((symbol.shape[-1],), 2.0)
    weights[0] = 1.0
    return float((symbol * weights).sum() / (symbol[..., 0].numel() * last))


class Stored(Cohort):
    """Prepared scans in a memory-mapped file.

    Args:
        images: file of (N, *S) float16 or float32, as `numpy.save` writes it.
        names: of the subjects.
        labels: file of (N, *S) whole numbers.
        has_labels: which subjects have them; all without this.
        label_names: by value.
    """

    def __init__(
        self, images: Path, names: Sequence[str], labels: Path | None = None, has_labels: Sequence[bool] | None = None,
        label_names: dict[int, str] | None = None,
    ):  # fmt: skip
        self._images = np.load(images, mmap_mode="r")
        self._labels = None if labels is None else np.load(labels, mmap_mode="r")
        self.names, self.shape = list(names), tuple(self._images.shape[1:])
        self._has = list(has_labels) if has_labels is not None else [labels is not None] * len(self.names)
        self.label_names = dict(label_names or {})

    def images(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._images[list(indices)].astype(np.float32))[:, None]

    def labels(self, index: int) -> Tensor | None:
        if not self._has[index]:
            return None
        return torch.from_numpy(self._labels[index].astype(np.int64))


class Toys(Cohort):
    """Images that are given, all in memory: ellipses, digits.

    Args:
        images: (N, *S) float32 in [0, 1].
        labels: (N, *S) whole numbers, where there are any.
        label_names: by value.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None, label_names: dict[int, str] | None = None):
        self._images = torch.from_numpy(np.ascontiguousarray(images, np.float32))[:, None]
        self._labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.shape, self.names = tuple(self._images.shape[2:]), [f"subject_{i:04d}" for i in range(len(images))]
        self.label_names = dict(label_names or {})

    def images(self, indices: Sequence[int]) -> Tensor:
        return self._images[list(indices)]

    def labels(self, index: int) -> Tensor | None:
        return None if self._labels is None else self._labels[index]


class Part(Cohort):
    """Some subjects of a cohort.

    Args:
        whole: the cohort.
        indices: of the subjects in it.
    """

    def __init__(self, whole: Cohort, indices: Sequence[int]):
        self.whole, self.indices = whole, list(indices)
        self.shape, self.names = whole.shape, [whole.names[index] for index in indices]
        self.label_names = whole.label_names

    def images(self, indices: Sequence[int]) -> Tensor:
        return self.whole.images([self.indices[index] for index in indices])

    def labels(self, index: int) -> Tensor | None:
        return self.whole.labels(self.indices[index])


def nearest(labels: Tensor, displacement: Tensor) -> Tensor:
    """Give labels (*S) at the voxel nearest to x + u(x), u (d, *S), clamped to the border."""
    at = torch.meshgrid(*(torch.arange(size, device=labels.device) for size in labels.shape), indexing="ij")
    places = [
        (x + shift).round().clamp(0, size - 1).long()
        for x, shift, size in zip(at, displacement, labels.shape, strict=True)
    ]
    return labels[tuple(places)]
