r"""Run a paper's claims as experiments and write what came out to `projects/<name>/results/claims.json`.

    python -m shared.reproduce fssm                                    every claim, seeds in parallel on this machine
    python -m shared.reproduce fssm --claims foh_over_zoh --dry-run    what would run, what is already there
    python -m shared.reproduce fssm --launcher submitit_slurm --jobs 8 hydra.launcher.partition=gpu
    python -m shared.reproduce fssm --setting claims_gpu               the larger runs, into results/claims_gpu.json

The card of a project, `projects/<name>/paper.yaml`
---------------------------------------------------
An unknown, missing or badly typed key stops the run and names the file, the claim and the key.
A claim is of one of three kinds.

    project: fssm
    title: First-order State Space Model for Lightweight Image Super-resolution
    authors: [Yujie Zhu, Xinyi Zhang]
    venue: ICASSP
    year: 2025
    link: https://doi.org/10.1109/ICASSP49660.2025.10887656
    task: lightweight image super-resolution
    idea: >
      Mamba holds its input constant over a step; this paper lets it run linearly to the next token.
    base: [experiment=claims, threads=1]     # common to every arm; `--setting X` puts experiment=X in its place
    network: {}                              # the contract of the network, free for the project's own tests
    departures:
      - what: Training runs on embedded images.
        why: DIV2K cannot be shipped.
    claims:
      # 1. Trained: arms x seeds of `python -m projects.fssm.train`, paired by seed.
      - id: foh_over_zoh
        headline: true                       # optional: the claim the root README shows (else the first one)
        statement: At equal parameters the first-order hold scores higher than the zero-order hold.
        table: Table 1
        claimed: +0.05 dB                    # optional: what the paper reports, in its own words
        metric: test/psnr_y                  # a key of "metrics" in metrics.json
        metric_convention: PSNR on Y of BT.601, 8 bit, 2 border pixels cut, mean over 5 held-out images
        unit: dB                             # optional, for the tables
        direction: higher                    # higher | lower | equivalent | not_lower | not_higher
        smallest_effect: 0.02                # in units of the metric, before the run; the last three's margin
        seeds: [0, 1, 2, 3, 4]               # at least three
        time_budget_minutes: 15              # of all its arms on two cores; reported against, nothing is killed
        control: zoh
        arms:
          zoh: [model.net.hold=zoh_euler]
          foh: [model.net.hold=foh_1]
          foh_simple: [model.net.hold=foh_0]
          previous: [model.net.hold=foh_1, model.net.side=causal]
        decide: [foh, foh vs previous]       # optional; `arm`: against the control, `arm vs arm`: against that one
                                             # default: every arm. Those left out are reported, but do not decide
      # 2. Program: `python -m projects.fssm.accuracy <arguments> --output <file>`, run alone, which writes
      #    {"passed": true | false | null, "values": {...}, "statement": "what was found"}, and a "device" for times.
      - id: order_of_accuracy
        statement: The first-order hold is second-order accurate.
        table: section 3
        command: projects.fssm.accuracy
        arguments: []                        # optional
        time_budget_minutes: 1
      # 3. Not attempted.
      - id: urban100
        statement: The x2 network reaches 32.9 dB on Urban100.
        table: Table 1
        status: not attempted
        reason: needs DIV2K, Urban100 and days on two GPUs

The verdict
-----------
One comparison: d_i = metric(arm, seed i) - metric(control, seed i), turned round for `lower` so that positive is what
the paper says. With their mean m, their 95 % t-interval [lo, hi] (n - 1 degrees of freedom) and s = smallest_effect,
for `higher` and `lower`:

    lo > 0 and m >= s     reproduced        surely in the claimed direction, and large enough to count
    lo > 0 and m < s      partial           surely in the claimed direction, but smaller than what counts
    lo <= 0 and hi < s    not reproduced    an effect that counts is excluded; so is a sure effect the wrong way
    lo <= 0 and hi >= s   undecided         both no effect and one that counts are compatible with these seeds

`equivalent` (negligible difference): reproduced if -s < lo and hi < s, not reproduced if hi <= -s or lo >= s, else
undecided. `not_lower` (no worse, where higher is better): reproduced if lo > -s, not reproduced if hi <= -s, else
undecided. `not_higher` is the same with the sign turned round.

A diverged run (its metric is NaN or infinite) is a result. A seed on which the arm diverged and the control did not is
a loss beyond any finite effect: not reproduced. The other way round it is a win beyond any finite effect, but cannot
enter a mean: if every seed is such a win, the comparison is reproduced, else the remaining pairs decide. `equivalent`
is not reproduced either way. A seed on which both diverged is left out. Fewer than three finite pairs: undecided.
A failed run (it stopped with an error) is no result: its comparisons are undecided until it has run.

The claim, from the comparisons that decide: reproduced if all are; else partial if one is reproduced or partial; else
not reproduced if one is; else undecided. All have to hold, so no correction for their number is made. A program's
`passed` true, false, null is reproduced, not reproduced, undecided. A claim whose metric, direction or smallest effect
was changed after a run carries the earlier rule in `earlier_rules`.

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
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from scipy import stats

from shared.errors import InputError
from shared.io.files import write_json, write_text

DIRECTIONS = ("higher", "lower", "equivalent", "not_lower", "not_higher")
VERDICTS = ("reproduced", "partial", "not reproduced", "undecided", "not attempted")
LAUNCHERS = ("joblib", "basic", "submitit_slurm", "submitit_local", "ray")


# The card -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class TrainedClaim:
    """A claim decided by training runs: arms x seeds, paired by seed."""

    id: str = MISSING
    statement: str = MISSING
    table: str = MISSING
    metric: str = MISSING
    metric_convention: str = MISSING
    direction: str = MISSING
    smallest_effect: float = MISSING
    seeds: list[int] = MISSING
    time_budget_minutes: float = MISSING
    control: str = MISSING
    arms: dict[str, list[str]] = MISSING
    decide: list[str] = dataclasses.field(default_factory=list)
    claimed: str = ""
    unit: str = ""
    headline: bool = False


@dataclasses.dataclass
class ProgramClaim:
    """A claim checked by a program of the project that writes its own finding."""

    id: str = MISSING
    statement: str = MISSING
    table: str = MISSING
    command: str = MISSING
    time_budget_minutes: float = MISSING
    arguments: list[str] = dataclasses.field(default_factory=list)
    claimed: str = ""
    headline: bool = False


@dataclasses.dataclass
class UnattemptedClaim:
    """A claim that needs data or compute we do not have; its other keys may be filled in for whoever has them."""

    id: str = MISSING
    statement: str = MISSING
    table: str = MISSING
    status: str = MISSING
    reason: str = MISSING
    claimed: str = ""
    metric: str = ""
    metric_convention: str = ""
    headline: bool = False


Claim = TrainedClaim | ProgramClaim | UnattemptedClaim


@dataclasses.dataclass
class Departure:
    """One difference from the paper."""

    what: str = MISSING
    why: str = MISSING


@dataclasses.dataclass
class Paper:
    """The card of a project. `claims` holds plain mappings here; `load_paper` turns them into claims."""

    project: str = MISSING
    title: str = MISSING
    authors: list[str] = MISSING
    venue: str = MISSING
    year: int = MISSING
    link: str = MISSING
    task: str = MISSING
    idea: str = MISSING
    claims: list[Any] = MISSING
    base: list[str] = dataclasses.field(default_factory=list)
    departures: list[Departure] = dataclasses.field(default_factory=list)
    network: dict[str, Any] = dataclasses.field(default_factory=dict)


def load_paper(path: str | os.PathLike) -> Paper:
    """Read and check a paper.yaml.

    Raises:
        InputError: the file is missing, is not YAML, or a key is unknown, missing, badly typed or contradicts another.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; every project has this card") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    paper = _checked(Paper, content, f"{path}")
    claims = [_load_claim(entry, f"{path}: claim {index + 1}") for index, entry in enumerate(paper.claims)]
    _parse_overrides(paper.base, f"{path}: base")
    for claim in claims:
        if sum(other.id == claim.id for other in claims) > 1:
            raise InputError(f"{path}: two claims have the id '{claim.id}'; give each its own")
    if sum(claim.headline for claim in claims) > 1:
        raise InputError(f"{path}: more than one claim says headline: true; keep one")
    return dataclasses.replace(paper, claims=claims)


