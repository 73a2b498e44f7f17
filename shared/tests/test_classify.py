"""Prediction on the user's files: every kind of picture, every kind of weights, every mistake."""

import csv
import json
import os
import re
from functools import partial
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from shared import classify as module
from shared.classify import CIFAR100, IMAGENET, Facts, classify, fit, read_facts
from shared.errors import InputError
from shared.io.classifiers import save_network
from shared.io.image_classes import FolderBatches
from shared.io.images import read_rgb
from shared.io.labelled import ImageFolder
from shared.testing.classifiers import TOYS, trained

THIN = {"name": "thin", "num_classes": 4}
NAMES = ["cat", "dog, big", "hörse", "emu"]
FACTS = Facts((0.3, 0.4, 0.5), (0.2, 0.25, 0.3), 32, class_names=NAMES, data="zoo")
OPTIONS = {
    "project": "toy", "input": None, "output": None, "ckpt_path": None, "weights": "zoo", "name": None, "part": None,
    "member": None, "batch_size": 64, "top": 3, "mean": None, "std": None, "image_size": None, "resize": None,
    "class_names": None, "device": "cpu", "threads": 1,
}  # fmt: skip


@pytest.fixture
def net():
    return trained()


@pytest.fixture
def weights(net, tmp_path):
    path = tmp_path / "weights" / "zoo.safetensors"
    save_network(net, THIN, path, **FACTS.as_metadata())
    return path


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def usual(net):
    return IMAGENET if net.fc.in_features == 8 else CIFAR100


def predict(folder=Path("nowhere"), **options):
    options = {key: os.fspath(value) if isinstance(value, Path) else value for key, value in options.items()}
    return module.predict(OmegaConf.create(OPTIONS | options), TOYS.load, usual, folder)


def table(weights, source, target, **options):
    predict(input=source, output=target, ckpt_path=weights, **options)
    with open(target, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def expected(net, picture, facts=FACTS):
    images = torch.tensor(picture).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (facts.mean, facts.std))
    with torch.no_grad():
        return net((images - mean) / std).softmax(1)[0]


def test_row_says_the_classes_and_probabilities_of_the_network(net, weights, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "in.png")
    header, row = table(weights, tmp_path / "in.png", tmp_path / "made" / "out.csv")
    assert header == ["file", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    values, order = expected(net, picture).sort(descending=True)
    assert row[0] == "in.png"
    assert row[1::2] == [NAMES[k] for k in order[:3]]
    assert [float(p) for p in row[2::2]] == pytest.approx(values[:3].tolist(), abs=2e-6)
    assert len(table(weights, tmp_path / "in.png", tmp_path / "all.csv", top=9)[0]) == 1 + 2 * 4


KINDS = [
    "rgb.png",
    "gray.png",
    "rgba.png",
    "la.png",
    "palette.png",
    "photo.jpg",
    "deep.png",
    "turned.jpg",
    "a b=c.webp",
]


def test_folder_of_every_kind_of_picture_and_size_becomes_a_row_each(net, weights, tmp_path):
    folder, rng = tmp_path / "in", np.random.default_rng(1)
    folder.mkdir()
    for i, kind in enumerate(KINDS):
        pixels = rng.integers(0, 256, (30 + 9 * i, 70 - 5 * i, 3), dtype=np.uint8)
        if kind == "deep.png":
            (folder / kind).write_bytes(imagecodecs.png_encode(pixels.astype(np.uint16) * 257))
            continue
        mode = {"gray.png": "L", "la.png": "LA", "rgba.png": "RGBA", "palette.png": "P"}.get(kind, "RGB")
        exif = Image.Exif()
        exif[0x0112] = 6 if kind == "turned.jpg" else 1
        Image.fromarray(pixels).convert(mode).save(folder / kind, exif=exif)
    (folder / "notes.txt").write_text("not a picture")
    rows = table(weights, folder, tmp_path / "out.csv", batch_size=4, top=1)[1:]
    assert [row[0] for row in rows] == sorted(KINDS)
    for name, kind, probability in rows:
        found = expected(net, fit(read_rgb(folder / name), FACTS))
        assert (kind, float(probability)) == (NAMES[found.argmax()], pytest.approx(found.max().item(), abs=2e-6))


def test_names_are_in_natural_order_and_kept_to_the_byte(weights, picture, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    odd = os.fsdecode(b"z\xff.png")
    for name in ("10.png", "2.png", 'x,\n"y".png', odd):
        Image.fromarray(picture).save(folder / name)
    rows = table(weights, folder, tmp_path / "out.csv")
    assert [row[0] for row in rows[1:]] == ["2.png", "10.png", 'x,\n"y".png', odd]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_do_not_change_the_table(weights, tmp_path, batch_size):
    (tmp_path / "in").mkdir()
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    rows = [table(weights, tmp_path / "in", tmp_path / "out.csv", batch_size=n)[1:] for n in (7, batch_size)]
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
    values = [np.array([row[2::2] for row in part], float) for part in rows]
    assert np.abs(values[0] - values[1]).max() < 3e-6


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 64), (31, 200), (7, 5)])
@pytest.mark.parametrize("resize", [None, 40])
def test_pictures_are_fitted_as_in_the_test_of_a_training(tmp_path, height, width, resize):
    facts = Facts((0, 0, 0), (1, 1, 1), 32, resize)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    made = fit(pixels, facts)
    if (height, width) == (32, 32):
        assert made is pixels
    else:
        (tmp_path / "val" / "class").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "val" / "class" / "a.png")
        tested = FolderBatches(ImageFolder(tmp_path, "val"), 32, None, 1, resize or 32)[0]["images"]
        assert np.array_equal(made, tested[0].permute(1, 2, 0).numpy())


