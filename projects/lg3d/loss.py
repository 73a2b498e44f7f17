"""Losses of VoteNet's head (Qi et al., ICCV 2019, section 4.3) and of the imitation of guided features (LG3D).

Shapes: B scenes, S seeds, P proposals, K boxes of a scene, padded; is_box (B, K) tells boxes from padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import BoxCoder, points_in_boxes

NEAR, FAR = 0.3, 0.6  # m: proposals nearer to a box's centre are objects, farther ones are not
OBJECT_WEIGHTS = (0.2, 0.8)  # of proposals that are no object, and that are one
MAX_VOTES = 3  # targets of a seed
EPS = 1e-6


# --- Targets ----------------------------------------------------------------------------------------------------------


def vote_targets(xyz: Tensor, boxes: Tensor, is_box: Tensor) -> tuple[Tensor, Tensor]:
    """Say where seeds should vote: the centres of up to three boxes that hold them (SUN RGB-D's rule).

    The first box fills all three places, the fourth and later ones take the third's.

    Args:
        xyz: seeds (B, S, 3).
        boxes: (B, K, 7).
        is_box: (B, K) bool.

    Returns:
        centres (B, S, 3, 3), any numbers where there is none; whether a box holds the seed (B, S) bool.
    """
    inside = points_in_boxes(xyz, boxes) & is_box[:, None]
    order = inside.long().cumsum(-1)
    total = order[..., -1]
    slots = []
    for slot in range(MAX_VOTES):
        wanted = torch.where(total > slot, total if slot == MAX_VOTES - 1 else total.new_tensor(slot + 1), 1)
        # the box at which the count reaches what is wanted
        slots.append((inside & (order == wanted[..., None])).long().argmax(-1))
    place = torch.stack(slots, -1)
    centers = boxes[..., :3].gather(1, place.flatten(1)[..., None].expand(-1, -1, 3)).unflatten(1, place.shape[1:])
    return centers, total > 0


def instance_targets(xyz: Tensor, instance: Tensor, index: Tensor, num_boxes: int) -> tuple[Tensor, Tensor]:
    """Say where seeds should vote: the middle of the extent of their instance's points (ScanNet's rule).

    Args:
        xyz: all points of the scenes (B, N, 3).
        instance: (B, N) int64, the box of each point, -1 for none.
        index: (B, S) places of the seeds in the points.
        num_boxes: K.

    Returns:
        as `vote_targets`, all three places alike.
    """
    place = torch.where(instance < 0, num_boxes, instance)[..., None].expand(-1, -1, 3)
    low = xyz.new_full((xyz.shape[0], num_boxes + 1, 3), torch.inf).scatter_reduce(1, place, xyz, "amin")
    high = xyz.new_full((xyz.shape[0], num_boxes + 1, 3), -torch.inf).scatter_reduce(1, place, xyz, "amax")
    of_seeds = place.gather(1, index[..., None].expand(-1, -1, 3))
    middle = ((low + high) / 2).gather(1, of_seeds)
    has_box = of_seeds[..., 0] < num_boxes
    middle = torch.where(has_box[..., None], middle, 0)
    return middle[:, :, None].expand(-1, -1, MAX_VOTES, -1), has_box


# --- Terms ------------------------------------------------------------------------------------------------------------


def vote_loss(outputs: dict[str, Tensor], centers: Tensor, has_box: Tensor) -> Tensor:
    """L1 distance of a vote to the nearest of its targets, mean over seeds on objects."""
    distance = (outputs["vote_xyz"][:, :, None] - centers).abs().sum(-1).amin(-1)
    return masked_mean(distance, has_box)


def assign(proposals: Tensor, boxes: Tensor, is_box: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give proposals (B, P, 3) the box with the nearest centre.

    Returns:
        its number (B, P) int64; whether the proposal is an object, and whether it counts as one or as none, both
        (B, P) bool. Where there is no box all proposals are none.
    """
    # not cdist: its way over a matrix product loses the digits that tell 0.3 m
    distance = (proposals[:, :, None] - boxes[:, None, :, :3]).square().sum(-1).sqrt()
    distance = distance.masked_fill(~is_box[:, None], torch.inf)
    nearest, place = distance.min(-1)
    return place, nearest < NEAR, (nearest < NEAR) | (nearest > FAR)