def _checked(kind: type, content: object, where: str) -> Any:
    """Give `content` as a `kind`, with OmegaConf's checks of names and types."""
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected a mapping of keys, got {type(content).__name__}")
    unknown = [key for key in content if key not in {field.name for field in dataclasses.fields(kind)}]
    if unknown:
        known = ", ".join(field.name for field in dataclasses.fields(kind))
        raise InputError(f"{where}: unknown key '{unknown[0]}'; a {kind.__name__} has {known}")
    try:
        config = OmegaConf.merge(OmegaConf.structured(kind), content)
    except OmegaConfBaseException as error:
        raise InputError(f"{where}: key '{error.full_key}': {str(error).splitlines()[0]}") from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InputError(f"{where}: key '{missing[0]}' is missing")
    # Interpolations belong to the configuration of the run, not to the card.
    values = OmegaConf.to_container(config, resolve=False)
    return kind(**values)


def _load_claim(content: object, where: str) -> Claim:
    """Give one entry of `claims` as the kind that its keys say."""
    keys = content if isinstance(content, dict) else {}
    where = f"{where} ({keys['id']})" if "id" in keys else where
    kind = UnattemptedClaim if "status" in keys else ProgramClaim if "command" in keys else TrainedClaim
    claim = _checked(kind, content, where)
    if not re.fullmatch(r"\w+", claim.id):
        raise InputError(f"{where}: key 'id': use letters, digits and underscores only")
    if isinstance(claim, UnattemptedClaim) and claim.status != "not attempted":
        raise InputError(f"{where}: key 'status': the only status written by hand is 'not attempted'")
    if isinstance(claim, TrainedClaim):
        _check_trained(claim, where)
    return claim


