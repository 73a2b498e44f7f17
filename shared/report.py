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

A plain table (default, benchmark) is {"title", "command", "device", "date", "columns": [...], "rows": [[...]], "note"};
a benchmark's "headline" is a list of {"what", "ours_ms", "peer", "peer_ms", "ratio"} for the table of all speeds.
"""

import argparse
import csv
import dataclasses
import datetime
import html
import json
import math
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import quote

from shared.errors import InputError
from shared.io.files import atomic_path, write_json, write_text

MARKED = re.compile(r"^<!-- table:(\S+) -->\n(.*?)^<!-- /table -->$", re.DOTALL | re.MULTILINE)
PICTURES = {".png", ".jpg", ".jpeg", ".svg", ".gif", ".webp"}
LONG = 12  # rows of a table on the page
VERDICTS = ("reproduced", "partial", "not reproduced", "undecided", "not attempted")


@dataclasses.dataclass
class Link:
    """A cell of a table that points somewhere."""

    text: str
    target: str


@dataclasses.dataclass
class Table:
    """A table before it is Markdown or HTML; a cell is text, in which a line break may stand, or a link."""

    columns: list[str]
    rows: list[list[str | Link]]
    title: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)


# From a run to results ------------------------------------------------------------------------------------------------


def record(run_dir: Path) -> Path:
    """Write a finished run's scores to its project's results/default.json and copy its pictures to results/pictures.

    Raises:
        InputError: the folder holds no finished run.
    """
    try:
        found = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{run_dir} holds no finished run (no whole metrics.json)") from error
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


def metrics_columns(record: dict) -> list[str]:
    """Name the columns of `metrics_rows`."""
    return ["metric", "ours", "baseline", "difference", *(name.replace("_", " ") for name in record.get("peers", ()))]


def metrics_rows(record: dict) -> list[list[str]]:
    """Give one row a test metric: its name, ours, the trivial baseline's, the difference, each peer's."""
    rows = []
    for name, value in record["metrics"].items():
        floor = record["baseline"].get(name)
        beside = ["", ""] if floor is None else [f"{floor:.4f}", f"{value - floor:+.4f}"]
        peers = [f"{peer[name]:.4f}" if name in peer else "" for peer in record.get("peers", {}).values()]
        rows.append([name, f"{value:.4f}", *beside, *peers])
    return rows


# From results to tables -----------------------------------------------------------------------------------------------


def load(path: Path) -> dict:
    """Read a results file.

    Raises:
        InputError: it cannot be read, or holds neither claims nor columns and rows.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); restore it from git or make it anew") from error
    if not isinstance(content, dict) or not ("claims" in content or {"columns", "rows"} <= content.keys()):
        raise InputError(f"{path} holds neither claims nor a table; it needs 'claims', or 'columns' and 'rows'")
    for row in content.get("rows", []):
        if len(row) != len(content["columns"]):
            raise InputError(f"{path}: a row has {len(row)} cells for {len(content['columns'])} columns: {row}")
    return content


def plain_table(content: dict) -> Table:
    """Give the table of a default or benchmark file."""
    rows = [[_cell(value) for value in row] for row in content["rows"]]
    made = [content.get(key, "") for key in ("device", "date")]
    notes = [content.get("note", ""), ", ".join(part for part in made if part)]
    notes += [f"Made by `{content['command']}`."] if content.get("command") else []
    return Table(list(map(str, content["columns"])), rows, content.get("title", ""), [note for note in notes if note])


def claims_table(content: dict) -> Table:
    """Give the table of a claims file."""
    # the verdict beside the claim: on a phone the later columns have to be scrolled to
    columns = ["Claim", "Verdict", "Measured here", "Counts from", "Claimed", "In the paper"]
    rows = []
    for record in content["claims"]:
        verdict = record["verdict"] + (f"\n{record['reason']}" if record.get("reason") else "")
        claimed = record.get("claimed") or "–"
        rows.append([record["statement"], verdict, _measured(record), _counts_from(record), claimed, record["table"]])
    return Table(columns, rows, notes=_claim_notes(content))


