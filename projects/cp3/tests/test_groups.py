"""Groups of channels against the table of the paper's networks, by the dead-channel test, and on networks of others."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from projects.cp3.groups import KNOWN, codewords, find_groups
from projects.cp3.model import GroupedConv
from projects.cp3.pruning import choose, prune, widths
from shared.errors import InputError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def table(groups):
    """Write groups as {name: (producers, {reader: (columns in front, behind)})}; the channels are in order between."""
    written = {}
    for group in groups:
        readers = {}
        for name, columns in group.columns.items():
            front = int((columns >= 0).int().argmax())
            behind = len(columns) - front - group.width
            order = [*[-1] * front, *range(group.width), *[-1] * behind]
            assert columns.tolist() == order, (group.name, name)
            readers[name] = (front, behind)
        written[group.name] = (group.producers, readers)
    return written


def alone(*names):
    return dict.fromkeys(names, (0, 0))


def sa(stage, scale=0):
    return f"encoder.stages.{stage}.0.scales.{scale}.convs"


def inner(conv, behind):
    """Write the group of a layer that only its norm and the next layer read."""
    return (f"{conv}.0",), alone(f"{conv}.1", behind)


def kill(net, group, channels):
    """Let channels of a group put out 0: producers' rows and biases, and what norms make of them."""
    for name in group.producers:
        layer = net.get_submodule(name)
        layer.weight.data[channels] = 0
        if layer.bias is not None:
            layer.bias.data[channels] = 0
    for name, columns in group.columns.items():
        if isinstance(norm := net.get_submodule(name), NORMS):
            read = torch.isin(columns, channels)
            norm.weight.data[read] = 0
            norm.bias.data[read] = 0


def prune_dead(net, groups, group, channels, inputs, **options):
    """Kill channels and cut exactly them -> what the dead network gives, what the narrow one gives."""
    state = copy.deepcopy(net.state_dict())
    kill(net, group, channels)
    plan = {other.name: torch.arange(other.width) for other in groups}
    plan[group.name] = torch.tensor([c for c in range(group.width) if c not in channels])
    found = net(*inputs), prune(net, groups, plan, **options)(*inputs)
    net.load_state_dict(state)
    return found


def check_dead_channels(net, groups, inputs, channels=(0, 2), only=None):
    """Check that each group can lose dead channels without a change, and that these were not dead before."""
    before = net(*inputs)
    changed = []
    for group in groups if only is None else only:
        gone = torch.tensor([c for c in channels if c < group.width - 1])
        dead, narrow = prune_dead(net, groups, group, gone, inputs)
        torch.testing.assert_close(narrow, dead, rtol=0, atol=1e-5, msg=lambda m, g=group: g.name + m)
        changed.append(not torch.allclose(dead, before, rtol=0, atol=1e-5))
    assert sum(changed) > 0.5 * len(changed)  # a channel may be dead by chance behind a ReLU


# --- the paper's networks ---


def test_pointnext_s(traced):
    """Residual set abstractions: the last layer and the skip layer together, columns behind the three of Δp."""
    expected = {"encoder.stem": (("encoder.stem",), {f"{sa(0)}.0.0": (3, 0), **alone("encoder.stages.0.0.skip")})}
    for k in range(2):
        expected[f"{sa(k)}.0.0"] = inner(f"{sa(k)}.0", f"{sa(k)}.1.0")
        readers = {f"{sa(k)}.1.1": (0, 0), f"{sa(k + 1)}.0.0": (3, 0)}
        if k < 1:
            readers[f"encoder.stages.{k + 1}.0.skip"] = (0, 0)
        expected[f"{sa(k)}.1.0"] = ((f"{sa(k)}.1.0", f"encoder.stages.{k}.0.skip"), readers)
    expected[f"{sa(2)}.0.0"] = inner(f"{sa(2)}.0", f"{sa(2)}.1.0")
    expected[f"{sa(2)}.1.0"] = inner(f"{sa(2)}.1", "head.0.0")
    groups = traced("pointnext_s")
    assert table(groups) == expected
    assert [group.width for group in groups] == [4, 4, 8, 8, 16, 16, 16]


