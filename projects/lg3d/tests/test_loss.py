"""VoteNet's losses beside loops over scenes, seeds, proposals and boxes, and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from projects.lg3d.boxes import BoxCoder, heading_to_class, points_in_boxes
from projects.lg3d.loss import (
    assign,
    center_loss,
    detection_loss,
    imitation_loss,
    instance_targets,
    masked_mean,
    objectness_loss,
    vote_loss,
    vote_targets,
)

MEAN_SIZES = torch.tensor([[2.0, 1.5, 0.9], [0.8, 1.3, 0.7], [0.5, 0.5, 0.5]])
TERMS = {"vote", "objectness", "center", "heading_class", "heading_residual", "size_class", "size_residual", "semantic"}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


def some_boxes(batch=3, count=5, seed=1, spread=2.0):
    numbers = rand(batch, count, 7, seed=seed)
    sizes = 0.3 + numbers[..., 3:6]
    return torch.cat([spread * (2 * numbers[..., :3] - 1), sizes, 6.2 * numbers[..., 6:] - 3.1], -1)


def outputs_like(centers, num_headings=12, num_classes=3, seeds=20, seed=5):
    """Give what a head may say of proposals (B, P, 3)."""
    batch, proposals, _ = centers.shape
    shapes = {
        "seed_xyz": (seeds, 3), "vote_xyz": (seeds, 3), "objectness": (proposals, 2), "center": (proposals, 3),
        "heading_logits": (proposals, num_headings), "heading_residuals": (proposals, num_headings),
        "size_logits": (proposals, num_classes), "size_residuals": (proposals, num_classes, 3),
        "semantic": (proposals, num_classes),
    }  # fmt: skip
    found = {
        name: 2 * torch.randn(batch, *shape, generator=generator(seed + i), dtype=torch.float64)
        for i, (name, shape) in enumerate(shapes.items())
    }
    return found | {"proposal_xyz": centers}


def scenes(num_headings=12, seed=1):
    """Make outputs, boxes, labels of three scenes, with 5, 2 and no boxes; proposals near, between and far."""
    boxes = some_boxes(seed=seed)
    if num_headings == 1:
        boxes[..., 6] = 0
    labels = torch.tensor([[0, 1, 2, 1, 0], [2, 0, -1, -1, -1], [-1, -1, -1, -1, -1]])
    boxes[labels < 0] = 0  # as batches are padded
    near = boxes[:, [0, 1, 0, 1, 3], :3] + 0.3 * (rand(3, 5, 3, seed=seed + 7) - 0.5)
    between = boxes[:, [0, 1, 2], :3] + torch.tensor([0.0, 0.45, 0])
    centers = torch.cat([near, between, 5 + rand(3, 4, 3, seed=seed + 8)], 1)
    return outputs_like(centers, num_headings), boxes, labels


# --- targets ---


def votenets_rule(xyz, boxes):
    """The rule of VoteNet's preparation, a seed and a box at a time: three centres or None."""
    votes = []
    for point in xyz.tolist():
        slots, slot = None, 0
        for x, y, z, dx, dy, dz, yaw in boxes.tolist():
            px, py, pz = point[0] - x, point[1] - y, point[2] - z
            along, across = px * math.cos(yaw) + py * math.sin(yaw), py * math.cos(yaw) - px * math.sin(yaw)
            if abs(along) <= dx / 2 and abs(across) <= dy / 2 and abs(pz) <= dz / 2:
                if slots is None:
                    slots = [[x, y, z]] * 3
                slots[slot] = [x, y, z]
                slot = min(slot + 1, 2)
        votes.append(slots)
    return votes


def test_vote_targets_follow_votenets_rule():
    boxes = some_boxes(2, 7, spread=0.3)
    boxes[..., 3:6] += 0.5
    is_box = torch.tensor([[True] * 7, [True, False, True, True, False, True, False]])
    xyz = 2 * rand(2, 300, 3) - 1
    centers, has_box = vote_targets(xyz, boxes, is_box)
    assert centers.shape == (2, 300, 3, 3)
    for b in range(2):
        for i, slots in enumerate(votenets_rule(xyz[b], boxes[b][is_box[b]])):
            assert has_box[b, i] == (slots is not None)
            if slots is not None:
                assert centers[b, i].tolist() == slots
    counts = points_in_boxes(xyz[0], boxes[0]).sum(1)
    assert set(counts.tolist()) >= {0, 1, 2, 3, 4}


