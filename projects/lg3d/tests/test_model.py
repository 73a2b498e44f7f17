"""VoteNet: counts, a plain second VoteNet written here, what it does not depend on, and what it refuses."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from projects.lg3d import model as model_file
from projects.lg3d.layouts import SCANNET_CLASSES, SCANNET_MEAN_SIZES, SUNRGBD_CLASSES, SUNRGBD_MEAN_SIZES
from projects.lg3d.model import (
    Backbone,
    FeaturePropagation,
    GroupedConv,
    Seeds,
    SetAbstraction,
    VoteHead,
    VoteModule,
    build_network,
)
from shared.errors import InputError
from shared.kernels.points import furthest_point_sample, three_nn

CONFIGS = Path(model_file.__file__).parent / "configs"
TINY = {
    "name": "votenet",
    "backbone": {
        "in_channels": 2, "num_points": [32, 16, 9, 4], "radii": [0.5, 0.9, 1.4, 2.0], "num_samples": [8, 7, 4, 4],
        "widths": [[4, 5, 8], [8, 7, 16], [8, 8, 12], [6, 8, 10]], "out_channels": 16,
    },
    "head": {
        "num_proposals": 7, "radius": 0.6, "num_samples": 5, "widths": [8, 9, 10], "num_headings": 4,
        "mean_sizes": [[1.0, 0.5, 0.7], [0.4, 0.3, 0.2], [2.0, 1.0, 1.0]],
    },
}  # fmt: skip
OUTPUTS = {
    "seed_xyz": (16, 3), "vote_xyz": (16, 3), "proposal_xyz": (7, 3), "objectness": (7, 2), "center": (7, 3),
    "heading_logits": (7, 4), "heading_residuals": (7, 4), "size_logits": (7, 3), "size_residuals": (7, 3, 3),
    "semantic": (7, 3),
}  # fmt: skip


def changed(part, **arguments):
    return {**TINY, part: {**TINY[part], **arguments}}


def random_norms(module):
    """Give norms weights and statistics that differ from the initial ones."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(part.running_mean, 0, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.3)
    return module


def make(arguments=TINY, seed=0, dtype=torch.float64):
    """Build a network whose features and votes differ from seed to seed, with its own statistics too."""
    torch.manual_seed(seed)
    net = random_norms(build_network(arguments)).double()
    norms = [part for part in net.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 0.9
    net(*scene(seed=7))
    for norm in norms:
        norm.momentum = 0.1
    net.head.vote.out.weight.data[:3] *= 3
    return net.to(dtype)


def scene(points=50, batch=2, channels=2, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    xyz = torch.rand(batch, points, 3, generator=generator, dtype=dtype) * 3 - 1
    return xyz, torch.randn(batch, channels, points, generator=generator, dtype=dtype)


def published(head):
    net = yaml.safe_load((CONFIGS / "model" / "votenet.yaml").read_text())["net"]
    net["head"] |= yaml.safe_load((CONFIGS / "head" / f"{head}.yaml").read_text())
    return net


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# --- the published sizes ---


@pytest.mark.parametrize(("head", "params", "rows"), [("scannet", 953_828, 97), ("sunrgbd", 951_506, 79)])
def test_published_networks_have_the_published_number_of_parameters(head, params, rows):
    with torch.device("meta"):
        net = build_network(published(head))
    assert count(net) == params
    assert count(net.backbone) == 641_920
    assert net.head.classify.out_channels + net.head.regress.out_channels == rows


@pytest.mark.parametrize(
    ("head", "classes", "sizes", "headings"),
    [("scannet", SCANNET_CLASSES, SCANNET_MEAN_SIZES, 1), ("sunrgbd", SUNRGBD_CLASSES, SUNRGBD_MEAN_SIZES, 12)],
)
def test_published_heads_have_the_mean_sizes_of_their_data(head, classes, sizes, headings):
    arguments = yaml.safe_load((CONFIGS / "head" / f"{head}.yaml").read_text())
    np.testing.assert_array_equal(np.array(arguments["mean_sizes"], np.float32), sizes)
    assert arguments["num_headings"] == headings
    lines = (CONFIGS / "head" / f"{head}.yaml").read_text().splitlines()
    assert [line.split("# ")[1] for line in lines if line.startswith("  - ")] == list(classes)


def products_of(net):
    """Multiply-accumulates of the backbone and of the head for a scene, in plain form: weight times neighbours."""
    size, head = net.backbone, net.head
    centers = [n * k for n, k in zip(size.num_points, size.num_samples, strict=True)]
    rows = dict(zip(size.abstractions, centers, strict=True))
    rows |= {size.propagations[0]: size.num_points[2], size.propagations[1]: size.num_points[1]}
    rows |= {head.vote: size.num_points[1], head.aggregation: head.num_proposals * head.num_samples}
    rows |= dict.fromkeys((head.shared, head.classify, head.regress), head.num_proposals)
    in_backbone = {*size.abstractions, *size.propagations}
    counts = [0, 0]
    for module, n in rows.items():
        weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d)))
        counts[module not in in_backbone] += n * weights
    return counts


