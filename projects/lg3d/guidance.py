"""Label guidance: an auxiliary branch that sees the labels while a detector is trained, and is gone afterwards (LG3D).

    guided = Guidance(detector.backbone, detector.head, ...)     the detector as it is; a frozen copy is phi* and psi
    z = guided(xyz, features, boxes, labels, geometry)           seed features that know the labels
    loss = L_det(head(seeds)) + L_det(guided.propose(head, z)) + weight * imitation_loss(seeds.features, z)

The detector is anything with a `backbone` and a `head` as model.py has them; it is neither changed nor wrapped.

Symbols of the paper: P the scene, P^ the points within labelled boxes, A the annotations; f the student's backbone,
phi* a frozen one trained before, psi the same on P^, beta the annotation descriptor; LAI the label-annotation-inducer,
LKM the label-knowledge-mapper. Shapes: B scenes, N points, S seeds, K boxes, C channels; embeddings (B, C, rows).
"""

import copy
import itertools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from shared.errors import InputError

from .boxes import BoxCoder, points_in_boxes
from .model import Geometry, Seeds

CHOICES = {
    "variant": ("paper", "released"),
    "value": ("label", "scene"),
    "layout": ("masked", "tiled"),
    "pad": ("wrap", "zero"),
    "frozen_norms": ("eval", "train"),
    "head_norms": ("separate", "shared"),
}


# --- What the branch is shown -----------------------------------------------------------------------------------------