def projects_table(contents: list[dict]) -> Table:
    """Give the table of the root README: each project by its headline claim."""
    rows = []
    for content in contents:
        paper, claims, name = content["paper"], content["claims"], content["project"]
        if not claims:
            continue
        first = next((record for record in claims if record.get("headline")), claims[0])
        claimed = first["statement"] + (f"\n{first['claimed']}" if first.get("claimed") else "")
        link = Link(f"{paper['title']} ({paper['venue']} {paper['year']})", f"projects/{name}/README.md")
        measured = _measured(first) + (f"\n{first['reason']}" if first["verdict"] == "not attempted" else "")
        status = f"{first['verdict']}\n{_tally(claims)}"
        rows.append([link, paper["task"], claimed, measured.removeprefix("–\n"), status])
    return Table(["Paper", "Task", "Claimed", "Reproduced", "Status"], rows)


def speed_table(parts: list[Path]) -> Table:
    """Give the table of what kernels and projects, by their folders, take beside a peer; each row says where it ran."""
    rows = []
    for part in parts:
        for content in map(load, newest_benchmarks(part / "results")):
            made = f"{content.get('device', '')}, {content.get('date', '')}"
            for line in content.get("headline", []):
                ours, beside = _milliseconds(line["ours_ms"]), f"{line['peer']}: {_milliseconds(line['peer_ms'])}"
                link = Link(part.name, f"{part.as_posix()}/README.md")
                rows.append([link, line["what"], ours, beside, f"{line['ratio']:.2f}", made])
    return Table(["Part", "Measured", "Ours", "Beside", "Times as fast", "Device, date"], rows)


def _milliseconds(value: float) -> str:
    """Write a time with three digits, in seconds from one second on."""
    return f"{value / 1e3:.3g} s" if value >= 1e3 else f"{value:.3g} ms"


def _tally(claims: list[dict]) -> str:
    """Count the verdicts in words."""
    counts = {verdict: sum(record["verdict"] == verdict for record in claims) for verdict in VERDICTS}
    total = f"{len(claims)} claim{'s' if len(claims) != 1 else ''}"
    return f"all {total}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _measured(record: dict) -> str:
    """Say what was found, one line per comparison that decides."""
    if record["kind"] == "program":
        values = ", ".join(f"{name} {_cell(value)}" for name, value in record["values"].items())
        return record["finding"] or values or "–"
    if record["kind"] == "not attempted":
        return "–"
    return "\n".join(_difference(record, pair) for pair in record["comparisons"] if pair["decides"])


def _difference(record: dict, pair: dict) -> str:
    """Say what one comparison gave."""
    names = f"{pair['arm']} − {pair['control']}"
    if pair["mean"] is None:
        return f"{names}: no finite pair"
    value = f"{names}: {_signed(pair['mean'], record)}{_unit(record)}"
    if pair["interval"]:
        value += f" [{_signed(pair['interval'][0], record)}, {_signed(pair['interval'][1], record)}]"
    return f"{value}, n = {pair['n']}"


def _counts_from(record: dict) -> str:
    """Say which difference counts."""
    if record["kind"] != "trained":
        return "–"
    s = record["smallest_effect"]
    up, down, unit = _signed(s, record), _signed(-s, record), _unit(record)
    return {
        "higher": f"{up}{unit}",
        "lower": f"{down}{unit}",
        "equivalent": f"within {up.replace('+', '±')}{unit}",
        "not_lower": f"not below {down}{unit}",
        "not_higher": f"not above {up}{unit}",
    }[record["direction"]]


def _unit(record: dict) -> str:
    return f" {record['unit']}" if record.get("unit") else ""


def _signed(value: float, record: dict) -> str:
    """Write a difference with two digits of the smallest effect that counts."""
    decimals = max(0, 1 - math.floor(math.log10(record["smallest_effect"])))
    text = f"{value:+.{decimals}f}" if decimals <= 6 else f"{value:+.2e}"
    return text.replace("-", "−")


