"""Programs of the claims without fine-tuning: what they measure, and when they say yes, no and nothing."""

import json
import math

import numpy as np
import pytest
import torch

from projects.cp3 import one_shot
from projects.cp3.checkpoints import load_published, save_network
from projects.cp3.model import build_network
from shared.claims import interval95

NET = {"name": "pointnext", "num_classes": 15, "width": 4, "num_samples": 4, "blocks": [1, 1, 1], "strides": [1, 2, 1],
       "radius": 0.5, "head": [8]}  # fmt: skip


def clouds(seed, batches=1, count=3):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        xyz = torch.rand(count, 24, 3, generator=generator)
        found.append((xyz, torch.cat([xyz.mT, xyz[..., 1:2].mT], 1)))
    return found


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return build_network(NET).eval()


TEST = [{"xyz": xyz, "features": features, "label": torch.tensor([0, 1, 2])} for xyz, features in clouds(9)]


def test_order_prunes_by_each_criterion_and_reports_means_over_seeds(net, monkeypatch):
    calls, original = [], one_shot.prune
    monkeypatch.setattr(one_shot, "prune", lambda *a: calls.append(original(*a)) or calls[-1])
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = one_shot.order(net, [clouds(seed) for seed in range(2)], TEST, (0.25, 0.5))
    values = found["values"]
    assert len(calls) == 2 * 2 * len(one_shot.CRITERIA)
    assert {narrow.encoder.stem.out_channels for narrow in calls} == {3, 2}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert values["rates"] == [0.25, 0.5]
    for name in one_shot.CRITERIA:
        assert len(values[name]) == 2
        assert all(0 <= value <= 100 for value in values[name])
    gain = values["cp3_over_chip"][0]
    assert gain == pytest.approx(np.mean(values["cp3"]) - np.mean(values["chip"]))
    assert values["dense"] == one_shot.accuracy(net, TEST)
    assert found["passed"] in (True, False, None)
    assert f"cp3 over chip {gain:+.1f}" in found["statement"]


def forged_order(monkeypatch, net, accuracies):
    """Run `order` with accuracies by criterion (those of five seeds)."""
    wanted = iter([accuracies[name][seed] for seed in range(5) for name in one_shot.CRITERIA] + [99.0])
    monkeypatch.setattr(one_shot, "accuracy", lambda *_: next(wanted))
    monkeypatch.setattr(one_shot, "score", lambda *_: {})
    monkeypatch.setattr(one_shot, "choose", lambda *_: None)
    monkeypatch.setattr(one_shot, "prune", lambda *_: None)
    monkeypatch.setattr(one_shot, "reestimate_norms", lambda *_: None)
    return one_shot.order(net, [clouds(0)] * 5, TEST, (0.2,))


@pytest.mark.parametrize(("chip", "l1", "passed"), [
    ([70, 71, 69, 70, 71], [60, 61, 60, 59, 61], True),  # each clearly better
    ([80, 81, 79, 80, 81], [60, 61, 60, 59, 61], False),  # CHIP is no worse than CP3
    ([70, 79, 90, 62, 85], [60, 61, 60, 59, 61], None),  # too spread to say
    ([79.5, 80.6, 78.6, 79.5, 80.5], [60, 61, 60, 59, 61], False),  # surely better, by too little to count
])  # fmt: skip
def test_order_says_yes_no_and_nothing(net, monkeypatch, chip, l1, passed):
    accuracies = {name: [50.0] * 5 for name in one_shot.CRITERIA}
    accuracies |= {"cp3": [80, 81, 79, 80, 81], "chip": chip, "l1": l1, "random": [20, 22, 21, 20, 21]}
    found = forged_order(monkeypatch, net, accuracies)
    assert found["passed"] is passed
    gains = [a - b for a, b in zip(accuracies["cp3"], chip, strict=True)]
    mean, _, low, high = interval95(gains)
    assert found["values"]["cp3_over_chip"] == pytest.approx([mean, low, high])


def test_stability_compares_rankings_with_and_without_recycling(net):
    pairs = [(clouds(seed), clouds(seed + 10)) for seed in range(3)]
    found = one_shot.stability(net, pairs)
    values = found["values"]
    assert -1 <= values["tau_without_kr"] <= 1
    assert values["gain"][0] == pytest.approx(values["tau_with_kr"] - values["tau_without_kr"])
    assert values["gain"][1] <= values["gain"][0] <= values["gain"][2]
    same = one_shot.stability(net, [(clouds(seed), clouds(seed)) for seed in range(3)])["values"]
    assert same["tau_without_kr"] == pytest.approx(1)
    # the draws of dropped points differ, if any are left out: with stride 2 none is
    assert same["tau_with_kr"] == pytest.approx(1)


