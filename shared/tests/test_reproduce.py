import json
import math
import textwrap
from pathlib import Path

import pytest

from shared import claims, reproduce
from shared.errors import InputError

# A real Hydra entry without torch: `score` is known in advance, some seeds crash, some diverge.
TRAIN = """
import json, os, sys
from pathlib import Path
import hydra

@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def train(config):
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "starts").open("a") as file:
        file.write(f"{config.resume}\\n")
    if config.crash == config.seed:
        raise RuntimeError(f"seed {config.seed} fell over")
    if config.die == config.seed:
        os._exit(3)
    noise = 0.01 * (config.seed % 3)
    score = float("nan") if config.diverge == config.seed else config.score + noise
    (folder / "metrics.json").write_text(json.dumps({
        "project": "toy", "config_hash": "c0ffee", "seed": config.seed, "git": "abc", "device": "a cpu",
        "metrics": {"test/score": score}, "baseline": {}, "seconds": 0.5, "peak_memory_mb": 1.0,
    }))

if __name__ == "__main__":
    train()
"""
CONFIG = """
defaults: [_self_, {experiment: null}]
seed: 0
run_dir: null
resume: null
threads: null
score: 1.0
crash: null
die: null
diverge: null
"""
PROGRAM = """
import json, sys
Path = __import__("pathlib").Path
with Path("program_runs").open("a") as file:
    file.write("x")
if "crash" in sys.argv:
    sys.exit("error: no such thing")
Path(sys.argv[-1]).write_text(json.dumps({"passed": True, "values": {"slope": 2.0}, "statement": "slope 2.0"}))
"""
CARD = """
project: toy
title: A toy
authors: [A. Author]
venue: Nowhere
year: 2025
link: https://example.org
task: scoring
idea: Add a number.
base: [experiment=claims, threads=1]
claims:
  - {id: better, statement: It is better., table: Table 1, metric: test/score, metric_convention: points,
     direction: higher, smallest_effect: 0.1, seeds: [0, 1, 2], time_budget_minutes: 1, control: plain,
     arms: {plain: [], idea: [score=1.5]}}
  - {id: harmless, statement: It does no harm., table: Table 2, metric: test/score, metric_convention: points,
     direction: equivalent, smallest_effect: 0.1, seeds: [0, 1, 2], time_budget_minutes: 1, control: usual,
     arms: {usual: [score=1.0], quirk: [score=1.05]}}
  - {id: order, statement: It has order 2., table: text, command: projects.toy.order, time_budget_minutes: 1}
  - {id: large, statement: It is better at scale., table: Table 3, status: not attempted, reason: needs a GPU}
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Give the folder of a project `toy` in a repository of its own, which is the current folder."""
    folder = tmp_path / "projects" / "toy"
    (folder / "configs" / "experiment").mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").write_text("")
    (folder / "train.py").write_text(TRAIN)
    (folder / "order.py").write_text(PROGRAM)
    (folder / "configs" / "train.yaml").write_text(CONFIG)
    (folder / "configs" / "experiment" / "claims.yaml").write_text("# @package _global_\n")
    (folder / "configs" / "experiment" / "claims_gpu.yaml").write_text("# @package _global_\nscore: 3.0\n")
    (folder / "paper.yaml").write_text(CARD)
    monkeypatch.chdir(tmp_path)
    return folder


def run(*arguments):
    return reproduce.main(["toy", "--launcher", "basic", *arguments])


def results(toy, name="claims"):
    content = json.loads((toy / "results" / f"{name}.json").read_text())
    return {record["id"]: record for record in content["claims"]}


def starts():
    return {path.parent.as_posix(): path.read_text().split() for path in Path("runs").rglob("starts")}


# The statistics -------------------------------------------------------------------------------------------------------


def test_interval_by_hand():
    # mean 2, sd 1; t(0.975, 2) = 4.302653; 4.302653 / sqrt(3) = 2.484138
    mean, sd, low, high = claims.interval95([1.0, 2.0, 3.0])
    assert (mean, sd) == (2.0, 1.0)
    assert low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert high == pytest.approx(2 + 2.484138, abs=1e-6)


