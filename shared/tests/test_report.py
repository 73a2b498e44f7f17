import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from shared import report, report_page, reproduce, tables
from shared.errors import InputError

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8ffff3f0005fe02fe0def46b8"
    "0000000049454e44ae426082"
)


def trained(**changes):
    """Give a record as `shared.reproduce` writes it, its statistics made by `shared.reproduce`."""
    arms = {"zoh": [30.0, 30.1, 29.9], "foh": [30.03, 30.14, 29.95], "foh_0": [30.0, 30.2, 29.8]}
    seeds = [0, 1, 2]
    direction, smallest = changes.get("direction", "higher"), changes.get("smallest_effect", 0.02)
    comparisons = [
        {"arm": name, "control": "zoh", "decides": name == "foh"}
        | reproduce.compare(arms[name], arms["zoh"], direction, smallest)
        for name in ("foh", "foh_0")
    ]
    return {
        "id": "better",
        "kind": "trained",
        "headline": False,
        "statement": "The hold <b>helps</b> a | b.",
        "table": "Table 1",
        "claimed": "+0.05 dB",
        "metric": "test/psnr_y",
        "metric_convention": "PSNR on Y",
        "unit": "dB",
        "direction": direction,
        "smallest_effect": smallest,
        "seeds": seeds,
        "control": "zoh",
        "arms": {
            name: {"arm_hash": name, "runs": [{"seed": seed, "seconds": 120.0} for seed in seeds]}
            for name in ("zoh", "foh")
        },
        "comparisons": comparisons,
        "verdict": comparisons[0]["verdict"],
        "reason": "",
        "device": "a cpu, 1 threads",
        "threads": 1,
        "seconds": 360.0,
        "time_budget_minutes": 5,
        "code_hash": "cafe",
        "git": "abc",
        "date": "2025-11-02 10:00 UTC",
        **changes,
    }


PROGRAM = {
    "id": "order",
    "kind": "program",
    "headline": True,
    "statement": "It has order 2.",
    "table": "text",
    "claimed": "",
    "command": "python -m projects.toy.order",
    "values": {"slope": 2.0},
    "finding": "slope 2.00",
    "verdict": "reproduced",
    "reason": "",
    "seconds": 3.0,
    "time_budget_minutes": 1,
    "code_hash": "cafe",
    "git": "abc",
    "date": "2025-11-01 10:00 UTC",
}
UNATTEMPTED = {
    "id": "large",
    "kind": "not attempted",
    "headline": False,
    "statement": "It holds at scale.",
    "table": "Table 2",
    "claimed": "32.9 dB",
    "metric": "",
    "metric_convention": "",
    "reason": "needs DIV2K",
    "verdict": "not attempted",
    "date": "2025-11-01 10:00 UTC",
}


def claims(*records, project="toy", setting="claims"):
    paper = {"title": "A <toy>", "authors": ["A. Author"], "venue": "Nowhere", "year": 2025, "task": "scoring"}
    paper["link"] = "https://example.org"
    return {"project": project, "paper": paper, "setting": setting, "claims": list(records)}