def _claim_notes(content: dict) -> list[str]:
    """Give the conditions under which a claims file was made."""
    trained = [record for record in content["claims"] if record["kind"] == "trained"]
    ran = [record for record in content["claims"] if record["kind"] != "not attempted"]
    notes = []
    if trained:
        metrics = dict.fromkeys(f"`{record['metric']}`: {record['metric_convention'].strip()}" for record in trained)
        notes.append("; ".join(metrics) + ".")
        notes.append("Differences are paired by seed; in brackets their 95 % t-interval, n the number of pairs.")
    for record in trained:
        for rule in record.get("earlier_rules", []):
            was = f"{rule['metric']}, {rule['direction']}, {rule['smallest_effect']}"
            notes.append(f"The rule of `{record['id']}` was changed after a run; it was: {was}.")
    if ran:
        setting = content.get("setting", "claims")
        option = "" if setting == "claims" else f' ARGS="--setting {setting}"'
        devices = "; ".join(dict.fromkeys(record["device"] for record in ran if record.get("device")))
        # claims share arms, and a shared run took its time once
        arms = {arm["arm_hash"]: arm["runs"] for record in trained for arm in record["arms"].values()}
        once = {(arm, run["seed"]): run.get("seconds") or 0 for arm, runs in arms.items() for run in runs}
        programs = sum(record.get("seconds") or 0 for record in ran if record["kind"] == "program")
        hours = (sum(once.values()) + programs) / 3600
        codes = ", ".join(dict.fromkeys(record["code_hash"] for record in ran))
        made = [devices, f"{hours:.2f} run hours", f"code {codes}", max(record["date"] for record in ran)]
        notes.append("; ".join(part for part in made if part) + ".")
        notes.append(f"Made by `make reproduce PROJECT={content['project']}{option}`.")
    return notes


def _cell(value: object) -> str:
    """Write a value of a table as a person would."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        # 4 digits, and no exponent where a plain number is as short
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"
    return str(value)


# Where results are ----------------------------------------------------------------------------------------------------


def newest_benchmarks(folder: Path) -> list[Path]:
    """Give, of a folder's benchmark_*.json, the newest of each title and device."""
    newest: dict[tuple, tuple] = {}
    for path in sorted(folder.glob("benchmark_*.json")):
        content = load(path)
        key = (content.get("title", ""), content.get("device", ""))
        newest[key] = max(newest.get(key, ("", path)), (content.get("date", ""), path))
    return [newest[key][1] for key in sorted(newest)]


def measured_parts() -> list[Path]:
    """Give the folder of every kernel, then of every project."""
    found = [*sorted(Path("shared/kernels").glob("*/README.md")), *sorted(Path("projects").glob("*/README.md"))]
    return [readme.parent for readme in found]


def sources(readme: Path, name: str) -> list[Path]:
    """Give the results files behind the table `name` of a README; none if they were not made yet."""
    folder = readme.parent / "results"
    if name == "projects":
        return sorted(Path("projects").glob("*/results/claims.json"))
    if name == "speed":
        newest = [path for part in measured_parts() for path in newest_benchmarks(part / "results")]
        return [path for path in newest if load(path).get("headline")]
    if name == "benchmark":
        return newest_benchmarks(folder)
    if name.startswith("benchmark/"):
        kernel = Path("shared/kernels") / name.removeprefix("benchmark/")
        if not kernel.is_dir():
            raise InputError(f"{readme}: table:{name} names no kernel in shared/kernels")
        return newest_benchmarks(kernel / "results")
    path = folder / f"{name}.json"
    if not path.is_file() and name not in ("default", "claims", "claims_gpu"):
        raise InputError(f"{readme}: table:{name} has no file {path}; make it or correct the marker")
    return [path] if path.is_file() else []


def table_text(readme: Path, name: str) -> str:
    """Give the Markdown that belongs between the markers of the table `name` of a README."""
    paths = sources(readme, name)
    if name == "projects":
        return markdown(projects_table([load(path) for path in paths]))
    if not paths:
        return "*No results yet.*\n"
    if name == "speed":
        return markdown(speed_table(measured_parts()))
    return "\n".join(markdown(_table(load(path))) for path in paths)


def _table(content: dict) -> Table:
    """Give the table of a results file of either kind."""
    return claims_table(content) if "claims" in content else plain_table(content)


def readmes(project: str | None = None) -> list[Path]:
    """Give every README that may hold tables."""
    found = [Path("README.md"), *Path("projects").glob(f"{project or '*'}/README.md")]
    return [path for path in [*found, *Path("shared/kernels").glob("*/README.md")] if path.is_file()]


