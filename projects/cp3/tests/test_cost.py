"""Counts by hand."""

import copy

import pytest
import torch
from torch import nn

from projects.cp3.cost import Cost, cost_table, measure_cost
from projects.cp3.groups import Group


def test_counts_of_a_small_network_by_hand():
    net = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 5, 1, bias=False), nn.Flatten(),
        nn.Linear(50, 6), nn.ReLU(),
    )  # fmt: skip
    cost = measure_cost(net, torch.randn(1, 3, 10))
    macs = 10 * 3 * 4 + 10 * 4 * 5 + 50 * 6
    assert cost == Cost(params=(12 + 4) + 8 + 20 + 306, macs=macs, flops=2 * macs + 2 * 40 + (40 + 6))


def test_counts_of_pointnext_by_hand(tiny, cloud):
    """The first convolution counts on the grouped tensor of 3 + C channels, as published, and not as it is computed."""
    net = tiny("pointnext_s", blocks=[1, 1, 1], strides=[1, 2, 1])
    cost = measure_cost(net, *(part[:1] for part in cloud("pointnext_s", points=64)))
    grouped = 32 * 8
    macs = 64 * 4 * 4 + grouped * (7 * 4 + 4 * 8) + 32 * 4 * 8 + 32 * (11 * 8 + 8 * 8) + 8 * 16 + 16 * 8 + 8 * 5
    norms = grouped * (4 + 8) + 32 * (8 + 8) + 16 + 8
    acts = grouped * 4 + 32 * 8 + 32 * (8 + 8) + 16 + 8
    assert (cost.macs, cost.flops) == (macs, 2 * macs + 2 * norms + acts)
    assert cost.params == sum(p.numel() for p in net.parameters())


def test_network_is_left_as_it_was(tiny, cloud):
    net = tiny("scenes_s").train()
    net.head.eval()
    state, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    inputs = tuple(part[:1] for part in cloud("scenes_s"))
    assert measure_cost(net, *inputs) == measure_cost(net, *inputs)
    with pytest.raises(TypeError):
        measure_cost(net)
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_table():
    groups = [Group("stem", 32, ("stem",), {}, ()), Group("a", 64, ("a",), {}, ())]
    before, after = Cost(1_367_119, 811_175_680, 1_637_361_408), Cost(715_000, 341_000_000, 690_966_000)
    lines = cost_table(groups, {"stem": 20, "a": 41}, before, after, (10.0, 4.25)).splitlines()
    assert lines == [
        "| | before | after | after / before |",
        "|---|---|---|---|",
        "| width of stem | 32 | 20 | 0.625 |",
        "| width of a | 64 | 41 | 0.641 |",
        "| parameters (M) | 1.367 | 0.715 | 0.523 |",
        "| MACs (G) | 0.811 | 0.341 | 0.420 |",
        "| FLOPs (G) | 1.637 | 0.691 | 0.422 |",
        "| latency (ms) | 10.00 | 4.25 | 0.425 |",
    ]
    assert len(cost_table(groups, {"stem": 20, "a": 41}, before, after).splitlines()) == len(lines) - 1
