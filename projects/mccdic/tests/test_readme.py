"""The README's commands are there, and its plain torch lines run as they stand."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[3]
FOLDER = Path(__file__).parents[1]
README = (FOLDER / "README.md").read_text(encoding="utf-8")
MAKE = re.findall(r"^make (?:train|evaluate|predict) .*$", README, re.M)
PYTHON = re.findall(r"python -m (projects\.mccdic\.\w+)", README)


def test_there_are_commands():
    entries = {command.split()[1] for command in MAKE}
    assert entries == {"train", "evaluate", "predict"}
    assert PYTHON


@pytest.mark.parametrize("command", MAKE)
def test_commands_of_the_readme_compose(composed, command):
    _, entry, *words = shlex.split(command, comments=True)
    given = dict(word.split("=", 1) for word in words)
    assert given.pop("PROJECT") == "mccdic"
    overrides = given.pop("ARGS", "").split()
    for word, key in (("CKPT", "ckpt_path"), ("INPUT", "input"), ("OUTPUT", "output")):
        if word in given:
            overrides.append(f"{key}={given.pop(word)}")
    assert not given
    assert not [override for override in overrides if override.startswith("+")]
    OmegaConf.to_container(composed(entry, *overrides), resolve=True)


@pytest.mark.parametrize("module", sorted(set(PYTHON)))
def test_programs_of_the_readme_are_there(module):
    assert Path(ROOT, *module.split(".")).with_suffix(".py").is_file()


def test_files_and_keys_that_the_readme_names_are_there(composed):
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (FOLDER / name).is_file(), name
    keys = set(re.findall(r"`((?:model|data|trainer)(?:\.\w+)+)[=`]", README)) - {"model.py", "data.py"}
    roots = [composed("train"), *(composed("train", f"data={name}") for name in ("ixi", "brats", "fastmri", "folders"))]
    for key in keys:
        assert any(OmegaConf.select(config, key, default="???") != "???" for config in roots), key


def test_plain_torch_lines_of_the_readme_restore_slices_of_any_size(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(ROOT)
    t2, pd = torch.rand(2, 1, 1, 37, 50, generator=torch.Generator().manual_seed(0))
    names = {"t2": t2, "pd": pd}
    exec(code, names)
    assert names["restored"].shape == (1, 1, 37, 50)
    assert not torch.equal(names["restored"], names["zero_filled"])