def rebuilt(readme: Path) -> tuple[str, list[str]]:
    """Give a README's text with its tables made anew, and the names of those that change."""
    text = readme.read_text(encoding="utf-8")
    if len(MARKED.findall(text)) != len(re.findall(r"^<!-- table:", text, re.MULTILINE)):
        raise InputError(f"{readme}: a line '<!-- table:name -->' has no line '<!-- /table -->' of its own")
    changed = []

    def make(match: re.Match) -> str:
        name, old = match[1], match[2]
        new = table_text(readme, name)
        if new != old:
            changed.append(name)
        return f"<!-- table:{name} -->\n{new}<!-- /table -->"

    return MARKED.sub(make, text), changed


def stale(project: str | None = None) -> list[str]:
    """Name each table of a README that disagrees with its results file."""
    messages = []
    for readme in readmes(project):
        for name in rebuilt(readme)[1]:
            files = ", ".join(map(str, sources(readme, name))) or "the results, of which there are none"
            messages.append(f"{readme}: table:{name} disagrees with {files}; run `make report`")
    return messages


# Markdown -------------------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """Write a table as Markdown, its title before and its notes after it."""
    lines = [f"**{table.title}**", ""] if table.title else []
    lines.append("| " + " | ".join(map(_markdown_cell, table.columns)) + " |")
    lines.append("|" + " --- |" * len(table.columns))
    for row in table.rows:
        cells = [_markdown_cell(cell) for cell in row]
        lines.append("| " + " | ".join(_emphasised(cell) for cell in cells) + " |")
    if table.notes:
        lines += ["", " ".join(note if note.endswith(".") else f"{note}." for note in table.notes)]
    return "\n".join(lines) + "\n"


def _markdown_cell(cell: str | Link) -> str:
    if isinstance(cell, Link):
        return f"[{_markdown_cell(cell.text)}]({cell.target})"
    return (
        " ".join(cell.strip().replace("\n", "\0").split())
        .replace("|", r"\|")
        .replace("<", "&lt;")
        .replace("\0", "<br>")
    )


def _emphasised(cell: str) -> str:
    """Set a verdict in bold."""
    word, rest, tail = cell.partition("<br>")
    return f"**{word}**{rest}{tail}" if word in VERDICTS else cell


# The page -------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --panel: #f5f6f8; --text: #1b1f24; --quiet: #57606a; --line: #d5d9de;
  --accent: #0b57b0; --band: #0b57b01f; --good: #146c36; --half: #7a5200; --bad: #a4141b; --open: #57606a; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --panel: #1d2126; --text: #e7eaee; --quiet: #a3acb6;
  --line: #39404a; --accent: #7ab5ff; --band: #7ab5ff2b; --good: #6fd597; --half: #e6b45c; --bad: #ff918f;
  --open: #a3acb6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 0 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 2.5rem 0 .5rem; }
h2 { font-size: 1.4rem; line-height: 1.3; margin: 3.5rem 0 .25rem; padding-top: 1.5rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
details { margin: .75rem 0; border: 1px solid var(--line); border-radius: 8px; padding: 0 1rem; }
details[open] { padding-bottom: 1rem; }
summary { cursor: pointer; padding: .6rem 0; font-weight: 600; }
p { margin: .5rem 0; max-width: 48rem; }
a { color: var(--accent); text-underline-offset: .15em; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: 2px; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: 1rem; padding: .5rem 1rem; background: var(--page); z-index: 1; }
.quiet, figcaption, .notes { color: var(--quiet); font-size: .9rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; margin: 1rem 0; }
nav a { display: inline-block; padding: .3rem 0; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin: .75rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
.wide, .cards { min-width: 52rem; } .cards tbody th { min-width: 15rem; } .cards td { min-width: 7rem; }
th, td { text-align: left; vertical-align: top; padding: .55rem .75rem; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; }
thead th { background: var(--panel); font-weight: 600; white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 400; }
.verdict { display: inline-block; white-space: nowrap; font-weight: 600; padding: 0 .5rem; border: 1px solid;
  border-radius: 999px; color: var(--open); }
.verdict.reproduced { color: var(--good); } .verdict.partial { color: var(--half); }
.verdict.not-reproduced { color: var(--bad); border-style: double; border-width: 3px; }
.verdict.undecided { border-style: dashed; } .verdict.not-attempted { border-style: dotted; }
.plots, .pictures { display: grid; gap: 1.25rem; }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(32rem, 100%), 1fr)); }
figure { margin: 0; padding: 1rem; background: var(--panel); border-radius: 8px; min-width: 0; }
figcaption strong { color: var(--text); display: block; }
svg { display: block; width: 100%; height: auto; max-width: 30rem; margin-top: .5rem; }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; paint-order: stroke; stroke: var(--panel);
  stroke-width: 3px; } svg .tick { fill: var(--quiet); font-size: 11px; }
