"""Export by this project's entry: every kind of network; the rest is tested beside `shared.export`."""

import json

import numpy as np
import pytest
import torch

from projects.sokd.checkpoints import load_published, save_network
from projects.sokd.networks import build_network
from shared.classify import Facts
from shared.export import Classifier, write_onnx, write_program
from shared.io.checkpoints import read_metadata

TINY = {"name": "resnet8", "num_classes": 10, "filters": [4, 4, 8, 8]}
FACTS = Facts((0.3, 0.4, 0.5), (0.2, 0.25, 0.3), 32)
SMALL = {
    "resnet8": {"filters": [4, 4, 8, 8]}, "wrn_16_1": {}, "vgg8": {"widths": [4] * 5}, "ShuffleV1": {}, "ShuffleV2": {},
    "MobileNetV2": {}, "imagenet_resnet18": {"width": 8},
}  # fmt: skip


def network(name="resnet8"):
    """A network whose batch norms hold the statistics of a batch, so that folding them changes weights."""
    torch.manual_seed(0)
    net = build_network({"name": name, "num_classes": 10, **SMALL[name]})
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    with torch.no_grad():
        net.train()(normalised(torch.rand(32, 3, 32, 32)))
    return net.eval()


def normalised(images):
    mean, std = (torch.tensor(values)[:, None, None] for values in (FACTS.mean, FACTS.std))
    return (images - mean) / std


def expected(net, images, softmax):
    with torch.no_grad():
        logits = net(normalised(images))
    return logits.softmax(1) if softmax else logits


@pytest.mark.parametrize(
    "name", ["resnet8", *(pytest.param(n, marks=pytest.mark.slow) for n in SMALL if n != "resnet8")]
)
def test_program_takes_pictures_in_0_to_1_and_gives_the_same(tmp_path, name):
    net, path = network(name), tmp_path / "net.pt2"
    write_program(Classifier(net, FACTS, softmax=False), FACTS, {}, path)
    program = torch.export.load(path).module()
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, 32, 32)
        wanted = expected(net, images, False)
        assert (program(images) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_onnx_takes_pictures_in_0_to_1_and_gives_the_same(tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `benchmark` is not installed")
    net, path = network(name), tmp_path / "net.onnx"
    write_onnx(Classifier(net, FACTS, softmax=True), FACTS, {}, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, 32, 32)
        wanted = expected(net, images, True).numpy()
        (made,) = session.run(None, {"images": images.numpy()})
        assert np.abs(made - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_weights_become_weights_and_a_graph(command_line, tmp_path):
    net = network()
    save_network(net, TINY, tmp_path / "ours.safetensors", **FACTS.as_metadata())
    for name, options in (("again.safetensors", []), ("net.pt2", ["--softmax"])):
        arguments = [f"{tmp_path}/ours.safetensors", "--output", f"{tmp_path}/{name}", *options]
        code, _, error = command_line("export", *arguments)
        assert code == 0, error
    again = tmp_path / "again.safetensors"
    assert read_metadata(again) == read_metadata(tmp_path / "ours.safetensors")
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(load_published(again)(images), net(images))
    facts = {"facts.json": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=facts).module()
    assert json.loads(facts["facts.json"]) == FACTS.as_metadata()
    assert (program(images) - expected(net, images, True)).abs().max() < 1e-6


def test_bad_input_is_one_line_and_exit_code_2(command_line, tmp_path):
    save_network(network(), TINY, tmp_path / "ours.safetensors")
    for given, message in (
        (["absent.ckpt", "--output", "a.safetensors"], "absent.ckpt"),
        ([f"{tmp_path}/ours.safetensors", "--output", f"{tmp_path}/a.zip"], "end the name with one of .safetensors"),
    ):
        code, _, error = command_line("export", *given)
        assert (code, error.count("\n")) == (2, 1), error
        assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["ours.safetensors"]