def test_middle_is_what_is_seen():
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = 255
    assert (fit(pixels, FACTS)[:, 2:-2] == 255).all()


def test_classify_takes_arrays_of_any_size(net):
    pictures = [np.full((h, w, 3), 7 * h, np.uint8) for h, w in ((5, 9), (32, 32), (28, 14))]
    made = classify(net, pictures, FACTS)
    assert made.shape == (3, 4)
    assert torch.allclose(made[1], expected(net, pictures[1]), atol=1e-6)
    with torch.no_grad():
        net.fc.bias[0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        classify(net, pictures, FACTS)


def test_facts_of_the_file_of_the_run_and_of_the_options(net, weights, picture, tmp_path):
    """The same weights as .safetensors, as a run's .ckpt and as a bare file, told by options what they do not say."""
    Image.fromarray(picture).save(tmp_path / "in.png")
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    state = {f"net.{key}": value for key, value in net.state_dict().items()} | {"distiller.x": torch.zeros(1)}
    ckpt, bare, names = run_dir / "checkpoints" / "best.ckpt", tmp_path / "bare.safetensors", tmp_path / "names.txt"
    torch.save({"state_dict": state, "hyper_parameters": {"net": THIN}}, ckpt)
    save_network(net, THIN, bare)
    data = {"name": "zoo", "mean": list(FACTS.mean), "std": list(FACTS.std)}
    (run_dir / "config.yaml").write_text(json.dumps({"project": "toy", "data": data}))
    names.write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    spelt = {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.25, 0.3], "image_size": 32}
    whole = table(weights, tmp_path / "in.png", tmp_path / "a.csv")
    assert table(ckpt, tmp_path / "in.png", tmp_path / "b.csv", class_names=names) == whole
    assert table(bare, tmp_path / "in.png", tmp_path / "c.csv", class_names=names, **spelt) == whole
    numbers = table(ckpt, tmp_path / "in.png", tmp_path / "d.csv")
    assert [NAMES[int(k)] for k in numbers[1][1::2]] == whole[1][1::2]
    assert read_facts(ckpt, net, "toy", usual) == Facts(data["mean"], data["std"], 32, data="zoo")
    assert read_facts(ckpt, net, "another", usual) is None
    assert read_facts(bare, net, "toy", usual) is None


