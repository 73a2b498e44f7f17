"""VoteNet: Qi et al., "Deep Hough voting for 3D object detection in point clouds", ICCV 2019.

Shapes: B scenes, N points, S seeds, P proposals, K neighbours, C channels, NH heading bins, NS = NC classes; xyz
(B, N, 3) in metres, z up; features (B, C, N). Whatever detector has a `backbone` that turns points into `Seeds` and a
`head` that turns seeds into outputs can be trained with `guidance.Guidance`.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError
from shared.kernels.points import (
    ball_query,
    furthest_point_sample,
    gather_points,
    three_interpolate,
    three_nn,
)
from shared.networks import build_by_name

from .boxes import BoxCoder

MIN_NORM = 1e-6  # of a vote's features, which are divided by it


@dataclass(frozen=True)
class Seeds:
    """Points that a backbone describes.

    Attributes:
        xyz: (B, S, 3).
        features: (B, C, S).
        index: (B, S) int64, places in the scene's points.
    """

    xyz: Tensor
    features: Tensor
    index: Tensor


@dataclass(frozen=True)
class Geometry:
    """What a backbone looks up in a scene's coordinates: the same for every backbone of the same sizes.

    Attributes:
        xyz: (B, M, 3) of the points and of each level.
        index: (B, M) int32, places of the first level's centroids in the points.
        neighbors: (B, M, K) int32 of each level, places in the level before.
        nearest: (B, M, 3) int32 of each propagation, places in the coarser level.
        weights: (B, M, 3) of these, adding up to 1.
    """

    xyz: list[Tensor]
    index: Tensor
    neighbors: list[Tensor]
    nearest: list[Tensor]
    weights: list[Tensor]


# --- Layers -----------------------------------------------------------------------------------------------------------


class GroupedConv(nn.Conv2d):
    """1x1 convolution of cat([(p_j - q) / radius, f_j]) without ever making that tensor.

    Linear in both, so the product is taken once a point and once a centroid, not once a neighbour.

    Args:
        in_channels: C of the features; the weight (out, 3 + C, 1, 1) has three more columns, the first.
        out_channels: of the result.
        radius: what offsets are divided by.
    """

    def __init__(self, in_channels: int, out_channels: int, radius: float):
        super().__init__(3 + in_channels, out_channels, 1, bias=False)
        self.radius = radius

    def forward(self, features: Tensor, xyz: Tensor, new_xyz: Tensor, neighbors: Tensor) -> Tensor:
        """Convolve groups of features (B, C, N) of xyz (B, N, 3).

        Args:
            features: of the points.
            xyz: of the points.
            new_xyz: centroids (B, M, 3).
            neighbors: places (B, M, K) in the points.

        Returns:
            rows (B M K, out).
        """
        weight = self.weight.flatten(1)
        # half precision has too few digits for coordinates of many radii
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        to_points, xyz, new_xyz = weight[:, :3] / self.radius, xyz.to(weight.dtype), new_xyz.to(weight.dtype)
        with torch.autocast(xyz.device.type, enabled=False):
            of_points = xyz @ to_points.mT + features.mT.to(weight.dtype) @ weight[:, 3:].mT
            first = torch.arange(len(xyz), device=xyz.device)[:, None, None] * xyz.shape[1]
            grouped = of_points.flatten(0, 1).index_select(0, (neighbors + first).flatten())
            grouped = grouped.unflatten(0, neighbors.shape).sub_((new_xyz @ to_points.mT)[:, :, None])
        return grouped.flatten(0, 2).to(self.weight.dtype)


class SetAbstraction(nn.Module):
    """Group, shared MLP, maximum over the neighbours (PointNet++).

    Neighbours are rows of their channels, so that a layer is one matrix product: twice as fast as over (B, C, M, K).

    Args:
        in_channels: of the features.
        channels: widths of the MLP.
        radius: of the ball, metres.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], radius: float):
        super().__init__()
        convs = [GroupedConv(in_channels, channels[0], radius)]
        convs += [nn.Conv2d(a, b, 1, bias=False) for a, b in itertools.pairwise(channels)]
        self.convs = nn.ModuleList(
            nn.Sequential(conv, nn.BatchNorm2d(width)) for conv, width in zip(convs, channels, strict=True)
        )

    def forward(self, features: Tensor, xyz: Tensor, new_xyz: Tensor, neighbors: Tensor) -> Tensor:
        """See `GroupedConv.forward`; gives (B, channels[-1], M)."""
        (grouped, norm), *layers = self.convs
        rows = norm_rows(grouped(features, xyz, new_xyz, neighbors), norm)
        for conv, norm in layers:
            rows = norm_rows(F.linear(rows, conv.weight.flatten(1)), norm)
        # only the largest neighbour has a gradient, as torch.max knows and amax does not
        return rows.unflatten(0, neighbors.shape).max(2).values.mT