svg .band { fill: var(--band); } svg .axis { stroke: var(--quiet); } svg .threshold { stroke: var(--accent);
  stroke-dasharray: 4 3; } svg .interval { stroke: var(--text); stroke-width: 2; } svg .mean { fill: var(--text); }
svg .seed { fill: none; stroke: var(--accent); stroke-width: 1.5; }
svg .curve { fill: none; stroke: var(--accent); stroke-width: 1.5; } svg .grid { stroke: var(--line); }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; margin: 0 auto .5rem; }
code { font-size: .9em; }
@media (max-width: 40rem) { body { padding: 0 .9rem 3rem; } h1 { font-size: 1.5rem; margin-top: 1.5rem; }
  h2 { font-size: 1.2rem; } figure { padding: .75rem; } details { padding: 0 .75rem; }
  .cards { min-width: 0; } .cards, .cards tbody, .cards tr, .cards th, .cards td { display: block; }
  .cards thead, .cards .empty { display: none; } .cards tbody th { font-weight: 600; }
  .cards th, .cards td { border: 0; padding: .25rem .75rem; }
  .cards tr { border-bottom: 1px solid var(--line); padding: .5rem 0; } .cards tbody tr:last-child { border-bottom: 0; }
  .cards td::before { content: attr(data-column); display: block; color: var(--quiet); font-size: .85rem; } }
@media print { .scroll { overflow: visible; } .wide, .cards { min-width: 0; } }
"""


def page(projects: list[Path], output: Path) -> str:
    """Give the page of some project folders; their pictures are copied beside it."""
    contents = {folder.name: load(folder / "results" / "claims.json") for folder in projects if _has_claims(folder)}
    links = "".join(f'<li><a href="#{_e(folder.name)}">{_e(folder.name)}</a></li>' for folder in projects)
    overview = projects_table(list(contents.values()))
    for row in overview.rows:
        row[0] = Link(row[0].text, "#" + row[0].target.split("/")[1])
    sections = "\n".join(_section(folder, output) for folder in projects)
    claims = [record for content in contents.values() for record in content["claims"]]
    newest = max((record.get("date", "") for record in claims), default="")
    papers = f"{len(projects)} paper{'s' if len(projects) != 1 else ''}"
    lead = f"{papers}; {_tally(claims)}; newest result {newest}." if claims else f"{papers}; no claim has been run yet."
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>Tenfold: claimed and reproduced</title>
<style>{STYLE}</style>
</head>
<body id="top">
<a class="skip" href="#main">Skip to the results</a>
<header>
<h1>Tenfold: claimed and reproduced</h1>
<p>{_e(lead)}</p>
<nav aria-label="Projects"><ul>{links}</ul></nav>
</header>
<main id="main">
{_html_table(overview, "Every project by its main claim", is_prose=True)}
<p class="quiet">A claim is <em>reproduced</em> when the paired difference over seeds is surely in the claimed direction
and at least as large as the smallest effect that counts, which was written down before the runs; <em>partial</em> when
it is sure but smaller, or when only some of its comparisons hold; <em>not reproduced</em> when an effect that counts is
excluded; <em>undecided</em> when the seeds allow both; <em>not attempted</em> when it needs data or compute we do not
have.</p>
{sections}
{_speed_section(projects)}
</main>
</body>
</html>
"""


def _speed_section(projects: list[Path]) -> str:
    """Give the page's table of all speeds, of the kernels and these projects; nothing where none was measured."""
    table = speed_table([part for part in measured_parts() if part in projects or part.parent.name == "kernels"])
    if not table.rows:
        return ""
    for row in table.rows:
        name = row[0].text
        row[0] = Link(name, f"#{name}") if Path("projects", name) in projects else name
    return (
        '<section id="speed" aria-labelledby="speed-title">\n<h2 id="speed-title">Speed beside named peers</h2>\n'
        f"{_html_table(table, 'Speed of kernels and projects')}\n</section>"
    )


def _has_claims(folder: Path) -> bool:
    return (folder / "results" / "claims.json").is_file()


