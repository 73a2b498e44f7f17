"""The README's commands are there, and its plain torch lines run as they stand."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from projects.cp3.checkpoints import load_published
from projects.cp3.predict import WEIGHTS

ROOT = Path(__file__).parents[3]
FOLDER = Path(__file__).parents[1]
README = (FOLDER / "README.md").read_text(encoding="utf-8")
CARD = (FOLDER / "weights" / "README.md").read_text(encoding="utf-8")
HEADERS = "".join(
    file.read_text()
    for folder in ("", "experiment", "data", "model", "prune")
    for file in sorted((FOLDER / "configs" / folder).glob("*.yaml"))
)
ARGUMENTS = r'(?: +[A-Z]+=(?:"[^"]*"|<[^>]*>|[^\s`"<]+))+'
PYTHON = sorted(set(re.findall(r"python -m (projects\.cp3\.\w+)", README + CARD + HEADERS)))


def commands(text):
    return sorted({match[0] for match in re.finditer(rf"make (?:train|evaluate|predict){ARGUMENTS}", text)})


def test_there_are_commands():
    for text in (README, HEADERS):
        assert {command.split()[1] for command in commands(text)} == {"train", "evaluate", "predict"}
    assert len(commands(HEADERS)) > 30
    assert PYTHON


@pytest.mark.parametrize(
    "text", [README, CARD, pytest.param(HEADERS, marks=pytest.mark.slow)], ids=["readme", "card", "configs"]
)
def test_commands_compose(composed, text):
    for command in commands(text):
        _, entry, *words = shlex.split(re.sub(r"<[^>]*>", "a", command))
        given = dict(word.split("=", 1) for word in words)
        assert given.pop("PROJECT") == "cp3", command
        overrides = given.pop("ARGS", "").split()
        if overrides == ["--help"]:
            continue
        for word, key in (("CKPT", "ckpt_path"), ("INPUT", "input"), ("OUTPUT", "output")):
            if word in given:
                overrides.append(f"{key}={given.pop(word)}")
        assert not given, command
        assert not [override for override in overrides if override.startswith("+")], command
        OmegaConf.to_container(composed(entry, *overrides), resolve=True)


@pytest.mark.parametrize("module", PYTHON)
def test_programs_of_the_readme_are_there(module):
    assert Path(ROOT, *module.split(".")).with_suffix(".py").is_file()


def test_files_and_choices_that_the_readme_names_are_there(composed):
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (FOLDER / name).is_file(), name
    for group, choice in re.findall(r"(data|prune|experiment|model)=(\w+)", README):
        if (FOLDER / "configs" / group).is_dir():
            assert (FOLDER / "configs" / group / f"{choice}.yaml").is_file(), (group, choice)
    for key in re.findall(r"`(data\.\w+)`", README):
        configs = [composed("train", f"data={name}") for name in ("procshape", "scanobjectnn", "modelnet40", "s3dis")]
        assert any(key.split(".")[1] in config.data for config in configs), key


def test_departures_of_the_card_are_those_of_the_readme():
    card = yaml.safe_load((FOLDER / "paper.yaml").read_text())
    text = " ".join(README.split())
    for departure in card["departures"]:
        assert " ".join(departure["what"].split()) in text
        assert " ".join(departure["why"].split()) in text


def test_plain_torch_lines_of_the_readme_prune_a_network():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    net = load_published(WEIGHTS / "pointnext_tiny_hard.safetensors")
    xyz = torch.rand(2, 64, 3, generator=torch.Generator().manual_seed(0))
    names = {"net": net, "xyz": xyz, "features": torch.cat([xyz.mT, xyz[..., 1:2].mT], 1)}
    before = sum(p.numel() for p in net.parameters())
    exec(code, names)
    narrow = names["narrow"]
    assert narrow.encoder.stem.out_channels == int(16 * (1 - 0.35))
    assert sum(p.numel() for p in narrow.parameters()) < 0.6 * before == 0.6 * sum(p.numel() for p in net.parameters())
    assert narrow(xyz, names["features"]).shape == (2, 15)
