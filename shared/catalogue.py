"""List the papers of this repository: name, task, time of the default run, main claim and what came of it.

    python3 -m shared.catalogue

`make list` prints this before anything is installed, so the standard library has to do.
"""

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def line(folder: Path) -> list[str]:
    """Give a project's name, task, time and main claim with its verdict; the last two may not be known yet."""
    task = re.search(r"^task: *(.*)$", (folder / "paper.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    seconds = _results(folder / "results" / "default.json").get("seconds")
    claims = _results(folder / "results" / "claims.json").get("claims") or [{"statement": "", "verdict": "not run yet"}]
    main = next((claim for claim in claims if claim.get("headline")), claims[0])
    return [
        folder.name,
        task[1] if task else "",
        "not timed" if seconds is None else f"{seconds:.0f} s",
        f"{main['verdict']}: {main['statement']}".removesuffix(": "),
    ]


def _results(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def main() -> int:
    """Print one line a project, cut to the terminal's width where there is one; give the exit code."""
    rows = [line(path.parent) for path in sorted((ROOT / "projects").glob("*/paper.yaml"))]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for name, task, seconds, claim in rows:
        text = f"{name:{widths[0]}}  {task:{widths[1]}}  {seconds:>{widths[2]}}  {claim}"
        print(text if terminal is None or len(text) <= terminal else f"{text[: terminal - 1].rstrip()}…")
    return 0


if __name__ == "__main__":
    sys.exit(main())
