r"""Run a paper's claims as experiments and write what came out to `projects/<name>/results/claims.json`.

    python -m shared.reproduce fssm                                    every claim, seeds in parallel on this machine
    python -m shared.reproduce fssm --claims foh_over_zoh --dry-run    what would run, what is already there
    python -m shared.reproduce fssm --launcher submitit_slurm --jobs 8 hydra.launcher.partition=gpu
    python -m shared.reproduce fssm --setting claims_gpu               the larger runs, into results/claims_gpu.json

The card of a project, `projects/<name>/paper.yaml`, and how a verdict is reached stand in shared/claims.py.

What runs
---------
Each distinct arm is one Hydra `--multirun` over its missing seeds through the chosen launcher. An arm is identified by
the hash of its composed configuration (without seed and run folder), so arms that several claims share run once. Runs
live under `runs/<project>/claims/<arm hash>/seed_<n>/`. A run is finished when it left metrics.json under the present
code (a hash of the project's and shared's sources); it is then not run again. A run that stopped half-way under the
present code is resumed. Exit code: 0, whatever the verdicts; 1 if a run failed; 2 for unusable input.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from shared.claims import (
    Claim,
    Paper,
    ProgramClaim,
    TrainedClaim,
    UnattemptedClaim,
    combine,
    compare,
    deciding_pairs,
    load_paper,
)
from shared.errors import InputError
from shared.io.files import write_json, write_text

LAUNCHERS = ("joblib", "basic", "submitit_slurm", "submitit_local", "ray")


# Identity of a run ----------------------------------------------------------------------------------------------------


def code_hash(project_folder: Path) -> str:
    """Hash the sources that can change a run: the project's and shared's, without tests and reporting."""
    digest = hashlib.sha256()
    for folder, suffixes in ((project_folder, {".py"}), (Path(__file__).parent, {".py", ".cu"})):
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if (
                path.suffix not in suffixes
                or "tests" in name.parts
                or str(name) in ("claims.py", "growth.py", "reproduce.py", "report.py")
            ):
                continue
            digest.update(f"{folder.name}/{name.as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# In a process of its own: this module imports no project, but importing its train.py is what registers its schema.
_COMPOSE = """
import importlib, json, pathlib, sys
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
project, arms = json.load(sys.stdin)
module = importlib.import_module(f"projects.{project}.train")
answers = []
with initialize_config_dir(str(pathlib.Path(module.__file__).parent.resolve() / "configs"), version_base="1.3"):
    for overrides in arms:
        try:
            answers.append(OmegaConf.to_container(compose("train", overrides), resolve=False))
        except Exception as error:
            answers.append(" ".join(str(error).split()))