def plain(**changes):
    return {
        "title": "Default training",
        "command": "make train PROJECT=toy",
        "device": "a cpu",
        "date": "2025-11-01",
        "columns": ["method", "psnr", "seconds"],
        "rows": [["ours", 31.23456, 12], ["bicubic", 30.5, None]],
        "note": "one seed",
        **changes,
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def house(tmp_path, monkeypatch):
    """Give a repository with one project, one kernel and a README in each, tables still empty."""
    monkeypatch.chdir(tmp_path)
    toy, kernel = Path("projects/toy"), Path("shared/kernels/scan")
    write(Path("README.md"), "# House\n\n<!-- table:projects -->\n<!-- /table -->\nend\n")
    names = ("claims", "default", "benchmark", "benchmark/scan")
    write(toy / "README.md", "# Toy\n" + "".join(f"\n<!-- table:{name} -->\n<!-- /table -->\n" for name in names))
    write(kernel / "README.md", "# Scan\n<!-- table:benchmark -->\nold\n<!-- /table -->\n")
    write(toy / "paper.yaml", "project: toy\n")
    write(toy / "results" / "claims.json", claims(trained(), PROGRAM, UNATTEMPTED))
    write(toy / "results" / "default.json", plain())
    (toy / "results" / "pictures").mkdir()
    (toy / "results" / "pictures" / "test_images.png").write_bytes(PIXEL)
    for date, device, value in (("2025-10-01", "a cpu", 1), ("2025-11-01", "a cpu", 2), ("2025-09-01", "a gpu", 3)):
        table = plain(title="scan", date=date, device=device, rows=[["ours", value, value]])
        write(kernel / "results" / f"benchmark_scan_{device[2:]}_{date}.json", table)
    return tmp_path


def test_tables_are_filled_and_a_second_run_changes_nothing(house, capsys):
    assert report.main(["--check"]) == 1
    assert (
        "projects/toy/README.md: table:claims disagrees with projects/toy/results/claims.json"
        in capsys.readouterr().err
    )
    assert report.main([]) == 0
    first = {path: path.read_text() for path in [*tables.readmes(), Path("report/index.html")]}
    assert report.main(["--check"]) == 0
    assert report.main([]) == 0
    assert {path: path.read_text() for path in first} == first
    assert "\nend\n" in first[Path("README.md")]


def test_claims_table_says_what_was_found(house):
    report.main([])
    text = Path("projects/toy/README.md").read_text()
    # differences 0.03, 0.04, 0.05: mean 0.04, sd 0.01, half width 4.302653 * 0.01 / sqrt(3) = 0.02484
    row = next(line for line in text.splitlines() if "Table 1" in line)
    assert "| **reproduced** | foh − zoh: +0.040 dB [+0.015, +0.065], n = 3 | +0.020 dB | +0.05 dB |" in row
    assert r"The hold &lt;b>helps&lt;/b> a \| b." in row
    assert "foh_0" not in row
    assert "| It has order 2. | **reproduced** | slope 2.00 | – | – | text |" in text
    assert "| It holds at scale. | **not attempted**<br>needs DIV2K | – | – | 32.9 dB | Table 2 |" in text
    # 3 seeds of 2 arms of 120 s and a program of 3 s
    assert "0.20 run hours" in text
    # a claim that shares its arms adds nothing
    twice = tables.claims_table(claims(trained(), trained(id="other"), PROGRAM))
    assert any("0.20 run hours" in note for note in twice.notes)
    assert "`test/psnr_y`: PSNR on Y." in text
    assert "`make reproduce PROJECT=toy`" in text


def test_plain_and_benchmark_tables(house):
    report.main([])
    text = Path("projects/toy/README.md").read_text()
    assert "**Default training**" in text
    assert "| ours | 31.23 | 12 |" in text
    assert "| bicubic | 30.5 | – |" in text
    assert "one seed. a cpu, 2025-11-01. Made by `make train PROJECT=toy`." in text
    assert "<!-- table:benchmark -->\n*No results yet.*\n<!-- /table -->" in text
    # the newest of each device, and no other
    kernel = Path("shared/kernels/scan/README.md").read_text()
    for content in (text, kernel):
        assert "| ours | 2 | 2 |" in content
        assert "| ours | 3 | 3 |" in content
        assert "| ours | 1 | 1 |" not in content
    assert "old" not in kernel


def test_one_table_holds_the_speeds_of_the_newest_benchmarks_of_kernels_and_projects(house):
    write(Path("README.md"), "# House\n\n<!-- table:speed -->\n<!-- /table -->\n")
    report.main([])
    assert "<!-- table:speed -->\n*No results yet.*\n<!-- /table -->" in Path("README.md").read_text()
    assert 'id="speed"' not in Path("report/index.html").read_text()
    step = {"what": "training step", "ours_ms": 1.23456, "peer": "grid_sample", "peer_ms": 2345.6, "ratio": 1.9}
    toy, scan = "projects/toy", "shared/kernels/scan"
    for part, date, ratio in ((toy, "2025-10-01", 7), (toy, "2025-11-01", 2.5), (scan, "2025-12-01", 3)):
        table = plain(title="speed", date=date, headline=[{**step, "ratio": ratio}])
        write(Path(part, "results", f"benchmark_speed_{date}.json"), table)
    assert report.main(["--check"]) == 1
    report.main([])
    rows = [line for line in Path("README.md").read_text().splitlines() if "grid_sample" in line]
    measured = "training step | 1.23 ms | grid_sample: 2.35 s"
    assert rows == [
        f"| [scan](shared/kernels/scan/README.md) | {measured} | 3.00 | a cpu, 2025-12-01 |",
        f"| [toy](projects/toy/README.md) | {measured} | 2.50 | a cpu, 2025-11-01 |",
    ]
    page = ET.fromstring(Path("report/index.html").read_text().split("\n", 1)[1])
    section = next(part for part in page.iter("section") if part.get("id") == "speed")
    assert [[cell.text or cell[0].text for cell in row.iter("th")] for row in section.iter("tr")][1:] == [
        ["scan"],
        ["toy"],
    ]
    assert [link.get("href") for link in section.iter("a")] == ["#toy"]
    assert report.main(["--check"]) == 0


def test_root_table_shows_the_headline(house):
    report.main([])
    row = next(line for line in Path("README.md").read_text().splitlines() if "projects/toy" in line)
    assert row.startswith(
        "| [A &lt;toy> (Nowhere 2025)](projects/toy/README.md) | scoring | It has order 2. | slope 2.00 |"
    )
    assert "**reproduced**<br>all 3 claims: 2 reproduced, 1 not attempted |" in row


@pytest.mark.parametrize(
    ("direction", "words"),
    [
        ("higher", "+0.020 dB"),
        ("lower", "−0.020 dB"),
        ("equivalent", "within ±0.020 dB"),
        ("not_lower", "not below −0.020 dB"),
        ("not_higher", "not above +0.020 dB"),
    ],
)
def test_every_direction_is_said_and_drawn(direction, words):
    record = trained(direction=direction)
    assert tables.claims_table(claims(record)).rows[0][3] == words
    assert len(ET.fromstring(report_page.dot_plot(record)).findall(".//circle")) == 6


def test_diverged_seeds_and_a_moved_threshold_are_said():
    record = trained(earlier_rules=[{"metric": "m", "direction": "higher", "smallest_effect": 0.5, "date": "x"}])
    pair = record["comparisons"][0]
    pair |= reproduce.compare([1.0, float("nan"), float("nan")], [0.5, 1.0, 1.0], "higher", 0.02)
    assert "2 seeds without a difference" in report_page.dot_plot(record)
    assert "foh − zoh: +0.500 dB, n = 1" in tables.claims_table(claims(record)).rows[0][2]
    assert "changed after a run; it was: m, higher, 0.5" in " ".join(tables.claims_table(claims(record)).notes)
    pair |= reproduce.compare([float("nan")] * 3, [1.0] * 3, "higher", 0.02)
    assert "no finite pair" in tables.claims_table(claims(record)).rows[0][2]
    ET.fromstring(report_page.dot_plot(record))


def test_page_is_well_formed_and_stands_alone(house):
    write(Path("projects/toy/results/claims_gpu.json"), claims(trained(), setting="claims_gpu"))
    write(Path("projects/empty/paper.yaml"), "project: empty\n")
    report.main(["--output", "out"])
    text = Path("out/index.html").read_text()
    tree = ET.fromstring(text)
    addresses = [node.get("src") for node in tree.iter("img")]
    assert addresses == ["pictures/toy/test_images.png"]
    assert Path("out", addresses[0]).read_bytes() == PIXEL
    # nothing is loaded from anywhere: no scripts, style sheets, imports, fonts
    assert not list(tree.iter("script")) + list(tree.iter("link")) + list(tree.iter("iframe"))
    assert "url(" not in text
    assert "@import" not in text
    inside = {node.get("href")[1:] for node in tree.iter("a") if node.get("href").startswith("#")}
    names = [node.get("id") for node in tree.iter() if node.get("id")]
    assert inside <= set(names)
    assert len(names) == len(set(names))
    assert [node.tag for node in tree.iter() if node.tag in ("h1", "h2")] == ["h1", "h2", "h2"]
    words = " ".join("".join(tree.find("body").itertext()).split())
    assert "Claims, claims_gpu" in words
    assert "The hold <b>helps</b> a | b." in words
    assert "make reproduce PROJECT=empty" in words
    assert all(node.get("scope") for node in tree.iter("th"))
    assert all(node.get("tabindex") == "0" for node in tree.iter("div") if node.get("class") == "scroll")
    assert "prefers-color-scheme: dark" in text


def test_check_names_an_edited_table_and_changes_nothing(house, capsys):
    report.main([])
    readme = Path("projects/toy/README.md")
    readme.write_text(readme.read_text().replace("+0.040 dB", "+0.400 dB"))
    edited = readme.read_text()
    assert report.main(["--check"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("projects/toy/README.md: table:claims disagrees")
    assert error.count("\n") == 1
    assert readme.read_text() == edited
    assert tables.stale("toy") == tables.stale()


def test_a_changed_result_makes_both_tables_stale(house):
    report.main([])
    write(Path("projects/toy/results/claims.json"), claims(PROGRAM | {"verdict": "not reproduced"}))
    assert [message.split(":")[0] for message in tables.stale()] == ["README.md", "projects/toy/README.md"]


def test_project_leaves_other_projects_alone(house):
    write(Path("projects/other/README.md"), "<!-- table:claims -->\nkeep\n<!-- /table -->\n")
    write(Path("projects/other/paper.yaml"), "project: other\n")
    report.main(["--project", "toy"])
    assert "keep" in Path("projects/other/README.md").read_text()
    assert 'id="other"' not in Path("report/index.html").read_text()


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("README.md", "<!-- table:projects -->\n", "README.md: a line"),
        ("README.md", "<!-- table:projetcs -->\n<!-- /table -->\n", "table:projetcs has no file"),
        ("projects/toy/README.md", "<!-- table:benchmark/scna -->\n<!-- /table -->\n", "names no kernel"),
        ("projects/toy/results/default.json", "{", "default.json is not JSON"),
        ("projects/toy/results/default.json", "[]", "default.json holds neither"),
        ("projects/toy/results/default.json", '{"columns": ["a"], "rows": [[1, 2]]}', "2 cells for 1 columns"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(house, capsys, path, content, message):
    write(Path(path), content)
    assert report.main([]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("{", "no whole metrics.json"),
        ('{"project": "toy", "device": "CPU"}', "older code, which did not note config_hash"),
    ],
)
def test_run_that_cannot_be_recorded_is_one_line(house, capsys, metrics, message):
    write(Path("runs/toy/metrics.json"), metrics)
    assert report.main(["--record", "runs/toy"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_unknown_project(house, capsys):
    assert report.main(["--project", "tyo"]) == 2
    assert "known: toy" in capsys.readouterr().err


def test_ticks_are_round_and_inside():
    for low, high in ((-1.0, 1.0), (-0.013, 0.071), (0.0, 1234.0), (-3e-7, 2e-7)):
        ticks = report_page._ticks(low, high)
        assert 2 <= len(ticks) <= 6
        assert low <= ticks[0]
        assert ticks[-1] <= high


def test_load_refuses_a_missing_file():
    with pytest.raises(InputError, match="cannot read"):
        tables.load(Path("nowhere.json"))