def test_responses_of_pointnext_s(traced):
    """The score of a residual block is taken behind the addition and the activation, its map before the pooling."""
    places = {group.name: group.responses for group in traced("pointnext_s")}
    assert all(len(found) == 1 for found in places.values())
    places = {name: (found[0].grouped, found[0].pooled) for name, found in places.items()}
    assert places["encoder.stem"] == (None, "encoder.stem")
    assert places[f"{sa(1)}.0.0"] == (f"{sa(1)}.0.2", f"{sa(1)}.0.2")
    assert places[f"{sa(1)}.1.0"] == (f"{sa(1)}.1.1", "encoder.stages.1.0.act")
    assert places[f"{sa(2)}.1.0"] == (f"{sa(2)}.1.2", f"{sa(2)}.1.2")


def inv(stage, block):
    return f"encoder.stages.{stage}.{block}"


def stage_of_blocks(k, blocks, behind):
    """Write the groups of a stage of InvResMLPs: one for all outputs along the identities, two free ones a block."""
    producers = [f"{sa(k)}.0.0", *(f"{inv(k, b)}.project.0" for b in range(1, blocks))]
    readers = alone(f"{sa(k)}.0.1", *(f"{inv(k, b)}.project.1" for b in range(1, blocks)))
    readers |= {f"{inv(k, b)}.aggregation.convs.0.0": (3, 0) for b in range(1, blocks)}
    groups = {producers[0]: (tuple(producers), readers | behind)}
    for b in range(1, blocks):
        conv, expand = f"{inv(k, b)}.aggregation.convs.0", f"{inv(k, b)}.expand"
        groups[f"{conv}.0"] = inner(conv, f"{expand}.0")
        groups[f"{expand}.0"] = inner(expand, f"{inv(k, b)}.project.0")
    return groups


def test_pointnext_b(traced):
    expected = {"encoder.stem": (("encoder.stem",), {f"{sa(0)}.0.0": (3, 0)})}
    expected |= stage_of_blocks(0, 2, {f"{sa(1)}.0.0": (3, 0)})
    expected |= stage_of_blocks(1, 3, {f"{sa(2)}.0.0": (3, 0)})
    expected[f"{sa(2)}.0.0"] = inner(f"{sa(2)}.0", "head.0.0")
    groups = traced("pointnext_b")
    assert table(groups) == expected
    places = {group.name: [(r.grouped, r.pooled) for r in group.responses] for group in groups}
    assert places[f"{sa(1)}.0.0"] == [
        (f"{sa(1)}.0.2", f"{sa(1)}.0.2"), (None, f"{inv(1, 1)}.act"), (None, f"{inv(1, 2)}.act"),
    ]  # fmt: skip
    assert places[f"{inv(1, 1)}.expand.0"] == [(None, f"{inv(1, 1)}.expand.2")]


def test_pointnet2(traced):
    expected = {}
    for k, j in itertools.product(range(3), range(3)):
        if j < 2:
            expected[f"{sa(k)}.{j}.0"] = inner(f"{sa(k)}.{j}", f"{sa(k)}.{j + 1}.0")
        else:
            behind = {f"{sa(k + 1)}.0.0": (3, 0)} if k < 2 else alone("head.0.0")
            expected[f"{sa(k)}.{j}.0"] = ((f"{sa(k)}.{j}.0",), {f"{sa(k)}.{j}.1": (0, 0), **behind})
    assert table(traced("pointnet2")) == expected


def test_scales_lie_behind_one_another(traced):
    found = table(traced("pointnet2_msg"))
    # widths 4, 8 and 8 side by side, behind three coordinates
    columns = {0: (3, 16), 1: (7, 8), 2: (15, 0)}
    for scale, place in columns.items():
        name = f"{sa(0, scale)}.2"
        readers = {f"{sa(1, other)}.0.0": place for other in range(3)}
        assert found[f"{name}.0"] == ((f"{name}.0",), {f"{name}.1": (0, 0), **readers})
    assert found[f"{sa(1, 1)}.2.0"][1] == {f"{sa(1, 1)}.2.1": (0, 0), f"{sa(2)}.0.0": (3 + 8, 16)}
    assert len(found) == 3 * 3 * 2 + 3


