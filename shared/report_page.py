"""The page `report/index.html`: every project's claims, pictures, curves and measured tables."""

import dataclasses
import html
import math
import re
import shutil
from pathlib import Path
from urllib.parse import quote

from shared.io.files import atomic_path
from shared.tables import (
    VERDICTS,
    Link,
    Table,
    cell_text,
    claims_table,
    difference_text,
    load,
    measured_parts,
    newest_benchmarks,
    plain_table,
    projects_table,
    signed,
    speed_table,
    tally,
    unit_text,
)

PICTURES = {".png", ".jpg", ".jpeg", ".svg", ".gif", ".webp"}
LONG = 12  # rows of a table
LABEL = 50  # letters that fit into the width of a plot
RATIOS = (
    "Ours and the peer take turns. The ratio is the median of the ratios within a turn (selective_scan: of the "
    "shortest times) and may differ from the ratio of the two medians beside it."
)

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
#speed td:nth-child(3) { white-space: nowrap; }
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
    lead = f"{papers}; {tally(claims)}; newest result {newest}." if claims else f"{papers}; no claim has been run yet."
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
        f"<p>{RATIOS}</p>\n"
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
        squeezed = f' textLength="{width - 2 * margin}" lengthAdjust="spacingAndGlyphs"' if len(names) > LABEL else ""
        shapes.append(f'<text x="{margin}" y="{y - 18}"{squeezed}>{_e(names)}</text>')
        if pair["interval"]:
            a, b = map(x, pair["interval"])
            shapes.append(f'<path class="interval" fill="none" d="M{a} {y - 4}v8M{a} {y}H{b}M{b} {y - 4}v8" />')
        for seed, difference in zip(record["seeds"], pair["differences"], strict=True):
            if difference is not None:
                hint = f"<title>seed {seed}: {signed(difference, record)}{_e(unit_text(record))}</title>"
                shapes.append(f'<circle class="seed" cx="{x(difference)}" cy="{y}" r="4">{hint}</circle>')
        if pair["mean"] is not None:
            shapes.append(f'<path class="mean" d="M{x(pair["mean"])} {y - 6}l5 6l-5 6l-5 -6z" />')
    said = "; ".join(difference_text(record, pair) for pair in pairs)
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
    first, last = cell_text(points[0][1]), cell_text(points[-1][1])
    said = f"{name} from {first} at step {steps[0]:g} to {last} at step {steps[-1]:g}"
    return (
        f"<figure><figcaption><strong><code>{_e(name)}</code></strong>{last} at the end</figcaption>"
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