def test_interval_against_scipy():
    from scipy import stats

    values = [0.3, -0.1, 0.7, 0.2, 0.05]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert claims.interval95(values)[2:] == pytest.approx((expected.low, expected.high), rel=1e-12)


@pytest.mark.parametrize(
    ("direction", "mean", "low", "high", "verdict"),
    [
        ("higher", 1.0, 0.1, 1.9, "reproduced"),
        ("higher", 0.5, 0.1, 0.9, "reproduced"),  # the mean just counts
        ("higher", 0.4, 0.1, 0.7, "partial"),  # sure, but the mean is too small
        ("higher", 0.2, 0.1, 0.3, "partial"),  # sure, and surely too small
        ("higher", 0.6, 0.0, 1.2, "undecided"),  # an end on zero is not above zero
        ("higher", 0.1, -0.4, 0.6, "undecided"),
        ("higher", 0.1, -0.3, 0.5, "undecided"),  # 0.5 itself still counts
        ("higher", 0.0, -0.4, 0.4, "not reproduced"),
        ("higher", -1.0, -1.5, -0.5, "not reproduced"),
        ("higher", 0.0, 0.0, 0.0, "not reproduced"),
        ("lower", -1.0, -1.9, -0.1, "reproduced"),
        ("lower", -0.2, -0.3, -0.1, "partial"),
        ("lower", 1.0, 0.1, 1.9, "not reproduced"),
        ("lower", -0.1, -0.6, 0.4, "undecided"),
        ("equivalent", 0.1, -0.2, 0.4, "reproduced"),
        ("equivalent", 0.4, 0.3, 0.45, "reproduced"),  # a sure but negligible difference
        ("equivalent", 0.2, -0.2, 0.6, "undecided"),
        ("equivalent", 0.2, -0.1, 0.5, "undecided"),
        ("equivalent", 0.9, 0.5, 1.3, "not reproduced"),
        ("equivalent", -0.9, -1.3, -0.5, "not reproduced"),
        ("not_lower", 2.0, 1.0, 3.0, "reproduced"),
        ("not_lower", -0.3, -0.4, -0.2, "reproduced"),
        ("not_lower", -0.3, -0.6, 0.0, "undecided"),
        ("not_lower", -0.9, -1.0, -0.8, "not reproduced"),
        ("not_higher", 0.3, 0.2, 0.4, "reproduced"),
        ("not_higher", 0.9, 0.8, 1.0, "not reproduced"),
    ],
)
def test_verdict_of_interval(direction, mean, low, high, verdict):
    assert claims.verdict_of_interval(direction, 0.5, mean, low, high) == verdict


def test_compare_by_hand():
    # differences 1, 2, 3: interval [-0.484, 4.484]
    found = claims.compare([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], "higher", 0.5)
    assert found["differences"] == [1.0, 2.0, 3.0]
    assert (found["n"], found["mean"], found["sd"], found["verdict"]) == (3, 2.0, 1.0, "undecided")
    assert claims.compare([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], "higher", 0.5)["verdict"] == "reproduced"


def test_compare_diverged_and_failed():
    nan, good = math.nan, [1.0, 1.0, 1.0, 1.0]

    def verdict(arm, control, direction="higher"):
        return claims.compare(arm, control, direction, 0.5)["verdict"]

    assert verdict([2.0, 2.0, 2.0, nan], good) == "not reproduced"
    assert verdict([2.0, 2.0, 2.0, math.inf], good) == "not reproduced"
    assert verdict([2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, nan]) == "reproduced"
    assert verdict([2.0, 2.0, 2.0, 2.0], [1.0, 1.0, nan, nan]) == "undecided"  # two pairs are too few
    assert verdict(good, [nan] * 4) == "reproduced"
    assert verdict(good, [nan] * 4, "equivalent") == "not reproduced"
    assert verdict([nan] * 4, [nan] * 4) == "undecided"
    assert verdict([2.0, 2.0, 2.0, nan], [1.0, 1.0, 1.0, nan]) == "reproduced"
    assert verdict([2.0, 2.0, 2.0, None], good) == "undecided"
    assert verdict([2.0, 2.0, nan, None], good) == "not reproduced"


