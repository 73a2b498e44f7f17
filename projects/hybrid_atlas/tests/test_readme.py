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
CARD = (FOLDER / "weights" / "README.md").read_text(encoding="utf-8")
MAKE = re.findall(r"^ *make (?:train|evaluate|predict) .*$", README + CARD, re.M)
PYTHON = re.findall(r"python -m (projects\.hybrid_atlas\.\w+)", README + CARD)


def test_there_are_commands():
    assert {command.split()[1] for command in MAKE} == {"train", "evaluate", "predict"}
    assert PYTHON


@pytest.mark.parametrize("command", MAKE)
def test_commands_of_the_readme_compose(composed, command):
    _, entry, *words = shlex.split(command, comments=True)
    given = dict(word.split("=", 1) for word in words)
    assert given.pop("PROJECT") == "hybrid_atlas"
    overrides = given.pop("ARGS", "").split()
    if overrides == ["--help"]:
        return
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
    keys = set(re.findall(r"`((?:model|data|trainer|atlas|deformation)(?:\.\w+)+)[=`]", README))
    keys = {key for key in keys if not key.endswith(".py")}
    roots = [composed("train", *options) for options in ((), ("model=deepflash",), ("data=scans",))]
    roots.append(composed("predict"))
    for key in keys:
        assert any(OmegaConf.select(config, key, default="???") != "???" for config in roots), key


def test_plain_torch_lines_of_the_readme_register_slices(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(ROOT)
    atlas, *scans = torch.rand(4, 1, 1, 96, 112, generator=torch.Generator().manual_seed(0)).split(1)
    names = {"atlas": atlas[0], "scans": torch.cat(scans)[:, 0]}
    exec(code, names)
    assert names["warped"].shape == (3, 1, 96, 112)
    assert not torch.allclose(names["warped"], names["atlas"].expand(3, -1, -1, -1))
