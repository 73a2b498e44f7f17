"""Scores of a finished atlas and of each subject, and the labels that the subjects give it, shard by shard."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from shared.errors import InputError
from shared.kernels.image_warp import image_splat
from shared.metrics import ssim

from .atlas import Atlas, AtlasBuilder
from .cohort import nearest
from .engine import Sums
from .loss import energies
from .scores import (
    corner_folding_fraction,
    correlation,
    dice,
    focus_entropy,
    folding_fraction,
    laplacian_variance,
    log_determinant_std,
    psnr,
    sharpness,
)

COLUMNS = (
    "energy", "image_energy", "regulariser", "mse", "psnr", "ncc", "dice", "bridge_dice", "folding", "folding_cells",
    "log_det_std", "displacement",
)  # fmt: skip
MAX_LABELS = 512
ROUNDING = 1e-5  # of a sum of weights


class Votes(NamedTuple):
    """What the subjects' labels, carried to the atlas, say.

    Attributes:
        values: (L,) label values that occur, 0 among them.
        weights: (L, *S) how much of the subjects lies there with each label.
        counts: how many subjects have each label at all, by value.
    """

    values: Tensor
    weights: Tensor
    counts: dict[int, int]

    def winner(self) -> Tensor:
        """Give the label of most weight (*S); 0 where no subject reaches."""
        best, index = self.weights.max(0)
        return torch.where(best > 0, self.values[index], 0)


def assess(builder: AtlasBuilder, atlas: Atlas, votes: Votes | None = None) -> tuple[dict[str, float], Tensor]:
    """Score an atlas and the registration of each subject to it.

    Args:
        builder: that made it.
        atlas: what it made.
        votes: labels of the atlas; each subject's own vote is taken off before it is scored. Without them those of the
            true template are taken.

    Returns:
        Means over subjects and scores of the atlas, what does not apply left out; and (N, len(COLUMNS)), NaN where a
        column does not apply.
    """
    cohort, options, count = builder.cohort, builder.options, len(builder.cohort)
    model, device = atlas.model, builder.device

    def work(shard: int) -> Sums:
        indices = builder.shards[shard]
        images, parameter = cohort.images(indices).to(device), atlas.parameters(shard)
        displacement = model.displacement(parameter)
        warped = model.warp(atlas.image, parameter)
        found = energies(model, parameter, atlas.image, images, options.noise_std, options.similarity)
        rows = torch.full((len(indices), len(COLUMNS)), math.nan, dtype=torch.float64)
        columns = {
            "energy": found.total, "image_energy": found.image, "regulariser": found.regulariser,
            "mse": (warped - images).square().flatten(1).mean(1), "psnr": psnr(warped, images),
            "ncc": correlation(warped, images), "folding": folding_fraction(displacement),
            "folding_cells": corner_folding_fraction(displacement), "log_det_std": log_determinant_std(displacement),
            "displacement": displacement.square().sum(1).sqrt().flatten(1).mean(1),
        }  # fmt: skip
        for name, values in columns.items():
            rows[:, COLUMNS.index(name)] = values.double().cpu()
        labels = [cohort.labels(index) for index in indices]
        if any(part is not None for part in labels):
            inverse = model.inverse_displacement(parameter)
            for place, own in enumerate(labels):
                if own is None:
                    continue
                own = own.to(device)
                reference = atlas_labels(builder, votes, own, displacement[place])
                if reference is not None:
                    rows[place, COLUMNS.index("dice")] = dice(nearest(reference, displacement[place]), own)
                other = labels[(place + 1) % len(labels)]
                if other is not None and len(labels) > 1:
                    carried = nearest(own, inverse[place])
                    bridged = nearest(carried, displacement[(place + 1) % len(labels)])
                    rows[place, COLUMNS.index("bridge_dice")] = dice(bridged, other.to(device))
        table = torch.zeros(count, len(COLUMNS), dtype=torch.float64)
        table[list(indices)] = rows.nan_to_num(nan=-1e6)  # whole-numbered sums know no NaN
        sums = Sums(False)
        sums.add("table", table[None])
        return sums

    table = builder.engine.run("assess", range(len(builder.shards)), work)["table"].double().cpu()
    table = torch.where(table <= -1e6, math.nan, table)
    summary = {name: float(table[:, place].nanmean()) for place, name in enumerate(COLUMNS)}
    summary |= image_scores(atlas.image, cohort.truth)
    return {name: value for name, value in summary.items() if not math.isnan(value)}, table


def image_scores(image: Tensor, truth: Tensor | None) -> dict[str, float]:
    """Score the image (1, 1, *S) of an atlas, against the true template where it is known."""
    found = {
        "sharpness": sharpness(image), "laplacian_variance": laplacian_variance(image),
        "focus_entropy": focus_entropy(image),
    }  # fmt: skip
    if truth is not None:
        truth = truth.to(image)
        found["atlas_psnr"] = float(psnr(image, truth))
        slices = [part if part.ndim == 4 else part[0].movedim(-1, 0) for part in (image.clamp(0, 1), truth)]
        found["atlas_ssim"] = float(ssim(*slices, crop_border=0, channel="gray", quantise=False).mean())
    return found


def atlas_labels(builder: AtlasBuilder, votes: Votes | None, own: Tensor, displacement: Tensor) -> Tensor | None:
    """Give labels of the atlas that owe nothing to a subject, whose labels and warp are given."""
    if votes is None:
        truth = builder.cohort.truth_labels
        return None if truth is None else truth.to(own.device)
    weights = votes.weights - one_hot_splat(own, displacement, votes.values)
    # what rounding leaves of a subject's own vote is none
    others = votes._replace(weights=torch.where(weights > ROUNDING, weights, 0.0))
    return others.winner() if others.weights.any() else None


def vote(builder: AtlasBuilder, atlas: Atlas) -> Votes | None:
    """Carry the labels of all subjects that have some to the atlas; None where none has.

    Raises:
        InputError: more label values than a segmentation has.
    """
    cohort, device = builder.cohort, builder.device

    def count(shard: int) -> Sums:
        sums = Sums(False)
        for index in builder.shards[shard]:
            found = torch.zeros(65536, dtype=torch.int64)
            labels = cohort.labels(index)
            if labels is not None:
                values = torch.unique(labels)
                if values.min() < 0 or values.max() >= len(found):
                    raise InputError(f"{cohort.names[index]} has labels outside of 0 to 65535; number them anew")
                found[values] = 1
            sums.add("count", found[None])
        return sums

    counts = builder.engine.run("labels", range(len(builder.shards)), count).values["count"]
    values = torch.nonzero(counts).flatten()
    if not len(values):
        return None
    if len(values) > MAX_LABELS:
        raise InputError(f"the label maps hold {len(values)} values, more than {MAX_LABELS}: are they images?")

    def work(shard: int) -> Sums:
        sums = Sums(builder.options.exact_reduce)
        displacement = atlas.model.displacement(atlas.parameters(shard))
        for place, index in enumerate(builder.shards[shard]):
            labels = cohort.labels(index)
            if labels is None:
                part = torch.zeros(len(values), *cohort.shape, device=device)
            else:
                part = one_hot_splat(labels.to(device), displacement[place], values.to(device))
            sums.add("votes", part[None])
        return sums

    weights = builder.engine.run("votes", range(len(builder.shards)), work).to(device)["votes"]
    known = {int(value): int(counts[value]) for value in values}
    return Votes(values.to(device), weights, known)


def one_hot_splat(labels: Tensor, displacement: Tensor, values: Tensor) -> Tensor:
    """Give the part of each label (L, *S) that the transposed warp of a subject carries to each voxel."""
    hot = (labels[None] == values.reshape(-1, *[1] * labels.ndim)).float()
    return image_splat(hot[None], displacement[None])[0][0]
