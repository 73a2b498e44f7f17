"""PointNet++ and PointNeXt, for classes, parts and scenes, with the layers and counts of OpenPoints' configurations.

PointNet++: Qi et al., NeurIPS 2017. PointNeXt: Qian et al., NeurIPS 2022.

Shapes: B clouds, N points, M centroids, K neighbours, C channels; xyz (B, N, 3), features (B, C, N), grouped
(B, C, M, K). A block that samples is called with (xyz, features, centroids), the last the indices (B, M) of points:
this is all that pruning needs to know of it.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError
from shared.kernels.points import (
    ball_query,
    furthest_point_sample,
    gather_points,
    group_points,
    three_interpolate,
    three_nn,
)
from shared.networks import build_by_name

# --- Layers -----------------------------------------------------------------------------------------------------------


class GroupedConv(nn.Conv2d):
    """1x1 convolution of the grouped tensor cat([Δp, f_j]), coordinates first, without ever making that tensor.

    W [Δp / s; f_j] = (W_p p_j / s + W_f f_j) - W_p q / s: the first term once a point, the second once a centroid, so
    that the product is taken N + M times instead of M K times. Equal to the plain form up to rounding, which is why
    autocast leaves it in full precision: coordinates may be many radii long.

    Args:
        in_channels: C of the features; the layer's weight (out, 3 + C, 1, 1) has three more columns.
        out_channels: of the result.
        scale: s, what Δp is divided by.
    """

    def __init__(self, in_channels: int, out_channels: int, scale: float = 1.0):
        super().__init__(3 + in_channels, out_channels, 1, bias=False)
        self.scale = scale

    def forward(self, features: Tensor, xyz: Tensor, new_xyz: Tensor | None, neighbors: Tensor | None) -> Tensor:
        """Convolve groups.

        Args:
            features: (B, C, N).
            xyz: (B, N, 3).
            new_xyz: centroids (B, M, 3); None groups all points around the origin.
            neighbors: indices (B, M, K) of points; None for all.

        Returns:
            (B, out, M, K), or (B, out, 1, N).
        """
        weight = self.weight[:, :, 0, 0]
        to_points = weight[:, :3] / self.scale
        with torch.autocast(xyz.device.type, enabled=False):
            of_points = to_points @ xyz.mT + weight[:, 3:] @ features.to(weight.dtype)
            if neighbors is None:
                return of_points[:, :, None]
            return group_points(of_points, neighbors) - (to_points @ new_xyz.mT)[..., None]


def conv_block(conv: nn.Module, norm: type[nn.Module] | None, act: bool = True) -> nn.Sequential:
    """Follow a convolution or linear layer by a norm over its outputs and ReLU."""
    width = conv.out_features if isinstance(conv, nn.Linear) else conv.out_channels
    return nn.Sequential(conv, *([norm(width)] if norm else []), *([nn.ReLU()] if act else []))


def point_conv(in_channels: int, out_channels: int, act: bool = True) -> nn.Sequential:
    """1x1 convolution of points, batch norm, ReLU."""
    return conv_block(nn.Conv1d(in_channels, out_channels, 1, bias=False), nn.BatchNorm1d, act)


class LocalAggregation(nn.Module):
    """Group, shared MLP, maximum over the neighbours.

    Args:
        in_channels: of the features.
        channels: widths of the MLP.
        radius: of the ball; None takes all points as one group, their coordinates being absolute.
        num_samples: K neighbours.
        normalize_dp: divide Δp by the radius.
        last_act: whether the last layer has a ReLU.
    """

    def __init__(
        self, in_channels: int, channels: Sequence[int], radius: float | None, num_samples: int | None,
        normalize_dp: bool, last_act: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.radius, self.num_samples = radius, num_samples
        first = GroupedConv(in_channels, channels[0], radius if normalize_dp and radius else 1.0)
        convs = [first] + [nn.Conv2d(a, b, 1, bias=False) for a, b in itertools.pairwise(channels)]
        acts = [True] * (len(convs) - 1) + [last_act]
        self.convs = nn.ModuleList(conv_block(c, nn.BatchNorm2d, a) for c, a in zip(convs, acts, strict=True))

    def forward(self, xyz: Tensor, features: Tensor, new_xyz: Tensor) -> Tensor:
        neighbors = None if self.radius is None else ball_query(self.radius, self.num_samples, xyz, new_xyz)
        conv, *rest = self.convs[0]
        responses = conv(features, xyz, new_xyz, neighbors)
        for layer in itertools.chain(rest, self.convs[1:]):
            responses = layer(responses)
        return responses.max(-1).values


class SetAbstraction(nn.Module):
    """Sample centroids and describe each by its surroundings at one or several scales (PointNet++; PointNeXt).

    Args:
        in_channels: of the features.
        stride: N // stride centroids are sampled; None makes one group of all points.
        mlps: widths of each scale's MLP; the scales' results are concatenated.
        radii, num_samples: of each scale.
        normalize_dp: divide Δp by the radius.
        residual: add a convolution of the centroids' own features before the last ReLU (PointNeXt-S).
    """

    def __init__(
        self, in_channels: int, stride: int | None, mlps: Sequence[Sequence[int]], radii: Sequence[float | None],
        num_samples: Sequence[int | None], normalize_dp: bool = False, residual: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.stride = stride
        self.scales = nn.ModuleList(
            LocalAggregation(in_channels, mlp, radius, count, normalize_dp, last_act=not residual)
            for mlp, radius, count in zip(mlps, radii, num_samples, strict=True)
        )
        self.out_channels = sum(mlp[-1] for mlp in mlps)
        self.skip = nn.Conv1d(in_channels, self.out_channels, 1) if residual else None
        self.act = nn.ReLU() if residual else None

    def forward(self, xyz: Tensor, features: Tensor, centroids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Give the centroids' coordinates (B, M, 3) and features (B, out_channels, M); M is 1 for a group of all."""
        if centroids is None:
            new_xyz = xyz.new_zeros(xyz.shape[0], 1, 3)
        else:
            new_xyz = gather_points(xyz.mT.contiguous(), centroids).mT
        found = [scale(xyz, features, new_xyz) for scale in self.scales]
        result = found[0] if len(found) == 1 else torch.cat(found, 1)
        if self.skip is not None:
            result = self.act(result + self.skip(gather_points(features, centroids)))
        return new_xyz, result


