r"""What a paper claims, and how runs decide it: the card `paper.yaml`, the statistics, the verdict.

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
    growth:                                  # what makes a training step dearer, measured by shared/growth.py
      - {axis: batch, key: data.batch_size, values: [2, 4, 8, 16], base: [threads=1]}
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
"""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from scipy import stats

from shared.errors import InputError

DIRECTIONS = ("higher", "lower", "equivalent", "not_lower", "not_higher")


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
class Growth:
    """One axis along which the cost of a training step is measured; see shared/growth.py."""

    axis: str = MISSING
    key: str = MISSING
    values: list[Any] = MISSING
    base: list[str] = dataclasses.field(default_factory=list)

    @property
    def amounts(self) -> list[int]:
        """How much each value is: a number itself, the product of a list's numbers."""
        return [math.prod(value) if isinstance(value, list) else value for value in self.values]


@dataclasses.dataclass
class Paper:
    """The card of a project. `claims` and `growth` hold plain mappings here; `load_paper` turns them into classes."""

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
    growth: list[Any] = dataclasses.field(default_factory=list)


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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    paper = _checked(Paper, content, f"{path}")
    claims = [_load_claim(entry, f"{path}: claim {index + 1}") for index, entry in enumerate(paper.claims)]
    _parse_overrides(paper.base, f"{path}: base")
    for claim in claims:
        if sum(other.id == claim.id for other in claims) > 1:
            raise InputError(f"{path}: two claims have the id '{claim.id}'; give each its own")
    if sum(claim.headline for claim in claims) > 1:
        raise InputError(f"{path}: more than one claim says headline: true; keep one")
    growths = [_checked(Growth, entry, f"{path}: growth {index + 1}") for index, entry in enumerate(paper.growth)]
    for growth in growths:
        _check_growth(growth, f"{path}: growth ({growth.axis})")
        if sum(other.axis == growth.axis for other in growths) > 1:
            raise InputError(f"{path}: growth has two axes '{growth.axis}'; give each its own word")
    return dataclasses.replace(paper, claims=claims, growth=growths)


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
    for arm, control in deciding_pairs(claim):
        if arm not in claim.arms or control not in claim.arms or arm == control:
            raise InputError(f"{where}: key 'decide': '{arm} vs {control}' does not name two arms")


def _check_growth(growth: Growth, where: str) -> None:
    """Check what the types cannot say."""
    if not re.fullmatch(r"\w+", growth.axis):
        raise InputError(f"{where}: key 'axis': use letters, digits and underscores only")
    numbers = [number for value in growth.values for number in (value if isinstance(value, list) else [value])]
    are_counts = all(type(number) is int and number > 0 for number in numbers)
    if len(growth.values) < 2 or not are_counts or sorted({*growth.amounts}) != growth.amounts:
        raise InputError(f"{where}: key 'values': give at least two rising numbers from 1 on, or lists of such")
    _parse_overrides([*growth.base, f"{growth.key}={growth.values[0]}"], where)


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


def deciding_pairs(claim: TrainedClaim) -> list[tuple[str, str]]:
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