def test_published_network_takes_the_published_number_of_products():
    with torch.device("meta"):
        net = build_network(published("scannet"))
    backbone, head = products_of(net)
    assert round(backbone / 1e9, 2) == 5.12
    assert round((backbone + head) / 1e9, 2) == 5.60


def test_products_are_those_of_a_run():
    net, found = make(), 0

    def abstraction(module, arguments, output):
        nonlocal found
        found += arguments[-1][0].numel() * sum(conv.weight.numel() for conv, _ in module.convs)

    def conv(module, arguments, output):
        nonlocal found
        found += module.weight.numel() * output.shape[2]

    kinds = {SetAbstraction: abstraction, nn.Conv1d: conv}
    for module in net.modules():
        if type(module) in kinds:
            module.register_forward_hook(kinds[type(module)])
    net(*scene())
    assert found == sum(products_of(net))


def test_names_of_the_parameters_are_those_that_files_of_ours_have():
    state = build_network(TINY).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["backbone.abstractions.0.convs.0.0.weight"] == (4, 5, 1, 1)
    assert shapes["backbone.abstractions.3.convs.2.1.running_var"] == (10,)
    assert shapes["backbone.propagations.0.convs.0.0.weight"] == (16, 22, 1)
    assert shapes["backbone.propagations.1.convs.1.1.num_batches_tracked"] == ()
    assert shapes["head.vote.convs.1.0.bias"] == (16,)
    assert shapes["head.vote.out.weight"] == (19, 16, 1)
    assert shapes["head.aggregation.convs.0.0.weight"] == (8, 19, 1, 1)
    assert shapes["head.shared.1.1.weight"] == (10,)
    assert shapes["head.classify.weight"] == (5, 10, 1)
    assert shapes["head.regress.bias"] == (3 + 8 + 12,)
    # a layer of a set abstraction has a weight and a norm of 5; mean sizes are arguments and no weights
    assert len(state) == 5 * 3 * 6 + 2 * 2 * 6 + 2 * 2 * 7 + 3 * 2


# --- a VoteNet in plain torch, with its loops ---