def _section(folder: Path, output: Path) -> str:
    """Give one project's part of the page."""
    results, name = folder / "results", folder.name
    parts, title, about = [], name, ""
    for path in sorted(results.glob("claims*.json")):
        content = load(path)
        paper = content["paper"]
        title = paper["title"]
        about = (
            f'<p class="quiet">{_e(", ".join(paper["authors"]))}. {_e(paper["venue"])} {paper["year"]}. '
            f'{_e(paper["task"])}. <a href="{_e(paper["link"])}">The paper</a></p>'
        )
        setting = content.get("setting", "claims")
        heading = "Claims" if path.stem == "claims" else f"Claims, {setting}"
        parts.append(
            f"<h3>{_e(heading)}</h3>\n" + _html_table(claims_table(content), f"{heading} of {name}", is_prose=True)
        )
        plots = [dot_plot(record) for record in content["claims"] if record["kind"] == "trained"]
        if plots:
            legend = (
                '<p class="quiet">A ring is the paired difference of one seed, the diamond their mean, the bar its '
                "95 % interval. The shaded range holds the differences that agree with the claim.</p>"
            )
            inside = f'{legend}\n<div class="plots">{"".join(plots)}</div>'
            parts.append(_folded(f"{heading}, each seed: {_count(plots, 'plot')}", inside))
    if (results / "default.json").is_file():
        content = load(results / "default.json")
        table = plain_table(content)
        # a long table says first what there is something to compare with
        compared = [row for row in table.rows if len(table.rows) > LONG and row[table.columns.index("baseline")]]
        brief = dataclasses.replace(table, rows=compared or table.rows)
        parts.append(f"<h3>{_e(table.title)}</h3>\n" + _html_table(brief, f"{table.title}, {name}"))
        if compared:
            inside = _html_table(table, f"All of it, {name}")
            parts.append(_folded(f"All {_count(table.rows, 'metric')}", inside))
        curves = [line_plot(metric, points) for metric, points in content.get("curves", {}).items() if len(points) > 1]
        if curves:
            inside = f'<div class="plots">{"".join(curves)}</div>'
            parts.append(_folded(f"Its validations: {_count(curves, 'curve')}", inside))
    captions = dict(reversed(pair) for pair in re.findall(r"!\[(.*?)\]\(results/pictures/(.*?)\)", _text(folder)))
    pictures = _pictures(results / "pictures", output / "pictures" / name, captions)
    shown = [figure for picture, figure in pictures.items() if picture in captions]
    others = [figure for picture, figure in pictures.items() if picture not in captions]
    if pictures:
        parts.append(f'<h3>Pictures</h3>\n<div class="pictures">{"".join(shown)}</div>')
    if others:
        inside = f'<div class="pictures">{"".join(others)}</div>'
        parts.append(_folded(f"{'More' if shown else 'All'} pictures: {len(others)}", inside))
    plain = [path for path in sorted(results.glob("*.json")) if not path.stem.startswith(("claims", "benchmark_"))]
    measured = [path for path in plain if path.stem != "default"] + newest_benchmarks(results)
    tables = [plain_table(load(path)) for path in measured]
    if tables:
        inside = "\n".join(
            f"<h4>{_e(table.title or path.stem)}</h4>\n{_html_table(table, f'{table.title or path.stem}, {name}')}"
            for path, table in zip(measured, tables, strict=True)
        )
        parts.append(_folded(f"Measured beside: {_count(tables, 'table')}", inside))
    if not parts:
        parts.append(f"<p>No results yet: <code>make reproduce PROJECT={_e(name)}</code></p>")
    body = "\n".join(parts)
    heading = f'<h2 id="{_e(name)}-title">{_e(title)}</h2>'
    back = '<p class="quiet"><a href="#top">Back to all papers</a></p>'
    return (
        f'<section id="{_e(name)}" aria-labelledby="{_e(name)}-title">\n{heading}\n{about}\n{body}\n{back}\n</section>'
    )


def _folded(summary: str, inside: str) -> str:
    """Write what a reader opens when wanted; a search in the page opens it too."""
    return f"<details><summary>{_e(summary)}</summary>\n{inside}\n</details>"


def _count(things: list, word: str) -> str:
    return f"{len(things)} {word}{'s' if len(things) != 1 else ''}"


def _text(folder: Path) -> str:
    """Give a project's README."""
    readme = folder / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