def label_points(xyz: Tensor, features: Tensor, boxes: Tensor, is_box: Tensor, pad: str) -> tuple[Tensor, Tensor]:
    """Take the points within any box, P^, as a cloud of as many points as the scene.

    They are repeated in turn; what is left of the N rows, less than one more round, takes some of them at equal
    distances. A scene without such a point is taken as a whole.

    Args:
        xyz: (B, N, 3).
        features: (B, C, N).
        boxes: (B, K, 7).
        is_box: (B, K) bool, False for padding.
        pad: "wrap" as above; "zero" leaves the rest of the rows 0, as released: a cluster at the origin.

    Returns:
        xyz (B, N, 3) and features (B, C, N).
    """
    inside = (points_in_boxes(xyz, boxes) & is_box[:, None]).any(-1)
    inside = inside | ~inside.any(1, keepdim=True)
    count = inside.sum(1, keepdim=True)
    order = (~inside).long().argsort(dim=1, stable=True)
    num_points = xyz.shape[1]
    row = torch.arange(num_points, device=xyz.device)
    whole = num_points // count * count
    # never 0: only divided by where there is a rest
    rest = (num_points - whole).clamp(min=1)
    place = torch.where(row < whole, row % count, (row - whole) * count // rest)
    chosen = order.gather(1, place)
    kept = (row < whole).to(xyz.dtype) if pad == "zero" else torch.ones_like(inside, dtype=xyz.dtype)
    xyz = xyz.gather(1, chosen[..., None].expand(-1, -1, 3)) * kept[..., None]
    return xyz, features.gather(2, chosen[:, None].expand(-1, features.shape[1], -1)) * kept[:, None]


def annotations(boxes: Tensor, labels: Tensor, coder: BoxCoder) -> Tensor:
    """Describe labelled boxes in numbers, A.

    Args:
        boxes: (B, K, 7).
        labels: (B, K) int64; rows of -1 give numbers without meaning.
        coder: of the head.

    Returns:
        (B, 9 + NC, K): centre (m), size less the class's mean (m), class, heading bin, heading residual (half bins;
        both 0 where boxes are not turned), and softmax of the one-hot class.
    """
    known = labels.clamp(min=0)
    bins, residuals, _ = coder.encode(boxes, known)
    if coder.num_headings == 1:
        residuals = torch.zeros_like(residuals)
    sizes = boxes[..., 3:6] - coder.mean_sizes.to(boxes)[known]
    one_hot = F.one_hot(known, len(coder.mean_sizes)).to(boxes.dtype)
    numbers = torch.stack([known.to(boxes.dtype), bins.to(boxes.dtype), residuals], -1)
    return torch.cat([boxes[..., :3], sizes, numbers, one_hot.softmax(-1)], -1).mT


def tiled(rows: Tensor, is_box: Tensor, num_rows: int) -> Tensor:
    """Repeat the rows (B, D, K) of each scene's boxes floor(num_rows / n) times, zeros after them, as released.

    Raises:
        InputError: a scene has more boxes than rows.
    """
    count = is_box.sum(1, keepdim=True)
    if rows.shape[2] > num_rows and (count > num_rows).any():
        raise InputError(f"a scene has {int(count.max())} boxes, more than {num_rows} rows; take layout=masked")
    order = (~is_box).long().argsort(dim=1, stable=True)
    row = torch.arange(num_rows, device=rows.device)
    some = count.clamp(min=1)
    place = order.gather(1, row % some)
    kept = (row < num_rows // some * some) & (count > 0)
    return rows.gather(2, place[:, None].expand(-1, rows.shape[1], -1)) * kept[:, None].to(rows.dtype)


# --- Networks ---------------------------------------------------------------------------------------------------------


class AnnotationDescriptor(nn.Module):
    """Beta: the same three layers for each annotation.

    Args:
        in_channels: numbers of an annotation, D.
        channels: C of the seeds; the layers are C/4, C/2 and C wide, the last without a ReLU.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        widths = [in_channels, channels // 4, channels // 2, channels]
        self.convs = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths[1:])

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Describe annotations.

        Args:
            rows: (B, D, K).
            mask: (B, K) bool; the norms see the rows where it is True alone, others become 0. None takes all.

        Returns:
            (B, C, K).
        """
        if mask is None:
            return self.layers(rows)
        found = rows.new_zeros(*mask.shape, self.norms[-1].num_features)
        if mask.any():
            found[mask] = self.layers(rows.mT[mask].mT[None])[0].mT.to(found.dtype)
        else:  # DistributedDataParallel waits for a gradient of every parameter
            found = found + 0 * sum(parameter.sum() for parameter in self.parameters())
        return found.mT

    def layers(self, x: Tensor) -> Tensor:
        """Give (B, C, K) of (B, D, K)."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(x)
            if x.shape[0] * x.shape[2] > 1 or not self.training:
                x = norm(x)
            else:  # one value has no variance
                x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
            if i < 2:
                x = F.relu(x)
        return x


class Attention(nn.Module):
    """Single-head attention of embeddings: W_o softmax(Q^T K / sqrt(d)) V, with d = C/8.

    Args:
        channels: C.
        starts_at_zero: W_o is 0 at first, so that what the result is added to is kept.
    """

    def __init__(self, channels: int, starts_at_zero: bool):
        super().__init__()
        width = max(1, channels // 8)
        self.query, self.key = nn.Conv1d(channels, width, 1), nn.Conv1d(channels, width, 1)
        self.value, self.out = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, channels, 1)
        if starts_at_zero:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from (B, C, Nq) to (B, C, Nk), those of mask (B, Nk) alone: (B, C, Nq), 0 where there is none."""
        found = self.out(attend(self.query(queries), self.key(keys), self.value(keys), mask))
        return found if mask is None else found * mask.any(1)[:, None, None].to(found.dtype)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q^T K / sqrt(d)) V of (B, d, Nq), (B, d, Nk), (B, C, Nk): (B, C, Nq)."""
    logits = queries.mT @ keys / math.sqrt(keys.shape[1])
    if mask is not None:
        # finite: a scene without any key must not become NaN
        logits = logits.masked_fill(~mask[:, None], torch.finfo(logits.dtype).min)
    return values @ logits.softmax(-1).mT


class Inducer(nn.Module):
    """LAI: label points attend to annotations that have attended to one another.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.embed = nn.Conv1d(channels, channels, 1)
        self.among = Attention(channels, starts_at_zero=False)
        self.across = Attention(channels, starts_at_zero=True)

    def embedded(self, described: Tensor, mask: Tensor | None) -> Tensor:
        """Give E_A + SelfAttention(E_A) (B, C, K)."""
        embedding = self.embed(described)
        return embedding + self.among(embedding, embedding, mask)

    def forward(self, points: Tensor, described: Tensor, mask: Tensor | None) -> Tensor:
        """Give the annotation-enhanced label representation Z_L (B, C, S).

        Args:
            points: psi(P^) (B, C, S).
            described: beta(A) (B, C, K).
            mask: (B, K) bool.
        """
        return points + self.across(points, self.embedded(described, mask), mask)


class Mapper(nn.Module):
    """LKM: the scene's seeds attend to the label representation.

    Args:
        channels: C.
        value: what is added to a seed: "label", of the label representation; or "scene", of other seeds, found by what
            they have in common in it.
    """

    def __init__(self, channels: int, value: str = "label"):
        super().__init__()
        self.attention = Attention(channels, starts_at_zero=True)
        self.of_scene = value == "scene"

    def forward(self, scene: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
        """Give the label-enhanced auxiliary representation Z (B, C, S) of phi*(P) (B, C, S) and Z_L (B, C, rows)."""
        if not self.of_scene:
            return scene + self.attention(scene, label, mask)
        layers = self.attention
        queries, of_labels = layers.query(scene), layers.key(label)
        # the labels' keys as each seed sees them
        keys = attend(queries, of_labels, of_labels, mask)
        return scene + layers.out(attend(queries, keys, layers.value(scene)))


class ReleasedAttention(nn.Module):
    """The attention of the released code: softmax over the queries, scaled afterwards, keys paired with places.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        width = max(1, channels // 8)
        layers = [
            nn.Sequential(nn.Conv1d(channels, out, 1, bias=False), nn.BatchNorm1d(out), nn.ReLU())
            for out in (width, width, channels)
        ]
        self.key, self.query, self.value = layers
        self.channels = channels

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Give q + V S^T (B, C, N) of (B, C, N) and (B, C, N).

        Raises:
            InputError: as many queries as keys are needed.
        """
        if queries.shape != keys.shape:
            raise InputError(
                f"the released attention pairs {queries.shape[2]} queries with {keys.shape[2]} keys; they are as many"
            )
        scores = self.key(keys).mT @ self.query(queries)
        weights = scores.softmax(-1) / math.sqrt(self.channels)
        return queries + self.value(keys) @ weights.mT


# --- The branch -------------------------------------------------------------------------------------------------------


class Guidance(nn.Module):
    """The auxiliary branch of a detector. Its parameters are beta's, LAI's and LKM's; phi* and psi are frozen.

    Args:
        backbone: the detector's; copied as phi* and psi, which are one network. Load its weights before, or those of
            `teacher` afterwards.
        head: the detector's; only its norms' statistics are copied, for seeds of this branch.
        points: whether LKM sees the label points; without them it sees the annotations alone.
        annotations: whether LAI sees the annotations. Without both, Z is phi*(P).
        variant: "paper", as the authors drew it; "released", as their code has it: other attention, annotations tiled.
        share_attention: LAI and LKM are one module (released code; variant=released).
        value: see `Mapper`; of variant=paper.
        layout: of annotations: "masked" rows, or "tiled" to as many rows as there are seeds.
        pad: see `label_points`.
        jitter: annotated centres move by up to so many sizes to either side in training.
        frozen_norms: the frozen network's norms take their own statistics ("eval") or those of the batch ("train").
        head_norms: seeds of this branch have statistics of their own in the head ("separate") or move the detector's
            ("shared", released code).

    Attributes:
        teacher: phi* and psi.

    Raises:
        InputError: an unknown choice, or choices that exclude one another.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, points: bool = True, annotations: bool = True,
        variant: str = "paper", share_attention: bool = False, value: str = "label", layout: str = "masked",
        pad: str = "wrap", jitter: float = 0.0, frozen_norms: str = "eval", head_norms: str = "separate",
    ):  # fmt: skip
        super().__init__()
        chosen = {
            "variant": variant, "value": value, "layout": layout, "pad": pad, "frozen_norms": frozen_norms,
            "head_norms": head_norms,
        }  # fmt: skip
        for key, choice in chosen.items():
            if choice not in CHOICES[key]:
                raise InputError(f"unknown guidance {key}={choice!r}; choose one of {', '.join(CHOICES[key])}")
        if variant == "released" and (layout != "tiled" or not (points and annotations) or value != "label"):
            raise InputError("guidance variant=released takes layout=tiled, value=label, points and annotations")
        if share_attention and variant != "released":
            raise InputError("guidance share_attention=true is of variant=released alone")
        if not 0 <= jitter < math.inf:
            raise InputError(f"guidance jitter is at least 0, not {jitter}")
        self.points, self.annotations, self.released = points, annotations, variant == "released"
        self.is_tiled, self.pad, self.jitter = layout == "tiled", pad, jitter
        self.frozen_norms, self.head_norms = frozen_norms, head_norms
        self.coder = head.coder
        channels = backbone.out_channels
        self.teacher = copy.deepcopy(backbone).requires_grad_(False)
        if annotations:
            self.descriptor = AnnotationDescriptor(9 + head.num_classes, channels)
        if self.released:
            self.inducer = ReleasedAttention(channels)
            self.mapper = self.inducer if share_attention else ReleasedAttention(channels)
        elif points or annotations:
            if annotations:
                self.inducer = Inducer(channels)
                if not points:  # nothing attends to the annotations but the mapper
                    del self.inducer.across
            self.mapper = Mapper(channels, value)
        self.statistics = nn.Module()
        if head_norms == "separate":
            for name, buffer in head.named_buffers():
                if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked"):
                    self.statistics.register_buffer(name.replace(".", "/"), buffer.clone())
        self.train(self.training)

    def train(self, mode: bool = True) -> "Guidance":
        """Keep the frozen network as it is."""
        super().train(mode)
        self.teacher.train(mode and self.frozen_norms == "train")
        return self

    def forward(
        self, xyz: Tensor, features: Tensor, boxes: Tensor, labels: Tensor, geometry: Geometry | None = None
    ) -> Seeds:
        """Give seeds that know the labels: Z at the places of phi*(P), which are the student's.

        Args:
            xyz: (B, N, 3).
            features: (B, C_in, N).
            boxes: (B, K, 7), K at least 1.
            labels: (B, K) int64, -1 for padding.
            geometry: of the scene, where the student has it already.
        """
        is_box = labels >= 0
        with torch.no_grad():
            seeds = self.described(features, self.teacher.geometry(xyz) if geometry is None else geometry)
            of_points = None
            if self.points:
                shown, shown_features = label_points(xyz, features, boxes, is_box, self.pad)
                of_points = self.described(shown_features, self.teacher.geometry(shown)).features
        scene = seeds.features
        mask, described = None, None
        if self.annotations:
            if self.jitter and self.training:
                boxes = self.jittered(boxes)
            rows = annotations(boxes, labels, self.coder)
            if self.is_tiled:
                described = self.descriptor(tiled(rows, is_box, scene.shape[2]))
            else:
                mask, described = is_box, self.descriptor(rows, is_box)
        if self.released:
            return replace(seeds, features=self.mapper(scene, self.inducer(of_points, described)))
        if described is None:
            return seeds if of_points is None else replace(seeds, features=self.mapper(scene, of_points))
        if of_points is None:
            return replace(seeds, features=self.mapper(scene, self.inducer.embedded(described, mask), mask))
        return replace(seeds, features=self.mapper(scene, self.inducer(of_points, described, mask)))

    def described(self, features: Tensor, geometry: Geometry) -> Seeds:
        """Run the frozen network; with the batch's statistics it leaves its own as they are."""
        if not self.teacher.training:
            return self.teacher(features, geometry)
        kept = {name: buffer.clone() for name, buffer in self.teacher.named_buffers()}
        return functional_call(self.teacher, kept, (features, geometry))

    def jittered(self, boxes: Tensor) -> Tensor:
        """Move centres (B, K, 3) at random, drawn apart from torch's global numbers, which the student's run shares."""
        random = torch.rand((*boxes.shape[:2], 3), generator=self.generator())
        noise = (2 * random - 1).to(boxes) * self.jitter * boxes[..., 3:6]
        return torch.cat([boxes[..., :3] + noise, boxes[..., 3:]], -1)

    def generator(self) -> torch.Generator:
        """Give random numbers that a resumed run has too: they follow from the steps taken."""
        steps = self.descriptor.norms[0].num_batches_tracked
        return torch.Generator().manual_seed(int(steps))

    def propose(self, head: nn.Module, seeds: Seeds, sample: str) -> dict[str, Tensor]:
        """Run the detector's head on seeds of this branch, with norms as `head_norms` says."""
        if self.head_norms == "shared":
            return head(seeds, sample)
        own = {name.replace("/", "."): buffer for name, buffer in self.statistics.named_buffers()}
        return functional_call(head, own, (seeds, sample))
