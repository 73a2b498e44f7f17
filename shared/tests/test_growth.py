"""How cost grows: the fit, the table, points that fail, what the user got wrong; one real point."""

import json

import pytest

from shared import growth
from shared.claims import Growth, load_paper
from shared.errors import InputError
from shared.tables import load

CARD = """
project: toy
title: A toy
authors: [A. Author]
venue: Nowhere
year: 2025
link: https://example.org
task: scoring
idea: Add a number.
claims: []
"""
SECTION = """
growth:
  - {axis: batch, key: data.batch_size, values: [2, 4, 8, 16], base: [threads=1]}
  - {axis: pixels, key: data.shape, values: [[8, 8], [16, 16], [24, 32]]}
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Give the card of a project `toy` in a repository of its own, which is the current folder."""
    card = tmp_path / "projects" / "toy" / "paper.yaml"
    card.parent.mkdir(parents=True)
    card.write_text(CARD + SECTION)
    monkeypatch.chdir(tmp_path)
    return card


@pytest.fixture
def asked(monkeypatch):
    """Stand in for the processes of the points: steps that grow with the power 1.5, a limit at 16 -> what was asked."""
    asked = []

    def run(project, overrides, memory_mb, seconds):
        asked.append((project, overrides))
        if overrides[-1] == "data.batch_size=16":
            return {"error": f"more than {memory_mb} MB"}
        value = {"2": 2, "4": 4, "8": 8, "[8, 8]": 64, "[16, 16]": 256, "[24, 32]": 768}[overrides[-1].split("=")[1]]
        found = {"seconds": 0.01 * value**1.5, "added_mb": 5.0 * value, "peak_mb": 100.0 + 5 * value, "threads": 1}
        return found | {"device": "a cpu"}

    monkeypatch.setattr(growth, "in_own_process", run)
    return asked


def points(toy):
    return json.loads((toy.parent / "results" / "growth.json").read_text())["points"]


def test_fit_recovers_a_known_exponent_and_its_error():
    values = [1, 2, 4, 8, 16]
    slope, error = growth.exponent(values, [3 * value**1.7 for value in values])
    assert slope == pytest.approx(1.7, abs=1e-12)
    assert error == pytest.approx(0, abs=1e-7)
    # by hand, in powers of 2: x 0 1 2 3, y 0 1 2 4: slope 1.3, residuals 0.2 -0.1 -0.4 0.3, their squares 0.3, spread 5
    slope, error = growth.exponent([1, 2, 4, 8], [1, 2, 4, 16])
    assert (slope, error) == (pytest.approx(1.3), pytest.approx((0.3 / 2 / 5) ** 0.5))
    assert growth.exponent([1, 2, 4], [1, 4, 16]) == (pytest.approx(2), None)
    assert growth.exponent([3], [1]) is None


def test_card_is_measured_point_by_point_and_shown_as_a_table(toy, asked, capsys):
    assert growth.main(["toy", "--memory", "77"]) == 0
    assert asked[0] == ("toy", ["threads=1", "data.batch_size=2"])
    assert asked[-1] == ("toy", ["data.shape=[24, 32]"])
    assert "toy batch 4: 12.5 steps per second, 120 MB" in capsys.readouterr().out
    content = load(toy.parent / "results" / "growth.json")
    assert content["rows"] == [
        ["batch", "2", "35.4", "110"],
        ["batch", "4", "12.5", "120"],
        ["batch", "8", "4.42", "140"],
        ["batch", "16", "more than 77 MB", "–"],
        ["batch", "growth", "time ~ batch^1.50", "added memory ~ batch^1.00"],
        ["pixels", "8×8", "0.195", "420"],
        ["pixels", "16×16", "0.0244", "1380"],
        ["pixels", "24×32", "0.0047", "3940"],
        ["pixels", "growth", "time ~ pixels^1.50", "added memory ~ pixels^1.00"],
    ]
    assert content["device"] == "a cpu, 1 threads"


def test_one_axis_is_measured_again_and_the_other_kept(toy, asked):
    assert growth.main([]) == 0
    before, count = points(toy), len(asked)
    assert growth.main(["toy", "--axes", "pixels"]) == 0
    assert len(asked) == count + 3
    assert sorted(points(toy), key=str) == sorted(before, key=str)


def test_memory_that_the_steps_do_not_add_to_has_no_exponent():
    axis = Growth("batch", "data.batch_size", [1, 2], [])
    flat = [{"value": n, "amount": n, "seconds": n, "added_mb": 1.0, "peak_mb": 101.0} for n in axis.values]
    assert growth.axis_rows(axis, flat)[-1] == ["batch", "growth", "time ~ batch^1.00", "–"]


def test_what_the_user_got_wrong_is_one_line(toy, asked, capsys):
    for arguments, words in (
        (["none"], ["no project 'none'", "known: toy"]),
        (["toy", "--axes", "depth"], ["no axis 'depth'", "batch, pixels"]),
    ):
        assert growth.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert all(word in error for word in words)
    toy.write_text(CARD)
    assert growth.main(["toy"]) == 2
    assert "no section `growth`" in capsys.readouterr().err
    assert not asked


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("axis: batch", "axes: batch", "growth 1: unknown key 'axes'"),
        ("axis: batch", "axis: a batch", "'axis': use letters"),
        ("axis: pixels", "axis: batch", "two axes 'batch'"),
        ("[2, 4, 8, 16]", "[2]", "'values': give at least two rising"),
        ("[2, 4, 8, 16]", "[2, 8, 4]", "'values': give at least two rising"),
        ("[2, 4, 8, 16]", "[2, 4.5]", "'values': give at least two rising"),
        ("[[8, 8]", "[[99, 99]", "growth (pixels): key 'values'"),
        ("base: [threads=1]", "base: [threads]", "no Hydra override"),
        ("base: [threads=1]", "base: [seed=1]", "set by the runner"),
    ],
)
def test_card_errors_name_file_axis_and_key(toy, old, new, message):
    assert old in SECTION
    toy.write_text(CARD + SECTION.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        load_paper(toy)
    assert message in str(error.value)
    assert "paper.yaml" in str(error.value)


@pytest.mark.slow
def test_a_point_is_a_training_in_a_process_of_its_own():
    smoke = ["experiment=smoke", "callbacks.progress=null"]
    found = growth.in_own_process("mdrn", smoke)
    assert 0 < found["seconds"] < 60
    assert 0 < found["added_mb"] < found["peak_mb"]
    assert found["threads"] == 1
    assert growth.in_own_process("mdrn", smoke, seconds=0.1) == {"error": "more than 0.1 s"}
    assert growth.in_own_process("mdrn", [*smoke, "data.batch_size=512", "data.patch_size=128"], memory_mb=3000) == {
        "error": "more than 3000 MB"
    }
    assert "batch_siz" in growth.in_own_process("mdrn", [*smoke, "data.batch_siz=2"])["error"]
