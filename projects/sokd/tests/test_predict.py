"""Prediction by this project's entry; what all projects share is tested beside `shared.classify`."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from projects.sokd import predict
from projects.sokd.checkpoints import save_network
from projects.sokd.networks import build_network
from shared.classify import Facts, classify
from shared.io.images import read_rgb

TINY = {"name": "resnet8", "num_classes": 4, "filters": [4, 4, 8, 8]}
NAMES = ["cat", "dog, big", "hörse", "emu"]
FACTS = Facts((0.3, 0.4, 0.5), (0.2, 0.25, 0.3), 32, class_names=NAMES, data="zoo")


@pytest.fixture
def net():
    """Untrained, but sure enough of itself that pictures differ."""
    torch.manual_seed(0)
    net = build_network(TINY)
    with torch.no_grad():
        net.fc.weight *= 30
    return net.eval()


@pytest.fixture
def weights(net, tmp_path):
    path = tmp_path / "weights" / "zoo.safetensors"
    save_network(net, TINY, path, **FACTS.as_metadata())
    return path


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of two sizes in a folder -> that folder."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, size in enumerate(((32, 32), (50, 40), (32, 32))):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_table_says_the_classes_and_probabilities_of_the_network(command_line, net, weights, pictures, tmp_path):
    options = (f"input={pictures}", f"output={tmp_path}/out.csv", f"ckpt_path={weights}", "top=2", "threads=1")
    code, out, error = command_line("predict", *options)
    assert (code, "wrote" in out) == (0, True), error
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "class", "probability", "class_2", "probability_2"]
    wanted = classify(net, [read_rgb(pictures / f"{i}.png") for i in range(3)], FACTS)
    for i, (row, values) in enumerate(zip(rows, wanted, strict=True)):
        order = values.argsort(descending=True)[:2]
        assert [row[0], *row[1::2]] == [f"{i}.png", *(NAMES[k] for k in order)]
        assert [float(p) for p in row[2::2]] == pytest.approx(values[order].tolist(), abs=2e-6)


def test_shipped_weights_are_found_by_their_name(composed, weights, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "WEIGHTS", weights.parent)
    for name, given in (("a", f"ckpt_path='{weights}'"), ("b", "weights=zoo")):
        options = (f"input='{pictures}'", f"output='{tmp_path}/{name}.csv'", "threads=1")
        predict.run(composed("predict", *options, given))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_what_is_not_said_is_of_the_networks_kind():
    for name, resize in (("resnet8", None), ("imagenet_resnet18", 256)):
        assert predict.usual_facts(build_network({"name": name, "num_classes": 2})).resize == resize


def test_bad_input_is_one_line_and_exit_code_2(command_line, weights, pictures, tmp_path):
    good = [f"input={pictures}", f"output={tmp_path}/out.csv", f"ckpt_path={weights}"]
    for arguments, message in (([], "say what to classify"), ([*good, "topp=1"], "topp"), ([*good, "top=0"], "top is")):
        code, _, error = command_line("predict", *arguments)
        assert (code, error.count("\n"), error.startswith("error: ")) == (2, 1, True), error
        assert message in error
    assert not (tmp_path / "out.csv").exists()
