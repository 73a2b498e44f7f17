"""Widths, choices, narrow networks and plans."""

import copy
import itertools
import json

import pytest
import torch
from torch import nn

from projects.cp3.groups import Group, find_groups
from projects.cp3.model import GroupedConv, build_network
from projects.cp3.pruning import (
    choose,
    find_rate,
    fit_shapes,
    prune,
    read_plan,
    rounded,
    save_plan,
    share,
    widths,
)
from shared.errors import InputError

SA = "encoder.stages.0.0.scales.0.convs"


def group(name, width):
    return Group(name, width, (name,), {}, ())


def shares(**sizes):
    return [group(name, width) for name, width in sizes.items()]


def plan_of(groups, rate=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(g.width, generator=generator, dtype=torch.float64) for g in groups}
    return choose(groups, scores, widths(groups, rate))


# --- how many ---


@pytest.mark.parametrize(
    ("width", "rate", "left"),
    [(32, 0.69, 9), (64, 0.35, 41), (32, 0.35, 20), (512, 0.68, 163), (10, 0.9, 1), (8, 0.99, 1), (1, 0.5, 1),
     (32, 0, 32), (100, 0.29, 71), (10, 0.3, 7), (10, 0.1, 9)],
)  # fmt: skip
def test_widths_are_cut_off_and_never_zero(width, rate, left):
    assert widths([group("a", width)], rate) == {"a": left}


def test_widths_are_those_of_float64():
    """100 (1 - 0.43) is 57.00000000000001, 100 (1 - 0.42) 58.00000000000001, 1000 (1 - 0.9) 99.99999999999997."""
    assert [int(widths([group("a", c)], r)["a"]) for c, r in ((100, 0.43), (100, 0.42), (1000, 0.9))] == [57, 58, 99]


def test_widths_by_pattern():
    groups = [group(name, 20) for name in ("stem", "stages.0.a", "stages.1.a", "stages.1.b")]
    found = widths(groups, 0.5, {"stages.*": 0.1, "stages.1.*": 0.8, "*.b": 0.0})
    assert found == {"stem": 10, "stages.0.a": 18, "stages.1.a": 3, "stages.1.b": 20}
    with pytest.raises(InputError, match=r"rates: 'stage.\*' fits no layer; those are stem, stages.0.a"):
        widths(groups, 0.5, {"stage.*": 0.1})


@pytest.mark.parametrize(
    ("count", "width", "to", "left"),
    [(21, 32, 8, 24), (19, 32, 8, 16), (3, 32, 8, 8), (31, 32, 8, 32), (5, 6, 8, 6), (6, 20, 1, 6), (13, 64, 16, 16),
     (30, 30, 8, 30)],
)  # fmt: skip
def test_widths_in_multiples(count, width, to, left):
    assert rounded(count, width, to) == left


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_rates_out_of_range(rate):
    with pytest.raises(InputError, match=r"rate is in .0, 1."):
        widths([group("a", 8)], rate)
    with pytest.raises(InputError, match="a is"):
        widths([group("a", 8)], 0.5, {"a": rate})


def test_multiples_below_one():
    with pytest.raises(InputError, match="round_to is at least 1, not 0"):
        widths([group("a", 8)], 0.5, round_to=0)


def test_share_gives_the_network_its_best_channels():
    groups = shares(a=10, b=10)
    scores = {"a": torch.arange(1, 11.0).double(), "b": torch.ones(10).double()}
    # of unit mean square the best of a is 10 / sqrt(38.5) = 1.61, its median 0.9, each of b 1
    kept = share(groups, scores, {"a": 5, "b": 5})
    assert kept == {"a": 4, "b": 6} or kept == {"a": 5, "b": 5}
    better = [value for name in "ab" for value in (scores[name] / scores[name].square().mean().sqrt()).tolist()]
    threshold = sorted(better)[-10]
    assert kept["a"] == sum(v / 38.5**0.5 >= threshold for v in range(1, 11))
    assert sum(kept.values()) == 10