def objectness_loss(outputs: dict[str, Tensor], is_object: Tensor, counts: Tensor) -> Tensor:
    """Weighted cross entropy over the proposals that count, divided by their number."""
    weights = outputs["objectness"].new_tensor(OBJECT_WEIGHTS)
    entropy = F.cross_entropy(outputs["objectness"].mT, is_object.long(), weights, reduction="none")
    return masked_mean(entropy, counts)


def center_loss(outputs: dict[str, Tensor], boxes: Tensor, is_box: Tensor, is_object: Tensor) -> Tensor:
    """Squared Chamfer distance of proposed and true centres: from proposals that are objects, and from all boxes."""
    distance = (outputs["center"][:, :, None] - boxes[:, None, :, :3]).square().sum(-1)
    to_boxes = distance.masked_fill(~is_box[:, None], torch.inf).amin(-1)
    # a scene without boxes has no objects either
    to_boxes = torch.where(is_object, to_boxes, 0)
    return masked_mean(to_boxes, is_object) + masked_mean(distance.amin(1), is_box)


def detection_loss(
    outputs: dict[str, Tensor], votes: tuple[Tensor, Tensor], boxes: Tensor, labels: Tensor, coder: BoxCoder
) -> dict[str, Tensor]:
    """Give all terms of VoteNet's loss, and their weighted sum.

    Args:
        outputs: of the head.
        votes: of `vote_targets` or `instance_targets`.
        boxes: (B, K, 7), K at least 1.
        labels: (B, K) int64, -1 for padding.
        coder: of the head.

    Returns:
        vote, objectness, center, heading_class, heading_residual, size_class, size_residual, semantic and their sum
        under "total": 10 (vote + 0.5 objectness + box + 0.1 semantic), box = center + 0.1 heading_class +
        heading_residual + 0.1 size_class + size_residual. Finite without any box.
    """
    is_box = labels >= 0
    place, is_object, counts = assign(outputs["proposal_xyz"].detach(), boxes, is_box)
    true_boxes = boxes.gather(1, place[..., None].expand(-1, -1, 7))
    true_labels = labels.gather(1, place).clamp(min=0)
    bins, turns, sizes = coder.encode(true_boxes, true_labels)
    said_turn = outputs["heading_residuals"].gather(2, bins[..., None])[..., 0]
    said_size = outputs["size_residuals"].gather(2, true_labels[..., None, None].expand(-1, -1, -1, 3))[:, :, 0]

    def entropy(logits: Tensor, target: Tensor) -> Tensor:
        return masked_mean(F.cross_entropy(logits.mT, target, reduction="none"), is_object)

    terms = {
        "vote": vote_loss(outputs, *votes),
        "objectness": objectness_loss(outputs, is_object, counts),
        "center": center_loss(outputs, boxes, is_box, is_object),
        "heading_class": entropy(outputs["heading_logits"], bins),
        "heading_residual": masked_mean(F.huber_loss(said_turn, turns, reduction="none"), is_object),
        "size_class": entropy(outputs["size_logits"], true_labels),
        "size_residual": masked_mean(F.huber_loss(said_size, sizes, reduction="none").mean(-1), is_object),
        "semantic": entropy(outputs["semantic"], true_labels),
    }
    box = terms["center"] + 0.1 * terms["heading_class"] + terms["heading_residual"]
    box = box + 0.1 * terms["size_class"] + terms["size_residual"]
    terms["total"] = 10 * (terms["vote"] + 0.5 * terms["objectness"] + box + 0.1 * terms["semantic"])
    return terms


def imitation_loss(student: Tensor, guided: Tensor) -> Tensor:
    """L_aux of LG3D: mean squared difference of seed features (B, C, S); teaches the student alone."""
    return F.mse_loss(student, guided.detach())


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the mask, divided by its count; 0 where it is empty."""
    return torch.where(mask, values, 0).sum() / (mask.sum().to(values) + EPS)
