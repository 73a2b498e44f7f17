"""Tables from the results files, and where a README wants them.

A plain table (default, benchmark) is {"title", "command", "device", "date", "columns": [...], "rows": [[...]], "note"};
a benchmark's "headline" is a list of {"what", "ours_ms", "peer", "peer_ms", "ratio"} for the table of all speeds.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

from shared.errors import InputError

MARKED = re.compile(r"^<!-- table:(\S+) -->\n(.*?)^<!-- /table -->$", re.DOTALL | re.MULTILINE)
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


# From results to tables -----------------------------------------------------------------------------------------------


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
    rows = [[cell_text(value) for value in row] for row in content["rows"]]
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
        status = f"{first['verdict']}\n{tally(claims)}"
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


def tally(claims: list[dict]) -> str:
    """Count the verdicts in words."""
    counts = {verdict: sum(record["verdict"] == verdict for record in claims) for verdict in VERDICTS}
    total = f"{len(claims)} claim{'s' if len(claims) != 1 else ''}"
    return f"all {total}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _measured(record: dict) -> str:
    """Say what was found, one line per comparison that decides."""
    if record["kind"] == "program":
        values = ", ".join(f"{name} {cell_text(value)}" for name, value in record["values"].items())
        return record["finding"] or values or "–"
    if record["kind"] == "not attempted":
        return "–"
    return "\n".join(difference_text(record, pair) for pair in record["comparisons"] if pair["decides"])


def difference_text(record: dict, pair: dict) -> str:
    """Say what one comparison gave."""
    names = f"{pair['arm']} − {pair['control']}"
    if pair["mean"] is None:
        return f"{names}: no finite pair"
    value = f"{names}: {signed(pair['mean'], record)}{unit_text(record)}"
    if pair["interval"]:
        value += f" [{signed(pair['interval'][0], record)}, {signed(pair['interval'][1], record)}]"
    return f"{value}, n = {pair['n']}"


def _counts_from(record: dict) -> str:
    """Say which difference counts."""
    if record["kind"] != "trained":
        return "–"
    s = record["smallest_effect"]
    up, down, unit = signed(s, record), signed(-s, record), unit_text(record)
    return {
        "higher": f"{up}{unit}",
        "lower": f"{down}{unit}",
        "equivalent": f"within {up.replace('+', '±')}{unit}",
        "not_lower": f"not below {down}{unit}",
        "not_higher": f"not above {up}{unit}",
    }[record["direction"]]


def unit_text(record: dict) -> str:
    """Give a claim's unit as it follows a number; nothing without one."""
    return f" {record['unit']}" if record.get("unit") else ""


def signed(value: float, record: dict) -> str:
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


def cell_text(value: object) -> str:
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