def test_share_does_not_depend_on_the_scale_of_a_layer_and_leaves_a_tenth():
    generator = torch.Generator().manual_seed(0)
    groups = shares(a=40, b=20, c=30)
    scores = {g.name: torch.rand(g.width, generator=generator, dtype=torch.float64) for g in groups}
    counts = widths(groups, 0.6)
    expected = share(groups, scores, counts)
    assert sum(expected.values()) == sum(counts.values())
    assert share(groups, scores | {"b": 1e6 * scores["b"]}, counts) == expected
    spike = torch.zeros(30, dtype=torch.float64)
    spike[3] = 1
    assert share(groups, scores | {"c": spike}, counts)["c"] == 3
    assert share(groups, scores | {"c": 0 * spike}, counts)["c"] == 3
    fixed = share(groups, scores, counts, fixed=["a"])
    assert fixed["a"] == counts["a"]
    assert sum(fixed.values()) == sum(counts.values())
    assert all(count % 4 == 0 or count == 30 for count in share(groups, scores, counts, round_to=4).values())
    assert share(groups, scores, widths(groups, 0.99)) == {"a": 4, "b": 2, "c": 3}


def test_choose_keeps_the_best_in_their_order_and_the_first_of_equal_ones():
    groups = shares(a=6, b=4)
    scores = {"a": torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7]), "b": torch.ones(4)}
    plan = choose(groups, scores, {"a": 3, "b": 2})
    assert {name: kept.tolist() for name, kept in plan.items()} == {"a": [1, 3, 5], "b": [0, 1]}


@pytest.mark.parametrize("cut", [0.0, 0.1, 0.578, 0.9])
def test_find_rate_reaches_the_cut_with_the_smallest_rate(cut):
    rate = find_rate(lambda r: (1 - r) ** 2, cut)
    assert rate == pytest.approx(1 - (1 - cut) ** 0.5, abs=2e-6)
    assert (1 - rate) ** 2 <= 1 - cut
    steps = find_rate(lambda r: int(32 * (1 - r)), cut)
    assert int(32 * (1 - steps)) <= 32 * (1 - cut) < int(32 * (1 - steps)) + 1


def test_cuts_that_cannot_be():
    for cut in (-0.1, 1.0):
        with pytest.raises(InputError, match=r"flops_cut is in .0, 1."):
            find_rate(lambda r: 1 - r, cut)
    with pytest.raises(InputError, match=r"flops_cut=0.9 is more than pruning can cut"):
        find_rate(lambda r: 5 - r, 0.9)


# --- narrow networks ---


def test_nothing_pruned_is_the_same_network(tiny, cloud, traced, kind):
    net, inputs, groups = tiny(kind), cloud(kind), traced(kind)
    same = prune(net, groups, plan_of(groups, 0.0))
    assert same is not net
    assert list(same.state_dict()) == list(net.state_dict())
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in same.state_dict().items())
    assert torch.equal(same(*inputs), net(*inputs))


def test_narrow_networks_run_with_one_channel_a_layer(tiny, cloud, traced, kind):
    net, inputs, groups = tiny(kind), cloud(kind), traced(kind)
    before = copy.deepcopy(net.state_dict())
    for rate in (0.5, 0.999):
        narrow = prune(net, groups, plan_of(groups, rate))
        out = narrow(*inputs)
        assert out.shape == net(*inputs).shape
        assert out.isfinite().all()
        out.square().sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in narrow.parameters())
        for name, layer in narrow.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                said = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else (
                    layer.out_channels, layer.in_channels)  # fmt: skip
                assert said == tuple(layer.weight.shape[:2]), name
            elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert {layer.num_features} == {len(x) for x in (layer.weight, layer.bias, layer.running_mean)}
        if rate == 0.999:
            assert all(len(narrow.get_submodule(g.producers[0]).weight) == 1 for g in groups)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_kept_weights_are_copied_to_their_places(tiny, traced):
    net, groups = tiny("pointnext_s"), traced("pointnext_s")
    plan = plan_of(groups)
    narrow = prune(net, groups, plan).state_dict()
    stem, inside, out = (plan[name] for name in ("encoder.stem", f"{SA}.0.0", f"{SA}.1.0"))
    full = net.state_dict()
    columns = torch.cat([torch.arange(3), 3 + stem])
    assert torch.equal(narrow[f"{SA}.0.0.weight"], full[f"{SA}.0.0.weight"][inside][:, columns])
    assert torch.equal(narrow[f"{SA}.1.0.weight"], full[f"{SA}.1.0.weight"][out][:, inside])
    assert torch.equal(narrow[f"{SA}.1.1.running_var"], full[f"{SA}.1.1.running_var"][out])
    assert torch.equal(narrow["encoder.stages.0.0.skip.weight"], full["encoder.stages.0.0.skip.weight"][out][:, stem])
    assert torch.equal(narrow["encoder.stages.0.0.skip.bias"], full["encoder.stages.0.0.skip.bias"][out])
    last = plan["encoder.stages.2.0.scales.0.convs.1.0"]
    assert torch.equal(narrow["head.0.0.weight"], full["head.0.0.weight"][:, last])
    assert all(value.is_contiguous() for value in narrow.values())


