"""Scores of a network against the same ones computed out loud, layer by layer, and what must not change them."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from projects.cp3 import scoring
from projects.cp3.groups import find_groups
from projects.cp3.importance import neighborhoods
from projects.cp3.model import SetAbstraction
from projects.cp3.scoring import Criterion, score
from shared.errors import InputError
from shared.kernels.points import furthest_point_sample

PLAIN = {"ce": "none", "kr": "none"}
SA, INV = "encoder.stages.0.0.scales.0.convs", "encoder.stages.0.1"
BLOCKS = {"blocks": [1, 2, 1], "strides": [1, 2, 1], "expansion": 2}


# --- the oracle: one PointNeXt of a stem, a residual set abstraction, an InvResMLP and a group of all ---


def chip_out_loud(A):
    rows = A.detach().double().flatten(2).numpy()

    def nuclear(x):
        return np.linalg.svd(x, compute_uv=False).sum()

    return np.array([[nuclear(x) - nuclear(np.delete(x, c, 0)) for c in range(len(x))] for x in rows])


def rank_out_loud(A):
    return torch.linalg.matrix_rank(A.detach()).double().numpy()


def corr_out_loud(G, Q):
    found = np.zeros(G.shape[:2])
    for b, c in np.ndindex(found.shape):
        if (g := G[b, c].detach().double().numpy()).std() > 0:
            found[b, c] = max(abs(np.corrcoef(g, Q[b, :, a].double().numpy())[0, 1]) for a in range(3))
    return found


def norm_out_loud(G, Q):
    return np.linalg.norm(G.detach().double().numpy(), axis=-1)


def unit(values):
    size = np.linalg.norm(values)
    return values / size if size > 0 else values


def responses_out_loud(net, xyz, features, plain_group):
    """Give for each group its places: (A or None, G, Q, the same around dropped points or None)."""
    stem = F.conv1d(features, net.encoder.stem.weight, net.encoder.stem.bias)
    block, inv = net.encoder.stages[0]
    centroids = furthest_point_sample(xyz, xyz.shape[1] // 2).long()
    dropped = torch.tensor([[i for i in range(xyz.shape[1]) if i not in own] for own in centroids.tolist()])
    rows = torch.arange(len(xyz))[:, None]

    def around(index):
        Q = xyz[rows, index]
        scale = block.scales[0]
        (conv, norm, _), (last, last_norm) = scale.convs
        A1 = F.relu(
            norm(F.conv2d(plain_group(xyz, stem, Q, scale.radius, scale.num_samples, scale.radius), conv.weight))
        )
        A2 = last_norm(F.conv2d(A1, last.weight))
        return Q, A1, A2, F.relu(A2.amax(-1) + block.skip(stem.mT[rows, index].mT))

    Q, A1, A2, out = around(centroids)
    Q_dis, A1_dis, A2_dis, out_dis = around(dropped)
    local = inv.aggregation
    conv, norm, _ = local.convs[0]
    A3 = F.relu(norm(F.conv2d(plain_group(Q, out, Q, local.radius, local.num_samples, local.radius), conv.weight)))
    wide = F.relu(inv.expand[1](F.conv1d(A3.amax(-1), inv.expand[0].weight)))
    after = F.relu(out + inv.project[1](F.conv1d(wide, inv.project[0].weight)))
    whole = [torch.cat([Q.mT, after], 1)[:, :, None]]
    for conv, norm, _ in net.encoder.stages[1][0].scales[0].convs:
        whole.append(F.relu(norm(F.conv2d(whole[-1], conv.weight))))
    name = "encoder.stages.1.0.scales.0.convs"
    return {
        "encoder.stem": [(None, stem, xyz, None)],
        f"{SA}.0.0": [(A1, A1.amax(-1), Q, (A1_dis, A1_dis.amax(-1), Q_dis))],
        f"{SA}.1.0": [(A2, out, Q, (A2_dis, out_dis, Q_dis)), (None, after, Q, None)],
        f"{INV}.aggregation.convs.0.0": [(A3, A3.amax(-1), Q, None)],
        f"{INV}.expand.0": [(None, wide, Q, None)],
        f"{name}.0.0": [(whole[1], whole[1][:, :, 0], Q, None)],
        f"{name}.1.0": [(whole[2], whole[2][:, :, 0], Q, None)],
    }


def base_out_loud(base, A, G, Q):
    if base == "chip":
        return chip_out_loud(G if A is None else A)
    return rank_out_loud(neighborhoods(G, Q) if A is None or A.shape[2] == 1 else A)


def scores_out_loud(net, clouds, plain_group, base, kr, released=False):
    """Give {group: (base, ce, kr)}: means over clouds, each place of unit length, their sum of unit length."""
    found = {}
    for name, places in responses_out_loud(net, *clouds, plain_group).items():
        parts = [[], [], []]
        for A, G, Q, others in places:
            ce = unit(corr_out_loud(G, Q).mean(0))
            parts[0].append(unit(base_out_loud(base, A, G, Q).mean(0)))
            parts[1].append(ce)
            if others is None:
                instead = unit(norm_out_loud(G, Q).mean(0)) if A is None else ce
                parts[2].append(instead if released else 0 * ce)
            else:
                A, G, Q = others
                again = {
                    "ce": corr_out_loud,
                    "norm": norm_out_loud,
                    "base": lambda G, Q, A=A: base_out_loud(base, A, G, Q),
                }
                parts[2].append(unit(again[kr](G, Q).mean(0)))
        found[name] = [unit(sum(part)) for part in parts]
    return found


@pytest.fixture(scope="module")
def blocks(tiny, cloud):
    """The oracle's network, its groups and clouds."""
    net = tiny("pointnext_s", **BLOCKS)
    inputs = cloud("pointnext_s", batch=4, points=24)
    return net, find_groups(net, *(part[:1] for part in inputs)), inputs