def _check_trained(claim: TrainedClaim, where: str) -> None:
    """Check what the types cannot say."""
    if claim.direction not in DIRECTIONS:
        raise InputError(f"{where}: key 'direction': '{claim.direction}' is none of {', '.join(DIRECTIONS)}")
    if not claim.smallest_effect > 0:
        raise InputError(f"{where}: key 'smallest_effect': must be above 0, in units of {claim.metric}")
    if len(set(claim.seeds)) < 3 or len(set(claim.seeds)) < len(claim.seeds):
        raise InputError(f"{where}: key 'seeds': give at least three different seeds")
    if claim.control not in claim.arms:
        raise InputError(f"{where}: key 'control': no arm is called '{claim.control}'")
    if len(claim.arms) < 2:
        raise InputError(f"{where}: key 'arms': give the control and at least one other arm")
    for name, overrides in claim.arms.items():
        if not re.fullmatch(r"\w+", name):
            raise InputError(f"{where}: key 'arms': call '{name}' with letters, digits and underscores only")
        _parse_overrides(overrides, f"{where}: arm {name}")
    for arm, control in _pairs(claim):
        if arm not in claim.arms or control not in claim.arms or arm == control:
            raise InputError(f"{where}: key 'decide': '{arm} vs {control}' does not name two arms")


def _parse_overrides(overrides: list[str], where: str) -> None:
    """Refuse what is no override, and what the runner itself decides."""
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise InputError(f"{where}: '{text}' is no Hydra override: {str(error).splitlines()[0]}") from error
        if override.is_sweep_override():
            raise InputError(f"{where}: '{text}' is a sweep; write one arm for each value")
        if override.key_or_group in ("seed", "run_dir", "resume") or override.key_or_group.startswith("hydra"):
            raise InputError(f"{where}: '{text}' is set by the runner; leave it out")


def _pairs(claim: TrainedClaim) -> list[tuple[str, str]]:
    """Give the (arm, control) pairs that decide a claim."""
    entries = claim.decide or [name for name in claim.arms if name != claim.control]
    pairs = [tuple(part.strip() for part in entry.split(" vs ")) for entry in entries]
    return [(pair[0], pair[1] if len(pair) > 1 else claim.control) for pair in pairs]


# The verdict ----------------------------------------------------------------------------------------------------------


def interval95(values: list[float]) -> tuple[float, float, float, float]:
    """Give mean, sample standard deviation and the two ends of the 95 % t-interval of at least two values."""
    n = len(values)
    mean = sum(values) / n
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return mean, sd, mean - half, mean + half


