"""MC-CDic: common and unique sparse codes of a target and its references, found by unrolled proximal gradient steps.

Observation model (Lei et al., IJCAI 2023): the target X = D*U + A*C and a reference Y = H*V + B*C share the code C and
each have one of their own. Inside the network the "images" are feature maps of `features` channels and every
dictionary is a multi-scale one (dictionary.py).

Shapes: target (B, 1, H, W), references (B, R, H, W); codes are lists, coarse to fine (dictionary.py).
In the code a *branch* is an image with its unique code: 0 the target, 1..R the references.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.errors import InputError

from .consistency import KINDS as CONSISTENCIES
from .consistency import DataConsistency
from .dictionary import Codes, Dictionary, analyse, largest_eigenvalue, synthesise

PROXES = ("residual", "soft")
STEPS = ("learnt", "constant")
INITIALISATIONS = ("consistent", "published")
THRESHOLD = 0.01


class Restoration(NamedTuple):
    """What the network returns.

    Attributes:
        target: (B, 1, H, W) the restored target, not clamped.
        references: (B, R, H, W) the references as the codes explain them.
        common: (B, 1 + R, H, W) what C adds to each, the target first; None where a network has no such part.
        unique: (B, 1 + R, H, W) what U and V add.
    """

    target: Tensor
    references: Tensor
    common: Tensor | None = None
    unique: Tensor | None = None


class ChannelAttention(nn.Module):
    """Weight the channels by their means: 1x1 to width / 16, ReLU, 1x1, sigmoid."""

    def __init__(self, width: int):
        super().__init__()
        hidden = max(width // 16, 1)
        self.squeeze, self.excite = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, channel attention if wanted, and the skip: (B, width, H, W) -> the same."""

    def __init__(self, width: int, attention: bool):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.attention = ChannelAttention(width) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.second(F.relu(self.first(x))))


class ProximalNetwork(nn.Sequential):
    """A learnt proximal operator: residual blocks and a 3x3 convolution, and a skip around them all if wanted."""

    def __init__(self, width: int, blocks: int, attention: bool, skip: bool):
        super().__init__(
            *(ResidualBlock(width, attention) for _ in range(blocks)), nn.Conv2d(width, width, 3, padding=1)
        )
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x) if self.skip else super().forward(x)


class Coder(nn.Module):
    """Dictionary, adjoint with weights of its own, steps, thresholds and proximal operators of one code.

    Args:
        widths, features, prox, blocks, attention, skip, steps, stages: see `MCCDic`.
        tie: let the adjoint have the dictionary's weights.
    """

    def __init__(
        self, widths: list[int], features: int, prox: str, blocks: list[int], attention: bool, skip: bool, steps: str,
        stages: int, tie: bool,
    ):  # fmt: skip
        super().__init__()
        self.synthesis = Dictionary(widths, features)
        self.preconditioned = self.synthesis if tie else copy_of(self.synthesis)
        counts = stages if prox == "soft" else 1
        self.thresholds = nn.ParameterList(torch.full((counts, width, 1, 1), THRESHOLD) for width in widths)
        self.prox = nn.ModuleList(
            ProximalNetwork(width, count, attention, skip)
            for width, count in zip(widths, blocks if prox == "residual" else [], strict=prox == "residual")
        )
        if steps == "learnt":
            self.raw_steps = nn.Parameter(torch.empty(stages))
        else:
            self.register_buffer("constant_steps", torch.empty(stages))
            self.thresholds.requires_grad_(False)
        self.reset_steps()

    @torch.no_grad()
    def reset_steps(self) -> None:
        """Set every step size to 1 / L of the dictionary."""
        if self.synthesis.bottleneck.is_meta:
            return
        size = 1 / largest_eigenvalue(self.synthesis)
        if hasattr(self, "raw_steps"):
            self.raw_steps.fill_(math.log(math.expm1(size)))
        else:
            self.constant_steps.fill_(size)

    @property
    def steps(self) -> Tensor:
        """The step size eta of each stage, (stages,), positive."""
        return F.softplus(self.raw_steps) if hasattr(self, "raw_steps") else self.constant_steps

    def shrink(self, codes: Codes, stage: int, step: Tensor) -> Codes:
        """Soft-threshold to non-negative codes, relu(c - relu(eta lambda))."""
        return [F.relu(c - F.relu(step * t[stage])) for c, t in zip(codes, self.thresholds, strict=True)]

    def first(self, analysed: Codes) -> Codes:
        """Give the codes before the first iteration, from the adjoint of the image."""
        step = self.steps[0]
        return self.shrink([step * part for part in analysed], 0, step)

    def update(self, codes: Codes, gradient: Codes, stage: int) -> Codes:
        """Take a gradient step and apply the proximal operator."""
        step = self.steps[stage]
        moved = [code - step * part for code, part in zip(codes, gradient, strict=True)]
        if not self.prox:
            return self.shrink(moved, stage, step)
        return [prox(F.relu(code)) for prox, code in zip(self.prox, moved, strict=True)]