def test_vote_targets_by_hand_in_no_one_two_three_and_four_boxes():
    # cubes of 2 m, each 0.4 m further along x than the one before
    boxes = torch.tensor([[[0.4 * i, 0, 0, 2, 2, 2, 0] for i in range(4)]])
    xyz = torch.tensor([[[-5.0, 0, 0], [-0.9, 0, 0], [-0.5, 0, 0], [-0.1, 0, 0], [0.5, 0, 0]]])
    centers, has_box = vote_targets(xyz, boxes, torch.ones(1, 4, dtype=torch.bool))
    assert has_box.tolist() == [[False, True, True, True, True]]
    expected = [[0, 0, 0], [0, 0.4, 0], [0, 0.4, 0.8], [0, 0.4, 1.2]]
    torch.testing.assert_close(centers[0, 1:, :, 0], torch.tensor(expected))


def test_padding_holds_no_seed_not_even_one_at_the_origin():
    boxes = torch.zeros(2, 2, 7)
    boxes[0, 0] = torch.tensor([1.0, 0, 0, 4, 4, 4, 0])
    centers, has_box = vote_targets(torch.zeros(2, 1, 3), boxes, torch.tensor([[True, False], [False, False]]))
    assert has_box.tolist() == [[True], [False]]
    assert centers[0, 0].tolist() == [[1, 0, 0]] * 3
    assert centers.isfinite().all()


def test_instance_targets_are_the_middle_of_the_extent_not_the_mean():
    xyz = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [4, 2, -6], [7, 7, 7], [9, 9, 9]]])
    instance = torch.tensor([[1, 1, 1, -1, 0]])
    centers, has_box = instance_targets(xyz, instance, torch.tensor([[2, 3, 4, 0]]), 2)
    assert has_box.tolist() == [[True, False, True, True]]
    assert centers[0, :, 0].tolist() == [[2, 1, -3], [0, 0, 0], [9, 9, 9], [2, 1, -3]]
    assert (centers == centers[:, :, :1]).all()
    assert centers.shape == (1, 4, 3, 3)


def test_instance_targets_agree_with_a_loop_over_objects():
    xyz = rand(2, 200, 3)
    instance = torch.randint(-1, 6, (2, 200), generator=generator(1))
    index = torch.randint(0, 200, (2, 50), generator=generator(2))
    centers, has_box = instance_targets(xyz, instance, index, 9)
    for b in range(2):
        for i, place in enumerate(index[b]):
            number = instance[b, place]
            assert has_box[b, i] == (number >= 0)
            if number >= 0:
                of_object = xyz[b][instance[b] == number]
                middle = (of_object.min(0).values + of_object.max(0).values) / 2
                torch.testing.assert_close(centers[b, i], middle.expand(3, -1))


def test_scenes_without_instances_have_finite_targets():
    centers, has_box = instance_targets(rand(1, 5, 3), torch.full((1, 5), -1), torch.arange(5)[None], 1)
    assert not has_box.any()
    assert centers.isfinite().all()


# --- terms by hand ---


def test_vote_loss_is_the_distance_to_the_nearest_target():
    centers = torch.tensor([[[[0.0, 0, 0], [1, 1, 1], [5, 5, 5]], [[0, 0, 0]] * 3, [[0, 0, 0]] * 3]])
    votes = torch.tensor([[[1.0, 0.5, 1.2], [0.1, -0.2, 0.3], [9, 9, 9]]])
    found = vote_loss({"vote_xyz": votes}, centers, torch.tensor([[True, True, False]]))
    assert found.item() == pytest.approx((0.7 + 0.6) / 2, rel=1e-5)


