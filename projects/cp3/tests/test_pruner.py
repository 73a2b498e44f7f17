"""Pruning as configured: what is refused, how much goes, plans, steps, statistics estimated anew."""

import copy

import pytest
import torch
from torch import nn

from projects.cp3 import pruner as pruner_file
from projects.cp3.cost import measure_cost
from projects.cp3.pruner import Pruning, prune_network, reestimate_norms
from projects.cp3.pruning import save_plan, widths
from projects.cp3.scoring import Criterion
from shared.errors import InputError

CHIP = {"base": "chip", "ce": "none", "kr": "none"}
RANDOM = {"base": "random", "ce": "none", "kr": "none"}
SHORT = {"blocks": [1, 1, 1], "strides": [1, 2, 1]}


@pytest.fixture
def given(tiny, cloud):
    """A network and its calibration clouds in two batches."""

    def make(kind="pointnext_s", **changes):
        inputs = cloud(kind, batch=5, points=32)
        return tiny(kind, **(SHORT if kind == "pointnext_s" else {}), **changes), [
            tuple(part[:3] for part in inputs),
            tuple(part[3:] for part in inputs),
        ]

    return make


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": {"base": "l7"}}, "base is one of chip"),
        ({"criterion": {"bass": "l1"}}, "prune.criterion: .*'bass'"),
        ({"rate": None}, "say either prune.rate or prune.flops_cut"),
        ({"flops_cut": 0.5}, "say either prune.rate or prune.flops_cut"),
        ({"scope": "stage"}, "prune.scope is one of layer, network, not 'stage'"),
        ({"split": "val"}, "prune.split is one of train, validation, test, not 'val'"),
        *(({key: 0}, f"prune.{key} is at least 1, not 0")
          for key in ("num_clouds", "batch_size", "steps", "epochs_between", "round_to")),
        ({"rate": 1.0}, "prune.rate is in .0, 1., not 1.0: at 1 no channel would be left"),
        ({"rate": -0.5}, "prune.rate is in"),
        ({"rate": None, "flops_cut": 1.0}, "prune.flops_cut is in"),
        ({"rates": {"stem": 2}}, "prune.stem is in"),
        ({"plan": "plan.json", "steps": 2}, "prune.plan is followed at once"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Pruning(**{"criterion": CHIP, "rate": 0.5, **arguments})


@pytest.mark.parametrize("kind", ["pointnext_b", "pointnet2", "parts"])
def test_a_rate(given, cloud, kind):
    net, batches = given(kind)
    before = copy.deepcopy(net)
    done = prune_network(net, batches, Pruning(Criterion().__dict__, rate=0.4))
    assert {name: len(kept) for name, kept in done.plan.items()} == widths(done.groups, 0.4)
    for name, kept in done.plan.items():
        total = done.scores[name].total
        assert total[kept].min() >= max([x for i, x in enumerate(total.tolist()) if i not in kept], default=-1)
    one = tuple(part[:1] for part in batches[0])
    assert (done.before, done.after) == (measure_cost(before, *one), measure_cost(net, *one))
    assert done.after.params < done.before.params
    assert net(*cloud(kind)).isfinite().all()
    convs = {name for name, m in before.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d)) and "encoder" in name}
    assert {name for group in done.groups for name in group.producers} == convs


@pytest.mark.parametrize(
    ("scope", "cut"), [("layer", 0.0), ("layer", 0.578), ("layer", 0.9), ("network", 0.0), ("network", 0.578)]
)
def test_a_cut_is_reached_and_hardly_passed(given, scope, cut):
    net, batches = given(width=16)
    done = prune_network(net, batches, Pruning(RANDOM, flops_cut=cut, scope=scope))
    found = 1 - done.after.flops / done.before.flops
    # one channel of 16 in each layer at most
    assert cut <= found < cut + 0.08
    if cut == 0:
        assert done.after == done.before


def test_a_cut_of_too_much_and_patterns_that_fit_nothing(given, monkeypatch):
    net, batches = given()
    monkeypatch.setattr(pruner_file, "score", lambda *_: pytest.fail("scored before the settings were looked at"))
    with pytest.raises(InputError, match=r"rates: 'stam' fits no layer"):
        prune_network(net, batches, Pruning(CHIP, rate=0.5, rates={"stam": 0.1}))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"flops_cut=0.999.* is more than pruning can cut"):
        prune_network(net, batches, Pruning(CHIP, flops_cut=0.999))
    with pytest.raises(InputError, match=r"prune.keep=\['\*'\] leaves no layer to prune"):
        prune_network(net, batches, Pruning(CHIP, rate=0.5, keep=["*"]))
    with pytest.raises(InputError, match="no calibration clouds"):
        prune_network(net, [], Pruning(CHIP, rate=0.5))


def test_rates_of_layers_and_multiples(given):
    net, batches = given(width=16)
    done = prune_network(
        net, batches, Pruning(RANDOM, rate=0.5, rates={"encoder.stem": 0.0, "*.stages.0.*": 0.9}, round_to=4)
    )
    kept = {name: len(channels) for name, channels in done.plan.items()}
    assert kept["encoder.stem"] == 16
    assert kept["encoder.stages.0.0.scales.0.convs.0.0"] == 4
    assert kept["encoder.stages.1.0.scales.0.convs.1.0"] == 16
    assert all(count % 4 == 0 for count in kept.values())