class MCCDic(nn.Module):
    """The unfolded multi-contrast convolutional dictionary network.

    Args:
        widths: channels of the codes, coarse to fine; as many as the dictionaries have scales.
        features: channels of the feature maps.
        stages: S; one initialisation and S - 1 unrolled iterations.
        blocks: residual blocks of the proximal networks, per scale.
        attention: channel attention in these blocks.
        skip: a skip around each proximal network; the published network has none.
        prox: `residual`, the learnt proximal networks, or `soft`, soft thresholds.
        common: False leaves C out, so that nothing of the references reaches the target.
        tie: adjoint and reconstruction dictionaries share the weights of the synthesis in the gradient.
        num_references: R.
        steps: `learnt` step sizes (softplus) and thresholds, or `constant` ones, which is what the published code,
            by not registering them, has.
        consistency: `none`, `hard` or `soft` data consistency of the output in k-space.
        zero_heads: let the last layers begin at zero, so that the untrained network returns its input. The loss of the
            references then has nothing to pull at: they are given back as they are from the beginning.
        initialisation: `consistent` copies each D to its adjoint and its reconstruction; `published` then draws D of
            the unique codes anew, as the published code does by a slip.
        recompute: compute each update of a code again in the backward pass instead of keeping its activations.

    Raises:
        InputError: an option that does not exist, fewer than 2 stages, or `blocks` that do not fit `widths`.
    """

    def __init__(
        self, widths: list[int], features: int, stages: int, blocks: list[int], attention: bool = True,
        skip: bool = False, prox: str = "residual", common: bool = True, tie: bool = False, num_references: int = 1,
        steps: str = "learnt", consistency: str = "none", zero_heads: bool = False,
        initialisation: str = "consistent", recompute: bool = False,
    ):  # fmt: skip
        super().__init__()
        for name, value, known in (
            ("prox", prox, PROXES), ("steps", steps, STEPS), ("consistency", consistency, CONSISTENCIES),
            ("initialisation", initialisation, INITIALISATIONS),
        ):  # fmt: skip
            if value not in known:
                raise InputError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
        if stages < 2:
            raise InputError(f"stages={stages} leaves no iteration; give at least 2")
        if num_references < 1:
            raise InputError(f"num_references={num_references}: the network needs a reference")
        if not widths or (prox == "residual" and len(blocks) != len(widths)):
            raise InputError(f"blocks={list(blocks)} must have a number for each of widths={list(widths)}")
        if features < 1 or min(widths) < 1 or (prox == "residual" and min(blocks) < 0):
            raise InputError(f"features={features} and widths={list(widths)} must be at least 1, blocks 0")
        self.stages, self.num_references, self.recompute = stages, num_references, recompute
        self.scales = len(widths)
        self.branches = 1 + num_references
        coder = (widths, features, prox, blocks, attention, skip, steps, stages, tie)
        self.lift = nn.ModuleList(nn.Conv2d(1, features, 3, padding=1) for _ in range(self.branches))
        self.unique = nn.ModuleList(Coder(*coder) for _ in range(self.branches))
        self.reconstruction = nn.ModuleList(c.synthesis if tie else copy_of(c.synthesis) for c in self.unique)
        self.fuse = nn.ModuleList(nn.Conv2d(features * (stages - 1), features, 1) for _ in range(self.branches))
        self.render = nn.ModuleList(nn.Conv2d(features, 1, 3, padding=1) for _ in range(self.branches))
        if common:
            self.lift_common = nn.Conv2d(self.branches, features, 3, padding=1)
            self.common = Coder(*coder)
            self.explained = nn.ModuleList(Dictionary(widths, features) for _ in range(self.branches))
            self.compress = nn.Conv2d(features * self.branches, features, 3, padding=1)
            self.render_common = Dictionary(widths, self.branches)
        else:
            self.common = None
        if initialisation == "published":
            for coder in self.unique:
                coder.synthesis.reset_parameters()
                coder.reset_steps()
        if zero_heads:
            for layer in self.render:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
            if common:
                nn.init.zeros_(self.render_common.out)
        self.consistency = None if consistency == "none" else DataConsistency(consistency)

    def forward(
        self, target: Tensor, references: Tensor, kspace: Tensor | None = None, mask: Tensor | None = None,
        phase: Tensor | None = None,
    ) -> Restoration:  # fmt: skip
        """Restore a target.

        Args:
            target: (B, 1, H, W), the zero-filled magnitude.
            references: (B, R, H, W).
            kspace: measured samples of the target, (B, 1, H, W) complex; needed with `consistency`.
            mask: (B, 1, H, W) bool, where they are.
            phase: (B, 1, H, W) of complex data, see consistency.py.
        """
        images = [target, *references.split(1, 1)]
        codes, history = self.encode(images)
        unique = torch.cat(
            [
                render(fuse(torch.cat(kept, 1)))
                for render, fuse, kept in zip(self.render, self.fuse, history, strict=True)
            ],
            1,
        )
        common = torch.zeros_like(unique) if self.common is None else self.render_common(codes[-1])
        restored = torch.cat(images, 1) + common + unique
        found, others = restored[:, :1], restored[:, 1:]
        if self.consistency is not None:
            if kspace is None or mask is None:
                raise ValueError("data consistency needs k-space and mask of the target")
            found = self.consistency(found, kspace, mask, phase)
        return Restoration(found, others, common, unique)

    def encode(self, images: list[Tensor]) -> tuple[list[Codes], list[list[Tensor]]]:
        """Find the codes of images (B, 1, H, W), the target first.

        Returns:
            The codes U, V, ... and, last, C; and for each branch D'*U of every iteration, (B, features, H, W) each.

        Raises:
            ValueError: another number of images than the network takes.
            InputError: smaller images than its scales need.
        """
        if len(images) != self.branches:
            raise ValueError(f"needs {self.num_references} references, got {len(images) - 1}")
        if min(images[0].shape[-2:]) < 1 << (self.scales - 1):
            raise InputError(
                f"{self.scales} scales need images or crops of {1 << (self.scales - 1)} pixels a side at least"
            )
        weights = self.folded()
        features = [lift(image) for lift, image in zip(self.lift, images, strict=True)]
        adjoints = [
            analyse(feature, coder.preconditioned.folded())
            for feature, coder in zip(features, self.unique, strict=True)
        ]
        codes = [coder.first(part) for coder, part in zip(self.unique, adjoints, strict=True)]
        if self.common is not None:
            lifted = self.lift_common(torch.cat(images, 1))
            codes.append(self.common.first(analyse(lifted, self.common.preconditioned.folded())))
        history: list[list[Tensor]] = [[] for _ in images]
        for stage in range(1, self.stages):
            codes, explained = self.iterate(codes, features, adjoints, weights, stage)
            for kept, part in zip(history, explained, strict=True):
                kept.append(part)
        return codes, history

    def explained_features(self, target: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Give what the common and the unique codes explain of each image's feature map in the end: A*C and D'*U.

        Returns:
            Two tensors (B, 1 + R, features, H, W), the target first.
        """
        if self.common is None:
            raise ValueError("this network has no common code")
        codes, history = self.encode([target, *references.split(1, 1)])
        common = [dictionary(codes[-1]) for dictionary in self.explained]
        return torch.stack(common, 1), torch.stack([kept[-1] for kept in history], 1)

    def folded(self) -> dict[str, list]:
        """Fold every 1x1 convolution into its neighbour, once for all iterations.

        In the gradient the 1x1 of a dictionary meets the transposed 1x1 of an adjoint: both go into the dictionary.
        """
        weights: dict[str, list] = {"synthesis": [], "explained": [], "adjoint": [], "reconstruction": []}
        for branch, coder in enumerate(self.unique):
            before = coder.preconditioned.out.transpose(0, 1)
            weights["synthesis"].append(coder.synthesis.folded(before))
            weights["adjoint"].append(coder.preconditioned.inner())
            weights["reconstruction"].append(self.reconstruction[branch].folded())
            if self.common is not None:
                weights["explained"].append(self.explained[branch].folded(before))
        if self.common is not None:
            before = self.common.preconditioned.out.transpose(0, 1)
            weights["synthesis"].append(self.common.synthesis.folded(before))
            weights["adjoint"].append(self.common.preconditioned.inner())
            weights["compress"] = [
                torch.einsum("om,mihw->oihw", before[..., 0, 0], self.compress.weight),
                before[..., 0, 0] @ self.compress.bias,
            ]
        return weights

    def iterate(
        self, codes: list[Codes], features: list[Tensor], adjoints: list[Codes], weights: dict[str, list], stage: int
    ) -> tuple[list[Codes], list[Tensor]]:
        """Update U and V on the old C, then C on the new U and V.

        Returns:
            The codes, C last, and D'*U, H'*V: the feature maps that the unique codes explain.
        """
        updated, explained = [], []
        for branch in range(self.branches):
            found, part = self.run(self.update_unique, branch, codes, adjoints[branch], weights, stage)
            updated.append(found)
            explained.append(part)
        if self.common is not None:
            left = [feature - part for feature, part in zip(features, explained, strict=True)]
            updated.append(self.run(self.update_common, codes[-1], left, weights, stage))
        return updated, explained

    def run(self, update: Callable, *arguments: object) -> Any:
        """Make an update, with `recompute` so that nothing inside it is kept for the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(update, *arguments, use_reentrant=False, preserve_rng_state=False)
        return update(*arguments)

    def update_unique(
        self, branch: int, codes: list[Codes], adjoint: Codes, weights: dict[str, list], stage: int
    ) -> tuple[Codes, Tensor]:
        """Update the unique code of an image; give it and the feature map that it explains, D'*U."""
        image = synthesise(codes[branch], weights["synthesis"][branch])
        if self.common is not None:
            image = image + synthesise(codes[-1], weights["explained"][branch])
        gradient = difference(analyse(image, weights["adjoint"][branch]), adjoint)
        updated = self.unique[branch].update(codes[branch], gradient, stage)
        return updated, synthesise(updated, weights["reconstruction"][branch])

    def update_common(self, codes: Codes, left: list[Tensor], weights: dict[str, list], stage: int) -> Codes:
        """Update the common code to explain Z, what the unique codes leave of each feature map."""
        image = synthesise(codes, weights["synthesis"][-1])
        image = image - F.conv2d(torch.cat(left, 1), *weights["compress"], padding=1)
        return self.common.update(codes, analyse(image, weights["adjoint"][-1]), stage)


def difference(left: Codes, right: Codes) -> Codes:
    """Subtract codes scale by scale."""
    return [a - b for a, b in zip(left, right, strict=True)]


def copy_of(dictionary: Dictionary) -> Dictionary:
    """Make a dictionary of its own with the same weights."""
    made = Dictionary(dictionary.widths, dictionary.out_channels)
    made.load_state_dict(dictionary.state_dict())
    return made
