"""The README's commands are there, and its plain torch lines run as they stand."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from projects.lg3d.model import build_network

ROOT = Path(__file__).parents[3]
FOLDER = Path(__file__).parents[1]
README = (FOLDER / "README.md").read_text(encoding="utf-8")
CARD = (FOLDER / "weights" / "README.md").read_text(encoding="utf-8")
HEADERS = "".join(
    file.read_text()
    for folder in ("", "experiment", "data", "guidance", "head", "model")
    for file in sorted((FOLDER / "configs" / folder).glob("*.yaml"))
)
SIZES = OmegaConf.to_container(OmegaConf.load(FOLDER / "configs" / "head" / "sunrgbd.yaml"))
HEAD = OmegaConf.to_container(OmegaConf.load(FOLDER / "configs" / "model" / "votenet_smoke.yaml").net.head) | SIZES
ARGUMENTS = r'(?: +[A-Z]+=(?:"[^"]*"|<[^>]*>|[^\s`"<]+))+'
PYTHON = sorted(set(re.findall(r"python -m (projects\.lg3d\.\w+)", README + CARD + HEADERS)))


def commands(text):
    return sorted({match[0] for match in re.finditer(rf"make (?:train|evaluate|predict){ARGUMENTS}", text)})


def test_there_are_commands():
    for text in (README, HEADERS):
        assert {command.split()[1] for command in commands(text)} == {"train", "evaluate", "predict"}
    assert len(commands(HEADERS)) > 20
    assert PYTHON


@pytest.mark.parametrize(
    "text", [README, CARD, pytest.param(HEADERS, marks=pytest.mark.slow)], ids=["readme", "card", "configs"]
)
def test_commands_compose(composed, text):
    for command in commands(text):
        _, entry, *words = shlex.split(re.sub(r"<[^>]*>", "a", command))
        given = dict(word.split("=", 1) for word in words)
        assert given.pop("PROJECT") == "lg3d", command
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


def test_files_and_choices_that_the_readme_names_are_there():
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (FOLDER / name).is_file(), name
    for group, choice in re.findall(r"(data|guidance|experiment|model|head)=(\w+)", README + CARD):
        assert (FOLDER / "configs" / group / f"{choice}.yaml").is_file(), (group, choice)


def test_departures_of_the_card_are_those_of_the_readme():
    card = yaml.safe_load((FOLDER / "paper.yaml").read_text())
    text = " ".join(README.split())
    for departure in card["departures"]:
        assert " ".join(departure["what"].split()) in text
        assert " ".join(departure["why"].split()) in text


def test_plain_torch_lines_of_the_readme_guide_a_detector():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    net = build_network(
        OmegaConf.to_container(OmegaConf.load(FOLDER / "configs" / "model" / "votenet_smoke.yaml").net) | {"head": HEAD}
    )
    random = torch.Generator().manual_seed(0)
    xyz = 4 * torch.rand(2, 128, 3, generator=random)
    boxes = torch.tensor([[2, 2, 1, 2, 2, 2, 0.0]]).repeat(2, 1, 1)
    names = {"net": net, "xyz": xyz, "features": xyz.mT[:, 2:], "boxes": boxes, "labels": torch.tensor([[3], [0]])}
    before = {key: value.clone() for key, value in net.backbone.state_dict().items() if "running" not in key}
    exec(code, names)
    names["loss"].backward()
    assert names["loss"].isfinite()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert all(value.equal(net.backbone.state_dict()[key]) for key, value in before.items() if "num_" not in key)
