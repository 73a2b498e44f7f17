"""The contract of a project, as far as a program can check it, for every project there is."""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECTS = sorted(path.parent.name for path in (ROOT / "projects").glob("*/paper.yaml"))
FILES = [
    "README.md", "paper.yaml", "model.py", "loss.py", "data.py", "module.py", "checkpoints.py", "schema.py",
    "train.py", "evaluate.py", "predict.py", "configs/train.yaml", "configs/evaluate.yaml", "configs/predict.yaml",
    "results/claims.json", "results/default.json", "results/growth.json",
]  # fmt: skip
GROUPS = ["data", "model", "trainer", "callbacks", "logger", "experiment"]
TESTS = ["test_model", "test_loss", "test_data", "test_configs", "test_train", "test_predict"]
README_ORDER = [
    "The idea", "Three commands", "What it makes", "Claimed and reproduced", "Data", "Published weights", "Departures",
]  # fmt: skip


def card(project):
    return yaml.safe_load((ROOT / "projects" / project / "paper.yaml").read_text())


def test_there_are_projects():
    assert PROJECTS
    folders = {path.name for path in (ROOT / "projects").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(PROJECTS), "a folder under projects/ without paper.yaml"


@pytest.mark.parametrize("project", PROJECTS)
def test_every_file_has_its_place(project):
    folder = ROOT / "projects" / project
    missing = [name for name in FILES if not (folder / name).is_file()]
    missing += [f"configs/{name}" for name in GROUPS if not any((folder / "configs" / name).glob("*.yaml"))]
    missing += [f"tests/{name}.py" for name in TESTS if not (folder / "tests" / f"{name}.py").is_file()]
    assert not missing
    assert any((folder / "tests" / "golden").iterdir())


@pytest.mark.parametrize("project", PROJECTS)
def test_slug_is_the_same_everywhere(project):
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf"^{project} = \[", pyproject, re.M), "no extra of this name"
    assert card(project)["project"] == project
    train = yaml.safe_load((ROOT / "projects" / project / "configs" / "train.yaml").read_text())
    assert train["project"] == project
    names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in train["defaults"]]
    assert names.index("_self_") < names.index("experiment"), "the experiment's values would be overridden"


@pytest.mark.parametrize("project", PROJECTS)
def test_readme_has_its_parts_in_order(project):
    text = (ROOT / "projects" / project / "README.md").read_text()
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert [heading for heading in headings if heading in README_ORDER] == README_ORDER
    paper = card(project)
    assert paper["title"] in text
    assert paper["link"] in text
    assert all(author in text for author in paper["authors"])
    idea = text.split("## The idea")[1].split("\n## ")[0].strip().splitlines()
    assert 3 <= len(idea) <= 7
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
        assert (ROOT / "projects" / project / picture).is_file(), picture
    assert "![" in text, "no picture made by the code"


@pytest.mark.parametrize("project", PROJECTS)
def test_model_knows_neither_lightning_nor_hydra(project):
    for name in ("model.py", "loss.py"):
        text = (ROOT / "projects" / project / name).read_text()
        assert not re.search(r"^\s*(import|from) (lightning|hydra|omegaconf)", text, re.M)


@pytest.mark.parametrize("project", PROJECTS)
def test_at_least_three_claims_were_run_and_recorded(project):
    recorded = json.loads((ROOT / "projects" / project / "results" / "claims.json").read_text())["claims"]
    ids = {claim["id"] for claim in card(project)["claims"]}
    assert {claim["id"] for claim in recorded} == ids
    assert sum(claim["verdict"] != "not attempted" for claim in recorded) >= 3
    for claim in card(project)["claims"]:
        if "arms" in claim:
            assert len(claim["seeds"]) >= 3
            assert claim["smallest_effect"] > 0


@pytest.mark.parametrize("project", PROJECTS)
def test_shipped_weights_have_a_card(project):
    folder = ROOT / "projects" / project / "weights"
    weights = sorted(folder.glob("*.safetensors"))
    assert weights
    text = (folder / "README.md").read_text()
    assert all(file.name in text for file in weights)
    assert "make train" in text
    assert "dB" in text or "%" in text


@pytest.mark.parametrize("project", PROJECTS)
def test_experiments_say_what_they_are(project):
    for file in (ROOT / "projects" / project / "configs" / "experiment").glob("*.yaml"):
        header = file.read_text().split("\n\n")[0]
        assert header.startswith("# @package _global_\n"), file
        assert f"PROJECT={project}" in header, file


def test_photographs_are_attributed():
    folder = ROOT / "shared" / "io" / "photographs"
    with open(folder / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["licence"] and row["author"] for row in rows)


def test_repository_names_no_machine():
    """No root's home, no package index's host."""
    pattern = re.compile(r"/root/|files\.pythonhosted|pypi\.org/simple|download\.pytorch\.org")
    for file in ROOT.rglob("*"):
        inside = file.relative_to(ROOT).parts
        if inside[0] in (".git", ".venv", "runs", "report", "build") or file.suffix not in (
            ".py",
            ".md",
            ".yaml",
            ".yml",
            ".toml",
            ".cu",
            "",
        ):
            continue
        if file.is_file() and file != Path(__file__):
            assert not pattern.search(file.read_text(encoding="utf-8", errors="replace")), file