@pytest.mark.parametrize(("taus", "passed"), [
    ([0.8, 0.81, 0.82, 0.8, 0.79], True), ([0.6, 0.61, 0.62, 0.6, 0.59], False), ([0.9, 0.5, 0.95, 0.45, 0.9], None),
    ([0.603, 0.613, 0.623, 0.603, 0.593], False),
])  # fmt: skip
def test_stability_says_yes_no_and_nothing(net, monkeypatch, taus, passed):
    noise = [0.0, 0.001, -0.001, 0.0005, 0.0]
    wanted = iter(
        [tau for pair in zip(taus, [0.6 + e for e in (0, 0.01, 0.02, 0, -0.01)], strict=True) for tau in pair]
    )
    monkeypatch.setattr(one_shot, "agreement", lambda *_: next(wanted) + noise[0])
    monkeypatch.setattr(one_shot, "score", lambda *_: {})
    assert one_shot.stability(net, [(clouds(0), clouds(1))] * 5)["passed"] is passed


def test_modes_compare_both_scores_with_the_size_of_responses(net):
    found = one_shot.modes(net, [clouds(seed, batches=2) for seed in range(3)])
    values = found["values"]
    assert all(-1 <= values[name] <= 1 for name in ("corr_and_released", "corr_and_norm", "released_and_norm"))
    assert values["difference"][0] == pytest.approx(values["released_and_norm"] - values["corr_and_norm"])


@pytest.mark.parametrize(("released", "passed"), [
    ([0.8, 0.81, 0.79, 0.8, 0.8], True), ([0.1, 0.11, 0.09, 0.1, 0.1], False), ([0.9, -0.5, 0.9, 0.0, 0.8], None),
])  # fmt: skip
def test_modes_say_yes_no_and_nothing(net, monkeypatch, released, passed):
    wanted = iter([tau for own in released for tau in (0.3, 0.1, own)])
    monkeypatch.setattr(one_shot, "agreement", lambda *_: next(wanted))
    monkeypatch.setattr(one_shot, "score", lambda *_: {})
    assert one_shot.modes(net, [clouds(0)] * 5)["passed"] is passed


def test_agreement_is_kendalls_tau_over_layers_that_both_score():
    a = {"x": torch.tensor([1.0, 2, 3, 4]), "y": torch.zeros(4), "z": torch.tensor([1.0, 2, 3])}
    b = {"x": torch.tensor([1.0, 2, 4, 3]), "y": torch.tensor([1.0, 2, 3, 4]), "z": torch.tensor([3.0, 2, 1])}
    # 5 pairs of 6 agree, then none of 3
    assert one_shot.agreement(a, b) == pytest.approx(((5 - 1) / 6 + -1) / 2)


def test_accuracy_is_in_percent():
    logits = torch.eye(4)[[0, 1, 2, 0]]
    batch = {"xyz": None, "features": None, "label": torch.tensor([0, 1, 3, 3])}

    class Net:
        def eval(self):
            pass

        def __call__(self, xyz, features):
            return logits

    assert one_shot.accuracy(Net(), [batch, batch]) == 50


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    data = one_shot.scans(24, 5, str(tmp_path_factory.mktemp("cache")))
    data.num_points = 256
    return data


def test_views_are_other_random_points_of_random_clouds(scans):
    first, again, other = (one_shot.views(scans, seed, count=16) for seed in (0, 0, 1))
    assert [tuple(xyz.shape) for xyz, _ in first] == [(8, 256, 3)] * 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    one, two = one_shot.two_views(scans, 0, count=8)
    assert not torch.equal(one[0][0], two[0][0])
    # of the same clouds: their middles and sizes are alike, those of others are not
    heights = [part[0][1][:, 3].mean(1) for part in (one, two)]
    assert float(np.corrcoef(*heights)[0, 1]) > 0.9
    for xyz, features in (one[0], two[0]):
        assert torch.equal(features[:, :3], xyz.mT)
        assert math.isclose(float(xyz.norm(dim=2).max()), 1, rel_tol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["order", "stability", "modes"])
def test_command_writes_what_reproduce_reads(command_line, tmp_path, monkeypatch, what):
    arguments = {**NET, "num_samples": 8}
    torch.manual_seed(0)
    save_network(build_network(arguments), arguments, tmp_path / "net.safetensors")
    assert load_published(tmp_path / "net.safetensors")
    code, out, error = command_line(
        "one_shot", what, "--output", str(tmp_path / "out.json"), "--ckpt", str(tmp_path / "net.safetensors"),
        "--num-test", "30",
    )  # fmt: skip
    assert code == 0, error
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["passed"] in (True, False, None)
    assert found["statement"] in out
    assert found["values"]


def test_wrong_words_are_refused(command_line, tmp_path):
    assert command_line("one_shot", "all", "--output", "a.json")[0] == 2
    code, _, error = command_line("one_shot", "modes", "--output", "a.json", "--ckpt", "absent.safetensors")
    assert (code, "no checkpoint at absent.safetensors" in error) == (2, True)