sys.stdout.write("\\n" + json.dumps(answers, default=str))
"""


def composed(project: str, arms: list[list[str]]) -> list[dict | str]:
    """Compose each list of overrides; an error message stands for one that does not compose."""
    process = subprocess.run(
        [sys.executable, "-c", _COMPOSE],
        input=json.dumps([project, arms]),
        capture_output=True,
        text=True,
        env=_environment(),
    )
    if process.returncode:
        raise InputError(f"cannot import projects.{project}.train: {_last_line(process.stderr)}")
    return json.loads(process.stdout.splitlines()[-1])


def arm_hash(config: dict) -> str:
    """Hash a composed configuration without what differs between the runs of one arm."""
    rest = {key: value for key, value in config.items() if key not in ("seed", "run_dir", "resume", "logger")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _environment() -> dict[str, str]:
    """Let workers of every launcher import the projects of this folder."""
    paths = [str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _last_line(text: str) -> str:
    """Give the line of a log that most likely says what went wrong."""
    # Hydra ends a traceback with an advertisement for the full one.
    lines = [line.strip() for line in text.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    errors = [line for line in lines if re.match(r"error:|[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (errors or lines or ["no output"])[-1][:500]


# Running --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Arm:
    """One configuration and the seeds it is wanted for."""

    hash: str
    overrides: list[str]
    threads: int | None
    folder: Path
    used_by: list[str] = dataclasses.field(default_factory=list)
    seeds: list[int] = dataclasses.field(default_factory=list)
    errors: dict[int, str] = dataclasses.field(default_factory=dict)

    def run_folder(self, seed: int) -> Path:
        """The folder of one run."""
        return self.folder / f"seed_{seed}"

    def marker(self, seed: int) -> Path:
        """The file beside it that says which code it was started with."""
        return self.folder / f"seed_{seed}.code"

    def metrics(self, seed: int, code: str) -> dict | None:
        """What a finished run left, if the present code made it."""
        if not self.started(seed, code):
            return None
        try:
            return json.loads((self.run_folder(seed) / "metrics.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def started(self, seed: int, code: str) -> bool:
        """Whether the present code began this run."""
        return self.marker(seed).is_file() and self.marker(seed).read_text(encoding="utf-8").strip() == code

    def missing(self, code: str) -> list[int]:
        """The seeds that still have to run."""
        return [seed for seed in self.seeds if self.metrics(seed, code) is None]


def launcher_overrides(launcher: str, jobs: int) -> list[str]:
    """Give the overrides that make a Hydra launcher run `jobs` runs at a time."""
    limits = {
        "basic": [],
        "joblib": [f"hydra.launcher.n_jobs={jobs}"],
        "submitit_slurm": [f"hydra.launcher.array_parallelism={jobs}"],
        # submitit starts all local jobs at once; the sweeper's batches bound them
        "submitit_local": [f"hydra.sweeper.max_batch_size={jobs}"],
        "ray": [f"++hydra.launcher.ray.init.num_cpus={jobs}"],
    }
    return [f"hydra/launcher={launcher}", *limits[launcher]]


def train_command(project: str, arm: Arm, seeds: list[int], launch: list[str]) -> list[str]:
    """Give the Hydra multirun of one arm over some seeds."""
    return [
        *(sys.executable, "-m", f"projects.{project}.train", "--multirun"),
        *arm.overrides,
        f"seed={','.join(map(str, seeds))}",
        f"run_dir='{arm.folder.as_posix()}/seed_${{seed}}'",
        "resume=auto",
        f"hydra.sweep.dir='{arm.folder.as_posix()}'",
        "hydra.sweep.subdir='seed_${seed}'",
        *launch,
    ]


def run_arm(project: str, arm: Arm, code: str, launch: list[str], redo: bool = False) -> int:
    """Run the missing seeds of an arm and note the error of each that fails; give the number of runs launched."""
    if redo:
        for seed in arm.seeds:
            arm.marker(seed).unlink(missing_ok=True)
    seeds = arm.missing(code)
    for seed in seeds:
        if not arm.started(seed, code):
            # what other code left must not be resumed
            shutil.rmtree(arm.run_folder(seed), ignore_errors=True)
            write_text(arm.marker(seed), code + "\n")
    if not seeds:
        return 0
    log = arm.folder / "launch.log"
    output = _run(train_command(project, arm, seeds, launch), log)
    hopeless = len(seeds) == 1
    for seed in arm.missing(code):
        if not hopeless:
            # once more alone: a dying worker takes its neighbours with it, and only alone is the message surely its own
            output = _run(train_command(project, arm, [seed], launch), log)
            # where no seed ever finished it is the arm, and further tries would say the same
            hopeless = len(arm.missing(code)) == len(arm.seeds)
        if arm.metrics(seed, code) is None:
            arm.errors[seed] = f"{_last_line(output)} (log: {log})"
    return len(seeds)


def _run(command: list[str], log: Path) -> str:
    """Run a command, keep its output in `log` and give it; whether it worked is seen by what it left."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=_environment())
    return log.read_text(encoding="utf-8", errors="replace")


def run_program(claim: ProgramClaim, folder: Path, code: str, redo: bool = False) -> dict:
    """Run a claim's program unless the present code has; give its finding with `seconds`, or {"error": ...}."""
    key = hashlib.sha256(json.dumps([claim.command, claim.arguments]).encode()).hexdigest()[:12]
    output, state = folder / key / "output.json", folder / key / "state.json"
    try:
        known = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if known.get("code_hash") == code and not redo:
        return known
    output.unlink(missing_ok=True)
    start = time.monotonic()
    command = [sys.executable, "-m", claim.command, *claim.arguments, "--output", str(output)]
    log = folder / key / "launch.log"
    text = _run(command, log)
    try:
        found = json.loads(output.read_text(encoding="utf-8"))
        if found["passed"] not in (True, False, None):
            raise ValueError(f"'passed' is {found['passed']!r}, not true, false or null")
        finding = {"finding": found["statement"], "device": found.get("device", "")}
        found = {"passed": found["passed"], "values": found["values"], **finding}
    except OSError:
        return {"error": f"{_last_line(text)} (log: {log})"}
    except (KeyError, TypeError, ValueError) as error:
        return {"error": f"{output} is not what a claim's program writes: {error}"}
    found = {**found, "seconds": round(time.monotonic() - start, 1), "git": git_commit(), "code_hash": code}
    write_json(state, found)
    return found


