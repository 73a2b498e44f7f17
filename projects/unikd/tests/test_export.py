"""The student for `predict` and for other programs: alone, with what is known of it, and with the same outputs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from projects.unikd import export
from projects.unikd.checkpoints import load_published, save_network
from projects.unikd.networks import build_network
from projects.unikd.predict import Facts, read_facts
from shared.io.checkpoints import read_metadata
from shared.io.labelled import load_digits_rgb

TINY = {"name": "resnet8", "num_classes": 10, "filters": [4, 4, 8, 8]}
FACTS = Facts((0.3, 0.4, 0.5), (0.2, 0.25, 0.3), 32)
SMALL = {
    "resnet8": {"filters": [4, 4, 8, 8]}, "wrn_16_1": {}, "vgg8": {"widths": [4] * 5}, "ShuffleV1": {}, "ShuffleV2": {},
    "MobileNetV2": {}, "imagenet_resnet18": {"width": 8},
}  # fmt: skip


def network(name="resnet8", **overrides):
    """A network whose batch norms hold the statistics of a batch, so that folding them changes weights."""
    torch.manual_seed(0)
    net = build_network({"name": name, "num_classes": 10, **(overrides or SMALL[name])})
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


def test_run_becomes_its_student_alone_with_its_names_and_score(smoke, command_line, tmp_path):
    record, run_dir = smoke("run", "logger=csv")
    assert any(key.startswith("distiller.") for key in checkpoint(run_dir)["state_dict"])
    made = {which: tmp_path / f"{which}.safetensors" for which in ("best", "last")}
    for which, file in made.items():
        code, out, error = command_line("export", f"{run_dir}/checkpoints/{which}.ckpt", "--output", str(file))
        assert (code, str(file) in out) == (0, True), error
    net = build_network(TINY)
    with safe_open(made["best"], "pt") as file:
        assert set(file.keys()) == set(net.state_dict())
    trained = {key[4:]: value for key, value in checkpoint(run_dir)["state_dict"].items() if key.startswith("net.")}
    assert all(torch.equal(value, trained[key]) for key, value in load_published(made["best"]).state_dict().items())
    assert read_facts(made["best"], net) == Facts([0.3] * 3, [0.35] * 3, 32, None, list("0123456789"), "digits")
    for which, ending in (("best", "_best"), ("last", "")):
        said = read_metadata(made[which])
        scores = json.loads(said["metrics"])
        assert json.loads(said["net"]) == TINY
        assert scores["test/digits/top1"] == record["metrics"][f"test/digits/top1{ending}"]
        assert not any(name.endswith("_best") for name in scores)
        assert json.loads(said["config_hash"]) == record["config_hash"]
    picture = Image.fromarray(load_digits_rgb(train=False).images[0])
    picture.save(tmp_path / "in.png")
    options = (f"input={tmp_path}/in.png", f"output={tmp_path}/out.csv", f"ckpt_path={made['best']}", "threads=1")
    code, out, error = command_line("predict", *options)
    assert (code, "does not say" in out) == (0, False), error
    # and on from there: the facts travel
    code, _, error = command_line("export", str(made["best"]), "--output", f"{tmp_path}/again.safetensors")
    assert code == 0, error
    assert read_metadata(tmp_path / "again.safetensors") == read_metadata(made["best"])


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoints" / "best.ckpt", weights_only=True)


def test_scores_are_those_of_the_weights(tmp_path):
    (tmp_path / "config.yaml").write_text("tested: [best]")
    record = {"metrics": {"test/x/top1": 7.0}, "seed": 0, "config_hash": "a", "device": "b", "seconds": 1.0}
    assert export.run_scores(tmp_path, "best") == {}  # not finished
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    assert json.loads(export.run_scores(tmp_path, "best")["metrics"]) == {"test/x/top1": 7.0}
    assert export.run_scores(tmp_path, "last") == {}  # not tested


@pytest.mark.parametrize(
    "name", ["resnet8", *(pytest.param(n, marks=pytest.mark.slow) for n in SMALL if n != "resnet8")]
)
@pytest.mark.parametrize("softmax", [False, True])
def test_program_takes_pictures_in_0_to_1_and_gives_the_same(tmp_path, name, softmax):
    net = network(name)
    path = tmp_path / "net.pt2"
    export.write_program(export.Classifier(net, FACTS, softmax), FACTS, {"data": "zoo"}, path)
    facts = {"facts.json": ""}
    program = torch.export.load(path, extra_files=facts).module()
    assert json.loads(facts["facts.json"]) == {"data": "zoo"}
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, 32, 32)
        wanted = expected(net, images, softmax)
        assert (program(images) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("softmax", [False, True])
def test_onnx_takes_pictures_in_0_to_1_and_gives_the_same(tmp_path, name, softmax):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `benchmark` is not installed")
    net = network(name)
    path = tmp_path / "net.onnx"
    export.write_onnx(export.Classifier(net, FACTS, softmax), FACTS, {"data": "zoo"}, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    assert [output.name for output in session.get_outputs()] == ["probabilities" if softmax else "logits"]
    assert session.get_modelmeta().custom_metadata_map == {"data": "zoo"}
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, 32, 32)
        wanted = expected(net, images, softmax).numpy()
        (made,) = session.run(None, {"images": images.numpy()})
        assert np.abs(made - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_graph_of_weights_carries_what_they_say(command_line, tmp_path):
    net = network()
    save_network(net, TINY, tmp_path / "ours.safetensors", **FACTS.as_metadata())
    path = tmp_path / "net.pt2"
    code, _, error = command_line("export", f"{tmp_path}/ours.safetensors", "--output", str(path), "--softmax")
    assert code == 0, error
    facts = {"facts.json": ""}
    program = torch.export.load(path, extra_files=facts).module()
    assert json.loads(facts["facts.json"]) == FACTS.as_metadata()
    images = torch.rand(3, 3, 32, 32)
    assert (program(images) - expected(net, images, True)).abs().max() < 1e-6


def test_bad_input_is_one_line_and_exit_code_2(command_line, tmp_path):
    save_network(network(), TINY, tmp_path / "ours.safetensors")
    names = json.dumps(["a", "b"])
    save_network(network(), TINY, tmp_path / "two.safetensors", class_names=names, data="zoo")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    state = {f"net.{key}": value for key, value in network().state_dict().items()}
    content = {"state_dict": state, "hyper_parameters": {"net": TINY}}
    torch.save(content, tmp_path / "run" / "checkpoints" / "best.ckpt")
    data = {"_target_": "projects.unikd.data.CIFAR", "root": str(tmp_path), "name": "cifar10", "num_validation": 0}
    data |= {"mean": [0.5] * 3, "std": [0.5] * 3, "batch_size": 4, "seed": 0}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"project": "unikd", "data": data}))
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    before = sorted(tmp_path.rglob("*"))
    for given, message in (
        (["absent.ckpt", "--output", "a.safetensors"], "absent.ckpt"),
        ([f"{tmp_path}/other.pth", "--output", f"{tmp_path}/a.onnx"], "other.pth"),
        ([f"{tmp_path}/ours.safetensors", "--output", f"{tmp_path}/a.zip"], "end the name with one of .safetensors"),
        ([f"{tmp_path}/ours.safetensors", "--output", f"{tmp_path}/a.safetensors", "--softmax"], "no softmax"),
        ([f"{tmp_path}/two.safetensors", "--output", f"{tmp_path}/a.pt2"], "its data zoo has 2"),
        ([f"{tmp_path}/run/checkpoints/best.ckpt", "--output", f"{tmp_path}/a.pt2"], "batches.meta is missing"),
    ):
        code, _, error = command_line("export", *given)
        assert (code, error.count("\n")) == (2, 1), error
        assert message in error
        assert sorted(tmp_path.rglob("*")) == before, given


def test_weights_that_say_nothing_are_exported_as_cifars_and_said_to_be(command_line, tmp_path):
    save_network(network(), TINY, tmp_path / "ours.safetensors")
    code, out, error = command_line("export", f"{tmp_path}/ours.safetensors", "--output", f"{tmp_path}/a.safetensors")
    assert (code, "does not say what it was trained on" in out) == (0, True), error
    assert list(read_metadata(tmp_path / "a.safetensors")) == ["net"]