def test_proposals_near_a_centre_are_objects_and_far_ones_are_none():
    boxes = torch.zeros(1, 3, 7)
    boxes[0, 0, :3], boxes[0, 1, :3] = torch.tensor([1.0, 0, 0]), torch.tensor([3.0, 0, 0])
    is_box = torch.tensor([[True, True, False]])
    offsets = [1.29, 1.31, 1.59, 1.61, 2.8, 3.0, -5.0, 0.0]
    proposals = torch.tensor([[[x, 0, 0] for x in offsets]])
    place, is_object, counts = assign(proposals, boxes, is_box)
    assert place.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0]]
    assert is_object.tolist() == [[True, False, False, False, True, True, False, False]]
    # the last is at the origin, where padding is
    assert counts.tolist() == [[True, False, False, True, True, True, True, True]]


def test_where_there_is_no_box_all_proposals_are_none():
    _, is_object, counts = assign(torch.zeros(2, 4, 3), torch.zeros(2, 1, 7), torch.zeros(2, 1, dtype=torch.bool))
    assert not is_object.any()
    assert counts.all()


def test_distances_far_from_the_origin_keep_their_digits():
    proposals = torch.tensor([[[100.0, 100, 100]]])
    for distance, expected in ((0.295, True), (0.305, False)):
        boxes = torch.tensor([[[100 + distance, 100, 100, 1, 1, 1, 0]]])
        assert assign(proposals, boxes, torch.ones(1, 1, dtype=torch.bool))[1].item() == expected


def test_objectness_weighs_objects_four_times_others():
    logits = torch.tensor([[[0.0, 0], [0, 0], [0, 0], [3, 9]]])
    is_object = torch.tensor([[True, False, False, True]])
    counts = torch.tensor([[True, True, True, False]])
    found = objectness_loss({"objectness": logits}, is_object, counts)
    assert found.item() == pytest.approx(math.log(2) * (0.8 + 0.2 + 0.2) / 3, rel=1e-5)


def test_center_loss_by_hand():
    boxes = torch.zeros(1, 3, 7)
    boxes[0, 0, :3], boxes[0, 1, :3] = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 4, 0])
    center = torch.tensor([[[1.0, 1, 0], [0, 0, 0]]])
    found = center_loss(
        {"center": center}, boxes, torch.tensor([[True, True, False]]), torch.tensor([[True, False]])
    )  # fmt: skip
    # from the one object 1; from the boxes 1 and 9 + 1, not from the padding, where the second proposal is
    assert found.item() == pytest.approx(1 + (1 + 10) / 2, rel=1e-5)


def test_means_over_nothing_are_0():
    values = torch.tensor([1.0, torch.nan, torch.inf])
    assert masked_mean(values, torch.tensor([False, False, False])).item() == 0
    assert masked_mean(values, torch.tensor([True, False, False])).item() == pytest.approx(1)


# --- all of it ---