def test_scenes_with_their_decoder(traced):
    """Propagation reads cat([skip, interpolated]): each level's channels in front of the coarser level's."""
    found = table(traced("scenes_s"))
    assert found["encoder.stem"][1] == {
        f"{sa(0)}.0.0": (3, 0), "encoder.stages.0.0.skip": (0, 0), "decoder.0.convs.0.0": (0, 8),
    }  # fmt: skip
    first, second = found[f"{sa(0)}.1.0"], found[f"{sa(1)}.1.0"]
    assert first[0] == (f"{sa(0)}.1.0", "encoder.stages.0.0.skip")
    assert first[1] == {
        f"{sa(0)}.1.1": (0, 0), f"{sa(1)}.0.0": (3, 0), "encoder.stages.1.0.skip": (0, 0),
        "decoder.1.convs.0.0": (0, 16),
    }  # fmt: skip
    assert second[1] == {f"{sa(1)}.1.1": (0, 0), "decoder.1.convs.0.0": (8, 0)}
    assert found["decoder.1.convs.1.0"] == (
        ("decoder.1.convs.1.0",), {"decoder.1.convs.1.1": (0, 0), "decoder.0.convs.0.0": (4, 0)},
    )  # fmt: skip
    assert found["decoder.0.convs.1.0"][1] == alone("decoder.0.convs.1.1", "head.0.0")
    kept = {name for name in found if not name.startswith("decoder.")}
    assert set(table(traced("scenes_s", ("head.*", "decoder.*")))) == kept


def test_parts(traced):
    whole = {group.name: group for group in traced("parts")}
    found = table([group for name, group in whole.items() if name.startswith("encoder.")])
    assert found["encoder.stem"][1]["decoder.0.convs.0.0"] == (64 + 128 + 3, 8)
    assert found[f"{sa(0)}.2.0"][1]["globals.0.0"] == (0, 0)
    assert found[f"{sa(1)}.2.0"][1]["globals.1.0"] == (0, 0)
    assert table([whole["globals.1.0"]])["globals.1.0"][1] == {"decoder.0.convs.0.0": (64, 3 + 4 + 8)}
    # the head reads the last features, their maxima and their means
    assert whole["decoder.0.convs.1.0"].columns["head.0.0"].tolist() == [*range(4)] * 3


def test_dead_channels_can_go(tiny, cloud, traced, kind):
    check_dead_channels(tiny(kind), traced(kind), cloud(kind))


def test_dead_channel_test_finds_the_released_shift(tiny, cloud, traced):
    net, groups, inputs = tiny("pointnext_s"), traced("pointnext_s"), cloud("pointnext_s")
    stem = groups[0]
    dead, shifted = prune_dead(net, groups, stem, torch.tensor([1]), inputs, released_columns=True)
    assert not torch.allclose(shifted, dead, atol=1e-3)


def test_network_is_left_as_it_was(tiny, cloud, traced):
    net = tiny("pointnext_s")
    net.train()
    net.encoder.stem.eval()
    state = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    find_groups(net, *cloud("pointnext_s", batch=1, points=16))
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    with pytest.raises(InputError):
        find_groups(net, *cloud("pointnext_s", batch=1, points=3))
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


# --- networks of others ---


def edges(f, xyz, k):
    """Group features by the nearest points -> cat([Δp, f_j, f_i]), (B, 3 + 2 C, N, K)."""
    nearest = torch.cdist(xyz, xyz).topk(k, largest=False).indices
    rows = torch.arange(len(f))[:, None, None]
    around = f.mT[rows, nearest].permute(0, 3, 1, 2)
    dp = (xyz[rows, nearest] - xyz[:, :, None]).permute(0, 3, 1, 2)
    return torch.cat([dp, around, f[..., None].expand_as(around)], 1)


class Edges(nn.Module):
    """DGCNN-like, with Δp in front."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(3, 6, 1)
        self.first = nn.Sequential(nn.Conv2d(15, 8, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2, inplace=True))
        self.second = nn.Conv2d(19, 10, 1)
        self.gather = nn.Conv1d(6 + 8 + 10, 12, 1)
        self.out = nn.Linear(24, 4)

    def forward(self, xyz):
        f0 = F.relu(self.stem(xyz.mT))
        f1 = self.first(edges(f0, xyz, 5)).amax(-1)
        f2 = F.leaky_relu(self.second(edges(f1, xyz, 5)), 0.2).max(-1).values
        f = F.relu(self.gather(torch.cat([f0, f1, f2], 1)))
        return self.out(torch.cat([f.amax(-1), f.mean(-1)], 1))


class Residual(nn.Module):
    """PointNet-like: a layer called twice, residual sums, two branches, a flattened map."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 1)
        self.shared = nn.Conv1d(8, 8, 1)
        self.norm = nn.BatchNorm1d(8)
        self.act = nn.ReLU(inplace=True)
        self.wide = nn.Conv1d(8, 12, 1)
        self.left, self.right = nn.Conv1d(12, 5, 1), nn.Conv1d(12, 5, 1)
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(5 * 16, 9), nn.ReLU(), nn.Linear(9, 4))

    def forward(self, xyz):
        x = self.act(self.stem(xyz.mT))
        x = x + self.norm(self.shared(x))
        x = x + self.norm(self.shared(x))
        x = F.relu(self.wide(x))
        return {"logits": self.out(F.relu(self.left(x)) + self.right(x)), "names": None}


