"""The auxiliary branch: what it is shown, its attention, what it teaches, what it leaves alone, and other detectors."""

import copy
import functools
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from projects.lg3d.boxes import BoxCoder, points_in_boxes
from projects.lg3d.guidance import (
    AnnotationDescriptor,
    Attention,
    Guidance,
    Inducer,
    Mapper,
    ReleasedAttention,
    annotations,
    attend,
    label_points,
    tiled,
)
from projects.lg3d.loss import detection_loss, imitation_loss, vote_targets
from projects.lg3d.model import Seeds, build_network
from shared.errors import InputError

MEAN_SIZES = [[1.0, 0.5, 0.7], [0.4, 0.3, 0.2], [2.0, 1.0, 1.0]]
TINY = {
    "name": "votenet",
    "backbone": {
        "in_channels": 1, "num_points": [32, 16, 8, 4], "radii": [0.5, 0.9, 1.4, 2.0], "num_samples": [8, 8, 4, 4],
        "widths": [[4, 4, 8], [8, 8, 16], [8, 8, 16], [8, 8, 16]], "out_channels": 16,
    },
    "head": {
        "num_proposals": 7, "radius": 0.6, "num_samples": 5, "widths": [8, 8, 8], "num_headings": 4,
        "mean_sizes": MEAN_SIZES,
    },
}  # fmt: skip
RELEASED = {
    "variant": "released", "share_attention": True, "layout": "tiled", "pad": "zero", "frozen_norms": "train",
    "head_norms": "shared",
}  # fmt: skip
FORMS = {
    "paper": {},
    "scene": {"value": "scene"},
    "tiled": {"layout": "tiled"},
    "points": {"annotations": False},
    "points_scene": {"annotations": False, "value": "scene"},
    "annotations": {"points": False},
    "annotations_scene": {"points": False, "value": "scene"},
    "annotations_tiled": {"points": False, "layout": "tiled"},
    "imitation": {"points": False, "annotations": False},
    "jitter": {"jitter": 0.2},
    "zero": {"pad": "zero"},
    "frozen_train": {"frozen_norms": "train"},
    "head_shared": {"head_norms": "shared"},
    "released": RELEASED,
    "released_two": {**RELEASED, "share_attention": False},
}
SOME = ("paper", "scene", "annotations", "released")


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def batch(points=60, dtype=torch.float32, seed=0):
    """Make three scenes with 4, 1 and no boxes: xyz, features, boxes, labels."""
    xyz = 3 * rand(3, points, 3, seed=seed, dtype=dtype)
    numbers = rand(3, 4, 7, seed=seed + 1, dtype=dtype)
    boxes = torch.cat([xyz[:, :4] + 0.2 * numbers[..., :3], 0.5 + numbers[..., 3:6], 6 * numbers[..., 6:] - 3], -1)
    labels = torch.tensor([[0, 1, 2, 1], [2, -1, -1, -1], [-1, -1, -1, -1]])
    boxes[labels < 0] = 0
    return xyz, xyz.mT[:, 2:].contiguous(), boxes, labels


def detector(seed=0, dtype=torch.float32):
    return copy.deepcopy(made(seed)).to(dtype)