def git_commit() -> str:
    """Give the commit of the working folder, with `-dirty` if tracked files differ; empty outside a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
        change = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return ""
    return head.stdout.strip() + ("-dirty" if change.stdout.strip() else "") if head.returncode == 0 else ""


# What is written ------------------------------------------------------------------------------------------------------


def trained_record(claim: TrainedClaim, arms: dict[str, Arm], code: str) -> dict:
    """Give the record of a trained claim from what its runs left."""
    shown, values, devices, seconds = {}, {}, set(), 0.0
    for name, arm in arms.items():
        runs = [_run_record(claim, arm, seed, code) for seed in claim.seeds]
        values[name] = [math.nan if run["status"] == "diverged" else run["value"] for run in runs]
        devices |= {run["device"] for run in runs if run.get("device")}
        seconds += sum(run.get("seconds") or 0 for run in runs)
        shown[name] = {"overrides": claim.arms[name], "arm_hash": arm.hash, "runs": runs}
    deciding = deciding_pairs(claim)
    pairs = deciding + [(name, claim.control) for name in claim.arms if name != claim.control]
    comparisons = [
        {
            "arm": arm,
            "control": control,
            "decides": (arm, control) in deciding,
            **compare(values[arm], values[control], claim.direction, claim.smallest_effect),
        }
        for arm, control in dict.fromkeys(pairs)
    ]
    threads = {arm.threads for arm in arms.values()}
    return {
        "metric": claim.metric,
        "metric_convention": claim.metric_convention,
        "unit": claim.unit,
        "direction": claim.direction,
        "smallest_effect": claim.smallest_effect,
        "seeds": claim.seeds,
        "control": claim.control,
        "arms": shown,
        "comparisons": comparisons,
        "verdict": combine([comparison["verdict"] for comparison in comparisons if comparison["decides"]]),
        "reason": "; ".join(dict.fromkeys(c["reason"] for c in comparisons if c["decides"] and c["reason"])),
        "device": ", ".join(sorted(devices)),
        "threads": threads.pop() if len(threads) == 1 else None,
        "seconds": round(seconds, 1),
        "time_budget_minutes": claim.time_budget_minutes,
    }


def _run_record(claim: TrainedClaim, arm: Arm, seed: int, code: str) -> dict:
    """Give what one run says about one claim."""
    found = arm.metrics(seed, code)
    if found is None:
        return {"seed": seed, "status": "failed", "value": None, "error": arm.errors.get(seed, "not run")}
    about = {key: found.get(key) for key in ("config_hash", "git", "device", "seconds")}
    # a device may be described by more than a word
    about["device"] = about["device"] if isinstance(about["device"], str) else json.dumps(about["device"])
    if claim.metric not in found["metrics"]:
        error = f"metrics.json has no '{claim.metric}'; it has {', '.join(found['metrics'])}"
        return {"seed": seed, "status": "failed", "value": None, "error": error, **about}
    value = found["metrics"][claim.metric]
    if value is None or not math.isfinite(value):
        return {"seed": seed, "status": "diverged", "value": None, **about}
    return {"seed": seed, "status": "finished", "value": value, **about}


def program_record(claim: ProgramClaim, found: dict) -> dict:
    """Give the record of a claim checked by a program."""
    verdict = {True: "reproduced", False: "not reproduced", None: "undecided"}[found.get("passed")]
    return {
        "command": " ".join(["python", "-m", claim.command, *claim.arguments]),
        "values": found.get("values", {}),
        "finding": found.get("finding", ""),
        "verdict": verdict,
        "reason": f"the program failed: {found['error']}" if "error" in found else "",
        "device": found.get("device", ""),
        "seconds": found.get("seconds"),
        "time_budget_minutes": claim.time_budget_minutes,
    }


def identified(claim: Claim, record: dict, code: str, earlier: dict | None) -> dict:
    """Complete a record with what all kinds share; the earlier record itself if nothing but the date would change."""
    kind = {TrainedClaim: "trained", ProgramClaim: "program", UnattemptedClaim: "not attempted"}[type(claim)]
    record = {
        "id": claim.id,
        "kind": kind,
        "headline": claim.headline,
        "statement": claim.statement,
        "table": claim.table,
        "claimed": claim.claimed,
        **record,
    }
    if kind != "not attempted":
        record |= {"code_hash": code, "git": git_commit()}
    earlier = earlier or {}
    rule = {key: earlier.get(key) for key in ("metric", "direction", "smallest_effect", "date")}
    history = list(earlier.get("earlier_rules", []))
    if kind == "trained" and earlier.get("kind") == kind and any(rule[key] != record[key] for key in list(rule)[:3]):
        history.append(rule)
    if history:
        record["earlier_rules"] = history
    if {**earlier, "date": None, "git": None} == {**record, "date": None, "git": None}:
        return earlier
    # one clock for every machine that writes results
    return {**record, "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}


def write_results(path: Path, paper: Paper, setting: str, records: Iterable[dict]) -> None:
    """Write the results file in the order of the card, leaving out claims that the card no longer has."""
    by_id = {record["id"]: record for record in records}
    card = {key: getattr(paper, key) for key in ("title", "authors", "venue", "year", "link", "task")}
    claims = [by_id[claim.id] for claim in paper.claims if claim.id in by_id]
    write_json(path, {"project": paper.project, "paper": card, "setting": setting, "claims": claims})


# The command ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m shared.reproduce",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a paper's claims, several seeds each, and write projects/<project>/results/claims.json.\n"
        "Finished runs are kept and not run again while neither the code nor the configuration changes.",
        epilog="verdicts: reproduced, partial, not reproduced, undecided, not attempted; the rule stands at the top\n"
        "of shared/claims.py. exit code: 0 whatever the verdicts, 1 if a run failed, 2 for unusable input.",
    )
    add = parser.add_argument
    add("project", help="a folder of projects/, for instance fssm")
    add("hydra", nargs="*", metavar="hydra.X=Y", help="settings of the launcher, as hydra.launcher.partition=gpu")
    add("--claims", metavar="ID,ID", help="only these claims (default: all of paper.yaml); other results are kept")
    add("--launcher", choices=LAUNCHERS, default="joblib", help="Hydra's launcher for the seeds (default: joblib)")
    add("--jobs", type=int, default=2, help="runs at the same time (default: 2)")
    add("--setting", metavar="NAME", help="experiment/NAME.yaml in place of the card's, results in NAME.json")
    add("--dry-run", action="store_true", help="show what would run, and run nothing")
    add("--redo", action="store_true", help="run again what is already finished")
    args = parser.parse_intermixed_args(argv)
    try:
        return reproduce(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def reproduce(args: argparse.Namespace) -> int:
    """Run what `args` asks for; give the exit code."""
    folder = Path("projects") / args.project
    if not (folder / "paper.yaml").is_file():
        known = ", ".join(sorted(path.parent.name for path in Path("projects").glob("*/paper.yaml"))) or "none here"
        raise InputError(
            f"no project '{args.project}' with a paper.yaml in {Path('projects').resolve()}; known: {known}"
        )
    if args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: give at least 1")
    if "LOCAL_RANK" in os.environ:
        raise InputError("claims are run by one process, and LOCAL_RANK says that this is one of several; unset it")
    for text in args.hydra:
        if not text.lstrip("+").startswith("hydra"):
            raise InputError(f"'{text}': only hydra.* settings may follow; the arms stand in {folder / 'paper.yaml'}")
    paper = load_paper(folder / "paper.yaml")
    claims = _selected(paper, args.claims)
    setting = args.setting or _experiment(paper.base) or "claims"
    results = folder / "results" / f"{setting if args.setting else 'claims'}.json"
    earlier = _earlier(results)
    code = code_hash(folder)
    runs = Path("runs") / args.project / "claims"
    launch = [*launcher_overrides(args.launcher, args.jobs), *args.hydra]
    arms = _plan(paper, claims, args.setting, folder, runs)
    unique = list({arm.hash: arm for of_claim in arms.values() for arm in of_claim.values()}.values())
    todo = {arm.hash: len(arm.seeds if args.redo else arm.missing(code)) for arm in unique}
    total = sum(todo.values())
    print(f"{args.project}: {len(claims)} claims, {len(unique)} arms, {total} runs to do, code {code}", flush=True)

    if args.dry_run:
        for claim in claims:
            if isinstance(claim, ProgramClaim):
                print(f"{claim.id}: python -m {' '.join([claim.command, *claim.arguments])}")
        for arm in unique:
            seeds = arm.seeds if args.redo else arm.missing(code)
            print(f"{arm.hash} {', '.join(arm.used_by)}: {len(arm.seeds) - len(seeds)} done, {len(seeds)} to run")
            if seeds:
                print("    " + " ".join(train_command(args.project, arm, seeds, launch)))
        return 0

    start, launched, ready, failed = time.monotonic(), 0, set(), set()
    budget = 60 * sum(claim.time_budget_minutes for claim in claims if isinstance(claim, TrainedClaim))
    for claim in claims:
        if isinstance(claim, UnattemptedClaim):
            record = {key: getattr(claim, key) for key in ("metric", "metric_convention", "reason")}
            record["verdict"] = "not attempted"
        elif isinstance(claim, ProgramClaim):
            found = run_program(claim, runs, code, args.redo)
            failed |= {claim.id} if "error" in found else set()
            record = program_record(claim, found)
        else:
            for arm in arms[claim.id].values():
                if arm.hash in ready:
                    continue
                ready.add(arm.hash)
                done = run_arm(args.project, arm, code, launch, args.redo)
                launched += done
                elapsed = time.monotonic() - start
                left = elapsed / launched * (total - launched) if launched else budget
                errors = "".join(f"\n    seed {seed} failed: {error}" for seed, error in arm.errors.items())
                print(
                    f"[{len(ready)}/{len(unique)}] {arm.hash} {', '.join(arm.used_by)}: {done} run, "
                    f"{len(arm.seeds) - done} kept; {_minutes(elapsed)} gone, about {_minutes(left)} left{errors}",
                    flush=True,
                )
            record = trained_record(claim, arms[claim.id], code)
            for arm in record["arms"].values():
                failed |= {(arm["arm_hash"], run["seed"]) for run in arm["runs"] if run["status"] == "failed"}
        record = identified(claim, record, code, earlier.get(claim.id))
        earlier[claim.id] = record
        # after each claim, so that a long night cut short keeps what it has
        write_results(results, paper, setting, earlier.values())
        # a run of one thread leaves the second core to another
        on_two_cores = (record.get("seconds") or 0) * min(record.get("threads") or 2, 2) / 2
        over = on_two_cores > 60 * getattr(claim, "time_budget_minutes", math.inf)
        notes = [record["reason"], "over its time budget" if over else ""]
        print(f"{claim.id}: {record['verdict']}" + "".join(f" ({note})" for note in notes if note), flush=True)
    print(f"wrote {results}" + (f"; {len(failed)} runs failed" if failed else ""))
    return 1 if failed else 0


def _selected(paper: Paper, ids: str | None) -> list[Claim]:
    """Give the claims that `--claims` names, in the order of the card."""
    known = [claim.id for claim in paper.claims]
    wanted = [part.strip() for part in ids.split(",") if part.strip()] if ids else known
    for claim_id in wanted:
        if claim_id not in known:
            raise InputError(f"--claims: no claim '{claim_id}'; there is: {', '.join(known)}")
    return [claim for claim in paper.claims if claim.id in wanted]


def _experiment(base: list[str]) -> str | None:
    """Give the experiment that a list of overrides chooses."""
    return next((text.partition("=")[2] for text in base if text.startswith("experiment=")), None)


def _earlier(path: Path) -> dict[str, dict]:
    """Give the records of a results file by claim id."""
    if not path.exists():
        return {}
    try:
        return {record["id"]: record for record in json.loads(path.read_text(encoding="utf-8"))["claims"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it from git or delete it") from error


def _plan(
    paper: Paper, claims: list[Claim], setting: str | None, folder: Path, runs: Path
) -> dict[str, dict[str, Arm]]:
    """Give the arms of each trained claim by name; equal configurations are one and the same object."""
    base = list(paper.base)
    if setting:
        known = sorted(path.stem for path in (folder / "configs" / "experiment").glob("*.yaml"))
        if setting not in known:
            raise InputError(f"--setting {setting}: no such experiment; there is: {', '.join(known)}")
        base = [f"experiment={setting}", *(text for text in base if not text.startswith("experiment="))]
    trained = [claim for claim in claims if isinstance(claim, TrainedClaim)]
    wanted = [(claim, name, base + overrides) for claim in trained for name, overrides in claim.arms.items()]
    if not wanted:
        return {}
    arms: dict[str, Arm] = {}
    plan: dict[str, dict[str, Arm]] = {claim.id: {} for claim in trained}
    for (claim, name, overrides), config in zip(wanted, composed(paper.project, [w[2] for w in wanted]), strict=True):
        if isinstance(config, str):
            raise InputError(f"{folder / 'paper.yaml'}: claim {claim.id}, arm {name}: {config}")
        key = arm_hash(config)
        arm = arms.setdefault(key, Arm(key, overrides, config.get("threads"), runs / key))
        arm.used_by.append(f"{claim.id}/{name}")
        arm.seeds = sorted({*arm.seeds, *claim.seeds})
        plan[claim.id][name] = arm
    return plan


def _minutes(seconds: float) -> str:
    """Write a duration as a person would."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