def sampled(xyz, amount, skip_origin):
    """Sample as PointNet++ does: the point furthest from those chosen, the first of equal ones."""
    chosen, nearest = [0], (xyz - xyz[0]).square().sum(1)
    allowed = xyz.square().sum(1) > 1e-3 if skip_origin else torch.ones(len(xyz), dtype=torch.bool)
    while len(chosen) < amount:
        chosen.append(int(nearest.masked_fill(~allowed, -1).argmax()))
        nearest = nearest.minimum((xyz - xyz[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


def ball(xyz, centers, radius, amount):
    groups = []
    for center in centers:
        found = ((xyz - center).square().sum(1) < radius**2).nonzero()[:amount, 0].tolist()
        groups.append(found + [found[0]] * (amount - len(found)))
    return torch.tensor(groups)


class PlainVoteNet:
    """The paper's network from a state dict, with public functions of torch, a scene after the other."""

    def __init__(self, state, arguments, training):
        self.state = {key: value.clone() for key, value in state.items()}
        self.arguments, self.training = arguments, training

    def layer(self, name, x, conv=F.conv1d, act=True):
        """Convolve; a name that has a norm behind it is followed by norm and ReLU."""
        if f"{name}.weight" in self.state:
            return conv(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])
        x = conv(x, self.state[f"{name}.0.weight"], self.state.get(f"{name}.0.bias"))
        mean, var, weight, bias = (
            self.state[f"{name}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, mean, var, weight, bias, self.training, 0.1))

    def abstraction(self, name, features, xyz, centers, neighbors, radius):
        grouped = [
            torch.cat([(p[n] - c[:, None]).permute(2, 0, 1) / radius, f[:, n]])
            for f, p, c, n in zip(features, xyz, centers, neighbors, strict=True)
        ]
        x = torch.stack(grouped)
        for j in range(3):
            x = self.layer(f"{name}.convs.{j}", x, F.conv2d)
        return x.amax(-1)

    def propagation(self, name, fine, coarse, skip, features):
        mixed = []
        for a, b, f in zip(fine, coarse, features, strict=True):
            distance, place = torch.cdist(a, b).topk(3, largest=False)
            weight = 1 / (distance + 1e-8)
            mixed.append((f[:, place] * (weight / weight.sum(1, keepdim=True))).sum(-1))
        x = torch.cat([torch.stack(mixed), skip], 1)
        for j in range(2):
            x = self.layer(f"{name}.convs.{j}", x)
        return x

    def __call__(self, xyz, features, sample):
        size, head = self.arguments["backbone"], self.arguments["head"]
        skip = size.get("skip_origin", False)
        points, described, first = [xyz], [features], None
        for i in range(4):
            chosen = [sampled(p, size["num_points"][i], skip) for p in points[i]]
            first = torch.stack(chosen) if first is None else first
            points.append(torch.stack([p[c] for p, c in zip(points[i], chosen, strict=True)]))
            near = [
                ball(p, c, size["radii"][i], size["num_samples"][i])
                for p, c in zip(points[i], points[i + 1], strict=True)
            ]
            name = f"backbone.abstractions.{i}"
            described.append(self.abstraction(name, described[i], points[i], points[i + 1], near, size["radii"][i]))
        up = self.propagation("backbone.propagations.0", points[3], points[4], described[3], described[4])
        up = self.propagation("backbone.propagations.1", points[2], points[3], described[2], up)
        seeds, self.index = points[2], first[:, : points[2].shape[1]]
        x = self.layer("head.vote.convs.1", self.layer("head.vote.convs.0", up))
        x = self.layer("head.vote.out", x)
        votes, vote_features = seeds + x[:, :3].mT, up + x[:, 3:]
        vote_features = vote_features / vote_features.square().sum(1, keepdim=True).sqrt()
        spread = votes if sample == "vote" else seeds
        chosen = [sampled(p, head["num_proposals"], head.get("skip_origin", False)) for p in spread]
        centers = torch.stack([v[c] for v, c in zip(votes, chosen, strict=True)])
        near = [ball(p, c, head["radius"], head["num_samples"]) for p, c in zip(votes, centers, strict=True)]
        x = self.abstraction("head.aggregation", vote_features, votes, centers, near, head["radius"])
        x = self.layer("head.shared.1", self.layer("head.shared.0", x))
        scores, boxes = self.layer("head.classify", x).mT, self.layer("head.regress", x).mT
        bins, classes = head["num_headings"], len(head["mean_sizes"])
        return {
            "seed_xyz": seeds, "vote_xyz": votes, "proposal_xyz": centers, "objectness": scores[..., :2],
            "center": centers + boxes[..., :3], "heading_logits": boxes[..., 3 : 3 + bins],
            "heading_residuals": boxes[..., 3 + bins : 3 + 2 * bins],
            "size_logits": boxes[..., 3 + 2 * bins : 3 + 2 * bins + classes],
            "size_residuals": boxes[..., 3 + 2 * bins + classes :].unflatten(-1, (classes, 3)),
            "semantic": scores[..., 2:],
        }  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sample", ["vote", "seed"])
@pytest.mark.parametrize("skip_origin", [False, True])
def test_network_is_the_plain_votenet(training, sample, skip_origin):
    arguments = changed("backbone", skip_origin=skip_origin)
    arguments["head"] = {**arguments["head"], "skip_origin": skip_origin}
    net = make(arguments).train(training)
    xyz, features = scene()
    # next to the origin, far from all others
    xyz[:, 5:8] = torch.tensor([[0.001, 0, 0], [0, -0.02, 0.01], [0.02, 0, 0.02]])
    xyz[:, :5] += 2
    xyz[:, 8:] += 2
    plain = PlainVoteNet(net.state_dict(), arguments, training)
    expected = plain(xyz, features, sample)
    found = net(xyz, features, sample)
    assert found.keys() == expected.keys() == OUTPUTS.keys()
    for key, value in found.items():
        assert value.shape == (2, *OUTPUTS[key])
        torch.testing.assert_close(
            value, expected[key], rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key} {text}"
        )
    seeds = net.backbone(features, net.backbone.geometry(xyz))
    assert torch.equal(seeds.index, plain.index)
    assert torch.equal(seeds.xyz, xyz.gather(1, seeds.index[..., None].expand(-1, -1, 3)))
    assert all(skip_origin != bool({5, 6, 7} & set(row)) for row in plain.index.tolist())


def test_running_statistics_are_the_plain_votenets_after_a_step():
    net = make().train()
    plain = PlainVoteNet(net.state_dict(), TINY, True)
    xyz, features = scene()
    plain(xyz, features, "vote")
    net(xyz, features)
    for key, value in net.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(value, plain.state[key], rtol=1e-9, atol=1e-9)


def test_gradients_are_the_plain_votenets():
    net = make().train()
    plain = PlainVoteNet(net.state_dict(), TINY, True)
    names = [name for name, _ in net.named_parameters()]
    for name in names:
        plain.state[name].requires_grad_()
    xyz, features = scene()
    gradients = []
    for outputs, weights in (
        (net(xyz, features), list(net.parameters())),
        (plain(xyz, features, "vote"), [plain.state[name] for name in names]),
    ):
        generator = torch.Generator().manual_seed(3)
        values = [outputs[key] for key in OUTPUTS]
        total = sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in values)
        gradients.append(torch.autograd.grad(total, weights))
    for name, found, expected in zip(names, *gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name} {text}")
        # the norm takes the bias in front of it off again
        assert found.abs().max() > 1e-6 or name.endswith(".0.bias"), name


# --- layers ---


def plain_abstraction(module, features, xyz, new_xyz, neighbors):
    batch = torch.arange(len(xyz))[:, None, None]
    offset = (xyz[batch, neighbors.long()] - new_xyz[:, :, None]) / module.convs[0][0].radius
    x = torch.cat([offset.permute(0, 3, 1, 2), features.mT[batch, neighbors.long()].permute(0, 3, 1, 2)], 1)
    for conv, norm in module.convs:
        x = F.relu(norm(F.conv2d(x, conv.weight)))
    return x.max(-1).values


def group(channels=5, points=23, centers=6, neighbors=4):
    torch.manual_seed(2)
    xyz = torch.randn(2, points, 3, dtype=torch.float64)
    features = torch.randn(2, channels, points, dtype=torch.float64)
    new_xyz = torch.randn(2, centers, 3, dtype=torch.float64)
    near = torch.randint(0, points, (2, centers, neighbors), dtype=torch.int32)
    return features, xyz, new_xyz, near


@pytest.mark.parametrize("channels", [0, 1, 5])
def test_grouped_convolution_is_that_of_offsets_and_features(channels):
    conv = GroupedConv(channels, 7, 0.3).double()
    features, xyz, new_xyz, near = group(channels)
    batch = torch.arange(2)[:, None, None]
    offset = (xyz[batch, near.long()] - new_xyz[:, :, None]) / 0.3
    grouped = torch.cat([offset, features.mT[batch, near.long()]], -1)
    expected = F.conv2d(grouped.permute(0, 3, 1, 2), conv.weight).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(conv(features, xyz, new_xyz, near), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_set_abstraction_is_the_plain_form_with_all_its_gradients(training):
    torch.manual_seed(0)
    module = random_norms(SetAbstraction(5, [6, 4, 8], 0.7)).double().train(training)
    other = copy.deepcopy(module)
    *inputs, near = group()
    inputs = [value.requires_grad_() for value in inputs]
    found, expected = module(*inputs, near), plain_abstraction(other, *inputs, near)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(found)
    ours = torch.autograd.grad(found, [*inputs, *module.parameters()], weight)
    theirs = torch.autograd.grad(expected, [*inputs, *other.parameters()], weight)
    for a, b in zip(ours, theirs, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(module.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_set_abstraction_and_propagation_are_those_of_differences():
    torch.manual_seed(0)
    abstraction = random_norms(SetAbstraction(3, [4, 5], 0.7)).double().eval()
    *inputs, near = group(3, 9, 4, 3)
    inputs = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(lambda *x: abstraction(*x, near), inputs, fast_mode=True)
    propagation = random_norms(FeaturePropagation(5, 4)).double().eval()
    distance, place = three_nn(inputs[1].detach(), inputs[2].detach())
    weights = (1 / (distance + 1e-8)).requires_grad_()
    coarse = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    skip = inputs[0].detach().requires_grad_()
    inputs = [skip, coarse, weights]
    assert torch.autograd.gradcheck(lambda a, b, w: propagation(a, b, place, w), inputs, fast_mode=True)


def test_of_equal_neighbours_one_alone_has_a_gradient():
    """A ball with few points repeats the first: a gradient that is shared out among copies is the same in sum."""
    module = SetAbstraction(2, [3, 3, 3], 1.0).double().eval()
    features, xyz, new_xyz, _ = group(2, 4, 1, 1)
    near = torch.tensor([[[1, 1, 1]], [[0, 0, 0]]], dtype=torch.int32)
    features.requires_grad_()
    found = module(features, xyz, new_xyz, near)
    alone = module(features, xyz, new_xyz, near[:, :, :1])
    assert torch.equal(found, alone)
    ours, theirs = (torch.autograd.grad(value.sum(), features)[0] for value in (found, alone))
    torch.testing.assert_close(ours, theirs)


def test_grouped_convolution_keeps_its_digits_far_from_the_origin():
    conv = GroupedConv(1, 4, 0.2)
    torch.manual_seed(0)
    offset = torch.randn(1, 30, 3) * 0.1
    near = torch.arange(30, dtype=torch.int32).view(1, 1, 30)
    features = torch.zeros(1, 1, 30)
    at_home = conv(features, offset, torch.zeros(1, 1, 3), near)
    away = conv(features, offset + 8, torch.full((1, 1, 3), 8.0), near)
    torch.testing.assert_close(at_home, away, rtol=0, atol=2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(features, offset + 8, torch.full((1, 1, 3), 8.0), near), away)


def test_votes_are_of_length_1_and_may_be_0():
    module = VoteModule(6).double()
    seeds = Seeds(torch.randn(2, 4, 3).double(), torch.randn(2, 6, 4).double(), torch.zeros(2, 4, dtype=torch.int64))
    votes = module(seeds)
    torch.testing.assert_close(votes.features.norm(dim=1), torch.ones(2, 4).double())
    nn.init.zeros_(module.out.weight)
    module.out.bias.data = torch.tensor([1.0, -2, 3, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    seeds = replace(seeds, features=torch.zeros(2, 6, 4, dtype=torch.float64, requires_grad=True))
    votes = module(seeds)
    torch.testing.assert_close(votes.xyz, seeds.xyz + torch.tensor([1.0, -2, 3]))
    assert votes.features.abs().max() == 0
    (votes.features.sum() + votes.xyz.sum()).backward()
    assert all(p.grad.isfinite().all() for p in [*module.parameters(), seeds.features])


def test_network_of_zero_votes_has_finite_outputs_and_gradients():
    net = make(dtype=torch.float32)
    for parameter in (*net.backbone.propagations[1].parameters(), *net.head.vote.out.parameters()):
        nn.init.zeros_(parameter)
    xyz, features = scene(dtype=torch.float32)
    outputs = net(xyz, features)
    sum(value.sum() for value in outputs.values()).backward()
    assert all(value.isfinite().all() for value in outputs.values())
    assert all(p.grad.isfinite().all() for p in net.parameters())


# --- geometry ---


def test_points_sampled_furthest_first_are_the_samples_of_themselves():
    net = make()
    xyz, _ = scene()
    geometry = net.backbone.geometry(xyz)
    for fine, coarse in itertools.pairwise(geometry.xyz[1:]):
        again = furthest_point_sample(fine, coarse.shape[1])
        assert torch.equal(again, torch.arange(coarse.shape[1], dtype=torch.int32).expand(2, -1))
        assert torch.equal(coarse, fine[:, : coarse.shape[1]])
    assert torch.equal(geometry.xyz[1], xyz.gather(1, geometry.index.long()[..., None].expand(-1, -1, 3)))
    assert [level.shape[1] for level in geometry.xyz] == [50, 32, 16, 9, 4]
    assert torch.equal(net.backbone(scene()[1], geometry).index, geometry.index[:, :16].long())


def test_weights_of_neighbours_add_up_to_1_and_a_known_point_has_its_own_features():
    net = make()
    geometry = net.backbone.geometry(scene()[0])
    for level, (nearest, weights) in enumerate(zip(geometry.nearest, geometry.weights, strict=True)):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]).double())
        coarse = geometry.xyz[4 - level].shape[1]
        # the first points of the finer level are the coarser one
        assert torch.equal(nearest[:, :coarse, 0], torch.arange(coarse, dtype=torch.int32).expand(2, -1))
        assert (weights[:, :coarse, 0] > 1 - 1e-6).all()
        assert (weights[:, coarse:, 0] < 0.9999).any()


def test_a_scene_of_fewer_places_than_samples_is_described():
    xyz, features = scene(8, dtype=torch.float32)
    xyz, features = xyz.repeat(1, 6, 1), features.repeat(1, 1, 6)
    outputs = make(dtype=torch.float32).eval()(xyz, features)
    assert all(value.isfinite().all() for value in outputs.values())
    one_place = make(dtype=torch.float32).eval()(xyz[:, :1].repeat(1, 40, 1), features[:, :, :1].repeat(1, 1, 40))
    assert all(value.isfinite().all() for value in one_place.values())


@pytest.mark.parametrize("sample", ["vote", "seed"])
def test_the_original_head_makes_no_cluster_next_to_the_origin(sample):
    # six seeds 3 m away, and one within 3 cm of the origin; votes are where seeds are
    xyz = torch.tensor([[[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [-3, 0, 0], [0, -3, 0], [0, 0, -3], [0.01, 0.01, 0]]])
    seeds = Seeds(xyz, torch.randn(1, 16, 7), torch.arange(7)[None])
    for skip_origin in (False, True):
        head = VoteHead(16, **{**TINY["head"], "skip_origin": skip_origin}).eval()
        nn.init.zeros_(head.vote.out.weight)
        nn.init.zeros_(head.vote.out.bias)
        centers = head(seeds, sample)["proposal_xyz"]
        assert (centers[0].norm(dim=1) < 0.1).any() != skip_origin
        # the first is taken again where no other is left
        assert torch.equal(centers[0, 6], xyz[0, 0 if skip_origin else 6])


# --- what it does not depend on ---


def test_scenes_of_a_batch_do_not_see_each_other():
    net = make().eval()
    xyz, features = scene(batch=3)
    together = net(xyz, features)
    for i in range(3):
        for key, value in net(xyz[i : i + 1], features[i : i + 1]).items():
            torch.testing.assert_close(value[0], together[key][i], rtol=1e-10, atol=1e-10)


def test_boxes_move_with_the_scene():
    net = make().eval()
    xyz, features = scene()
    shift = torch.tensor([4.0, -2.0, 1.0], dtype=torch.float64)
    still, moved = net(xyz, features), net(xyz + shift, features)
    for key, value in moved.items():
        moves = key.endswith("xyz") or key == "center"
        torch.testing.assert_close(value, still[key] + shift if moves else still[key], rtol=1e-9, atol=1e-9)


def test_training_samples_votes_and_the_test_samples_seeds():
    net, inputs = make(), scene()
    for mode, sample in ((False, "seed"), (True, "vote")):
        found = [copy.deepcopy(net).train(mode)(*inputs, *choice)["proposal_xyz"] for choice in ((), (sample,))]
        assert torch.equal(*found)
    net.eval()
    votes, seeds = (net(*inputs, sample) for sample in ("vote", "seed"))
    assert not torch.equal(votes["proposal_xyz"], seeds["proposal_xyz"])
    # seeds are in sampled order, so that the test's clusters are around the votes of the first of them
    assert torch.equal(seeds["proposal_xyz"], seeds["vote_xyz"][:, :7])


def test_every_parameter_has_a_gradient():
    net = make(dtype=torch.float32)
    outputs = net(*scene(dtype=torch.float32))
    sum(value.square().sum() for value in outputs.values()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("training", [True, False])
def test_autocast_keeps_coordinates_and_types(training):
    net, inputs = make(dtype=torch.float32).train(training), scene(dtype=torch.float32)
    expected = net(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(*inputs)
    sum(value.sum() for value in found.values()).backward()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in found.values())
    assert torch.equal(found["seed_xyz"], expected["seed_xyz"])
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in net.parameters())
    error = (found["vote_xyz"] - expected["vote_xyz"]).abs().max()
    assert 0 < error < 0.5


def test_float64_is_kept_throughout():
    found = make().eval()(*scene())
    assert {value.dtype for value in found.values()} == {torch.float64}
    single = make(dtype=torch.float32).eval()(*(value.float() for value in scene()))
    for key, value in single.items():
        torch.testing.assert_close(value.double(), found[key], rtol=1e-4, atol=1e-4)


def test_points_in_double_precision_are_taken_by_a_single_precision_network():
    xyz, features = scene()
    found = make(dtype=torch.float32).eval()(xyz, features)
    for key, value in make().eval()(xyz, features).items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-4)


def test_network_in_half_precision_computes_coordinates_in_full():
    net, inputs = make(dtype=torch.float32).eval(), scene(dtype=torch.float32)
    found = copy.deepcopy(net).bfloat16()(inputs[0], inputs[1].bfloat16())
    error = (found["vote_xyz"] - net(*inputs)["vote_xyz"]).abs().max()
    assert found["vote_xyz"].dtype == torch.float32
    assert error < 0.3


# --- what it refuses ---


@pytest.mark.parametrize(
    ("xyz", "features", "message"),
    [
        ((50, 3), (2, 50), r"points are \(B, N, 3\), not \(50, 3\)"),
        ((2, 3, 50), (2, 2, 50), r"points are \(B, N, 3\), not \(2, 3, 50\)"),
        ((2, 50, 3), (2, 1, 50), r"features of these points are \(2, 2, 50\), not \(2, 1, 50\)"),
        ((2, 50, 3), (2, 50, 2), r"features of these points are \(2, 2, 50\), not \(2, 50, 2\)"),
        ((2, 50, 3), (1, 2, 50), r"features of these points are \(2, 2, 50\), not \(1, 2, 50\)"),
        ((2, 31, 3), (2, 2, 31), "the network samples 32 points, the scene has 31; repeat some of them"),
        ((2, 0, 3), (2, 2, 0), "the network samples 32 points, the scene has 0"),
    ],
)
def test_other_shapes_are_refused_in_one_line(xyz, features, message):
    with pytest.raises(InputError, match=message) as caught:
        make(dtype=torch.float32)(torch.rand(xyz), torch.rand(features))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_points_of_few_digits_are_refused(dtype):
    xyz, features = scene(dtype=torch.float32)
    with pytest.raises(InputError, match=r"points are float32 or float64, not torch\.\w+: convert them with \.float"):
        make(dtype=torch.float32)(xyz.to(dtype), features)


def test_numbers_that_are_not_finite_are_refused():
    net, (xyz, features) = make(dtype=torch.float32), scene(dtype=torch.float32)
    broken = xyz.clone()
    broken[1, 3, 2] = torch.nan
    with pytest.raises(InputError, match="xyz holds NaN or infinity"):
        net(broken, features)
    with pytest.raises(InputError, match="votes are not finite: either the points' features are not, or its weights"):
        net(xyz, features * torch.inf)
    nn.init.constant_(net.head.vote.out.bias, torch.nan)
    with pytest.raises(InputError, match="training diverged; lower the learning rate"):
        net(xyz, features)


@pytest.mark.parametrize(
    ("part", "arguments", "message"),
    [
        ("backbone", {"num_points": [32, 16, 9]}, "the backbone has four levels"),
        ("backbone", {"radii": [0.2, 0.4, 0.8]}, "the backbone has four levels"),
        ("backbone", {"num_points": [32, 33, 9, 4]}, "num_points of the levels fall and end with at least 3"),
        ("backbone", {"num_points": [32, 16, 9, 2]}, "num_points of the levels fall and end with at least 3"),
        ("backbone", {"num_points": [32.5, 16, 9, 4]}, "num_points of the backbone: whole numbers above 0"),
        ("backbone", {"num_samples": [8, 0, 8, 8]}, "num_samples of the backbone: whole numbers above 0"),
        ("backbone", {"widths": [[4], [], [4], [4]]}, "widths of the backbone: whole numbers above 0"),
        ("backbone", {"out_channels": 0}, "out_channels of the backbone: whole numbers above 0"),
        ("backbone", {"in_channels": -1}, "in_channels of the backbone are at least 0, not -1"),
        ("backbone", {"radii": [0.2, 0.0, 0.8, 1.2]}, "radii of the backbone: metres above 0 are needed, not 0.0"),
        ("backbone", {"radii": [0.2, float("nan"), 0.8, 1.2]}, "radii of the backbone: metres above 0 are needed"),
        ("backbone", {"speed": 3}, "the network's arguments do not fit: .*'speed'"),
        ("head", {"num_proposals": 17}, "17 proposals cannot be made of 16 seeds"),
        ("head", {"num_proposals": 0}, "num_proposals of the head: whole numbers above 0"),
        ("head", {"num_headings": 0}, "num_headings of the head: whole numbers above 0"),
        ("head", {"widths": []}, "widths of the head: whole numbers above 0"),
        ("head", {"radius": -0.3}, "radius of the head: metres above 0 are needed, not -0.3"),
        ("head", {"mean_sizes": []}, "mean_sizes of the head are three numbers for each class"),
        ("head", {"mean_sizes": [[1, 2]]}, "mean_sizes of the head are three numbers for each class"),
        ("head", {"mean_sizes": [[1, 2, 0]]}, "mean_sizes of the head: metres above 0 are needed, not 0"),
        ("head", {"mean_sizes": [1, 2, 3]}, "the network's arguments do not fit"),
    ],
)
def test_sizes_that_are_none_are_refused_in_one_line(part, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        build_network(changed(part, **arguments))
    assert "\n" not in str(caught.value)


def test_unknown_networks_and_arguments_are_refused():
    with pytest.raises(InputError, match="unknown network 'votenets'; choose one of votenet"):
        build_network({**TINY, "name": "votenets"})
    with pytest.raises(InputError, match="network votenet takes no 'neck'; choose from backbone, head"):
        build_network({**TINY, "neck": {}})
    with pytest.raises(InputError, match="the network's arguments do not fit"):
        build_network({"name": "votenet", "backbone": None, "head": None})
    with pytest.raises(TypeError):
        VoteHead(16)
    with pytest.raises(TypeError):
        Backbone(1)