def test_in_place_the_parameters_stay_the_same_objects(tiny, cloud, traced):
    net, inputs, groups = tiny("pointnext_s"), cloud("pointnext_s"), traced("pointnext_s")
    plan, before = plan_of(groups), list(net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    expected = prune(net, groups, plan)
    net(*inputs).sum().backward()
    assert prune(net, groups, plan, inplace=True) is net
    assert all(a is b for a, b in zip(net.parameters(), before, strict=True))
    assert torch.equal(net(*inputs), expected(*inputs))
    assert all(p.grad is None or p.grad.shape == p.shape for p in net.parameters())
    net(*inputs).sum().backward()
    optimizer.step()
    assert not torch.equal(net(*inputs), expected(*inputs))


def test_pruned_twice_is_pruned_once_to_the_same_channels(tiny, cloud, traced):
    net, inputs, groups = tiny("scenes_b"), cloud("scenes_b"), traced("scenes_b")
    first = plan_of(groups, 0.3)
    once = prune(net, groups, first)
    again = find_groups(once, *cloud("scenes_b", batch=1, points=16))
    assert [(g.name, g.producers, g.width) for g in again] == [
        (g.name, g.producers, len(first[g.name])) for g in groups
    ]
    second = plan_of(again, 0.4, seed=1)
    twice = prune(once, again, second)
    direct = prune(net, groups, {name: kept[second[name]] for name, kept in first.items()})
    assert torch.equal(twice(*inputs), direct(*inputs))


def test_released_columns_are_shifted_by_the_coordinates(tiny, traced):
    """The kept numbers go straight to the 3 + C columns; the last three stay as drawn. All else is as it should be."""
    net, groups = tiny("pointnext_s"), traced("pointnext_s")
    plan = plan_of(groups)
    right, wrong = (prune(net, groups, plan, released_columns=flag).state_dict() for flag in (False, True))
    differ = {key for key in right if not torch.equal(right[key], wrong[key])}
    assert differ == {f"encoder.stages.{k}.0.scales.0.convs.0.0.weight" for k in range(3)}
    full = net.state_dict()[f"{SA}.0.0.weight"]
    rows, stem = plan[f"{SA}.0.0"], plan["encoder.stem"]
    shifted = wrong[f"{SA}.0.0.weight"]
    assert torch.equal(shifted[:, :-3], full[rows][:, stem])
    bound = (3 + len(stem)) ** -0.5
    assert shifted[:, -3:].abs().max() <= bound
    assert shifted[:, -3:].std() > bound / 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda plan: plan.pop("encoder.stem"), "the plan is of another network: its layers are"),
        (lambda plan: plan.update(more=torch.arange(2)), "is of another network"),
        (
            lambda plan: plan.update({"encoder.stem": torch.tensor([0, 4])}),
            "no ascending channels below 4 of encoder.stem",
        ),
        (lambda plan: plan.update({"encoder.stem": torch.tensor([2, 1])}), "no ascending channels"),
        (lambda plan: plan.update({"encoder.stem": torch.tensor([1, 1])}), "no ascending channels"),
        (lambda plan: plan.update({"encoder.stem": torch.tensor([-1, 1])}), "no ascending channels"),
        (lambda plan: plan.update({"encoder.stem": torch.tensor([], dtype=torch.long)}), "no ascending channels"),
        (lambda plan: plan.update({"encoder.stem": torch.tensor([[0]])}), "no ascending channels"),
    ],
)
def test_plans_that_do_not_fit(tiny, traced, damage, message):
    groups = traced("pointnext_s")
    plan = plan_of(groups)
    damage(plan)
    with pytest.raises(InputError, match=message):
        prune(tiny("pointnext_s"), groups, plan)


# --- shapes of a file ---