class Rows(nn.Module):
    """Linear layers over (B, N, C)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 7), nn.Linear(7, 9), nn.Linear(9, 4)
        self.act, self.unused = nn.ReLU(), nn.Linear(5, 5)

    def forward(self, xyz):
        return self.c(self.act(self.b(self.act(self.a(xyz)))).amax(1))


def points(batch=2, count=16, seed=0):
    return torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(seed))


def build(kind):
    torch.manual_seed(0)
    return kind().eval()


class Logits(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, xyz):
        out = self.net(xyz)
        return out["logits"] if isinstance(out, dict) else out


def test_a_dgcnn_like_network():
    net = build(Edges)
    groups = find_groups(net, points(1))
    found = {group.name: group for group in groups}
    assert list(found) == ["stem", "first.0", "second", "gather"]
    assert found["stem"].columns["first.0"].tolist() == [-1, -1, -1, *range(6), *range(6)]
    assert found["stem"].columns["gather"].tolist() == [*range(6), *[-1] * 18]
    assert found["first.0"].columns["second"].tolist() == [-1, -1, -1, *range(8), *range(8)]
    assert found["first.0"].columns["gather"].tolist() == [*[-1] * 6, *range(8), *[-1] * 10]
    assert found["second"].columns["gather"].tolist() == [*[-1] * 14, *range(10)]
    assert found["gather"].columns["out"].tolist() == [*range(12)] * 2
    assert found["first.0"].responses[0].grouped == "first.2"
    check_dead_channels(net, groups, [points()])


def test_a_network_with_shared_layers_sums_and_a_flattened_map():
    net = build(Residual)
    groups = find_groups(net, points(1))
    found = {group.name: group for group in groups}
    assert list(found) == ["stem", "wide", "left", "out.1"]
    assert found["stem"].producers == ("stem", "shared")
    assert set(found["stem"].columns) == {"shared", "norm", "wide"}
    assert found["wide"].columns["right"].tolist() == [*range(12)]
    assert found["left"].producers == ("left", "right")
    assert found["left"].columns["out.1"].tolist() == [c for c in range(5) for _ in range(16)]
    assert found["out.1"].columns["out.3"].tolist() == [*range(9)]
    wrapped = Logits(net).eval()
    check_dead_channels(wrapped, find_groups(wrapped, points(1)), [points()])


def test_linear_layers_of_points_and_one_that_never_runs():
    net = build(Rows)
    groups = find_groups(net, points(1))
    assert table(groups) == {"a": (("a",), alone("b")), "b": (("b",), alone("c"))}
    check_dead_channels(net, groups, [points()])


def net_of(forward, **modules):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in modules.items():
                setattr(self, name, module)

        def forward(self, xyz):
            return forward(self, xyz.mT)

    torch.manual_seed(0)
    return Net().eval()


def conv(a, b, **options):
    return nn.Conv1d(a, b, 1, **options)


@pytest.mark.parametrize(
    ("modules", "forward", "message"),
    [
        ({"n": nn.LayerNorm([8, 16])}, lambda s, x: s.b(s.n(s.a(x))), "a leads to n, a LayerNorm.*name a in keep"),
        ({"n": nn.GroupNorm(2, 8)}, lambda s, x: s.b(s.n(s.a(x))), "a leads to n, a GroupNorm"),
        ({"n": nn.GroupNorm(2, 8, affine=False)}, lambda s, x: s.b(s.n(s.a(x))), "of a are mixed on their way to b"),
        ({"n": nn.PReLU()}, lambda s, x: s.b(s.n(s.a(x))), "a leads to n, a PReLU"),
        ({"n": conv(8, 8, groups=4)}, lambda s, x: s.b(s.n(s.a(x))), "a leads to n, a convolution in groups"),
        ({"a": conv(3, 9, groups=3), "b": conv(9, 2)}, lambda s, x: s.b(s.a(x)), "a is a convolution in groups"),
        ({}, lambda s, x: s.b(s.a(x) + s.a(x).flip(1)), "of a are mixed on their way to b"),
        ({}, lambda s, x: s.b(s.a(x).softmax(1)), "of a are mixed on their way to b"),
        ({}, lambda s, x: s.b(torch.ones(8, 8) @ s.a(x)), "of a are mixed on their way to b"),
        ({}, lambda s, x: s.b((s.a(x)[:, :4] * s.a(x)[:, 4:]).repeat(1, 2, 1)), "of a are mixed on their way to b"),
        ({}, lambda s, x: s.b(s.a(x).flip(1)), "b reads the channels of a in part or in another order"),
        ({}, lambda s, x: s.b(s.a(x).view(-1, 2, 4, 16).transpose(1, 2).flatten(1, 2)), "in another order"),
        (
            {"b": conv(4, 2), "c": conv(4, 2)}, lambda s, x: s.b(s.a(x).chunk(2, 1)[0]) + s.c(s.a(x).chunk(2, 1)[1]),
            "b reads the channels of a in part",
        ),
        ({"c": conv(11, 2)}, lambda s, x: s.b(s.a(x)) + s.c(torch.cat([x, s.a(x).roll(1, 1)], 1)), "c reads the chan"),
        ({"c": conv(4, 8), "d": conv(3, 8)}, lambda s, x: s.b(s.d(x) + s.c(s.a(x)[:, 4:])), "c reads the channels"),
        (
            {"c": conv(3, 4), "b": conv(12, 2)},
            lambda s, x: s.b(torch.cat([s.a(x), s.c(x)], 1) + torch.cat([s.c(x), s.a(x)], 1)),
            "of [ac] are mixed|crosswise",
        ),
        (
            {"c": conv(3, 4)}, lambda s, x: s.b(s.a(x) + F.pad(s.c(x), (0, 0, 0, 4))),
            "of a and c are added crosswise; name both",
        ),
        ({"c": conv(3, 4)}, lambda s, x: s.b(s.a(x) + s.c(x).repeat(1, 2, 1)), "added crosswise"),
        (
            {"c": conv(3, 8), "d": conv(3, 8), "e": conv(12, 2)},
            lambda s, x: s.b(s.a(x) + s.c(x)) + s.b(s.c(x) + s.d(x))
            + s.e(F.pad(s.a(x), (0, 0, 0, 4)) + F.pad(s.d(x), (0, 0, 4, 0))),
            "of a and d are added crosswise",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned_along_is_refused(modules, forward, message):
    net = net_of(forward, **{"a": conv(3, 8), "b": conv(8, 2), **modules})
    with pytest.raises(InputError, match=message) as caught:
        find_groups(net, points(1))
    assert "\n" not in str(caught.value)
    # and the cure works
    find_groups(net, points(1), keep=("a", "c", "d", "n"))


@pytest.mark.parametrize("width", [2, 3, 4, 7, 8, 16, 31, 64])
def test_mixing_is_found_at_every_width(width):
    """Channels' numbers alone would not do: mixed, they have the bits of another one."""
    for forward in (
        lambda s, x: s.b(s.a(x).sum(1, keepdim=True).expand(-1, width, -1)),
        lambda s, x: s.b(torch.cat([s.a(x)[:, :1] + s.a(x)[:, 1:2], s.a(x)[:, 1:]], 1)),
    ):
        with pytest.raises(InputError, match="are mixed on their way"):
            find_groups(net_of(forward, a=conv(3, width), b=conv(width, 2)), points(1))