@pytest.mark.parametrize(
    ("verdicts", "claim"),
    [
        (["reproduced", "reproduced"], "reproduced"),
        (["reproduced", "not reproduced"], "partial"),
        (["partial", "undecided"], "partial"),
        (["not reproduced", "undecided"], "not reproduced"),
        (["undecided", "undecided"], "undecided"),
    ],
)
def test_combine(verdicts, claim):
    assert claims.combine(verdicts) == claim


# The card -------------------------------------------------------------------------------------------------------------


def test_card_in_docstring_is_valid(tmp_path):
    lines = claims.__doc__.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    project: fssm"))
    end = next(i for i, line in enumerate(lines) if line == "The verdict")
    card = tmp_path / "paper.yaml"
    card.write_text(textwrap.dedent("\n".join(lines[start:end])))
    paper = claims.load_paper(card)
    kinds = [type(claim).__name__ for claim in paper.claims]
    assert kinds == ["TrainedClaim", "ProgramClaim", "UnattemptedClaim"]
    assert claims.deciding_pairs(paper.claims[0]) == [("foh", "zoh"), ("foh", "previous")]


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("venue: Nowhere", "venu: Nowhere", ["paper.yaml", "'venu'"]),
        ("venue: Nowhere\n", "", ["paper.yaml", "'venue' is missing"]),
        ("year: 2025", "year: soon", ["'year'"]),
        ("direction: higher", "direktion: higher", ["claim 1 (better)", "'direktion'"]),
        ("direction: higher", "direction: up", ["claim 1 (better)", "'direction'", "equivalent"]),
        ("direction: higher, ", "", ["claim 1 (better)", "'direction' is missing"]),
        ("smallest_effect: 0.1, seeds", "smallest_effect: none, seeds", ["claim 1 (better)", "'smallest_effect'"]),
        ("smallest_effect: 0.1, seeds", "smallest_effect: 0, seeds", ["'smallest_effect'", "above 0"]),
        (
            "seeds: [0, 1, 2], time_budget_minutes: 1, control: plain",
            "seeds: [0, 1], time_budget_minutes: 1, control: plain",
            ["'seeds'", "three"],
        ),
        (
            "seeds: [0, 1, 2], time_budget_minutes: 1, control: plain",
            "seeds: [0, 1, 1], time_budget_minutes: 1, control: plain",
            ["'seeds'"],
        ),
        ("control: plain", "control: plane", ["'control'", "plane"]),
        ("[score=1.5]", "['score=1,2']", ["arm idea", "sweep"]),
        ("[score=1.5]", "[score]", ["arm idea", "no Hydra override"]),
        ("[score=1.5]", "[seed=3]", ["arm idea", "set by the runner"]),
        ("[score=1.5]}", "[score=1.5]}, decide: [ideal]", ["'decide'", "ideal vs plain"]),
        ("id: harmless", "id: better", ["two claims", "'better'"]),
        ("status: not attempted", "status: reproduced", ["(large)", "'status'"]),
        ("command: projects.toy.order", "command: projects.toy.order, metric: x", ["(order)", "'metric'"]),
        ("project: toy", "project: [toy", ["is not YAML"]),
    ],
)
def test_card_errors_name_file_and_key(toy, old, new, names):
    assert old in CARD
    (toy / "paper.yaml").write_text(CARD.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        claims.load_paper(toy / "paper.yaml")
    message = str(error.value)
    assert "\n" not in message
    for name in ["paper.yaml", *names]:
        assert name in message


# The runs -------------------------------------------------------------------------------------------------------------


def test_a_whole_run_then_nothing_to_do(toy, capsys):
    assert run() == 0
    records = results(toy)
    assert {name: record["verdict"] for name, record in records.items()} == {
        "better": "reproduced",
        "harmless": "reproduced",
        "order": "reproduced",
        "large": "not attempted",
    }
    better = records["better"]
    assert [run["value"] for run in better["arms"]["idea"]["runs"]] == pytest.approx([1.5, 1.51, 1.52])
    assert better["comparisons"][0]["mean"] == pytest.approx(0.5)
    assert (better["device"], better["threads"], better["seconds"]) == ("a cpu", 1, 3.0)
    assert {run["config_hash"] for run in better["arms"]["idea"]["runs"]} == {"c0ffee"}
    assert better["code_hash"] == reproduce.code_hash(Path("projects/toy"))
    assert better["date"].endswith("UTC")
    assert records["order"]["values"] == {"slope": 2.0}
    assert records["large"]["reason"] == "needs a GPU"
    # plain and usual say the same in other words: one arm, three seeds; with idea and quirk three arms
    assert better["arms"]["plain"]["arm_hash"] == records["harmless"]["arms"]["usual"]["arm_hash"]
    assert list(starts().values()) == [["auto"]] * 9

    before = (toy / "results" / "claims.json").read_text()
    capsys.readouterr()
    assert run() == 0
    assert "0 runs to do" in capsys.readouterr().out
    assert list(starts().values()) == [["auto"]] * 9
    assert Path("program_runs").read_text() == "x"
    assert (toy / "results" / "claims.json").read_text() == before

    # another claim's results are kept, and a threshold moved after the run does not go unseen
    card = (toy / "paper.yaml").read_text()
    (toy / "paper.yaml").write_text(card.replace("smallest_effect: 0.1, seeds", "smallest_effect: 0.9, seeds", 1))
    assert run("--claims", "better") == 0
    records = results(toy)
    assert list(records) == ["better", "harmless", "order", "large"]
    assert records["better"]["verdict"] == "partial"
    assert [rule["smallest_effect"] for rule in records["better"]["earlier_rules"]] == [0.1]

    # changed code runs anew in an empty folder, and only what was asked for
    (toy / "train.py").write_text(TRAIN.replace("0.01 *", "0.02 *"))
    assert run("--claims", "better") == 0
    assert sum(len(lines) for lines in starts().values()) == 9
    assert [run["value"] for run in results(toy)["better"]["arms"]["idea"]["runs"]] == pytest.approx([1.5, 1.52, 1.54])


def test_failed_and_diverged_runs_are_recorded(toy, capsys):
    card = CARD.replace("idea: [score=1.5]", "idea: [score=1.5, crash=1]")
    card = card.replace("quirk: [score=1.05]", "quirk: [score=1.05, diverge=1]")
    (toy / "paper.yaml").write_text(card.replace("projects.toy.order,", "projects.toy.order, arguments: [crash],"))
    assert run() == 1
    records = results(toy)
    runs = records["better"]["arms"]["idea"]["runs"]
    assert [run["status"] for run in runs] == ["finished", "failed", "finished"]
    assert "RuntimeError: seed 1 fell over" in runs[1]["error"]
    assert "launch.log" in runs[1]["error"]
    assert records["better"]["verdict"] == "undecided"
    assert "1 of 3 pairs" in records["better"]["reason"]
    runs = records["harmless"]["arms"]["quirk"]["runs"]
    assert [run["status"] for run in runs] == ["finished", "diverged", "finished"]
    assert records["harmless"]["verdict"] == "not reproduced"
    assert records["order"]["verdict"] == "undecided"
    assert "error: no such thing" in records["order"]["reason"]
    assert "NaN" not in (toy / "results" / "claims.json").read_text()
    assert "seed 1 failed: RuntimeError" in capsys.readouterr().out

    # the failed one is tried again, the others stay
    finished = {path: lines for path, lines in starts().items() if Path(path, "metrics.json").exists()}
    assert len(finished) == 8
    assert run("--claims", "better") == 1
    assert all(starts()[path] == lines for path, lines in finished.items())


@pytest.mark.slow
def test_joblib_worker_that_dies_takes_no_other_seed_with_it(toy):
    arm = reproduce.Arm("cafe", ["score=2", "die=1"], 1, Path("runs/toy/claims/cafe"), seeds=[0, 1, 2])
    reproduce.run_arm("toy", arm, "somecode", reproduce.launcher_overrides("joblib", 2))
    assert arm.missing("somecode") == [1]
    assert list(arm.errors) == [1]


def test_unknown_metric_names_what_there_is(toy):
    (toy / "paper.yaml").write_text(CARD.replace("metric: test/score", "metric: test/psnr", 1))
    claim = claims.load_paper(toy / "paper.yaml").claims[0]
    arm = reproduce.Arm("cafe", [], 1, Path("runs/cafe"), seeds=[0, 1, 2])
    for seed in arm.seeds:
        arm.run_folder(seed).mkdir(parents=True)
        arm.marker(seed).write_text("code")
        (arm.run_folder(seed) / "metrics.json").write_text('{"metrics": {"test/score": 1.0}}')
    record = reproduce.trained_record(claim, {"plain": arm, "idea": arm}, "code")
    assert record["verdict"] == "undecided"
    assert "has no 'test/psnr'; it has test/score" in record["arms"]["idea"]["runs"][0]["error"]


def test_setting_writes_its_own_file(toy):
    (toy / "paper.yaml").write_text(CARD.replace("plain: []", "plain: [threads=2]"))
    assert run("--claims", "better", "--setting", "claims_gpu") == 0
    assert not (toy / "results" / "claims.json").exists()
    record = results(toy, "claims_gpu")["better"]
    assert [run["value"] for run in record["arms"]["plain"]["runs"]] == pytest.approx([3.0, 3.01, 3.02])


def test_dry_run_runs_nothing(toy, capsys):
    assert run("--dry-run") == 0
    shown = capsys.readouterr().out
    assert shown.count("--multirun") == 3
    assert "better/plain, harmless/usual: 0 done, 3 to run" in shown
    assert "seed=0,1,2" in shown
    assert not Path("runs").exists()
    assert not (toy / "results").exists()


def test_half_finished_run_resumes_and_other_codes_leftovers_go(toy):
    code = reproduce.code_hash(Path("projects/toy"))
    arm = reproduce.Arm("cafe", [], 1, Path("runs/toy/claims/cafe"), seeds=[0, 1, 2])
    for seed, started_with in ((0, code), (1, "othercode")):
        arm.run_folder(seed).mkdir(parents=True)
        (arm.run_folder(seed) / "last.ckpt").write_text("half")
        arm.marker(seed).write_text(started_with)
    # metrics of other code do not count as finished
    (arm.run_folder(1) / "metrics.json").write_text('{"metrics": {}}')
    assert arm.missing(code) == [0, 1, 2]
    reproduce.run_arm("toy", arm, code, reproduce.launcher_overrides("basic", 1))
    assert arm.missing(code) == []
    assert (arm.run_folder(0) / "last.ckpt").exists()
    assert not (arm.run_folder(1) / "last.ckpt").exists()


def test_code_hash_sees_sources_and_not_tests(toy):
    before = reproduce.code_hash(toy)
    (toy / "tests").mkdir()
    (toy / "tests" / "test_model.py").write_text("x = 1")
    (toy / "README.md").write_text("hello")
    assert reproduce.code_hash(toy) == before
    (toy / "model.py").write_text("x = 1")
    assert reproduce.code_hash(toy) != before


def test_arm_hash_ignores_seed_and_place():
    config = {"seed": 0, "run_dir": None, "model": {"lr": 1}}
    assert reproduce.arm_hash(config) == reproduce.arm_hash({**config, "seed": 5, "run_dir": "x"})
    assert reproduce.arm_hash(config) != reproduce.arm_hash({**config, "model": {"lr": 2}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "known: toy"),
        (["toy", "--claims", "bettre"], "no claim 'bettre'; there is: better"),
        (["toy", "--setting", "huge"], "there is: claims, claims_gpu"),
        (["toy", "--jobs", "0"], "--jobs 0"),
        (["toy", "score=2"], "only hydra.* settings"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(toy, capsys, arguments, message):
    assert reproduce.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_arm_that_does_not_compose_is_named(toy, capsys):
    (toy / "paper.yaml").write_text(CARD.replace("[score=1.5]", "[scroe=1.5]"))
    assert run() == 2
    error = capsys.readouterr().err
    assert "claim better, arm idea" in error
    assert "scroe" in error


@pytest.mark.parametrize("launcher", reproduce.LAUNCHERS)
def test_launcher_overrides_are_hydra_overrides(launcher):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(reproduce.launcher_overrides(launcher, 3))
    assert parsed[0].value() == launcher


def test_help_helps(capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--help"])
    assert stop.value.code == 0
    assert "not run again" in " ".join(capsys.readouterr().out.split())