def _pictures(source: Path, target: Path, captions: dict[str, str]) -> dict[str, str]:
    """Copy a folder of pictures and give by name the figures that show them, with the captions there are."""
    figures = {}
    for path in sorted(source.glob("*")) if source.is_dir() else []:
        if path.suffix.lower() not in PICTURES:
            continue
        with atomic_path(target / path.name) as temporary:
            shutil.copyfile(path, temporary)
        words = _e(captions.get(path.name, path.stem.replace("_", " ")))
        address = quote(f"pictures/{target.name}/{path.name}")
        figures[path.name] = (
            f'<figure><a href="{address}"><img src="{address}" alt="{words}" loading="lazy" /></a>'
            f"<figcaption>{words}</figcaption></figure>"
        )
    return figures


def _html_table(table: Table, label: str, is_prose: bool = False) -> str:
    """Write a table as HTML; on a narrow screen it scrolls, with the keyboard too, and one of prose becomes cards."""
    head = "".join(f'<th scope="col" role="columnheader">{_e(column)}</th>' for column in table.columns)
    body = []
    for first, *others in table.rows:
        cells = "".join(
            f'<td role="cell" data-column="{_e(column)}"{_empty(cell)}>{_html_cell(cell)}</td>'
            for column, cell in zip(table.columns[1:], others, strict=True)
        )
        body.append(f'<tr role="row"><th scope="row" role="rowheader">{_html_cell(first)}</th>{cells}</tr>')
    kind = "cards" if is_prose else "wide" if len(table.columns) > 4 else ""
    notes = " ".join(note if note.endswith(".") else f"{note}." for note in table.notes)
    after = f'<p class="notes">{_code(notes)}</p>' if notes else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_e(label)}"><table role="table" class="{kind}">'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n'
        f'<tbody role="rowgroup">{chr(10).join(body)}</tbody></table></div>{after}'
    )


def _html_cell(cell: str | Link) -> str:
    if isinstance(cell, Link):
        return f'<a href="{_e(cell.target)}">{_e(cell.text)}</a>'
    lines = [_code(line) for line in cell.split("\n")]
    if cell.split("\n")[0] in VERDICTS:
        lines[0] = _badge(lines[0])
    return "<br />".join(lines)


def _empty(cell: str | Link) -> str:
    """Mark a cell that says nothing: a card leaves it out."""
    return ' class="empty"' if cell in ("", "–") else ""


def _badge(verdict: str) -> str:
    """Set a verdict off by colour and border; the word itself says it."""
    return f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>'