def norm_rows(rows: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Normalise rows (n, C) and cut them off at 0; as an image whose channels come last, which torch does fast."""
    image = rows[None, :, None].permute(0, 3, 1, 2)
    return F.relu(norm(image), inplace=True).permute(0, 2, 3, 1).flatten(0, 2)


def point_conv(in_channels: int, out_channels: int, bias: bool) -> nn.Sequential:
    """1x1 convolution of points, batch norm, ReLU."""
    return nn.Sequential(nn.Conv1d(in_channels, out_channels, 1, bias=bias), nn.BatchNorm1d(out_channels), nn.ReLU())


class FeaturePropagation(nn.Module):
    """Carry features back to more points: cat([interpolated, skip]), MLP of two layers of one width.

    VoteNet's MLPs have 2-D norms over (B, C, M, 1); 1-D ones are the same.

    Args:
        in_channels: of both together.
        width: of the layers.
    """

    def __init__(self, in_channels: int, width: int):
        super().__init__()
        self.convs = nn.Sequential(point_conv(in_channels, width, False), point_conv(width, width, False))

    def forward(self, skip: Tensor, coarse: Tensor, nearest: Tensor, weights: Tensor) -> Tensor:
        return self.convs(torch.cat([three_interpolate(coarse, nearest, weights), skip], 1))


class Backbone(nn.Module):
    """PointNet++ with four set abstractions and two propagations; its seeds are the centroids of the second level.

    Args:
        in_channels: of the points' features (1: the height above the floor).
        num_points: centroids of the levels.
        radii: of the levels, metres.
        num_samples: neighbours of the levels.
        widths: of the levels' MLPs.
        out_channels: C of the seeds, and width of the propagations.
        skip_origin: sample as the original VoteNet's kernels did, which never choose a point within 3 cm of the origin.

    Raises:
        InputError: not four levels, more centroids than in the level before, or a size that is none.
    """

    def __init__(
        self, in_channels: int, num_points: Sequence[int], radii: Sequence[float], num_samples: Sequence[int],
        widths: Sequence[Sequence[int]], out_channels: int, skip_origin: bool = False,
    ):  # fmt: skip
        super().__init__()
        if not len(num_points) == len(radii) == len(num_samples) == len(widths) == 4:
            raise InputError("the backbone has four levels: num_points, radii, num_samples and widths are of length 4")
        check_counts("backbone", num_points=num_points, num_samples=num_samples, out_channels=[out_channels])
        for width in widths:
            check_counts("backbone", widths=width)
        check_lengths("backbone", radii=radii)
        if in_channels < 0:
            raise InputError(f"in_channels of the backbone are at least 0, not {in_channels}")
        if sorted(num_points, reverse=True) != list(num_points) or num_points[-1] < 3:
            raise InputError(f"num_points of the levels fall and end with at least 3, not {list(num_points)}")
        self.in_channels, self.out_channels, self.skip_origin = in_channels, out_channels, skip_origin
        self.num_points, self.radii, self.num_samples = list(num_points), list(radii), list(num_samples)
        outs = [in_channels, *(width[-1] for width in widths)]
        self.abstractions = nn.ModuleList(
            SetAbstraction(c, width, radius) for c, width, radius in zip(outs, widths, radii, strict=False)
        )
        self.propagations = nn.ModuleList(
            [
                FeaturePropagation(outs[4] + outs[3], out_channels),
                FeaturePropagation(out_channels + outs[2], out_channels),
            ]
        )

    @torch.no_grad()
    def geometry(self, xyz: Tensor) -> Geometry:
        """Look up samples and neighbours of points (B, N, 3).

        Points sampled furthest first are, in their order, the samples of themselves: one search serves all levels.

        Raises:
            InputError: fewer points than the first level samples.
        """
        if xyz.shape[1] < self.num_points[0]:
            raise InputError(
                f"the network samples {self.num_points[0]} points, the scene has {xyz.shape[1]}; repeat some of them"
            )
        index = furthest_point_sample(xyz, self.num_points[0], self.skip_origin)
        sampled = gather_points(xyz.mT.contiguous(), index).mT.contiguous()
        levels = [xyz, *(sampled[:, :count].contiguous() for count in self.num_points)]
        neighbors = [
            ball_query(radius, count, *pair)
            for radius, count, pair in zip(self.radii, self.num_samples, itertools.pairwise(levels), strict=True)
        ]
        nearest, weights = [], []
        for fine, coarse in ((3, 4), (2, 3)):
            distance, places = three_nn(levels[fine], levels[coarse])
            weight = 1 / (distance + 1e-8)
            nearest.append(places)
            weights.append(weight / weight.sum(-1, keepdim=True))
        return Geometry(levels, index, neighbors, nearest, weights)

    def forward(self, features: Tensor, geometry: Geometry) -> Seeds:
        """Describe the seeds of points with features (B, in_channels, N)."""
        xyz, levels = geometry.xyz, [features]
        for i, abstraction in enumerate(self.abstractions):
            levels.append(abstraction(levels[i], xyz[i], xyz[i + 1], geometry.neighbors[i]))
        coarse = levels[4]
        for i, propagation in enumerate(self.propagations):
            coarse = propagation(levels[3 - i], coarse, geometry.nearest[i], geometry.weights[i])
        return Seeds(xyz[2], coarse, geometry.index[:, : xyz[2].shape[1]].long())


class VoteModule(nn.Module):
    """Each seed votes for the centre of its object: an offset, and features of length 1.

    Args:
        channels: C of the seeds and votes.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.convs = nn.Sequential(*(point_conv(channels, channels, True) for _ in range(2)))
        self.out = nn.Conv1d(channels, 3 + channels, 1)

    def forward(self, seeds: Seeds) -> Seeds:
        found = self.out(self.convs(seeds.features))
        features = seeds.features + found[:, 3:]
        features = features / features.norm(dim=1, keepdim=True).clamp(min=MIN_NORM)
        return replace(seeds, xyz=seeds.xyz + found[:, :3].mT, features=features)


class VoteHead(nn.Module):
    """Votes, their clusters, and a box proposed by each cluster.

    Args:
        channels: C of the seeds.
        num_proposals: P.
        radius, num_samples, widths: of the clusters around their centres.
        num_headings: NH.
        mean_sizes: (NC, 3), metres.
        skip_origin: see `Backbone`.

    Raises:
        InputError: a size that is none.
    """

    def __init__(
        self, channels: int, num_proposals: int, radius: float, num_samples: int, widths: Sequence[int],
        num_headings: int, mean_sizes: Sequence[Sequence[float]], skip_origin: bool = False,
    ):  # fmt: skip
        super().__init__()
        check_counts("head", num_proposals=[num_proposals], num_samples=[num_samples], num_headings=[num_headings])
        check_counts("head", widths=widths)
        if not mean_sizes or any(len(size) != 3 for size in mean_sizes):
            raise InputError("mean_sizes of the head are three numbers for each class")
        check_lengths("head", radius=[radius], mean_sizes=itertools.chain.from_iterable(mean_sizes))
        self.num_proposals, self.radius, self.num_samples = num_proposals, radius, num_samples
        self.num_classes, self.num_headings, self.skip_origin = len(mean_sizes), num_headings, skip_origin
        self.register_buffer("mean_sizes", torch.tensor(mean_sizes, dtype=torch.float32), persistent=False)
        width = widths[-1]
        self.vote = VoteModule(channels)
        self.aggregation = SetAbstraction(channels, widths, radius)
        self.shared = nn.Sequential(*(point_conv(width, width, True) for _ in range(2)))
        self.classify = nn.Conv1d(width, 2 + self.num_classes, 1)
        self.regress = nn.Conv1d(width, 3 + 2 * num_headings + 4 * self.num_classes, 1)

    @property
    def coder(self) -> BoxCoder:
        """How boxes are said."""
        return BoxCoder(self.mean_sizes, self.num_headings)

    def forward(self, seeds: Seeds, sample: str) -> dict[str, Tensor]:
        """Propose boxes.

        Args:
            seeds: S of them, at least P.
            sample: where centres of clusters are furthest apart: among the "vote"s, as in training, or the "seed"s, as
                in the test.

        Returns:
            seed_xyz, vote_xyz (B, S, 3); proposal_xyz (B, P, 3), the clusters' centres; objectness (B, P, 2) logits of
            no and yes; center (B, P, 3); heading_logits and heading_residuals (B, P, NH), in half bins; size_logits
            (B, P, NS) and size_residuals (B, P, NS, 3), in mean sizes; semantic (B, P, NC) logits.

        Raises:
            InputError: votes that are not finite; on a GPU that is not checked.
        """
        votes = self.vote(seeds)
        vote_xyz = votes.xyz.contiguous()
        # on a GPU the check would wait for it
        checked = vote_xyz.device.type == "cpu" and not torch.compiler.is_compiling()
        if checked and not vote_xyz.isfinite().all():
            raise InputError(
                "the network's votes are not finite: either the points' features are not, or its weights, which means "
                "that training diverged; lower the learning rate"
            )
        with torch.no_grad():
            spread = {"vote": vote_xyz, "seed": seeds.xyz}[sample].detach().contiguous()
            chosen = furthest_point_sample(spread, self.num_proposals, self.skip_origin)
        centers = gather_points(vote_xyz.mT.contiguous(), chosen).mT.contiguous()
        with torch.no_grad():
            neighbors = ball_query(self.radius, self.num_samples, vote_xyz.detach(), centers.detach())
        clusters = self.shared(self.aggregation(votes.features, vote_xyz, centers, neighbors))
        classes, boxes = self.classify(clusters).mT.to(centers), self.regress(clusters).mT.to(centers)
        headings, sizes = self.num_headings, self.num_classes
        offset, heading_logits, heading_residuals, size_logits, size_residuals = boxes.split(
            [3, headings, headings, sizes, 3 * sizes], -1
        )
        return {
            "seed_xyz": seeds.xyz,
            "vote_xyz": vote_xyz,
            "proposal_xyz": centers,
            "objectness": classes[..., :2],
            "center": centers + offset,
            "heading_logits": heading_logits,
            "heading_residuals": heading_residuals,
            "size_logits": size_logits,
            "size_residuals": size_residuals.unflatten(-1, (sizes, 3)),
            "semantic": classes[..., 2:],
        }


class VoteNet(nn.Module):
    """Backbone and head.

    Args:
        backbone: arguments of `Backbone`.
        head: arguments of `VoteHead` but channels.
    """

    def __init__(self, backbone: dict, head: dict):
        super().__init__()
        self.backbone = Backbone(**backbone)
        self.head = VoteHead(self.backbone.out_channels, **head)
        if self.head.num_proposals > self.backbone.num_points[1]:
            raise InputError(
                f"{self.head.num_proposals} proposals cannot be made of {self.backbone.num_points[1]} seeds"
            )

    def forward(self, xyz: Tensor, features: Tensor, sample: str | None = None) -> dict[str, Tensor]:
        """Propose boxes in scenes, see `VoteHead.forward`; `sample` is "vote" in training, "seed" otherwise if None."""
        check_scene(xyz, features, self.backbone.in_channels)
        seeds = self.backbone(features, self.backbone.geometry(xyz))
        return self.head(seeds, sample or ("vote" if self.training else "seed"))


def check_counts(part: str, **arguments: Sequence[int]) -> None:
    """Stop unless the arguments of a part of the network are whole numbers above 0.

    Raises:
        InputError: one is not, or there is none; names the argument.
    """
    for name, numbers in arguments.items():
        if not len(numbers) or not all(isinstance(number, int) and number > 0 for number in numbers):
            raise InputError(f"{name} of the {part}: whole numbers above 0 are needed, not {list(numbers)}")


def check_lengths(part: str, **arguments: Iterable[float]) -> None:
    """Stop unless the arguments of a part of the network are finite numbers above 0.

    Raises:
        InputError: one is not; names the argument.
    """
    for name, numbers in arguments.items():
        for number in numbers:
            if not 0 < number < math.inf:
                raise InputError(f"{name} of the {part}: metres above 0 are needed, not {number}")


def check_scene(xyz: Tensor, features: Tensor, in_channels: int) -> None:
    """Stop unless xyz is (B, N, 3) and features (B, in_channels, N) of the same scenes.

    Raises:
        InputError: another shape, or points in another precision than float32 or float64.
    """
    if xyz.ndim != 3 or xyz.shape[2] != 3:
        raise InputError(f"points are (B, N, 3), not {(*xyz.shape,)}")
    if xyz.dtype not in (torch.float32, torch.float64):
        raise InputError(f"points are float32 or float64, not {xyz.dtype}: convert them with .float()")
    expected = (xyz.shape[0], in_channels, xyz.shape[1])
    if features.shape != expected:
        raise InputError(f"features of these points are {expected}, not {(*features.shape,)}")


NETWORKS = {"votenet": VoteNet}


def build_network(arguments: dict) -> nn.Module:
    """Build a detector from {"name": one of `NETWORKS`, and its arguments}.

    Raises:
        InputError: an unknown name or argument, or a value that the detector refuses.
    """
    try:
        return build_by_name(arguments, NETWORKS)
    except TypeError as error:
        raise InputError(f"the network's arguments do not fit: {error}") from error