@pytest.mark.parametrize(
    ("base", "kr", "released"),
    [("chip", "ce", False), ("hrank", "base", False), ("chip", "base", False), ("hrank", "norm", True),
     ("chip", "ce", True)],
)  # fmt: skip
def test_scores_equal_those_computed_out_loud(blocks, plain_group, base, kr, released):
    net, groups, inputs = blocks
    criterion = Criterion(
        base=base,
        ce="corr",
        kr=kr,
        unsampled="released" if released else "zero",
        base_weight=1,
        ce_weight=0.5,
        kr_weight=2,
    )
    found = score(net, groups, [inputs], criterion)
    expected = scores_out_loud(net, inputs, plain_group, base, kr, released)
    assert list(found) == list(expected)
    for name, parts in expected.items():
        for part, values in zip(("base", "ce", "kr"), parts, strict=True):
            np.testing.assert_allclose(getattr(found[name], part), values, rtol=0, atol=2e-5, err_msg=f"{name} {part}")
        total = parts[0] + 0.5 * parts[1] + 2 * parts[2]
        np.testing.assert_allclose(found[name].total, total, rtol=0, atol=1e-4, err_msg=name)
    recycled = {name for name, parts in found.items() if parts.kr.any()}
    assert recycled == (set(found) if released else {f"{SA}.0.0", f"{SA}.1.0"})


def test_other_ways_to_tie_responses_to_coordinates(blocks, plain_group):
    net, groups, inputs = blocks
    places = responses_out_loud(net, *inputs, plain_group)
    for axes in ("max", "mean", "min"):
        found = score(net, groups, [inputs], Criterion(base="none", ce="released_l2", kr="none", axes=axes))
        for name in (f"{SA}.0.0", "encoder.stem"):
            _, G, Q, _ = places[name][0]
            D = np.linalg.norm(G.detach().double().numpy()[:, :, None] - Q.mT.double().numpy()[:, None], axis=-1)
            expected = getattr(D / np.linalg.norm(D, axis=1, keepdims=True), axes)(-1).mean(0)
            np.testing.assert_allclose(found[name].ce, unit(expected), rtol=0, atol=1e-5)
            assert torch.equal(found[name].total, found[name].ce)


def test_recycling_the_sampled_points_gives_the_coordinate_enhanced_score(tiny, cloud, traced, monkeypatch):
    """The same support: with the centroids in place of the dropped points the second score is the first."""
    monkeypatch.setattr(scoring, "discarded", lambda centroids, num_points, generator: centroids)
    for kind, ce in (("pointnext_s", "corr"), ("pointnet2_msg", "released_l2")):
        found = score(tiny(kind), traced(kind), [cloud(kind)], Criterion(ce=ce))
        sampled = [name for name, parts in found.items() if parts.kr.any()]
        last = max(int(name.split(".")[2]) for name in found if "stages" in name)
        assert sampled == [name for name in found if "stages" in name and f"stages.{last}." not in name]
        assert all(torch.equal(found[name].kr, found[name].ce) for name in sampled)