@functools.cache
def made(seed):
    """Build a detector whose norms have seen a batch, so that seeds differ in the test too."""
    torch.manual_seed(seed)
    net = build_network(TINY)
    norms = [part for part in net.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 0.9
    net(*batch(seed=5)[:2])
    for norm in norms:
        norm.momentum = 0.1
    return net


def guided_by(net, seed=1, awake=True, **choices):
    """Build guidance; awake it does not start from phi*(P) but adds something."""
    torch.manual_seed(seed)
    guidance = Guidance(net.backbone, net.head, **choices)
    dtype = next(net.parameters()).dtype
    if awake:
        for name, parameter in guidance.named_parameters():
            if name.endswith(("out.weight", "query.weight", "key.weight")):
                nn.init.normal_(parameter, std=0.5)
    return guidance.to(dtype)


def losses_of(net, guidance, scenes, sample="vote"):
    """Compute L_det2, L_det1 and L_aux as a training step does."""
    xyz, features, boxes, labels = scenes
    geometry = net.backbone.geometry(xyz)
    seeds = net.backbone(features, geometry)
    votes = vote_targets(seeds.xyz, boxes, labels >= 0)
    z = guidance(xyz, features, boxes, labels, geometry)
    student = detection_loss(net.head(seeds, sample), votes, boxes, labels, net.head.coder)["total"]
    guided = detection_loss(guidance.propose(net.head, z, sample), votes, boxes, labels, net.head.coder)["total"]
    return student, guided, imitation_loss(seeds.features, z.features)


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# --- label points ---


def test_label_points_by_hand():
    xyz = torch.tensor([[[0.0, 0, 0], [5, 0, 0], [1, 0, 0], [6, 0, 0], [7, 0, 0], [8, 0, 0], [9, 0, 0]]])
    features = torch.arange(14.0).view(1, 2, 7)
    boxes = torch.tensor([[[0.5, 0, 0, 1.2, 1, 1, 0], [7, 0, 0, 1, 1, 1, 0], [0, 0, 0, 99, 99, 99, 0]]])
    is_box = torch.tensor([[True, True, False]])
    found, with_them = label_points(xyz, features, boxes, is_box, "wrap")
    # three inside: two rounds of them, then the first of them
    assert found[0, :, 0].tolist() == [0, 1, 7, 0, 1, 7, 0]
    assert with_them[0].tolist() == [[0, 2, 4, 0, 2, 4, 0], [7, 9, 11, 7, 9, 11, 7]]
    found, with_them = label_points(xyz + 1, features + 1, boxes + torch.eye(7)[:3].sum(0), is_box, "zero")
    assert found[0, :, 0].tolist() == [1, 2, 8, 1, 2, 8, 0]
    assert found[0, 6].tolist() == [0, 0, 0]
    assert with_them[0, :, 6].tolist() == [0, 0]


def test_what_is_left_of_the_rows_takes_label_points_at_equal_distances():
    xyz = torch.arange(10.0)[None, :, None].repeat(1, 1, 3)
    boxes = torch.tensor([[[2.5, 2.5, 2.5, 5.5, 5.5, 5.5, 0]]])
    found, _ = label_points(xyz, xyz.mT, boxes, torch.tensor([[True]]), "wrap")
    assert found[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 3, 4]


def test_label_points_are_points_of_the_scene_within_a_box():
    xyz, features, boxes, labels = batch(61)
    is_box = labels >= 0
    found, with_them = label_points(xyz, features, boxes, is_box, "wrap")
    assert found.shape == xyz.shape
    for b in range(2):
        inside = points_in_boxes(xyz[b], boxes[b][is_box[b]]).any(1)
        expected = {tuple(row) for row in torch.cat([xyz[b], features[b].mT], 1)[inside].tolist()}
        rows = [tuple(row) for row in torch.cat([found[b], with_them[b].mT], 1).tolist()]
        assert set(rows) == expected
        counts = {rows.count(row) for row in expected}
        assert counts <= {61 // len(expected), 61 // len(expected) + 1}
        assert 1 < len(expected) < 40
    # a scene without a box is taken as it is
    assert torch.equal(found[2], xyz[2])
    assert torch.equal(with_them[2], features[2])


@pytest.mark.parametrize("pad", ["wrap", "zero"])
def test_a_scene_within_a_box_is_its_own_label_points(pad):
    xyz, features, _, _ = batch()
    boxes = torch.tensor([0.0, 0, 0, 50, 50, 50, 1]).expand(3, 1, 7)
    found, with_them = label_points(xyz, features, boxes, torch.ones(3, 1, dtype=torch.bool), pad)
    assert torch.equal(found, xyz)
    assert torch.equal(with_them, features)


def test_a_box_with_one_point_and_one_with_none():
    xyz = torch.arange(4.0)[None, :, None].repeat(2, 1, 3)
    boxes = torch.tensor([[[2.0, 2, 2, 0.5, 0.5, 0.5, 0]], [[20.0, 2, 2, 0.5, 0.5, 0.5, 0]]])
    found, _ = label_points(xyz, xyz.mT, boxes, torch.ones(2, 1, dtype=torch.bool), "wrap")
    assert found[0, :, 0].tolist() == [2, 2, 2, 2]
    assert torch.equal(found[1], xyz[1])


# --- annotations ---


def test_annotations_by_hand():
    coder = BoxCoder(torch.tensor(MEAN_SIZES), 4)
    boxes = torch.tensor([[[1.0, 2, 3, 0.5, 0.3, 0.1, math.pi / 2 + math.pi / 8], [0, 0, 0, 2, 1, 1, 0]]])
    found = annotations(boxes, torch.tensor([[1, 2]]), coder)
    assert found.shape == (1, 9 + 3, 2)
    high, low = math.e / (math.e + 2), 1 / (math.e + 2)
    expected = [1, 2, 3, 0.1, 0, -0.1, 1, 1, 0.5, low, high, low]
    torch.testing.assert_close(found[0, :, 0], torch.tensor(expected), rtol=0, atol=1e-6)
    expected = [0, 0, 0, 0, 0, 0, 2, 0, 0, low, low, high]
    torch.testing.assert_close(found[0, :, 1], torch.tensor(expected), rtol=0, atol=1e-6)


def test_annotations_of_boxes_that_are_not_turned_have_no_heading():
    boxes = torch.tensor([[[0.0, 0, 0, 1, 1, 1, 1.5]]])
    found = annotations(boxes, torch.tensor([[0]]), BoxCoder(torch.ones(18, 3), 1))
    assert found.shape == (1, 27, 1)
    assert found[0, 7:9, 0].tolist() == [0, 0]
    assert annotations(boxes, torch.tensor([[0]]), BoxCoder(torch.ones(10, 3), 12)).shape == (1, 19, 1)


def test_tiling_repeats_whole_rounds_and_leaves_the_rest_0():
    rows = torch.tensor([[[1.0, 2, 3]], [[4, 5, 6]], [[7, 8, 9]]])
    is_box = torch.tensor([[True, False, True], [True, True, True], [False, False, False]])
    found = tiled(rows, is_box, 7)
    assert found[:, 0].tolist() == [[1, 3, 1, 3, 1, 3, 0], [4, 5, 6, 4, 5, 6, 0], [0] * 7]
    assert tiled(rows, is_box[[0, 0, 0]], 2)[:, 0].tolist() == [[1, 3], [4, 6], [7, 9]]
    with pytest.raises(InputError, match="a scene has 3 boxes, more than 2 rows; take layout=masked"):
        tiled(rows, is_box, 2)


# --- networks ---


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parts_have_the_published_number_of_parameters():
    assert count(AnnotationDescriptor(27, 256)) == 44_032
    assert count(AnnotationDescriptor(19, 256)) == 43_520
    assert count(ReleasedAttention(256)) == 82_560


def test_descriptor_ends_with_a_norm_and_no_relu():
    descriptor = AnnotationDescriptor(12, 16)
    assert [tuple(conv.weight.shape) for conv in descriptor.convs] == [(4, 12, 1), (8, 4, 1), (16, 8, 1)]
    rows = torch.randn(2, 12, 30)
    x = rows
    for i, (conv, norm) in enumerate(zip(descriptor.convs, descriptor.norms, strict=True)):
        x = F.batch_norm(conv(x), None, None, norm.weight, norm.bias, True)
        x = F.relu(x) if i < 2 else x
    torch.testing.assert_close(descriptor(rows), x)
    assert (descriptor(rows) < 0).any()


def test_norms_of_the_descriptor_see_true_rows_alone():
    torch.manual_seed(0)
    descriptor, other = AnnotationDescriptor(5, 8).double(), AnnotationDescriptor(5, 8).double()
    other.load_state_dict(descriptor.state_dict())
    rows = torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    found = descriptor(rows, mask)
    together = torch.stack([rows[b, :, k] for b, k in mask.nonzero()], -1)[None]
    expected = other(together)[0].mT
    torch.testing.assert_close(found.mT[mask], expected)
    assert found.mT[~mask].abs().max() == 0
    for a, b in zip(descriptor.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_descriptor_of_one_row_and_of_none_is_finite_in_training():
    descriptor = AnnotationDescriptor(5, 8)
    rows = torch.randn(2, 5, 3, requires_grad=True)
    one = torch.tensor([[True, False, False], [False, False, False]])
    found = descriptor(rows, one)
    assert found.isfinite().all()
    found.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in descriptor.parameters())
    assert descriptor(rows, torch.zeros_like(one)).abs().max() == 0
    assert descriptor(rows[:1, :, :1]).isfinite().all()


@torch.no_grad()
def naive_attention(queries, keys, values, mask=None):
    found = torch.zeros(values.shape[0], values.shape[1], queries.shape[2], dtype=values.dtype)
    for b in range(len(queries)):
        places = [k for k in range(keys.shape[2]) if mask is None or mask[b, k]]
        for q in range(queries.shape[2]):
            weights = [math.exp(float(queries[b, :, q] @ keys[b, :, k]) / math.sqrt(queries.shape[1])) for k in places]
            for weight, k in zip(weights, places, strict=True):
                found[b, :, q] += weight / sum(weights) * values[b, :, k]
    return found


def test_attention_is_that_of_the_loops():
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, c, n, dtype=torch.float64) for c, n in ((4, 3), (4, 5), (6, 5)))
    torch.testing.assert_close(attend(queries, keys, values), naive_attention(queries, keys, values))
    mask = torch.tensor([[True, True, False, True, False], [False, True, False, False, False]])
    torch.testing.assert_close(attend(queries, keys, values, mask), naive_attention(queries, keys, values, mask))
    layer = Attention(16, starts_at_zero=False).double()
    points, rows = (torch.randn(2, 16, n, dtype=torch.float64) for n in (7, 5))
    inner = naive_attention(*(m(x) for m, x in ((layer.query, points), (layer.key, rows), (layer.value, rows))), mask)
    torch.testing.assert_close(layer(points, rows, mask), layer.out(inner))
    assert layer.query.out_channels == layer.key.out_channels == 2


