"""Finished runs of other methods under the same configuration, to stand beside a run.

    python -m shared.recorded runs/unikd/2026-01-01_10-00-00 ...    keep these runs in their project's results

A run is found by the hash of its configuration: in `projects/<name>/results/recorded/runs.json`, or else among the
finished runs of this machine.
"""

import argparse
import json
import sys
from pathlib import Path

from shared import report
from shared.errors import InputError
from shared.io.files import write_json

ROOT = Path(__file__).parents[1]
RUNS = Path("runs")  # of this machine, as a run makes them
KEPT = ("config_hash", "seed", "git", "device", "metrics", "seconds")


def find_recorded(project: str, fingerprint: str) -> dict | None:
    """Give the recorded run of this configuration hash: its "curve" and `KEPT`; None without one."""
    for run in _recorded(project):
        if run["config_hash"] == fingerprint:
            return run
    for file in sorted((RUNS / project).glob("*/metrics.json"), reverse=True):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:  # a damaged one is no reason to lose the run that asks
            continue
        if record.get("config_hash") == fingerprint and "checkpoint" not in record:
            return summary(record, file.parent)
    return None


def summary(record: dict, run_dir: Path) -> dict:
    """Give what is kept of a training: `KEPT` of its record, and as "curve" what each of its validations said."""
    return {key: record[key] for key in KEPT} | {"curve": read_curves(run_dir)}


def read_curves(run_dir: Path) -> dict[str, list[float]]:
    """Read what each validation of a run said, by name; nothing of a run without validation."""
    curves = report.read_curves(run_dir / "metrics.csv")
    return {name: [value for _, value in points] for name, points in curves.items()}


def keep(run_dir: Path) -> Path:
    """Take a finished training into its project's results, in place of an earlier one of the same configuration.

    Returns:
        The file written.

    Raises:
        InputError: the folder holds no finished training.
    """
    try:
        record = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
        kept, project = summary(record, run_dir), record["project"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{run_dir} holds no finished run; give a folder with metrics.json") from error
    if "checkpoint" in record:
        raise InputError(f"{run_dir} holds an evaluation; give the folder of a training")
    others = [run for run in _recorded(project) if run["config_hash"] != kept["config_hash"]]
    write_json(_file(project), {"runs": [*others, kept]})
    return _file(project)


def _file(project: str) -> Path:
    # in a folder of its own: every results/<name>.json is a table
    return ROOT / "projects" / project / "results" / "recorded" / "runs.json"


def _recorded(project: str) -> list[dict]:
    file = _file(project)
    return json.loads(file.read_text(encoding="utf-8"))["runs"] if file.is_file() else []


def main(argv: list[str] | None = None) -> int:
    """Keep finished runs; give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m shared.recorded", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    for run in parser.parse_args(argv).runs:
        try:
            print(f"kept {run} in {keep(run).relative_to(ROOT)}")
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