def verdict_of_interval(direction: str, smallest_effect: float, mean: float, low: float, high: float) -> str:
    """Apply the rule of the module's docstring to the interval of arm - control."""
    s = smallest_effect
    if direction in ("lower", "not_higher"):
        mean, low, high = -mean, -high, -low
    if direction in ("higher", "lower"):
        if low > 0:
            return "reproduced" if mean >= s else "partial"
        return "not reproduced" if high < s else "undecided"
    if direction == "equivalent":
        if -s < low and high < s:
            return "reproduced"
        return "not reproduced" if high <= -s or low >= s else "undecided"
    if low > -s:
        return "reproduced"
    return "not reproduced" if high <= -s else "undecided"


def compare(arm: list[float | None], control: list[float | None], direction: str, smallest_effect: float) -> dict:
    """Compare two arms, paired by position.

    Args:
        arm: one value per seed; NaN or infinite for a diverged run, None for a failed one.
        control: the same for the control.
        direction: one of `DIRECTIONS`.
        smallest_effect: the smallest difference that counts, or the margin.

    Returns:
        {"differences", "n", "mean", "sd", "interval", "verdict", "reason"}; a difference is None where a run failed or
        diverged.
    """
    pairs = list(zip(arm, control, strict=True))
    failed = sum(a is None or c is None for a, c in pairs)
    done = [(a, c) for a, c in pairs if a is not None and c is not None]
    losses = sum(not math.isfinite(a) and math.isfinite(c) for a, c in done)
    wins = sum(math.isfinite(a) and not math.isfinite(c) for a, c in done)
    differences = [
        a - c if a is not None and c is not None and math.isfinite(a) and math.isfinite(c) else None for a, c in pairs
    ]
    finite = [difference for difference in differences if difference is not None]
    mean = sd = low = high = None
    if len(finite) >= 2:
        mean, sd, low, high = interval95(finite)
    elif finite:
        mean = finite[0]

    reason = ""
    if losses or (wins and direction == "equivalent"):
        verdict = "not reproduced"
        reason = f"{losses or wins} of {len(pairs)} seeds diverged in {'the arm' if losses else 'the control'} only"
    elif failed:
        verdict, reason = "undecided", f"{failed} of {len(pairs)} pairs lack a run that failed"
    elif wins == len(pairs):
        verdict, reason = "reproduced", "the control diverged on every seed, the arm on none"
    elif len(finite) < 3:
        verdict, reason = "undecided", f"only {len(finite)} of {len(pairs)} pairs are finite"
    else:
        verdict = verdict_of_interval(direction, smallest_effect, mean, low, high)
        reason = f"the control alone diverged on {wins} of {len(pairs)} seeds" if wins else ""
    return {
        "differences": differences,
        "n": len(finite),
        "mean": mean,
        "sd": sd,
        "interval": None if low is None else [low, high],
        "verdict": verdict,
        "reason": reason,
    }


def combine(verdicts: list[str]) -> str:
    """Give the verdict of a claim from those of the comparisons that decide it."""
    if all(verdict == "reproduced" for verdict in verdicts):
        return "reproduced"
    if any(verdict in ("reproduced", "partial") for verdict in verdicts):
        return "partial"
    return "not reproduced" if "not reproduced" in verdicts else "undecided"


# Identity of a run ----------------------------------------------------------------------------------------------------


def code_hash(project_folder: Path) -> str:
    """Hash the sources that can change a run: the project's and shared's, without tests and reporting."""
    digest = hashlib.sha256()
    for folder, suffixes in ((project_folder, {".py"}), (Path(__file__).parent, {".py", ".cu"})):
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.suffix not in suffixes or "tests" in name.parts or str(name) in ("reproduce.py", "report.py"):
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
        except (OSError, json.JSONDecodeError):
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
    except (OSError, json.JSONDecodeError):
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
    deciding = _pairs(claim)
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
        "of shared/reproduce.py. exit code: 0 whatever the verdicts, 1 if a run failed, 2 for unusable input.",
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
    except (json.JSONDecodeError, KeyError, TypeError) as error:
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
