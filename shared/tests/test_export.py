"""The student for `predict` and for other programs: alone, with what is known of it, and with the same outputs."""

import json

import numpy as np
import pytest
import torch

from shared import export
from shared.classify import CIFAR100, Facts, read_facts
from shared.errors import InputError
from shared.io.checkpoints import read_metadata
from shared.io.classifiers import save_network
from shared.testing.classifiers import TOYS, trained

THIN = {"name": "thin", "num_classes": 10}
FACTS = Facts((0.3, 0.4, 0.5), (0.2, 0.25, 0.3), 32)


def usual(net):
    return CIFAR100


def exported(checkpoint, output, softmax=False):
    return export.export(checkpoint, output, softmax, "toy", TOYS, usual)


def expected(net, images, softmax):
    mean, std = (torch.tensor(values)[:, None, None] for values in (FACTS.mean, FACTS.std))
    with torch.no_grad():
        logits = net((images - mean) / std)
    return logits.softmax(1) if softmax else logits


@pytest.fixture
def checkpoint(tmp_path):
    """The best checkpoint of a run on the digits, a teacher in it."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    state = {f"net.{key}": value for key, value in trained(num_classes=10).state_dict().items()}
    content = {"state_dict": state | {"distiller.x": torch.zeros(1)}, "hyper_parameters": {"net": THIN}}
    torch.save(content, run / "checkpoints" / "best.ckpt")
    data = {"_target_": "shared.io.image_classes.Digits", "name": "digits", "num_validation": 0, "batch_size": 4}
    data |= {"mean": [0.3] * 3, "std": [0.35] * 3, "seed": 0}
    (run / "config.yaml").write_text(json.dumps({"project": "toy", "data": data, "tested": ["last", "best"]}))
    scores = {"test/digits/top1": 91.0, "test/digits/top1_best": 90.0}
    record = {"metrics": scores, "seed": 0, "config_hash": "a", "device": "b", "seconds": 1.0}
    (run / "metrics.json").write_text(json.dumps(record))
    return run / "checkpoints" / "best.ckpt"


def test_run_becomes_its_student_alone_with_its_names_and_score(checkpoint, tmp_path):
    made = exported(checkpoint, tmp_path / "student.safetensors")
    net = trained(num_classes=10)
    loaded = TOYS.load(made).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in net.state_dict().items())
    found = read_facts(made, net, "toy", usual)
    assert found == Facts([0.3] * 3, [0.35] * 3, 32, None, list("0123456789"), "digits")
    said = read_metadata(made)
    assert json.loads(said["net"]) == THIN
    assert json.loads(said["metrics"]) == {"test/digits/top1": 90.0}
    assert json.loads(said["config_hash"]) == "a"
    # and on from there: the facts travel
    assert read_metadata(exported(made, tmp_path / "again.safetensors")) == said


def test_scores_are_those_of_the_weights(tmp_path):
    (tmp_path / "config.yaml").write_text("tested: [best]")
    record = {"metrics": {"test/x/top1": 7.0}, "seed": 0, "config_hash": "a", "device": "b", "seconds": 1.0}
    assert export.run_scores(tmp_path, "best") == {}  # not finished
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    assert json.loads(export.run_scores(tmp_path, "best")["metrics"]) == {"test/x/top1": 7.0}
    assert export.run_scores(tmp_path, "last") == {}  # not tested


@pytest.mark.parametrize("softmax", [False, True])
def test_program_takes_pictures_in_0_to_1_and_gives_the_same(tmp_path, softmax):
    net = trained(name="deep", num_classes=10)
    path = tmp_path / "net.pt2"
    classifier = export.Classifier(net, FACTS, softmax)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in classifier.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    export.write_program(classifier, FACTS, {"data": "zoo"}, path)
    facts = {"facts.json": ""}
    program = torch.export.load(path, extra_files=facts).module()
    assert json.loads(facts["facts.json"]) == {"data": "zoo"}
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, 32, 32)
        wanted = expected(net, images, softmax)
        assert (program(images) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("softmax", [False, True])
def test_onnx_takes_pictures_in_0_to_1_and_gives_the_same(tmp_path, softmax):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `benchmark` is not installed")
    net = trained(name="deep", num_classes=10)
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


def test_graph_of_weights_carries_what_they_say(tmp_path):
    net = trained(num_classes=10)
    save_network(net, THIN, tmp_path / "ours.safetensors", **FACTS.as_metadata())
    path = exported(tmp_path / "ours.safetensors", tmp_path / "net.pt2", softmax=True)
    facts = {"facts.json": ""}
    program = torch.export.load(path, extra_files=facts).module()
    assert json.loads(facts["facts.json"]) == FACTS.as_metadata()
    images = torch.rand(3, 3, 32, 32)
    assert (program(images) - expected(net, images, True)).abs().max() < 1e-5


def test_bad_input_is_refused_before_anything_is_written(checkpoint, tmp_path):
    net = trained(num_classes=10)
    save_network(net, THIN, tmp_path / "ours.safetensors")
    save_network(net, THIN, tmp_path / "two.safetensors", class_names=json.dumps(["a", "b"]), data="zoo")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    config = checkpoint.parents[1] / "config.yaml"
    data = {"_target_": "shared.io.image_classes.CIFAR", "root": str(tmp_path), "name": "cifar10", "num_validation": 0}
    data |= {"mean": [0.5] * 3, "std": [0.5] * 3, "batch_size": 4, "seed": 0}
    config.write_text(json.dumps({"project": "toy", "data": data}))
    before = sorted(tmp_path.rglob("*"))
    for given, output, softmax, message in (
        ("absent.ckpt", "a.safetensors", False, "absent.ckpt"),
        ("other.pth", "a.onnx", False, "other.pth"),
        ("ours.safetensors", "a.zip", False, "end the name with one of .safetensors"),
        ("ours.safetensors", "a.safetensors", True, "no softmax"),
        ("two.safetensors", "a.pt2", False, "its data zoo has 2"),
        ("run/checkpoints/best.ckpt", "a.pt2", False, "batches.meta is missing"),
    ):
        with pytest.raises(InputError, match=message):
            exported(tmp_path / given, tmp_path / output, softmax)
        assert sorted(tmp_path.rglob("*")) == before, given


def test_weights_that_say_nothing_are_exported_as_usual_and_said_to_be(tmp_path, capsys):
    save_network(trained(num_classes=10), THIN, tmp_path / "ours.safetensors")
    made = exported(tmp_path / "ours.safetensors", tmp_path / "a.safetensors")
    assert "does not say what it was trained on; mean and std as for 32 x 32 pixels of CIFAR-100" in (
        capsys.readouterr().out.replace("\n", " ")
    )
    assert list(read_metadata(made)) == ["net"]