def huber(x):
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def naive_loss(outputs, votes, boxes, labels, num_headings):
    """VoteNet's loss over loops, from its paper and published code."""
    sums, eps = dict.fromkeys(TERMS, 0.0), 1e-6
    positive = counted = seeds = num_boxes = 0
    to_boxes = from_boxes = 0.0
    for b in range(len(labels)):
        true = [(box.tolist(), int(label)) for box, label in zip(boxes[b], labels[b], strict=True) if label >= 0]
        num_boxes += len(true)
        for i, vote in enumerate(outputs["vote_xyz"][b].tolist()):
            if votes[1][b, i]:
                seeds += 1
                targets = votes[0][b, i].tolist()
                sums["vote"] += min(sum(abs(p - q) for p, q in zip(vote, t, strict=True)) for t in targets)
        said = outputs["center"][b].tolist()
        for box, _ in true:
            from_boxes += min(math.dist(box[:3], s) ** 2 for s in said)
        for i, place in enumerate(outputs["proposal_xyz"][b].tolist()):
            distances = [math.dist(place, box[:3]) for box, _ in true]
            nearest = min(distances, default=math.inf)
            logits = outputs["objectness"][b, i]
            if nearest < 0.3 or nearest > 0.6:
                counted += 1
                kind = int(nearest < 0.3)
                sums["objectness"] -= (0.2, 0.8)[kind] * float(logits.log_softmax(0)[kind])
            if nearest >= 0.3:
                continue
            positive += 1
            box, label = true[distances.index(nearest)]
            to_boxes += min(math.dist(said[i], other[:3]) ** 2 for other, _ in true)
            width = 2 * math.pi / num_headings
            heading = int(((box[6] + width / 2) % (2 * math.pi)) / width)
            turn = ((box[6] - heading * width + math.pi) % (2 * math.pi) - math.pi) / (width / 2)
            sums["heading_class"] -= float(outputs["heading_logits"][b, i].log_softmax(0)[heading])
            sums["heading_residual"] += huber(float(outputs["heading_residuals"][b, i, heading]) - turn)
            sums["size_class"] -= float(outputs["size_logits"][b, i].log_softmax(0)[label])
            sums["semantic"] -= float(outputs["semantic"][b, i].log_softmax(0)[label])
            mean = MEAN_SIZES[label].tolist()
            sizes = outputs["size_residuals"][b, i, label].tolist()
            sums["size_residual"] += sum(huber(s - (box[3 + k] - mean[k]) / mean[k]) for k, s in enumerate(sizes)) / 3
    sums["vote"] /= seeds + eps
    sums["objectness"] /= counted + eps
    sums["center"] = to_boxes / (positive + eps) + from_boxes / (num_boxes + eps)
    for name in ("heading_class", "heading_residual", "size_class", "size_residual", "semantic"):
        sums[name] /= positive + eps
    box = sums["center"] + 0.1 * sums["heading_class"] + sums["heading_residual"]
    box += 0.1 * sums["size_class"] + sums["size_residual"]
    total = 10 * (sums["vote"] + 0.5 * sums["objectness"] + box + 0.1 * sums["semantic"])
    return sums | {"total": total}, positive


@pytest.mark.parametrize("num_headings", [1, 12])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_detection_loss_is_that_of_the_loops(num_headings, seed):
    outputs, boxes, labels = scenes(num_headings, seed)
    outputs["seed_xyz"] = boxes[:, :1, :3] + rand(3, 20, 3, seed=9) - 0.5
    votes = vote_targets(outputs["seed_xyz"], boxes, labels >= 0)
    found = detection_loss(outputs, votes, boxes, labels, BoxCoder(MEAN_SIZES, num_headings))
    expected, positive = naive_loss(outputs, votes, boxes, labels, num_headings)
    assert found.keys() == TERMS | {"total"}
    assert positive > 4
    for name, value in found.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
        assert value.item() > 0 or (name == "heading_class" and num_headings == 1)


