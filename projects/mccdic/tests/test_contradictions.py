"""Whether V explains what only the reference shows: the answer, and the networks and data that give none."""

import json
import re

import pytest
import torch

from projects.mccdic import contradictions, model
from projects.mccdic.checkpoints import save_network
from projects.mccdic.contradictions import SMALLEST_EFFECT, compare
from projects.mccdic.networks import build_network
from projects.mccdic.phantom import PhantomSettings
from shared.errors import InputError

NET = {"name": "mccdic", "widths": [8, 6, 4], "features": 4, "stages": 3, "blocks": [1, 1, 1]}
HEADS = {"anatomy": "ellipses", "size": (64, 64)}


@pytest.fixture(autouse=True)
def threads():
    """Leave the number of threads, which the command sets, as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Write an untrained network: weights(arguments that differ)."""
    # most of the time of a small network goes into the eigenvalues that it begins with
    monkeypatch.setattr(model, "largest_eigenvalue", lambda *_, **__: 4.0)

    def write(**changes):
        arguments = changes if "name" in changes else NET | changes
        torch.manual_seed(0)
        save_network(build_network(arguments), arguments, tmp_path / "weights.safetensors")
        return tmp_path / "weights.safetensors"

    return write


@pytest.mark.parametrize("changes", [{}, {"prox": "soft"}], ids=str)
def test_untrained_network_keeps_no_promise(weights, changes):
    found = compare(weights(**changes), 6, PhantomSettings(**HEADS))
    assert found["passed"] is not True
    values = found["values"]
    assert 0 <= values["unique_share"] <= 1
    assert 0 <= values["unique_share_common"] <= 1
    assert values["excess"] == pytest.approx(values["unique_share"] - values["unique_share_common"])
    assert values["low"] < values["excess"] < values["high"]
    assert re.search(r"over [3-6] slices", found["statement"])
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("excess", "spread", "passed"),
    [(0.3, 0.01, True), (0.06, 0.2, None), (0.02, 0.001, False), (-0.2, 0.01, False), (0.06, 0.001, True)],
)
def test_verdict_is_of_the_interval_and_the_smallest_effect(weights, monkeypatch, excess, spread, passed):
    shares = iter([spread * (i % 2 - 0.5) + excess for i in range(6)])
    monkeypatch.setattr(
        contradictions, "unique_shares",
        lambda net, batch: {"unique_share": 0.5 + next(shares), "unique_share_common": 0.5},
    )  # fmt: skip
    found = compare(weights(), 6, PhantomSettings(**HEADS))
    assert SMALLEST_EFFECT == 0.05
    assert found["values"]["excess"] == pytest.approx(excess)
    assert found["passed"] is passed


@pytest.mark.parametrize("few", [{"reference_only_share": 0.0}, {"structures": (0, 0)}], ids=str)
def test_heads_without_such_structures_are_refused(weights, few):
    with pytest.raises(
        InputError, match="0 slices with structures of the reference alone and of both; give at least 3"
    ):
        compare(weights(), 4, PhantomSettings(**HEADS, **few))


def test_too_few_slices_are_refused(weights):
    with pytest.raises(InputError, match=r"[0-2] slices with structures"):
        compare(weights(), 2, PhantomSettings(**HEADS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"common": False}, "without a common code"),
        ({"name": "plain", "width": 4, "blocks": 1}, "without a common code"),
        ({"num_references": 2}, "2 references; give one of a single reference"),
        ({"consistency": "hard"}, "data consistency"),
    ],
    ids=str,
)
def test_networks_that_have_no_answer_are_refused(weights, changes, message):
    with pytest.raises(InputError, match=rf"weights\.safetensors holds a network .*{message}"):
        compare(weights(**changes), 3, PhantomSettings(**HEADS))


def test_command_writes_its_answer_for_the_claim(weights, command_line, tmp_path):
    output = tmp_path / "answer.json"
    # the heads are the default ones: a few are enough to see it run
    code, _, error = command_line("contradictions", "--output", str(output), "--ckpt", str(tmp_path / "absent.ckpt"))
    assert (code, "absent.ckpt" in error, output.exists()) == (2, True, False)


@pytest.mark.slow
def test_command_restores_the_default_heads(weights, command_line, tmp_path):
    output = tmp_path / "answer.json"
    code, out, error = command_line("contradictions", "--output", str(output), "--ckpt", str(weights()))
    assert code == 0, error
    found = json.loads(output.read_text())
    assert set(found) == {"passed", "values", "statement"}
    assert found["statement"] in out
    # not every head has room for one of each kind
    assert 16 <= int(re.search(r"over (\d+) slices", out)[1]) <= 32
