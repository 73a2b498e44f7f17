"""Make every README table, and the page `report/index.html`, from the results files and from nothing else.

    python -m shared.report                  rewrite the tables and the page
    python -m shared.report --project fssm   only this project's tables and a page of this project
    python -m shared.report --check          change nothing; name each README that disagrees with its results and exit 1
    python -m shared.report --record RUN     take a finished run's numbers and pictures into its project's results first

A README marks where a table goes; what stands between the two lines is replaced:

    <!-- table:claims -->
    <!-- /table -->

    table:projects          README.md: one row per project, from every projects/*/results/claims.json
    table:claims            a project's README: its results/claims.json; likewise table:claims_gpu and other settings
    table:default           a project's README: its results/default.json, and likewise any other results/<name>.json
    table:benchmark         a project's or a kernel's README: of its results/benchmark_*.json the newest of each device
    table:benchmark/<op>    a project's README: the same of the kernel shared/kernels/<op>
    table:speed             README.md: of every kernel and project, what its newest benchmarks say of ours beside a peer
"""

import argparse
import csv
import datetime
import json
import shutil
import sys
from pathlib import Path

from shared.errors import InputError
from shared.io.files import atomic_path, write_json, write_text
from shared.report_page import page
from shared.tables import metrics_columns, metrics_rows, readmes, rebuilt, stale


def record(run_dir: Path) -> Path:
    """Write a finished run's scores to its project's results/default.json and copy its pictures to results/pictures.

    Raises:
        InputError: the folder holds no finished run.
    """
    try:
        found = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{run_dir} holds no finished run (no whole metrics.json)") from error
    if missing := {"project", "device", "seconds", "peak_memory_mb", "waiting", "config_hash"} - found.keys():
        lacks = ", ".join(sorted(missing))
        raise InputError(f"{run_dir} was trained by older code, which did not note {lacks}: train anew")
    results = Path("projects", found["project"], "results")
    table = {
        "title": "The default run, scored on the held-out data",
        "command": f"make train PROJECT={found['project']}",
        "device": found["device"],
        "date": datetime.date.fromtimestamp((run_dir / "metrics.json").stat().st_mtime).isoformat(),
        "columns": metrics_columns(found),
        "rows": metrics_rows(found),
        "seconds": found["seconds"],
        "curves": read_curves(run_dir / "metrics.csv"),
        "note": f"{found['seconds']:.0f} s in all, {found['peak_memory_mb']:.0f} MB at most; of the training "
        f"{100 * found['waiting']:.1f} % waiting for the next batch; seed {found['seed']}, "
        f"configuration {found['config_hash']}, torch {found['versions']['torch']}.",
    }
    write_json(results / "default.json", table)
    for picture in sorted((run_dir / "pictures").glob("*.png")):
        with atomic_path(results / "pictures" / picture.name) as temporary:
            shutil.copyfile(picture, temporary)
    return results / "default.json"


def read_curves(file: Path) -> dict[str, list[list[float]]]:
    """Give what the validations of a run said: by name of the metric, [step, value] of each; nothing without a file."""
    curves: dict[str, list[list[float]]] = {}
    if file.is_file():
        with open(file, newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                for name in (name for name, value in row.items() if name.startswith("val/") and value):
                    curves.setdefault(name, []).append([float(row["step"]), float(row[name])])
    return curves


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m shared.report",
        description="Rewrite every README table from the results files and build a page that shows them all.",
    )
    parser.add_argument("--project", metavar="NAME", help="only this project (default: all)")
    parser.add_argument("--output", default="report", metavar="FOLDER", help="folder of index.html (default: report)")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a table disagrees with its file"
    )
    parser.add_argument("--record", type=Path, metavar="RUN", help="take this finished run into its project's results")
    args = parser.parse_args(argv)
    try:
        return _report(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _report(args: argparse.Namespace) -> int:
    projects = sorted(path.parent for path in Path("projects").glob(f"{args.project or '*'}/paper.yaml"))
    if args.project and not projects:
        known = ", ".join(sorted(path.parent.name for path in Path("projects").glob("*/paper.yaml"))) or "none here"
        raise InputError(
            f"no project '{args.project}' with a paper.yaml in {Path('projects').resolve()}; known: {known}"
        )
    if args.check:
        messages = stale(args.project)
        for message in messages:
            print(message, file=sys.stderr)
        return 1 if messages else 0
    if args.record:
        print(f"wrote {record(args.record)}")
    for readme in readmes(args.project):
        text, changed = rebuilt(readme)
        if changed:
            write_text(readme, text)
            print(f"{readme}: {', '.join(changed)} made anew")
    output = Path(args.output)
    write_text(output / "index.html", page(projects, output))
    print(f"wrote {output / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