class InvResMLP(nn.Module):
    """Inverted residual MLP (PointNeXt): local aggregation of one layer, expansion, projection, identity.

    Args:
        channels: C, in and out.
        radius, num_samples: of the neighbourhood; Δp is divided by the radius.
        expansion: C is widened by this factor between the two point convolutions.
    """

    def __init__(self, channels: int, radius: float, num_samples: int, expansion: int = 4):
        super().__init__()
        self.aggregation = LocalAggregation(channels, [channels], radius, num_samples, normalize_dp=True)
        self.expand = point_conv(channels, expansion * channels)
        self.project = point_conv(expansion * channels, channels, act=False)
        self.act = nn.ReLU()

    def forward(self, xyz: Tensor, features: Tensor) -> Tensor:
        return self.act(features + self.project(self.expand(self.aggregation(xyz, features, xyz))))


class FeaturePropagation(nn.Module):
    """Carry features back to more points by inverse distances of the three nearest; skip features, MLP (PointNet++).

    Args:
        in_channels: of skip and coarse features together.
        channels: widths of the MLP.
    """

    def __init__(self, in_channels: int, channels: Sequence[int]):
        super().__init__()
        self.convs = nn.Sequential(*(point_conv(a, b) for a, b in itertools.pairwise([in_channels, *channels])))

    def forward(self, xyz: Tensor, skip: Tensor, coarse_xyz: Tensor, coarse: Tensor) -> Tensor:
        distances, nearest = three_nn(xyz, coarse_xyz)
        weights = 1 / (distances + 1e-8)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.convs(torch.cat([skip, three_interpolate(coarse, nearest, weights)], 1))