@pytest.mark.parametrize("width", [1, 2, 3, 6, 7, 35, 300, 1024])
def test_no_two_channels_make_up_a_third(width):
    words = codewords(width)
    assert len({tuple(word) for word in words.tolist()}) == width
    assert len(words.sum(1).unique()) == 1
    assert words.shape[1] <= (width - 1).bit_length() + 3


def test_layers_added_to_what_stays_whole_stay_whole():
    def forward(s, x):
        x = F.relu(s.a(x) + s.b(x))
        return s.d(F.relu(s.c(x)))

    net = net_of(forward, a=conv(3, 8), b=conv(3, 8), c=conv(8, 6), d=conv(6, 2))
    assert [group.producers for group in find_groups(net, points(1))] == [("a", "b"), ("c",)]
    assert [group.name for group in find_groups(net, points(1), keep=("b",))] == ["c"]
    net = net_of(lambda s, x: (s.c(s.a(x) + s.b(x)), s.b(x)), a=conv(3, 8), b=conv(3, 8), c=conv(8, 2))
    assert find_groups(net, points(1)) == []


def test_keep_of_a_part_of_a_residual_block(tiny, cloud):
    net, inputs = tiny("pointnext_s"), cloud("pointnext_s")
    groups = find_groups(net, *cloud("pointnext_s", batch=1, points=16), keep=("head.*", "*.skip"))
    assert [group.width for group in groups] == [4, 4, 8, 16, 16]
    plan = {group.name: torch.arange(group.width // 2) for group in groups}
    assert prune(net, groups, plan)(*inputs).isfinite().all()


def test_hooks_go_when_the_network_fails(tiny, cloud, monkeypatch):
    net = tiny("pointnet2")
    calls = itertools.count()
    original = GroupedConv.forward

    def failing(self, *arguments):
        if next(calls) == 5:
            raise RuntimeError("out of memory")
        return original(self, *arguments)

    monkeypatch.setattr(GroupedConv, "forward", failing)
    net.train()
    with pytest.raises(RuntimeError, match="out of memory"):
        find_groups(net, *cloud("pointnet2", batch=1, points=16))
    assert net.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


# --- Torch-Pruning ---


class FeaturesFirst(nn.Module):
    """PointNeXt-S of plain torch layers that concatenates [f_j, Δp], which Torch-Pruning can follow."""

    def __init__(self, width=8, stages=3):
        super().__init__()
        self.stem = nn.Conv1d(3, width, 1)
        sizes = [width * 2**k for k in range(stages + 1)]
        pairs = list(itertools.pairwise(sizes))
        self.inside = nn.ModuleList(nn.Conv2d(a + 3, a, 1, bias=False) for a, _ in pairs)
        self.inside_norm = nn.ModuleList(nn.BatchNorm2d(a) for a, _ in pairs)
        self.last = nn.ModuleList(nn.Conv2d(a, b, 1, bias=False) for a, b in pairs)
        self.last_norm = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        self.skip = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in pairs)
        self.head = nn.Linear(sizes[-1], 5)

    def forward(self, xyz):
        f = self.stem(xyz.mT)
        for inside, norm, last, last_norm, skip in zip(
            self.inside, self.inside_norm, self.last, self.last_norm, self.skip, strict=True
        ):
            few = xyz[:, : xyz.shape[1] // 2]
            nearest = torch.cdist(few, xyz).topk(4, largest=False).indices
            around = f.mT[0][nearest[0]].permute(2, 0, 1)[None]
            dp = (xyz[0][nearest[0]] - few[0][:, None]).permute(2, 0, 1)[None]
            g = last_norm(last(F.relu(norm(inside(torch.cat([around, dp], 1)))))).amax(-1)
            own = f.gather(2, torch.arange(few.shape[1])[None, None].expand(1, f.shape[1], -1))
            f, xyz = F.relu(g + skip(own)), few
        return self.head(f.amax(-1))


@pytest.mark.parametrize("rate", [0.35, 0.69])
def test_widths_equal_torch_prunings(rate):
    torch_pruning = pytest.importorskip("torch_pruning", reason="pip install -e .[test]")
    torch.manual_seed(0)
    net = FeaturesFirst().eval()
    peer = copy.deepcopy(net)
    groups = find_groups(net, points(1, 32))
    scores = {group.name: torch.arange(group.width).double() for group in groups}
    narrow = prune(net, groups, choose(groups, scores, widths(groups, rate)))
    torch_pruning.pruner.MetaPruner(
        peer, points(1, 32), torch_pruning.importance.MagnitudeImportance(p=1), pruning_ratio=rate,
        ignored_layers=[peer.head],
    ).step()  # fmt: skip
    ours = {key: tuple(value.shape) for key, value in narrow.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in peer.state_dict().items()}
    assert ours == theirs
    check_dead_channels(net, groups, [points(1, 32)], only=groups[:3])


def test_every_layer_is_of_a_known_kind(tiny, kind):
    """What the tracing knows covers every layer with parameters of our networks."""
    leaves = [m for m in tiny(kind).modules() if next(m.parameters(recurse=False), None) is not None]
    assert all(isinstance(module, KNOWN) for module in leaves)
