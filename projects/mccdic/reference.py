"""The network's equations one by one, nothing folded or fused: what model.py is tested and timed against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dictionary import Codes, Dictionary
from .model import MCCDic, Restoration


def synthesis(dictionary: Dictionary, codes: Codes) -> Tensor:
    """Apply a dictionary layer by layer."""
    image = F.conv2d(codes[0], dictionary.bottleneck, padding=1)
    for code, up, mix in zip(codes[1:], dictionary.up, dictionary.mix, strict=True):
        image = F.conv_transpose2d(image, up, stride=2)
        image = F.pad(image, (0, code.shape[-1] - image.shape[-1], 0, code.shape[-2] - image.shape[-2]))
        image = F.conv2d(torch.cat([code, image], 1), mix, padding=1)
    return F.conv2d(image, dictionary.out)


def adjoint(dictionary: Dictionary, image: Tensor) -> Codes:
    """Apply the adjoint layer by layer, by transposed convolutions."""
    image = F.conv_transpose2d(image, dictionary.out)
    codes = []
    for up, mix in zip(reversed(dictionary.up), reversed(dictionary.mix), strict=True):
        code, image = F.conv_transpose2d(image, mix, padding=1).chunk(2, 1)
        codes.append(code)
        image = F.conv2d(image, up, stride=2)
    return [F.conv_transpose2d(image, dictionary.bottleneck, padding=1), *reversed(codes)]


def forward(net: MCCDic, target: Tensor, references: Tensor) -> Restoration:
    """Run `net` without data consistency: the same numbers as `net(target, references)`, up to rounding."""
    images = [target, *references.split(1, 1)]
    features = [lift(image) for lift, image in zip(net.lift, images, strict=True)]
    analysed = [adjoint(coder.preconditioned, feature) for coder, feature in zip(net.unique, features, strict=True)]
    codes = [coder.first(part) for coder, part in zip(net.unique, analysed, strict=True)]
    common = None
    if net.common is not None:
        common = net.common.first(adjoint(net.common.preconditioned, net.lift_common(torch.cat(images, 1))))
    history: list[list[Tensor]] = [[] for _ in images]
    for stage in range(1, net.stages):
        for branch, coder in enumerate(net.unique):
            image = synthesis(coder.synthesis, codes[branch])
            if common is not None:
                image = image + synthesis(net.explained[branch], common)
            applied = adjoint(coder.preconditioned, image)
            codes[branch] = coder.update(
                codes[branch], [a - b for a, b in zip(applied, analysed[branch], strict=True)], stage
            )
            history[branch].append(synthesis(net.reconstruction[branch], codes[branch]))
        if common is not None:
            left = [feature - kept[-1] for feature, kept in zip(features, history, strict=True)]
            difference = synthesis(net.common.synthesis, common) - net.compress(torch.cat(left, 1))
            common = net.common.update(common, adjoint(net.common.preconditioned, difference), stage)
    unique = [net.render[i](net.fuse[i](torch.cat(kept, 1))) for i, kept in enumerate(history)]
    unique = torch.cat(unique, 1)
    shared = torch.zeros_like(unique) if common is None else synthesis(net.render_common, common)
    restored = torch.cat(images, 1) + shared + unique
    return Restoration(restored[:, :1], restored[:, 1:], shared, unique)