@pytest.mark.parametrize("kind", ["pointnext_s", "pointnet2", "scenes_b", "parts"])
def test_scores_do_not_depend_on_how_clouds_are_put_into_batches(tiny, cloud, traced, kind):
    net, inputs = tiny(kind), cloud(kind, batch=5)
    groups = [group for group in traced(kind) if not group.name.startswith("globals.")]
    criterion = Criterion(ce="corr", seed=3)
    whole = score(net, groups, [inputs], criterion)
    for sizes in ([2, 3], [1] * 5):
        parts = score(net, groups, zip(*(x.split(sizes) for x in inputs), strict=True), criterion)
        for name, expected in whole.items():
            for part in ("base", "ce", "kr"):
                torch.testing.assert_close(getattr(parts[name], part), getattr(expected, part), rtol=0, atol=1e-5)


def test_drawn_points_follow_the_seed(tiny, cloud, traced):
    """A stage of stride 4 draws a third of the points that it dropped."""
    net, inputs, groups = tiny("pointnet2"), cloud("pointnet2"), traced("pointnet2")
    first, again, other = (score(net, groups, [inputs], Criterion(ce="corr", seed=seed)) for seed in (0, 0, 1))
    name = "encoder.stages.1.0.scales.0.convs.0.0"
    assert torch.equal(first[name].kr, again[name].kr)
    assert torch.equal(first[name].ce, other[name].ce)
    assert not torch.allclose(first[name].kr, other[name].kr, atol=1e-4)


def test_every_kind_of_network_is_scored(tiny, cloud, traced, kind):
    """Decoders too; what leads to the shape's own numbers has no points and is kept."""
    groups = [group for group in traced(kind) if not group.name.startswith("globals.")]
    corr = {"ce": "corr", "kr": "base", "unsampled": "released"}
    for criterion in (Criterion(), Criterion(base="hrank", **corr)):
        found = score(tiny(kind), groups, [cloud(kind)], criterion)
        for group in groups:
            parts = found[group.name]
            assert parts.total.shape == (group.width,)
            assert parts.total.dtype == torch.float64
            assert parts.total.isfinite().all()
            assert parts.base.norm() == pytest.approx(1) or not parts.base.any()
            assert parts.ce.norm() == pytest.approx(1)


def test_shared_places_are_summed(blocks):
    """The stage's outputs are scored behind the sampling block and behind its InvResMLP."""
    net, groups, inputs = blocks
    found = {}
    shared = next(group for group in groups if len(group.responses) == 2)
    for keep in ([0], [1], [0, 1]):
        group = copy.copy(shared)
        object.__setattr__(group, "responses", tuple(shared.responses[i] for i in keep))
        found[len(keep), keep[0]] = score(net, [group], [inputs], Criterion(ce="corr", kr="none"))[group.name].ce
    both = found[1, 0] + found[1, 1]
    torch.testing.assert_close(found[2, 0], both / both.norm())


def test_size_of_weights_and_random(blocks):
    net, groups, _ = blocks
    found = score(net, groups, [], Criterion(base="l1", **PLAIN))
    stem = net.encoder.stem.weight.detach().abs().sum((1, 2)).double()
    torch.testing.assert_close(found["encoder.stem"].total, stem / stem.norm())
    skip = net.encoder.stages[0][0].skip.weight.detach().abs().flatten(1).sum(1).double()
    layers = [net.get_submodule(name).weight.detach().abs().flatten(1).sum(1).double()
              for name in (f"{SA}.1.0", "encoder.stages.0.1.project.0")]  # fmt: skip
    both = sum(x / x.norm() for x in (skip, *layers))
    torch.testing.assert_close(found[f"{SA}.1.0"].total, both / both.norm())
    first, again, other = (score(net, groups, [], Criterion(base="random", seed=s, **PLAIN)) for s in (4, 4, 5))
    for name, parts in first.items():
        assert torch.equal(parts.total, again[name].total)
        assert not torch.equal(parts.total, other[name].total)
        assert not parts.ce.any()
        assert not parts.kr.any()


def test_released_replacements_need_recycling(blocks):
    net, groups, inputs = blocks
    found = score(net, groups, [inputs], Criterion(kr="none", unsampled="released"))
    assert not any(parts.kr.any() for parts in found.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": "l2"}, "base is one of chip, hrank, l1, random, none, not 'l2'"),
        ({"ce": "pearson"}, "ce is one of corr, released_l2, none, not 'pearson'"),
        ({"kr": "l2"}, "kr is one of ce, base, norm, none, not 'l2'"),
        ({"axes": "sum"}, "axes is one of max, mean, min, not 'sum'"),
        ({"unsampled": "one"}, "unsampled is one of zero, released, not 'one'"),
        ({"kr_weight": -1.0}, "weights of the three scores are not negative"),
        ({"base": "none", **PLAIN}, "all none: nothing to rank channels by"),
        ({"ce": "none"}, "kr=ce recycles the coordinate-enhanced score"),
        ({"base": "l1", "kr": "base"}, "kr=base recycles chip or hrank, not base=l1"),
    ],
)
def test_criteria_that_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Criterion(**arguments)