def test_gradients_of_the_loss_are_those_of_differences():
    outputs, boxes, labels = scenes()
    votes = vote_targets(outputs["seed_xyz"], boxes, labels >= 0)
    names = [name for name in outputs if name not in ("seed_xyz", "proposal_xyz")]

    def total(*values):
        given = outputs | dict(zip(names, values, strict=True))
        return detection_loss(given, votes, boxes, labels, BoxCoder(MEAN_SIZES, 12))["total"]

    leaves = [outputs[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(total, leaves, fast_mode=True)


def test_where_clusters_are_is_not_learnt_from_what_they_are_assigned():
    outputs, boxes, labels = scenes()
    outputs["proposal_xyz"].requires_grad_()
    outputs["objectness"].requires_grad_()
    votes = vote_targets(outputs["seed_xyz"], boxes, labels >= 0)
    detection_loss(outputs, votes, boxes, labels, BoxCoder(MEAN_SIZES, 12))["total"].backward()
    assert outputs["proposal_xyz"].grad is None


@pytest.mark.parametrize("num_headings", [1, 12])
def test_perfect_outputs_have_no_loss(num_headings):
    boxes = some_boxes(2, 4)
    if num_headings == 1:
        boxes[..., 6] = 0
    labels = torch.tensor([[0, 1, 2, 2], [1, 0, 1, 0]])
    coder = BoxCoder(MEAN_SIZES, num_headings)
    bins, turns, sizes = coder.encode(boxes, labels)
    centers = boxes[..., :3]
    outputs = outputs_like(centers, num_headings, seeds=4) | {
        "vote_xyz": centers, "center": centers, "objectness": torch.tensor([-50.0, 50]).expand(2, 4, 2),
        "heading_logits": 100.0 * F.one_hot(bins, num_headings), "semantic": 100.0 * F.one_hot(labels, 3),
        "heading_residuals": turns[..., None].expand(-1, -1, num_headings),
        "size_logits": 100.0 * F.one_hot(labels, 3), "size_residuals": sizes[:, :, None].expand(-1, -1, 3, -1),
    }  # fmt: skip
    votes = vote_targets(centers, boxes, labels >= 0)
    terms = detection_loss(outputs, votes, boxes, labels, coder)
    assert terms["vote"].item() == 0
    assert terms["center"].item() == 0
    for name, value in terms.items():
        assert abs(value.item()) < 1e-9, name


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_are_finite_without_boxes_and_without_positives(far, dtype):
    boxes = torch.zeros(2, 1, 7, dtype=dtype)
    labels = torch.tensor([[-1], [-1]])
    if far:
        boxes[1, 0] = torch.tensor([50.0, 0, 0, 1, 1, 1, 0])
        labels = torch.tensor([[-1], [2]])
    outputs = {k: v.to(dtype) for k, v in outputs_like(rand(2, 6, 3)).items()}
    leaves = {name: value.clone().requires_grad_() for name, value in outputs.items()}
    votes = vote_targets(leaves["seed_xyz"], boxes, labels >= 0)
    terms = detection_loss(leaves, votes, boxes, labels, BoxCoder(MEAN_SIZES, 12))
    terms["total"].backward()
    for name, value in terms.items():
        assert value.isfinite(), name
        assert value.dtype == dtype
        if name not in ("total", "objectness", "center"):
            assert value == 0
    assert (terms["center"] > 0) == far
    for leaf in leaves.values():
        assert leaf.grad is None or leaf.grad.isfinite().all()


def test_padding_does_not_count():
    outputs, boxes, labels = scenes()
    coder = BoxCoder(MEAN_SIZES, 12)
    votes = vote_targets(outputs["seed_xyz"], boxes, labels >= 0)
    expected = detection_loss(outputs, votes, boxes, labels, coder)
    more = torch.cat([boxes, 7 * rand(3, 4, 7)], 1)
    more_labels = torch.cat([labels, torch.full((3, 4), -1)], 1)
    votes = vote_targets(outputs["seed_xyz"], more, more_labels >= 0)
    found = detection_loss(outputs, votes, more, more_labels, coder)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_bins_of_the_targets_are_those_of_the_coder():
    """The naive loss above takes bins from its own formula; here are the two side by side at the bins' edges."""
    yaw = torch.arange(-12, 13) * math.pi / 12 + 1e-4
    bins, _ = heading_to_class(yaw, 12)
    width = 2 * math.pi / 12
    assert bins.tolist() == [int(((float(a) + width / 2) % (2 * math.pi)) / width) for a in yaw]


# --- imitation ---


def test_imitation_is_the_mean_square_and_teaches_the_student_alone():
    student = torch.tensor([[[1.0, 2], [3, 4]]], requires_grad=True)
    guided = torch.tensor([[[1.0, 0], [0, 5]]], requires_grad=True)
    loss = imitation_loss(student, guided)
    assert loss.item() == pytest.approx((0 + 4 + 9 + 1) / 4)
    loss.backward()
    assert guided.grad is None
    torch.testing.assert_close(student.grad, torch.tensor([[[0.0, 1], [1.5, -0.5]]]))


def test_imitation_works_under_autocast_between_precisions():
    student = torch.randn(1, 4, 5, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = imitation_loss(student, torch.randn(1, 4, 5))
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.isfinite().all()