def test_with_one_annotation_every_place_gets_its_value():
    layer = Attention(8, starts_at_zero=False)
    rows = torch.randn(1, 8, 1)
    expected = layer.out(layer.value(rows)).expand(-1, -1, 5)
    torch.testing.assert_close(layer(torch.randn(1, 8, 5), rows), expected)
    mask = torch.tensor([[False, True, False]])
    more = torch.cat([torch.randn(1, 8, 1), rows, torch.randn(1, 8, 1)], 2)
    torch.testing.assert_close(layer(torch.randn(1, 8, 5), more, mask), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_nothing_is_0(dtype):
    layer = Attention(8, starts_at_zero=False).to(dtype)
    found = layer(torch.randn(1, 8, 5, dtype=dtype), torch.randn(1, 8, 3, dtype=dtype), torch.zeros(1, 3) > 0)
    assert found.abs().max() == 0


def test_modules_add_to_what_they_are_given_and_add_nothing_at_first():
    points, described, scene = torch.randn(2, 16, 6), torch.randn(2, 16, 4), torch.randn(2, 16, 9)
    mask = torch.tensor([[True, True, True, False], [False] * 4])
    inducer = Inducer(16)
    assert torch.equal(inducer(points, described, mask), points)
    nn.init.normal_(inducer.across.out.weight)
    embedding = inducer.embed(described)
    embedding = embedding + inducer.among(embedding, embedding, mask)
    torch.testing.assert_close(inducer(points, described, mask), points + inducer.across(points, embedding, mask))
    # where there is no annotation the label points stay as they are
    assert torch.equal(inducer(points, described, mask)[1], points[1])
    for value in ("label", "scene"):
        mapper = Mapper(16, value)
        assert torch.equal(mapper(scene, points), scene)
        nn.init.normal_(mapper.attention.out.weight)
        a = mapper.attention
        if value == "label":
            keys, values = a.key(points), a.value(points)
        else:
            labels = a.key(points)
            keys, values = naive_attention(a.query(scene), labels, labels), a.value(scene)
        expected = scene + a.out(naive_attention(a.query(scene), keys, values))
        torch.testing.assert_close(mapper(scene, points), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_released_attention_is_as_in_the_released_code(training):
    torch.manual_seed(0)
    module = ReleasedAttention(16).double().train(training)
    queries, keys = torch.randn(2, 16, 5, dtype=torch.float64), torch.randn(2, 16, 5, dtype=torch.float64)
    a, b, d = (copy.deepcopy(m)(x) for m, x in ((module.key, keys), (module.query, queries), (module.value, keys)))
    found = module(queries, keys)
    for scene in range(2):
        scores = [[float((a[scene, :, k] @ b[scene, :, q]).detach()) for q in range(5)] for k in range(5)]
        # softmax over the queries of a key's row
        scores = [[math.exp(x) / sum(math.exp(y) for y in row) / 4 for x in row] for row in scores]
        for place in range(5):
            # key k's row is paired with place k, and its columns with values
            expected = queries[scene, :, place] + sum(scores[place][j] * d[scene, :, j] for j in range(5))
            torch.testing.assert_close(found[scene, :, place], expected)
    with pytest.raises(InputError, match="pairs 5 queries with 4 keys; they are as many"):
        module(queries, keys[..., :4])


def test_released_form_has_one_attention_or_two():
    net = detector()
    one, two = (guided_by(net, **{**RELEASED, "share_attention": shared}) for shared in (True, False))
    attention = count(ReleasedAttention(16))
    parameters = [sum(p.numel() for p in g.parameters() if p.requires_grad) for g in (one, two)]
    assert parameters == [count(one.descriptor) + attention, count(two.descriptor) + 2 * attention]
    assert one.inducer is one.mapper
    xyz, features, boxes, labels = batch()
    for guidance in (one.eval(), two.eval()):
        seeds = guidance.teacher(features, guidance.teacher.geometry(xyz))
        shown = label_points(xyz, features, boxes, labels >= 0, "zero")
        points = guidance.teacher(shown[1], guidance.teacher.geometry(shown[0])).features
        rows = guidance.descriptor(tiled(annotations(boxes, labels, guidance.coder), labels >= 0, 16))
        expected = guidance.mapper(seeds.features, guidance.inducer(points, rows))
        torch.testing.assert_close(guidance(xyz, features, boxes, labels).features, expected)


# --- the branch ---


@pytest.mark.parametrize("form", [*SOME, "points", "imitation", "frozen_train"])
def test_guided_seeds_lie_where_the_students_do_by_shared_geometry_or_own(form):
    net = detector()
    guidance, (xyz, features, boxes, labels) = guided_by(net, **FORMS[form]), batch()
    other, geometry = copy.deepcopy(guidance), net.backbone.geometry(xyz)
    student, z = net.backbone(features, geometry), guidance(xyz, features, boxes, labels, geometry)
    assert torch.equal(z.xyz, student.xyz)
    assert torch.equal(z.index, student.index)
    assert z.features.shape == student.features.shape
    assert z.features.isfinite().all()
    own = other(xyz, features, boxes, labels)
    assert torch.equal(z.features, own.features)
    assert torch.equal(z.xyz, own.xyz)
    assert equal(state_of(guidance), state_of(other))


@pytest.mark.parametrize("form", ["paper", "scene", "points", "annotations", "imitation"])
def test_branch_starts_from_the_frozen_features_and_later_leaves_them(form):
    net = detector().eval()
    xyz, features, boxes, labels = batch()
    frozen = net.backbone(features, net.backbone.geometry(xyz)).features
    found = guided_by(net, awake=False, **FORMS[form])(xyz, features, boxes, labels).features
    assert torch.equal(found, frozen)
    later = guided_by(net, **FORMS[form])(xyz, features, boxes, labels).features
    assert torch.equal(later, frozen) == (form == "imitation")


@pytest.mark.parametrize("form", ["paper", "scene", "annotations", "released"])
def test_branch_sees_classes_where_it_sees_annotations(form):
    net = detector()
    guidance = guided_by(net, **FORMS[form]).eval()
    xyz, features, boxes, labels = batch()
    found = guidance(xyz, features, boxes, labels).features
    other = guidance(xyz, features, boxes, torch.where(labels == 1, 2, labels)).features
    # the second and third scene have no box of the class
    assert [torch.equal(a, b) for a, b in zip(found, other, strict=True)] == [False, True, True]
    blind = guided_by(net, annotations=False).eval()
    assert torch.equal(
        blind(xyz, features, boxes, labels).features,
        blind(xyz, features, boxes, torch.where(labels == 1, 2, labels)).features,
    )


@pytest.mark.parametrize("form", ["paper", "points", "released"])
def test_branch_sees_boxes_where_it_sees_their_points(form):
    net = detector()
    guidance = guided_by(net, **FORMS[form]).eval()
    xyz, features, boxes, labels = batch()
    found = guidance(xyz, features, boxes, labels).features
    boxes[1, 0, 3:6] *= 1.7
    other = guidance(xyz, features, boxes, labels).features
    assert [torch.equal(a, b) for a, b in zip(found, other, strict=True)] == [True, False, True]


@pytest.mark.parametrize("form", ["paper", "scene", "annotations"])
@pytest.mark.parametrize("training", [True, False])
def test_order_and_number_of_copies_of_annotations_do_not_matter(form, training):
    net = detector(dtype=torch.float64)
    guidance = guided_by(net, **FORMS[form]).train(training)
    xyz, features, boxes, labels = batch(dtype=torch.float64)

    def z(order):
        return copy.deepcopy(guidance)(xyz, features, boxes[:, order], labels[:, order]).features

    expected = z([0, 1, 2, 3])
    torch.testing.assert_close(z([3, 1, 0, 2]), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(z([0, 1, 2, 3, 3, 2, 1, 0]), expected, rtol=1e-10, atol=1e-10)
    # nor does padding, of whatever numbers
    more = torch.cat([boxes, 9 * rand(3, 3, 7, dtype=torch.float64)], 1)
    more_labels = torch.cat([labels, torch.full((3, 3), -1)], 1)
    found = copy.deepcopy(guidance)(xyz, features, more, more_labels).features
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(z([0, 0, 0, 0])[0], expected[0])


@pytest.mark.parametrize("form", SOME)
def test_scenes_of_a_batch_do_not_see_each_other(form):
    guidance = guided_by(detector(dtype=torch.float64), **FORMS[form]).eval()
    scenes = batch(dtype=torch.float64)
    together = guidance(*scenes).features
    for i in range(3):
        alone = guidance(*(value[i : i + 1] for value in scenes)).features
        torch.testing.assert_close(alone[0], together[i], rtol=1e-10, atol=1e-10)


# --- gradients ---


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_has_a_gradient(form):
    net = detector(dtype=torch.float64)
    guidance = guided_by(net, **FORMS[form])
    student, guided, imitation = losses_of(net, guidance, batch(dtype=torch.float64))
    (student + guided + imitation).backward()
    for name, parameter in itertools.chain(net.named_parameters(), guidance.named_parameters()):
        if name.startswith("teacher."):
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # norms and softmaxes take the constant that a bias adds off again
        assert parameter.grad.abs().max() > 1e-12 or name.endswith("bias"), name


@pytest.mark.parametrize("form", [*SOME, "points", "imitation"])
def test_each_loss_teaches_its_own_part(form):
    net = detector()
    guidance = guided_by(net, **FORMS[form])
    own = [p for p in guidance.parameters() if p.requires_grad]
    assert not any(p.requires_grad for p in guidance.teacher.parameters())

    def touched(loss, parameters):
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True) if parameters else ()
        return any(g is not None and bool(g.abs().max() > 0) for g in grads)

    student, guided, imitation = losses_of(net, guidance, batch())
    backbone, head = list(net.backbone.parameters()), list(net.head.parameters())
    assert touched(imitation, backbone)
    assert not touched(imitation, head + own)
    assert touched(guided, head)
    assert not touched(guided, backbone)
    assert touched(guided, own) == (form != "imitation")
    assert touched(student, backbone)
    assert touched(student, head)
    assert not own or not touched(student, own)


@pytest.mark.parametrize("form", ["paper", "frozen_train", "released"])
def test_frozen_network_is_the_same_after_a_step(form):
    net = detector()
    guidance = guided_by(net, **FORMS[form])
    before = state_of(guidance.teacher)
    optimizer = torch.optim.SGD([p for p in (*net.parameters(), *guidance.parameters()) if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(losses_of(net, guidance.train(), batch())).backward()
        optimizer.step()
    assert equal(state_of(guidance.teacher), before)
    assert guidance.teacher.training == (guidance.frozen_norms == "train")
    assert not equal(state_of(net.backbone), before)


def test_frozen_norms_take_their_own_statistics_or_those_of_the_batch():
    net = detector()
    scenes = batch()
    choices = {"points": False, "annotations": False}
    own, of_batch = (guided_by(net, frozen_norms=how, **choices).train() for how in ("eval", "train"))
    geometry = net.backbone.geometry(scenes[0])
    assert torch.equal(own(*scenes).features, copy.deepcopy(net.backbone).eval()(scenes[1], geometry).features)
    assert torch.equal(of_batch(*scenes).features, copy.deepcopy(net.backbone).train()(scenes[1], geometry).features)
    assert torch.equal(own(*scenes).features, of_batch.eval()(*scenes).features)


# --- what it leaves alone ---


@pytest.mark.parametrize("training", [True, False])
def test_separate_norms_leave_the_heads_statistics_alone(training):
    net = detector()
    guidance = guided_by(net).train(training)
    net.train(training)
    z = guidance(*batch())
    head, own = state_of(net.head), state_of(guidance.statistics)
    assert set(own) == {key.replace(".", "/") for key in head if "running" in key or "num_batches" in key}
    outputs = guidance.propose(net.head, z, "vote")
    assert equal(state_of(net.head), head)
    assert equal(state_of(guidance.statistics), own) != training
    if training:
        assert {int(v - own[k]) for k, v in state_of(guidance.statistics).items() if "num_batches" in k} == {1}
        # the same that a head of its own would have learnt
        other = copy.deepcopy(net.head)
        expected = other(z, "vote")
        moved = {k.replace("/", "."): v for k, v in state_of(guidance.statistics).items()}
        assert equal(moved, {k: v for k, v in state_of(other).items() if k in moved})
        assert equal(outputs, expected)


def test_separate_norms_are_used_in_the_test():
    net = detector().eval()
    guidance = guided_by(net).eval()
    z = guidance(*batch())
    before = guidance.propose(net.head, z, "seed")
    assert equal(before, net.head(z, "seed"))
    for name, buffer in guidance.statistics.named_buffers():
        if name.endswith("running_mean"):
            buffer += 0.5
    assert not torch.equal(guidance.propose(net.head, z, "seed")["semantic"], before["semantic"])
    assert torch.equal(net.head(z, "seed")["semantic"], before["semantic"])


def test_shared_norms_move_the_heads_statistics_as_in_the_released_code():
    net = detector()
    guidance = guided_by(net, head_norms="shared").train()
    z = guidance(*batch())
    other = copy.deepcopy(net.head)
    outputs, expected = guidance.propose(net.head, z, "vote"), other(z, "vote")
    assert equal(outputs, expected)
    assert equal(state_of(net.head), state_of(other))
    assert not list(guidance.statistics.buffers())


@pytest.mark.parametrize("form", SOME)
def test_detector_is_the_same_with_the_branch_and_without(form):
    net = detector()
    keys, outputs = set(net.state_dict()), copy.deepcopy(net).eval()(*batch()[:2])
    guidance = guided_by(net, **FORMS[form])
    assert set(net.state_dict()) == keys == set(build_network(TINY).state_dict())
    assert equal(net.eval()(*batch()[:2]), outputs)
    sum(losses_of(net.train(), guidance, batch())).backward()
    guided = net.eval()(*batch()[:2])
    exported = build_network(TINY)
    exported.load_state_dict(net.state_dict())
    del guidance
    assert equal(exported.eval()(*batch()[:2]), guided)


@pytest.mark.parametrize("form", ["released", "jitter"])
def test_branch_without_weight_leaves_the_training_as_it_is(form):
    """Neither statistics of norms nor random numbers of the student know of a branch whose losses are not added."""
    states = []
    for with_branch in (False, True):
        net = detector()
        guidance = guided_by(net, **{**FORMS[form], "head_norms": "separate"}).train() if with_branch else None
        torch.manual_seed(3)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for step in range(3):
            xyz, features, boxes, labels = batch(seed=step)
            xyz = xyz + 0.01 * torch.randn(xyz.shape)  # as augmentation draws
            seeds = net.backbone(features, net.backbone.geometry(xyz))
            votes = vote_targets(seeds.xyz, boxes, labels >= 0)
            loss = detection_loss(net.head(seeds, "vote"), votes, boxes, labels, net.head.coder)["total"]
            if guidance is not None:
                z = guidance(xyz, features, boxes, labels)
                guidance.propose(net.head, z, "vote")
                loss = loss + 0 * imitation_loss(seeds.features, z.features)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        states.append(state_of(net))
    assert equal(*states)


def test_jitter_moves_centres_in_training_alone_and_by_the_steps_taken():
    net = detector()
    guidance, still = guided_by(net, jitter=0.2), guided_by(net)
    boxes = batch()[2]
    moved = guidance.jittered(boxes)
    offset = (moved - boxes)[..., :3]
    assert torch.equal(moved[..., 3:], boxes[..., 3:])
    assert (offset.abs() <= 0.2 * boxes[..., 3:6] + 1e-6).all()
    assert (offset[0].abs() > 0.01 * boxes[0, :, 3:6]).any(0).all()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    again = guidance.jittered(boxes)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again, moved)
    still.load_state_dict(guidance.state_dict())
    assert torch.equal(guidance.eval()(*batch()).features, still.eval()(*batch()).features)
    assert not torch.equal(guidance.train()(*batch()).features, still.train()(*batch()).features)
    # a step later other numbers are drawn
    assert not torch.equal(guidance.jittered(boxes), moved)


def test_branch_comes_back_from_its_state():
    net = detector()
    guidance = guided_by(net).train()
    guidance.propose(net.head, guidance(*batch()), "vote")
    other = guided_by(detector(seed=4), seed=5)
    other.load_state_dict(guidance.state_dict())
    scenes = batch(seed=2)
    z = guidance.eval()(*scenes)
    assert torch.equal(other.eval()(*scenes).features, z.features)
    assert equal(other.propose(net.head.eval(), z, "seed"), guidance.propose(net.head, z, "seed"))


# --- precision and degenerate scenes ---


@pytest.mark.parametrize("form", SOME)
def test_branch_works_under_autocast(form):
    net = detector()
    guidance = guided_by(net, **FORMS[form])
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(net, guidance, batch())
    sum(losses).backward()
    for loss in losses:
        assert loss.dtype == torch.float32
        assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert all(p.grad.isfinite().all() for p in guidance.parameters() if p.requires_grad)


@pytest.mark.parametrize("form", SOME)
def test_double_precision_is_kept(form):
    net = detector(dtype=torch.float64)
    guidance = guided_by(net, **FORMS[form])
    assert guidance(*batch(dtype=torch.float64)).features.dtype == torch.float64
    assert {loss.dtype for loss in losses_of(net, guidance, batch(dtype=torch.float64))} == {torch.float64}


@pytest.mark.parametrize("form", [*SOME, "tiled", "points_scene", "annotations_scene"])
def test_branch_is_finite_where_no_scene_has_a_box(form):
    net, num_boxes = detector(), 1 + len(form) % 3
    guidance = guided_by(net, **FORMS[form])
    xyz, features, _, _ = batch()
    boxes, labels = torch.zeros(3, num_boxes, 7), torch.full((3, num_boxes), -1)
    losses = losses_of(net, guidance, (xyz, features, boxes, labels))
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert all(p.grad is None or p.grad.isfinite().all() for p in guidance.parameters())


@pytest.mark.parametrize("form", ["paper", "released"])
def test_one_scene_with_one_box_can_be_trained_on(form):
    net = detector()
    guidance = guided_by(net, **FORMS[form])
    losses = losses_of(net, guidance, tuple(value[1:2, : 60 if i == 0 else None] for i, value in enumerate(batch())))
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)


# --- another detector ---


@dataclass(frozen=True)
class Picked:
    """What the other backbone looks up: its seeds."""

    xyz: torch.Tensor
    index: torch.Tensor


class PointNet(nn.Module):
    """Every second point is a seed; it knows itself and the maximum over all."""

    def __init__(self, norm):
        super().__init__()
        self.out_channels = 24
        self.one, self.norm, self.two = nn.Conv1d(4, 12, 1), norm(12), nn.Conv1d(24, 24, 1)

    def geometry(self, xyz):
        index = torch.arange(0, xyz.shape[1], 2, device=xyz.device).expand(len(xyz), -1)
        return Picked(xyz, index)

    def forward(self, features, geometry):
        x = self.norm(self.one(torch.cat([geometry.xyz.mT, features], 1))).relu()
        x = torch.cat([x, x.amax(2, keepdim=True).expand_as(x)], 1)
        return Seeds(geometry.xyz[:, ::2], self.two(x)[..., ::2], geometry.index)


class PointwiseHead(nn.Module):
    """Every fifth seed proposes a box."""

    def __init__(self, norm):
        super().__init__()
        self.num_classes = 3
        self.norm, self.out = norm(24), nn.Conv1d(24, 3 + 2 + 3 + 2 * 6 + 4 * 3 + 3, 1)

    @property
    def coder(self):
        return BoxCoder(torch.tensor(MEAN_SIZES), 6)

    def forward(self, seeds, sample):
        found = self.out(self.norm(seeds.features).relu()).mT
        vote, objectness, offset, bins, turns, sizes, residuals, semantic = found.split([3, 2, 3, 6, 6, 3, 9, 3], -1)
        centers = (seeds.xyz + vote)[:, ::5]
        return {
            "seed_xyz": seeds.xyz, "vote_xyz": seeds.xyz + vote, "proposal_xyz": centers,
            "center": centers + offset[:, ::5], "objectness": objectness[:, ::5], "heading_logits": bins[:, ::5],
            "heading_residuals": turns[:, ::5], "size_logits": sizes[:, ::5],
            "size_residuals": residuals[:, ::5].unflatten(-1, (3, 3)), "semantic": semantic[:, ::5],
        }  # fmt: skip


class Other(nn.Module):
    """A detector of another make."""

    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.backbone, self.head = PointNet(norm), PointwiseHead(norm)


@pytest.mark.parametrize("form", [*SOME, "tiled", "points", "imitation", "head_shared"])
def test_another_detector_is_guided_too(form):
    torch.manual_seed(0)
    net = Other()
    keys, outputs = (
        set(net.state_dict()),
        net.eval().head(net.backbone(batch()[1], net.backbone.geometry(batch()[0])), ""),
    )
    guidance = guided_by(net, **FORMS[form])
    again = net.head(net.backbone(batch()[1], net.backbone.geometry(batch()[0])), "")
    assert equal(outputs, again)
    teacher, head = state_of(guidance.teacher), state_of(net.head)
    z = guidance(*batch())
    guidance.propose(net.train().head, z, "vote")
    assert equal(state_of(net.head), head) == (FORMS[form].get("head_norms") != "shared")
    sum(losses_of(net, guidance, batch())).backward()
    assert equal(state_of(guidance.teacher), teacher)
    assert set(net.state_dict()) == keys
    for name, parameter in itertools.chain(net.named_parameters(), guidance.named_parameters()):
        assert name.startswith("teacher.") or parameter.grad is not None, name


def test_another_detector_learns_from_all_losses():
    torch.manual_seed(0)
    net = Other()
    guidance = guided_by(net).train()
    optimizer = torch.optim.Adam([p for p in (*net.parameters(), *guidance.parameters()) if p.requires_grad], 2e-2)
    history = []
    for _ in range(25):
        losses = losses_of(net, guidance, batch())
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        history.append(torch.stack(losses).detach())
    assert (history[-1][:2] < 0.7 * history[0][:2]).all()


def test_a_detector_without_running_statistics_is_guided_too():
    torch.manual_seed(0)
    net = Other(lambda width: nn.GroupNorm(3, width))
    guidance = guided_by(net).train()
    assert not list(guidance.statistics.buffers())
    losses = losses_of(net, guidance, batch())
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)


# --- choices ---


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"variant": "papers"}, "unknown guidance variant='papers'; choose one of paper, released"),
        ({"value": "both"}, "unknown guidance value='both'; choose one of label, scene"),
        ({"layout": "tile"}, "unknown guidance layout='tile'; choose one of masked, tiled"),
        ({"pad": None}, "unknown guidance pad=None; choose one of wrap, zero"),
        ({"frozen_norms": "off"}, "unknown guidance frozen_norms='off'; choose one of eval, train"),
        ({"head_norms": "own"}, "unknown guidance head_norms='own'; choose one of separate, shared"),
        ({"variant": "released"}, "variant=released takes layout=tiled, value=label, points and annotations"),
        ({**RELEASED, "points": False}, "variant=released takes layout=tiled"),
        ({**RELEASED, "annotations": False}, "variant=released takes layout=tiled"),
        ({**RELEASED, "value": "scene"}, "variant=released takes layout=tiled"),
        ({"share_attention": True}, "share_attention=true is of variant=released alone"),
        ({"jitter": -0.1}, "guidance jitter is at least 0, not -0.1"),
        ({"jitter": math.nan}, "guidance jitter is at least 0, not nan"),
    ],
)
def test_choices_that_do_not_exist_or_exclude_one_another_are_refused(choices, message):
    net = build_network(TINY)
    with pytest.raises(InputError, match=message) as caught:
        Guidance(net.backbone, net.head, **choices)
    assert "\n" not in str(caught.value)


def test_paper_form_at_full_size_adds_what_its_layers_say():
    """Single-head attention of width C/8 = 32, in LAI twice and in LKM once, and one embedding."""
    with torch.device("meta"):
        net = build_network({**TINY, "backbone": {**TINY["backbone"], "out_channels": 256}})
        guidance = Guidance(net.backbone, net.head)
    attention = 2 * (256 * 32 + 32) + 2 * (256 * 256 + 256)
    assert count(guidance.inducer) == 256 * 256 + 256 + 2 * attention
    assert count(guidance.mapper) == attention