def hooked(net):
    return any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_network_is_left_as_it_was(blocks):
    net, groups, inputs = copy.deepcopy(blocks[0]), blocks[1], blocks[2]
    net.train()
    net.encoder.stages[0].eval()
    state, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    score(net, groups, [inputs], Criterion())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    for batches, message in (
        ([], "no calibration clouds"),
        ([(inputs[0], inputs[1] * torch.nan)], "the responses of encoder.stem are not finite"),
        ([(inputs[0] * torch.nan, inputs[1])], "NaN or infinity"),
        ([(inputs[0][:, :1], inputs[1][:, :, :1])], "too small"),
    ):
        for criterion in (Criterion(), Criterion(base="none", kr="none"), Criterion(base="hrank", **PLAIN)):
            with pytest.raises(InputError, match=message):
                score(net, groups, batches, criterion)
    assert [module.training for module in net.modules()] == modes
    assert not hooked(net)


def test_weights_that_are_not_finite_are_named(blocks):
    net, groups, inputs = copy.deepcopy(blocks[0]), blocks[1], blocks[2]
    net.encoder.stages[0][0].scales[0].convs[1][1].weight.data[2] = torch.inf
    with pytest.raises(InputError, match=r"the responses of encoder.stages.0.0.*not finite; check the weights"):
        score(net, groups, [inputs], Criterion())
    net.encoder.stem.weight.data[0] = torch.nan
    with pytest.raises(InputError, match=r"the responses of encoder.stem are not finite"):
        score(net, groups, [], Criterion(base="l1", **PLAIN))


# --- networks of others ---


class Own(nn.Module):
    """Linear layers with channels last, and a block that samples."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Sequential(nn.Linear(3, 6), nn.ReLU())
        self.sample = SetAbstraction(6, 2, [[8]], [0.8], [4])
        self.last = nn.Linear(8, 2)

    def forward(self, xyz):
        f = self.lift(xyz).mT
        few = furthest_point_sample(xyz, xyz.shape[1] // 2)
        return self.last(self.sample(xyz, f, few)[1].amax(-1))


class Hidden(nn.Module):
    """Gives its part the coordinates in another layout."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Conv1d(3, 6, 1), nn.ReLU(), nn.Conv1d(6, 5, 1))
        self.last = nn.Linear(5, 2)

    def forward(self, flat):
        return self.last(self.part(flat).amax(-1))


def test_a_users_network_with_a_sampling_block():
    torch.manual_seed(0)
    net, xyz = Own().eval(), torch.rand(3, 20, 3)
    groups = find_groups(net, xyz[:1])
    assert [group.name for group in groups] == ["lift.0", "sample.scales.0.convs.0.0"]
    found = score(net, groups, [(xyz,)], Criterion(ce="corr"))
    responses = net.lift[0](xyz).mT  # channels last: what a ReLU gives in this layout is not taken for channels
    np.testing.assert_allclose(found["lift.0"].ce, unit(corr_out_loud(responses, xyz).mean(0)), atol=1e-6)
    np.testing.assert_allclose(found["lift.0"].base, unit(chip_out_loud(responses).mean(0)), atol=1e-6)
    assert not found["lift.0"].kr.any()
    assert found["sample.scales.0.convs.0.0"].kr.norm() == pytest.approx(1)


def test_a_users_network_without_coordinates_is_told_what_to_do():
    torch.manual_seed(0)
    net, flat = Hidden().eval(), torch.rand(2, 3, 20)
    groups = find_groups(net, flat[:1])
    for criterion in (Criterion(), Criterion(base="hrank", **PLAIN)):
        with pytest.raises(InputError, match=r"no coordinates for the 20 points of part.1: call a module around it"):
            score(net, groups, [(flat,)], criterion)
    found = score(net, groups, [(flat,)], Criterion(**PLAIN))
    np.testing.assert_allclose(found["part.0"].total, unit(chip_out_loud(net.part[:2](flat)).mean(0)), atol=1e-6)