def test_pruned_weights_load_into_a_network_that_was_fitted_to_them(tiny, cloud, kinds, traced, kind):
    net, inputs, groups = tiny(kind), cloud(kind), traced(kind)
    narrow = prune(net, groups, plan_of(groups))
    fresh = build_network(kinds[kind]).eval()
    fit_shapes(fresh, narrow.state_dict())
    fresh.load_state_dict(narrow.state_dict(), strict=True)
    assert torch.equal(fresh(*inputs), narrow(*inputs))
    for ours, theirs in zip(fresh.modules(), narrow.modules(), strict=True):
        for key in ("out_channels", "in_channels", "num_features", "out_features", "in_features"):
            assert getattr(ours, key, None) == getattr(theirs, key, None) or not isinstance(
                ours, (nn.Conv1d, GroupedConv)
            )


def test_shapes_that_pruning_cannot_lead_to_stay(tiny):
    net = tiny("pointnext_s")
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    wrong = {
        "encoder.stem.weight": torch.zeros(5, 4, 1),  # wider
        f"{SA}.0.0.weight": torch.zeros(2, 7, 1, 2),  # another kernel
        f"{SA}.0.1.weight": torch.zeros(2, 2),  # a matrix
        "head.0.0.weight": torch.zeros(0, 16),  # empty
        "head.4.weight": torch.tensor(3.0),
        "unknown.weight": torch.zeros(1),
    }
    fit_shapes(net, wrong)
    assert {key: value.shape for key, value in net.state_dict().items()} == shapes


# --- plans on disk ---


def test_a_network_is_rebuilt_from_its_plan(tmp_path, tiny, cloud, kinds, traced):
    net, inputs, groups = tiny("pointnext_b"), cloud("pointnext_b"), traced("pointnext_b")
    plan = plan_of(groups, 0.4)
    narrow = prune(net, groups, plan)
    save_plan(tmp_path / "plan.json", groups, plan, net=kinds["pointnext_b"], note="ä")
    content = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert (content["net"], content["note"]) == (kinds["pointnext_b"], "ä")
    entry = content["groups"]["encoder.stages.0.0.scales.0.convs.0.0"]
    assert entry["layers"] == ["encoder.stages.0.0.scales.0.convs.0.0", "encoder.stages.0.1.project.0"]
    assert (entry["width"], entry["kept_width"], len(entry["kept"])) == (8, 4, 4)
    found = read_plan(tmp_path / "plan.json", groups)
    assert found.keys() == plan.keys()
    assert all(torch.equal(found[name], kept) for name, kept in plan.items())
    rebuilt = prune(build_network(content["net"]), groups, found).eval()
    rebuilt.load_state_dict(narrow.state_dict(), strict=True)
    assert torch.equal(rebuilt(*inputs), narrow(*inputs))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"groups": []}', '{"groups": {"a": []}}', '{"groups": {"a": {"kept": [0]}}}',
     '{"groups": {"a": {"kept": "all", "width": 4}}}', '{"groups": {"a": {"kept": [1e400], "width": 4}}}',
     '{"groups": {"a": {"kept": [99999999999999999999], "width": 4}}}', b"\xff\xfe"],
)  # fmt: skip
def test_damaged_plans(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"no pruning plan can be read from .*plan.json; give the plan.json of a run"):
        read_plan(path, shares(a=4))


def test_plans_of_other_networks(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(InputError, match=r"plan.json; give the plan.json of a run"):
        read_plan(path, shares(a=4))
    save_plan(path, shares(a=4, b=6), {"a": torch.tensor([0, 2]), "b": torch.tensor([5])})
    for groups, message in (
        (shares(a=4), "another network: its layers are a, b"),
        (shares(a=4, b=5), "no ascending channels below 5 of b"),
        (shares(a=8, b=6), "of another network: a had 4 channels there, 8 here"),
    ):
        with pytest.raises(InputError, match=message):
            read_plan(path, groups)


def test_every_group_loses_exactly_its_channels(tiny, traced):
    """One channel less in one group takes rows, columns and statistics, and nothing else."""
    net, groups = tiny("pointnet2_msg"), traced("pointnet2_msg")
    full = {key: value.numel() for key, value in net.state_dict().items()}
    for cut in itertools.islice(groups, 0, None, 4):
        plan = {g.name: torch.arange(g.width - (g is cut)) for g in groups}
        narrow = {key: value.numel() for key, value in prune(net, groups, plan).state_dict().items()}
        touched = {key.rpartition(".")[0] for key in full if narrow[key] != full[key]}
        assert touched == {*cut.producers, *cut.columns}