# --- Encoders and heads -----------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Stem and stages.

    Args:
        in_channels: of the input features.
        stem_width: of a first point convolution; None for none.
        stages: for each the arguments of `SetAbstraction`, and under "blocks" those of its `InvResMLP`s.

    Attributes:
        channels: width of the stem (or input) and of each stage.
    """

    def __init__(self, in_channels: int, stem_width: int | None, stages: Sequence[dict]):
        super().__init__()
        self.in_channels = in_channels
        self.stem = nn.Conv1d(in_channels, stem_width, 1) if stem_width else None
        self.channels = [stem_width or in_channels]
        self.stages = nn.ModuleList()
        for stage in stages:
            arguments = dict(stage)
            blocks = arguments.pop("blocks", [])
            first = SetAbstraction(self.channels[-1], **arguments)
            self.channels.append(first.out_channels)
            self.stages.append(
                nn.ModuleList([first, *(InvResMLP(first.out_channels, **block) for block in blocks)])
            )  # fmt: skip

    @property
    def least_points(self) -> int:
        """Number of points that leaves every stage at least one centroid."""
        product = 1
        for stage in self.stages:
            product *= stage[0].stride or 1
        return product

    def forward(self, xyz: Tensor, features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Give coordinates (B, M, 3) and features (B, C, M) of each level, the stem's first.

        Raises:
            InputError: shapes that do not fit, or fewer points than the stages sample.
        """
        check_cloud(xyz, features, self.in_channels, self.least_points)
        levels = [(xyz, features if self.stem is None else self.stem(features))]
        sampled = False
        for first, *blocks in self.stages:
            xyz, features = levels[-1]
            centroids = None
            if first.stride is not None:
                num_centroids = xyz.shape[1] // first.stride
                # furthest points of a set in furthest-point order are its first ones: one search serves all stages
                if sampled:
                    centroids = torch.arange(num_centroids, dtype=torch.int32, device=xyz.device)
                    centroids = centroids.expand(xyz.shape[0], -1).contiguous()
                else:
                    centroids = furthest_point_sample(xyz, num_centroids)
                sampled = True
            xyz, features = first(xyz, features, centroids)
            for block in blocks:
                features = block(xyz, features)
            levels.append((xyz, features))
        return levels


class Classifier(nn.Module):
    """Encoder whose last stage is one group of all, and linear layers: logits (B, num_classes).

    Args:
        num_classes: number of logits.
        encoder: arguments of `Encoder`.
        head: hidden widths.
        dropout: after each of these.
    """

    def __init__(self, num_classes: int, encoder: dict, head: Sequence[int] = (512, 256), dropout: float = 0.5):
        super().__init__()
        self.num_classes = num_classes
        self.encoder = Encoder(**encoder)
        widths = [self.encoder.channels[-1], *head]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [conv_block(nn.Linear(a, b, bias=False), nn.BatchNorm1d), nn.Dropout(dropout)]
        self.head = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))

    def forward(self, xyz: Tensor, features: Tensor) -> Tensor:
        return self.head(self.encoder(xyz, features)[-1][1][:, :, 0])


class Segmenter(nn.Module):
    """Encoder, feature propagation back to all points, point convolutions: logits (B, num_classes, N).

    Args:
        num_classes: number of logits.
        encoder: arguments of `Encoder`.
        decoder_layers: layers of each propagation, which leads to the width of the level it reaches.
        dropout: before the last layer.
        num_shapes: for parts of shapes: the shape's class, the coarsest two levels' maxima and global features are
            added (PointNeXt's form of CurveNet's head); 0 for none.
    """

    def __init__(
        self, num_classes: int, encoder: dict, decoder_layers: int = 2, dropout: float = 0.5, num_shapes: int = 0
    ):
        super().__init__()
        self.num_classes, self.num_shapes = num_classes, num_shapes
        self.encoder = Encoder(**encoder)
        channels = self.encoder.channels
        extra = 0
        if num_shapes:
            self.globals = nn.ModuleList(
                conv_block(nn.Conv1d(channels[level], width, 1), None) for level, width in ((-2, 64), (-1, 128))
            )
            extra = 64 + 128 + num_shapes
        self.decoder = nn.ModuleList()
        for level in range(len(channels) - 1):
            skip = channels[level] + (extra if level == 0 else 0)
            self.decoder.append(FeaturePropagation(skip + channels[level + 1], [channels[level]] * decoder_layers))
        width = channels[0] * (3 if num_shapes else 1)
        self.head = nn.Sequential(point_conv(width, width), nn.Dropout(dropout), nn.Conv1d(width, num_classes, 1))

    def forward(self, xyz: Tensor, features: Tensor, shape: Tensor | None = None) -> Tensor:
        # features come back from three points of the last level
        check_cloud(xyz, features, self.encoder.in_channels, 3 * self.encoder.least_points)
        levels = self.encoder(xyz, features)
        skips = [level for _, level in levels]
        if self.num_shapes:
            if shape is None or shape.shape != xyz.shape[:1] or shape.dtype != torch.int64:
                raise InputError("a network for parts needs the class of each shape, (B,) int64")
            # on a GPU the check would wait for it
            checked = shape.device.type == "cpu" and not torch.compiler.is_compiling()
            if checked and ((shape < 0) | (shape >= self.num_shapes)).any():
                raise InputError(f"classes of shapes are from 0 to {self.num_shapes - 1}, not {shape.tolist()}")
            maxima = [layer(skips[k]).amax(-1) for layer, k in zip(self.globals, (-2, -1), strict=True)]
            known = torch.cat([*maxima, F.one_hot(shape, self.num_shapes).to(features.dtype)], 1)
            skips[0] = torch.cat([known[..., None].expand(-1, -1, xyz.shape[1]), skips[0]], 1)
        coarse = skips[-1]
        for k in range(len(levels) - 2, -1, -1):
            coarse = self.decoder[k](levels[k][0], skips[k], levels[k + 1][0], coarse)
        if self.num_shapes:
            whole = [coarse.amax(-1, keepdim=True), coarse.mean(-1, keepdim=True)]
            coarse = torch.cat([coarse, *(part.expand_as(coarse) for part in whole)], 1)
        return self.head(coarse)