def test_network_scope_keeps_as_many_channels_elsewhere(given):
    plans = {}
    for scope in ("layer", "network"):
        net, batches = given(width=16)
        plans[scope] = prune_network(
            net, batches, Pruning(CHIP, rate=0.5, scope=scope, rates={"encoder.stem": 0.25})
        ).plan
    counts = {scope: {name: len(kept) for name, kept in plan.items()} for scope, plan in plans.items()}
    assert counts["layer"] != counts["network"]
    assert sum(counts["layer"].values()) == sum(counts["network"].values())
    assert counts["layer"]["encoder.stem"] == counts["network"]["encoder.stem"] == 12


def test_a_plan_is_followed(given, tmp_path):
    net, batches = given()
    first = copy.deepcopy(net)
    done = prune_network(first, batches, Pruning(CHIP, rate=0.5))
    save_plan(tmp_path / "plan.json", done.groups, done.plan)
    again = prune_network(net, batches, Pruning(CHIP, flops_cut=0.1, plan=str(tmp_path / "plan.json")))
    assert again.scores == {}
    assert all(torch.equal(kept, done.plan[name]) for name, kept in again.plan.items())
    assert torch.equal(net(*batches[0]), first(*batches[0]))


def in_steps(net, batches, how):
    """Prune step by step -> what each did, and the dense widths and FLOPs."""
    done = [prune_network(net, batches, how)]
    dense, flops = {g.name: g.width for g in done[0].groups}, done[0].before.flops
    done += [prune_network(net, batches, how, step, dense, flops) for step in range(2, how.steps + 1)]
    return done, dense, flops


def test_steps_end_at_the_rate(given):
    done, dense, _ = in_steps(*given(width=16), Pruning(RANDOM, rate=0.6, steps=3))
    for step, found in enumerate(done, 1):
        left = {name: len(kept) for name, kept in found.plan.items()}
        assert left == {name: int(c * (1 - (1 - 0.4 ** (step / 3)))) for name, c in dense.items()}


@pytest.mark.parametrize(("scope", "width"), [("layer", 12), ("network", 16)])
def test_steps_end_at_the_cut(given, scope, width):
    """Of the dense network's FLOPs, not of those that the step before has left."""
    done, _, flops = in_steps(*given(width=width), Pruning(RANDOM, flops_cut=0.578, steps=2, scope=scope))
    assert 1 - done[0].after.flops / flops < 0.5
    assert 0.578 <= 1 - done[1].after.flops / flops < 0.67


def test_released_columns_and_new_statistics_are_passed_on(given):
    nets = {}
    for options in ({}, {"released_columns": True}, {"reestimate_norms": True}):
        net, batches = given()
        prune_network(net, batches, Pruning(RANDOM, rate=0.5, **options))
        nets[next(iter(options), "")] = net.state_dict()
    assert not torch.equal(
        *(nets[key]["encoder.stages.0.0.scales.0.convs.0.0.weight"] for key in ("", "released_columns"))
    )
    assert not torch.equal(*(nets[key]["head.0.1.running_mean"] for key in ("", "reestimate_norms")))
    assert torch.equal(*(nets[key]["head.0.0.weight"] for key in ("", "reestimate_norms")))


# --- statistics ---


def test_statistics_are_means_over_batches(given):
    net, batches = given()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 0.25
    net.encoder.train()
    modes = [module.training for module in net.modules()]
    weights = copy.deepcopy(dict(net.named_parameters()))
    first, second = net.encoder.stages[0][0].scales[0].convs[0][:2]
    seen = []
    handle = first.register_forward_hook(lambda _, __, output: seen.append(output.transpose(0, 1).flatten(1).double()))
    reestimate_norms(net, batches)
    handle.remove()
    assert len(seen) == 2
    torch.testing.assert_close(second.running_mean.double(), sum(x.mean(1) for x in seen) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second.running_var.double(), sum(x.var(1) for x in seen) / 2, rtol=1e-4, atol=1e-5)
    assert second.num_batches_tracked == 2
    assert {m.momentum for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))} == {0.25}
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())


def test_deep_norms_see_what_training_would_see(given):
    """Behind earlier norms in training mode, dropout being off."""
    net, batches = given()
    peer = copy.deepcopy(net)
    reestimate_norms(net, batches[:1])
    for module in peer.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0
        module.training = not isinstance(module, nn.Dropout)
    peer(*batches[0])
    for ours, theirs in zip(net.buffers(), peer.buffers(), strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_one_cloud_has_no_variance(given):
    net, batches = given()
    momenta = [m.momentum for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    with pytest.raises(
        InputError, match=r"a calibration batch of one cloud has no variance.*prune.batch_size"
    ) as caught:
        reestimate_norms(net, [batches[0], tuple(part[:1] for part in batches[1])])
    assert "\n" not in str(caught.value)
    assert [m.momentum for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))] == momenta
    assert not net.training