def test_what_is_not_said_is_of_the_networks_kind_and_said_to_be(picture, tmp_path, capsys):
    Image.fromarray(picture).save(tmp_path / "in.png")
    for name, facts, kind in (("thin", CIFAR100, "CIFAR-100"), ("wide", IMAGENET, "ImageNet")):
        torch.save(trained(name=name).state_dict(), tmp_path / "bare.pth")
        assumed = table(tmp_path / "bare.pth", tmp_path / "in.png", tmp_path / "a.csv")
        said = f"does not say what it was trained on; mean, std, image_size: as for {kind}"
        assert said in " ".join(capsys.readouterr().out.split())
        spelt = {"mean": list(facts.mean), "std": list(facts.std), "image_size": facts.image_size}
        assert table(tmp_path / "bare.pth", tmp_path / "in.png", tmp_path / "b.csv", **spelt, resize=facts.resize)
        assert "does not say" not in capsys.readouterr().out
        assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
        assert len(assumed) == 2


def test_bad_input_is_refused_before_anything_is_written(weights, picture, tmp_path):
    good, folder = tmp_path / "good.png", tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(picture).save(good)
    for name in ("1.png", "3.png"):
        Image.fromarray(picture).save(folder / name)
    (folder / "2.png").write_bytes(good.read_bytes()[:500])
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    (tmp_path / "names.bin").write_bytes(b"\xff\xfe")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    save_network(trained(), THIN, tmp_path / "damaged.safetensors", mean="[0.1, 0.2")
    save_network(trained(), THIN, tmp_path / "wrong.safetensors", class_names='["one"]', mean="[0.1, 0.2, 0.3]")
    broken = trained()
    torch.nn.init.constant_(broken.fc.bias, torch.nan)
    save_network(broken, THIN, tmp_path / "nan.safetensors", **FACTS.as_metadata())
    out, no_names = tmp_path / "out.csv", tmp_path / "absent.txt"
    given = {"input": good, "output": out, "ckpt_path": weights}
    cases = [
        ({"output": None, "input": None}, "say what to classify"),
        ({"output": None}, "say what to classify"),
        ({"input": "absent.png"}, "absent.png does not exist"),
        ({"input": tmp_path / "empty"}, "empty holds no pictures"),
        ({"input": folder}, "2.png is damaged"),
        ({"input": tmp_path / "file"}, "file is empty"),
        ({"output": tmp_path / "out.txt"}, "end the name with .csv"),
        ({"output": tmp_path}, "end the name with .csv"),
        ({"output": tmp_path / "folder.csv"}, "it is a folder"),
        ({"output": tmp_path / "file" / "out.csv"}, "takes no files"),
        ({"ckpt_path": None, "weights": "cats"}, "no shipped weights 'cats'; choose one of zoo, or give a file"),
        ({"ckpt_path": "absent.ckpt"}, "absent.ckpt"),
        ({"ckpt_path": tmp_path / "other.pth"}, "other.pth"),
        ({"ckpt_path": tmp_path / "damaged.safetensors"}, "of its data is damaged"),
        ({"ckpt_path": tmp_path / "wrong.safetensors"}, "names 1 classes"),
        ({"ckpt_path": tmp_path / "nan.safetensors"}, "the network gives NaN"),
        ({"image_size": 2}, "image_size=2 is too small for a Toy"),
        ({"part": "head"}, "part is one of"),
        ({"member": "deep"}, "is no tar archive"),
        ({"class_names": tmp_path / "few.txt"}, "few.txt names 2 classes"),
        ({"class_names": tmp_path / "names.bin"}, "names.bin; give a text file"),
        ({"class_names": no_names}, "absent.txt; give a text file"),
        ({"mean": [0.5]}, "mean and std are three numbers"),
        ({"std": [1, 0, 1]}, "mean and std are three numbers"),
        ({"image_size": 0}, "image_size is at least 1"),
        ({"resize": 8}, "resize=8 is below image_size=32"),
        ({"top": 0}, "top is at least 1"),
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"device": "gpu9"}, "no device"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for options, message in cases:
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            predict(weights.parent, **given | options)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before, options


def test_table_that_stood_there_stays_when_a_picture_is_damaged(weights, tmp_path):
    (tmp_path / "out.csv").write_text("precious")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError):
        table(weights, tmp_path / "cut.png", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "precious"


def test_shipped_weights_are_found_by_their_name(weights, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "in.png")
    shipped = partial(predict, weights.parent, input=tmp_path / "in.png")
    shipped(output=tmp_path / "a.csv")
    shipped(output=tmp_path / "b.csv", ckpt_path=weights)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