def check_cloud(xyz: Tensor, features: Tensor, in_channels: int, least_points: int) -> None:
    """Check what a network is given.

    Raises:
        InputError: says what does not fit.
    """
    if xyz.ndim != 3 or xyz.shape[2] != 3:
        raise InputError(f"xyz is (B, N, 3), not {tuple(xyz.shape)}")
    if features.ndim != 3 or features.shape[::2] != xyz.shape[:2]:
        raise InputError(f"features are (B, C, N) of the same clouds as xyz, not {tuple(features.shape)}")
    if features.shape[1] != in_channels:
        raise InputError(f"the network takes {in_channels} feature channels, not {features.shape[1]}")
    if xyz.shape[1] < least_points:
        raise InputError(f"a cloud of {xyz.shape[1]} points is too small: the network takes at least {least_points}")


# --- Networks ---------------------------------------------------------------------------------------------------------

POINTNET2 = {
    # OpenPoints' form, which CP3 prunes
    "openpoints": [
        {"stride": 2, "radii": [0.2], "num_samples": [32], "mlps": [[64, 64, 128]]},
        {"stride": 4, "radii": [0.4], "num_samples": [64], "mlps": [[128, 128, 256]]},
    ],
    # single and multi-scale grouping of Qi et al. (2017)
    "ssg": [
        {"stride": 2, "radii": [0.2], "num_samples": [64], "mlps": [[64, 64, 128]]},
        {"stride": 4, "radii": [0.4], "num_samples": [64], "mlps": [[128, 128, 256]]},
    ],
    "msg": [
        {"stride": 2, "radii": [0.1, 0.2, 0.4], "num_samples": [16, 32, 128],
         "mlps": [[32, 32, 64], [64, 64, 128], [64, 96, 128]]},
        {"stride": 4, "radii": [0.2, 0.4, 0.8], "num_samples": [32, 64, 128],
         "mlps": [[64, 64, 128], [128, 128, 256], [128, 128, 256]]},
    ],
}  # fmt: skip