def _code(text: str) -> str:
    """Escape text, with `...` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _e(text))


def _e(text: object) -> str:
    return html.escape(str(text))


# The plots ------------------------------------------------------------------------------------------------------------


def dot_plot(record: dict) -> str:
    """Draw the differences of a claim: a ring per seed, mean, interval, zero, and the range that agrees with it."""
    width, margin, row, top = 340, 14, 50, 4
    pairs = sorted(record["comparisons"], key=lambda pair: not pair["decides"])
    s, direction = record["smallest_effect"], record["direction"]
    values = [0.0, s if direction in ("higher", "not_higher", "equivalent") else -s]
    values += [-s] if direction == "equivalent" else []
    for pair in pairs:
        values += [d for d in pair["differences"] if d is not None] + (pair["interval"] or [])
    low, high = min(values), max(values)
    pad = 0.06 * (high - low)
    low, high = low - pad, high + pad
    height = top + row * len(pairs) + 24
    bottom = height - 20

    def x(value: float) -> float:
        return round(margin + (value - low) / (high - low) * (width - 2 * margin), 1)

    ends = {
        "higher": (s, high),
        "lower": (low, -s),
        "equivalent": (-s, s),
        "not_lower": (-s, high),
        "not_higher": (low, s),
    }[direction]
    shapes = [f'<path class="band" d="M{x(ends[0])} {top}H{x(ends[1])}V{bottom}H{x(ends[0])}z" />']
    for value in ends:
        if abs(value) == s:
            shapes.append(f'<line class="threshold" x1="{x(value)}" x2="{x(value)}" y1="{top}" y2="{bottom}" />')
    shapes.append(f'<line class="axis" x1="{x(0)}" x2="{x(0)}" y1="{top}" y2="{bottom}" />')
    shapes.append(f'<line class="axis" x1="{margin}" x2="{width - margin}" y1="{bottom}" y2="{bottom}" />')
    for tick in _ticks(low, high):
        shapes.append(f'<text class="tick" x="{x(tick)}" y="{height - 5}" text-anchor="middle">{_number(tick)}</text>')
    for index, pair in enumerate(pairs):
        y = top + row * index + 34
        names = f"{pair['arm']} − {pair['control']}" + ("" if pair["decides"] else " (does not decide)")
        missing = sum(difference is None for difference in pair["differences"])
        names += f", {missing} seeds without a difference" if missing else ""
        shapes.append(f'<text x="{margin}" y="{y - 18}">{_e(names)}</text>')
        if pair["interval"]:
            a, b = map(x, pair["interval"])
            shapes.append(f'<path class="interval" fill="none" d="M{a} {y - 4}v8M{a} {y}H{b}M{b} {y - 4}v8" />')
        for seed, difference in zip(record["seeds"], pair["differences"], strict=True):
            if difference is not None:
                hint = f"<title>seed {seed}: {_signed(difference, record)}{_e(_unit(record))}</title>"
                shapes.append(f'<circle class="seed" cx="{x(difference)}" cy="{y}" r="4">{hint}</circle>')
        if pair["mean"] is not None:
            shapes.append(f'<path class="mean" d="M{x(pair["mean"])} {y - 6}l5 6l-5 6l-5 -6z" />')
    said = "; ".join(_difference(record, pair) for pair in pairs)
    unit = f" ({_e(record['unit'])})" if record.get("unit") else ""
    return (
        f"<figure><figcaption><strong>{_e(record['statement'])}</strong>"
        f"Difference in <code>{_e(record['metric'])}</code>{unit}: {_badge(record['verdict'])}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_e(said)}">{"".join(shapes)}</svg></figure>'
    )


def line_plot(name: str, points: list[list[float]]) -> str:
    """Draw a metric of the validations against the step."""
    width, height, left, right, top, bottom = 340, 170, 52, 12, 10, 24
    steps, values = [step for step, _ in points], [value for _, value in points if math.isfinite(value)]
    if not values:
        return f"<figure><figcaption><strong>{_e(name)}</strong>no finite value</figcaption></figure>"
    low, high = min(values), max(values)
    # a constant is drawn as one
    pad = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    low, high = low - pad, high + pad
    across = (width - left - right) / max(max(steps) - min(steps), 1)

    def x(step: float) -> float:
        return round(left + (step - min(steps)) * across, 1)

    def y(value: float) -> float:
        return round(height - bottom - (value - low) / (high - low) * (height - bottom - top), 1)

    shapes = []
    for tick in _ticks(low, high):
        shapes.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick)}" y2="{y(tick)}" />')
        shapes.append(f'<text class="tick" x="{left - 6}" y="{y(tick) + 4}" text-anchor="end">{_number(tick)}</text>')
    for step, anchor in ((min(steps), "start"), (max(steps), "end")):
        shapes.append(f'<text class="tick" x="{x(step)}" y="{height - 6}" text-anchor="{anchor}">{step:g}</text>')
    middle = (left + width - right) / 2
    shapes.append(f'<text class="tick" x="{middle}" y="{height - 6}" text-anchor="middle">training step</text>')
    drawn = [(x(step), y(value)) for step, value in points if math.isfinite(value)]
    shapes.append(f'<polyline class="curve" points="{" ".join(f"{a},{b}" for a, b in drawn)}" />')
    shapes += [f'<circle class="seed" cx="{a}" cy="{b}" r="2" />' for a, b in drawn]
    said = f"{name} from {_cell(points[0][1])} at step {steps[0]:g} to {_cell(points[-1][1])} at step {steps[-1]:g}"
    return (
        f"<figure><figcaption><strong><code>{_e(name)}</code></strong>{_cell(points[-1][1])} at the end</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_e(said)}">{"".join(shapes)}</svg></figure>'
    )


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _ticks(low: float, high: float) -> list[float]:
    """Give two to six round numbers between two ends."""
    raw = (high - low) / 5
    scale = 10 ** math.floor(math.log10(raw))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= raw)
    first, last = math.ceil(low / step), math.floor(high / step)
    # twelve digits drop the rounding of k * 0.1
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


# The command ----------------------------------------------------------------------------------------------------------


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