class PointNet2(Classifier):
    """PointNet++ for classes.

    Args:
        num_classes: number of logits.
        in_channels: of the input features, coordinates included.
        kind: openpoints, ssg or msg, see `POINTNET2`.
        width: factor on every width of the encoder, for small networks.
        num_samples: K of every scale; None as the kind says.
        head, dropout: as in `Classifier`.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 4, kind: str = "openpoints", width: float = 1.0,
        num_samples: int | None = None, head: Sequence[int] = (512, 256), dropout: float = 0.5,
    ):  # fmt: skip
        if kind not in POINTNET2:
            raise InputError(f"kind is one of {', '.join(POINTNET2)}, not {kind!r}")
        stages = [
            *POINTNET2[kind],
            {"stride": None, "radii": [None], "num_samples": [None], "mlps": [[256, 512, 1024]]},
        ]
        stages = [
            stage | {"mlps": [[max(1, int(c * width)) for c in mlp] for mlp in stage["mlps"]]}
            | ({"num_samples": [num_samples] * len(stage["mlps"])} if num_samples else {})
            for stage in stages
        ]  # fmt: skip
        super().__init__(num_classes, {"in_channels": in_channels, "stem_width": None, "stages": stages}, head, dropout)


def pointnext_encoder(
    in_channels: int, width: int, blocks: Sequence[int], strides: Sequence[int], sa_layers: int, sa_residual: bool,
    radius: float, radius_scaling: float, num_samples: int, expansion: int,
) -> dict:  # fmt: skip
    """Give the arguments of PointNeXt's `Encoder`: the width doubles and the radius grows at each strided stage."""
    if len(blocks) != len(strides) or not strides or strides[0] != 1:
        raise InputError(f"blocks and strides have one entry a stage, the first stride 1: {blocks}, {strides}")
    if blocks[0] != 1 or min(blocks) < 1 or any(b > 1 and s == 1 for b, s in zip(blocks, strides, strict=True)):
        raise InputError(
            f"blocks are 1 for the stem and where the stride is 1, at least 1 elsewhere: {blocks}, {strides}"
        )
    stages, channels = [], width
    for count, stride in zip(blocks[1:], strides[1:], strict=True):
        if stride == 1:  # a group of all points
            stages.append(
                {"stride": None, "radii": [None], "num_samples": [None], "mlps": [[channels] * sa_layers]}
            )  # fmt: skip
            continue
        channels *= 2
        stages.append({
            "stride": stride, "radii": [radius], "num_samples": [num_samples], "normalize_dp": True,
            "residual": sa_residual, "mlps": [[channels // 2] * (sa_layers - 1) + [channels]],
            "blocks": [{"radius": radius * radius_scaling, "num_samples": num_samples, "expansion": expansion}]
                      * (count - 1),
        })  # fmt: skip
        radius *= radius_scaling
    return {"in_channels": in_channels, "stem_width": width, "stages": stages}


class PointNeXt(Classifier):
    """PointNeXt for classes; the defaults are PointNeXt-S, blocks=[1, 2, 3, 2, 2, 1] and the like make -B and -L.

    Args:
        num_classes: number of logits.
        in_channels: of the input features, coordinates included.
        width: C of the stem; 32, or 64 for ModelNet40.
        blocks: for the stem and each stage: a set abstraction and blocks - 1 `InvResMLP`s.
        strides: of the stem (1) and each stage; a stage of stride 1 groups all points.
        sa_layers: layers of a set abstraction.
        sa_residual: whether set abstractions are residual (-S).
        radius: of the first stage.
        radius_scaling: growth of the radius from stage to stage.
        num_samples: K.
        expansion: of `InvResMLP`.
        head, dropout: as in `Classifier`.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 4, width: int = 32, blocks: Sequence[int] = (1, 1, 1, 1, 1, 1),
        strides: Sequence[int] = (1, 2, 2, 2, 2, 1), sa_layers: int = 2, sa_residual: bool = True, radius: float = 0.15,
        radius_scaling: float = 1.5, num_samples: int = 32, expansion: int = 4, head: Sequence[int] = (512, 256),
        dropout: float = 0.5,
    ):  # fmt: skip
        encoder = pointnext_encoder(
            in_channels, width, blocks, strides, sa_layers, sa_residual, radius, radius_scaling, num_samples, expansion
        )
        if encoder["stages"][-1]["stride"] is not None:
            raise InputError(f"a classifier's last stage groups all points: the last stride is 1, not {strides[-1]}")
        super().__init__(num_classes, encoder, head, dropout)


class PointNeXtSeg(Segmenter):
    """PointNeXt for scenes (S3DIS) or parts of shapes (ShapeNetPart).

    Args:
        num_classes: number of logits.
        in_channels: of the input features.
        num_shapes: classes of shapes whose parts are told apart; 0 for scenes.
        width, blocks, strides, sa_layers, sa_residual, radius, radius_scaling, num_samples, expansion: as in
            `PointNeXt`.
        decoder_layers, dropout: as in `Segmenter`.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 4, num_shapes: int = 0, width: int = 32,
        blocks: Sequence[int] = (1, 1, 1, 1, 1), strides: Sequence[int] = (1, 4, 4, 4, 4), sa_layers: int = 2,
        sa_residual: bool = True, radius: float = 0.1, radius_scaling: float = 2.0, num_samples: int = 32,
        expansion: int = 4, decoder_layers: int = 2, dropout: float = 0.5,
    ):  # fmt: skip
        encoder = pointnext_encoder(
            in_channels, width, blocks, strides, sa_layers, sa_residual, radius, radius_scaling, num_samples, expansion
        )
        if any(stage["stride"] is None for stage in encoder["stages"]):
            raise InputError(f"a segmenter's stages all sample: strides after the first are above 1, not {strides}")
        super().__init__(num_classes, encoder, decoder_layers, dropout, num_shapes)


NETWORKS = {"pointnet2": PointNet2, "pointnext": PointNeXt, "pointnext_seg": PointNeXtSeg}


def build_network(arguments: dict) -> nn.Module:
    """Build a network from {"name": one of `NETWORKS`, and arguments of its constructor}.

    Raises:
        InputError: an unknown name or argument, or a value that the constructor refuses.
    """
    return build_by_name(arguments, NETWORKS)
