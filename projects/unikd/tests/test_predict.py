"""Prediction on the user's files: every kind of picture, every kind of weights, every mistake."""

import csv
import json
import os
import re

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image

from projects.unikd import predict
from projects.unikd.checkpoints import save_network
from projects.unikd.data import FolderBatches
from projects.unikd.networks import build_network
from projects.unikd.predict import Facts, classify, fit, read_facts
from shared.errors import InputError
from shared.experiment import build
from shared.io.checkpoints import read_metadata
from shared.io.images import read_rgb
from shared.io.labelled import ImageFolder

TINY = {"name": "resnet8", "num_classes": 4, "filters": [4, 4, 8, 8]}
NAMES = ["cat", "dog, big", "hörse", "emu"]
FACTS = Facts((0.3, 0.4, 0.5), (0.2, 0.25, 0.3), 32, class_names=NAMES, data="zoo")


def network(seed=0, **arguments):
    """Untrained, but sure enough of itself that pictures differ."""
    torch.manual_seed(seed)
    net = build_network({**TINY, **arguments})
    with torch.no_grad():
        net.fc.weight *= 30
    return net.eval()


@pytest.fixture
def net():
    return network()


@pytest.fixture
def weights(net, tmp_path):
    path = tmp_path / "weights" / "zoo.safetensors"
    save_network(net, TINY, path, **FACTS.as_metadata())
    return path


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def run(composed, weights, source, target, *overrides):
    options = (f"input='{source}'", f"output='{target}'", f"ckpt_path='{weights}'", "threads=1")
    predict.run(composed("predict", *options, *overrides))
    with open(target, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def expected(net, picture, facts=FACTS):
    images = torch.tensor(picture).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (facts.mean, facts.std))
    with torch.no_grad():
        return net((images - mean) / std).softmax(1)[0]


def test_row_says_the_classes_and_probabilities_of_the_network(composed, net, weights, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "in.png")
    header, row = run(composed, weights, tmp_path / "in.png", tmp_path / "made" / "out.csv")
    assert header == ["file", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    values, order = expected(net, picture).sort(descending=True)
    assert row[0] == "in.png"
    assert row[1::2] == [NAMES[k] for k in order[:3]]
    assert [float(p) for p in row[2::2]] == pytest.approx(values[:3].tolist(), abs=2e-6)
    assert len(run(composed, weights, tmp_path / "in.png", tmp_path / "all.csv", "top=9")[0]) == 1 + 2 * 4


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


def test_folder_of_every_kind_of_picture_and_size_becomes_a_row_each(composed, net, weights, tmp_path):
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
    rows = run(composed, weights, folder, tmp_path / "out.csv", "batch_size=4", "top=1")[1:]
    assert [row[0] for row in rows] == sorted(KINDS)
    for name, kind, probability in rows:
        found = expected(net, fit(read_rgb(folder / name), FACTS))
        assert (kind, float(probability)) == (NAMES[found.argmax()], pytest.approx(found.max().item(), abs=2e-6))


def test_names_are_in_natural_order_and_kept_to_the_byte(composed, weights, picture, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    odd = os.fsdecode(b"z\xff.png")
    for name in ("10.png", "2.png", 'x,\n"y".png', odd):
        Image.fromarray(picture).save(folder / name)
    rows = run(composed, weights, folder, tmp_path / "out.csv")
    assert [row[0] for row in rows[1:]] == ["2.png", "10.png", 'x,\n"y".png', odd]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_do_not_change_the_table(composed, weights, tmp_path, batch_size):
    (tmp_path / "in").mkdir()
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    rows = [
        run(composed, weights, tmp_path / "in", tmp_path / "out.csv", f"batch_size={n}")[1:] for n in (7, batch_size)
    ]
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
        Image.fromarray(pixels).save(tmp_path / "a.png")
        (tmp_path / "val" / "class").mkdir(parents=True)
        (tmp_path / "a.png").rename(tmp_path / "val" / "class" / "a.png")
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


def test_facts_of_the_file_of_the_run_and_of_the_command_line(composed, net, weights, picture, tmp_path):
    """The same weights as .safetensors, as a run's .ckpt and as a bare file, told by options what they do not say."""
    Image.fromarray(picture).save(tmp_path / "in.png")
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    state = {f"net.{key}": value for key, value in net.state_dict().items()} | {"distiller.x": torch.zeros(1)}
    ckpt, bare, names = run_dir / "checkpoints" / "best.ckpt", tmp_path / "bare.safetensors", tmp_path / "names.txt"
    torch.save({"state_dict": state, "hyper_parameters": {"net": TINY}}, ckpt)
    save_network(net, TINY, bare)
    data = {"name": "zoo", "mean": list(FACTS.mean), "std": list(FACTS.std)}
    (run_dir / "config.yaml").write_text(json.dumps({"project": "unikd", "data": data}))
    names.write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    given = [f"class_names={names}"]
    spelt = [*given, "mean=[0.3,0.4,0.5]", "std=[0.2,0.25,0.3]", "image_size=32"]
    whole = run(composed, weights, tmp_path / "in.png", tmp_path / "a.csv")
    assert run(composed, ckpt, tmp_path / "in.png", tmp_path / "b.csv", *given) == whole
    assert run(composed, bare, tmp_path / "in.png", tmp_path / "c.csv", *spelt) == whole
    numbers = run(composed, ckpt, tmp_path / "in.png", tmp_path / "d.csv")
    assert [NAMES[int(k)] for k in numbers[1][1::2]] == whole[1][1::2]
    assert read_facts(ckpt, net) == Facts(data["mean"], data["std"], 32, data="zoo")


def test_what_is_not_said_is_cifars_and_said_to_be(command_line, net, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "in.png")
    torch.save(build_network({"name": "resnet8", "num_classes": 4}).state_dict(), tmp_path / "published.pth")
    options = (f"input={tmp_path}/in.png", f"ckpt_path={tmp_path}/published.pth", "threads=1")
    code, out, error = command_line("predict", *options, f"output={tmp_path}/a.csv")
    assert code == 0, error
    assert "does not say what it was trained on; mean, std, image_size: as for CIFAR-100" in " ".join(out.split())
    spelt = ("mean=[0.5071,0.4867,0.4408]", "std=[0.2675,0.2565,0.2761]", "image_size=32")
    code, out, error = command_line("predict", *options, *spelt, f"output={tmp_path}/b.csv")
    assert (code, "does not say" in out) == (0, False), error
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert predict.usual_facts(build_network({"name": "imagenet_resnet18", "num_classes": 2, "width": 4})).resize == 256


def test_bad_input_is_refused_before_anything_is_written(composed, weights, picture, tmp_path):
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
    save_network(network(), TINY, tmp_path / "damaged.safetensors", mean="[0.1, 0.2")
    save_network(network(), TINY, tmp_path / "wrong.safetensors", class_names='["one"]', mean="[0.1, 0.2, 0.3]")
    vgg = build_network({"name": "vgg8", "num_classes": 2, "widths": [2] * 5})
    save_network(vgg, {"name": "vgg8", "num_classes": 2, "widths": [2] * 5}, tmp_path / "vgg.safetensors")
    out, ckpt = f"output={tmp_path}/out.csv", f"ckpt_path={weights}"
    cases = [
        ([], "say what to classify"),
        ([f"input={good}"], "say what to classify"),
        (["input=absent.png", out, ckpt], "absent.png does not exist"),
        ([f"input={tmp_path}/empty", out, ckpt], "empty holds no pictures"),
        ([f"input={folder}", out, ckpt], "2.png is damaged"),
        ([f"input={tmp_path}/file", out, ckpt], "file is empty"),
        ([f"input={good}", f"output={tmp_path}/out.txt", ckpt], "end the name with .csv"),
        ([f"input={good}", f"output={tmp_path}", ckpt], "end the name with .csv"),
        ([f"input={good}", f"output={tmp_path}/folder.csv", ckpt], "it is a folder"),
        ([f"input={good}", f"output={tmp_path}/file/out.csv", ckpt], "takes no files"),
        ([f"input={good}", out, "weights=student_cats"], "no shipped weights 'student_cats'; choose one of"),
        ([f"input={good}", out, "ckpt_path=absent.ckpt"], "absent.ckpt"),
        ([f"input={good}", out, f"ckpt_path={tmp_path}/other.pth"], "other.pth"),
        ([f"input={good}", out, f"ckpt_path={tmp_path}/damaged.safetensors"], "of its data is damaged"),
        ([f"input={good}", out, f"ckpt_path={tmp_path}/wrong.safetensors"], "names 1 classes"),
        ([f"input={good}", out, f"ckpt_path={tmp_path}/vgg.safetensors", "image_size=4"], "image_size=4 is too small"),
        ([f"input={good}", out, ckpt, "part=head"], "part is one of"),
        ([f"input={good}", out, ckpt, "member=resnet20"], "is no tar archive"),
        ([f"input={good}", out, ckpt, f"class_names={tmp_path}/few.txt"], "few.txt names 2 classes"),
        ([f"input={good}", out, ckpt, f"class_names={tmp_path}/names.bin"], "names.bin; give a text file"),
        ([f"input={good}", out, ckpt, "class_names=absent.txt"], "absent.txt; give a text file"),
        ([f"input={good}", out, ckpt, "mean=[0.5]"], "mean and std are three numbers"),
        ([f"input={good}", out, ckpt, "std=[1,0,1]"], "mean and std are three numbers"),
        ([f"input={good}", out, ckpt, "image_size=0"], "image_size is at least 1"),
        ([f"input={good}", out, ckpt, "resize=8"], "resize=8 is below image_size=32"),
        ([f"input={good}", out, ckpt, "top=0"], "top is at least 1"),
        ([f"input={good}", out, ckpt, "batch_size=0"], "batch_size is at least 1"),
        ([f"input={good}", out, ckpt, "device=gpu9"], "no device"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in cases:
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            predict.run(composed("predict", *arguments))
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_bad_input_is_one_line_and_exit_code_2(command_line, weights, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "good.png")
    good = [f"input={tmp_path}/good.png", f"output={tmp_path}/out.csv", f"ckpt_path={weights}"]
    for arguments, message in (([], "say what to classify"), ([*good, "topp=1"], "topp"), ([*good, "top=0"], "top is")):
        code, _, error = command_line("predict", *arguments)
        assert (code, error.count("\n"), error.startswith("error: ")) == (2, 1, True), error
        assert message in error
    assert not (tmp_path / "out.csv").exists()


def test_table_that_stood_there_stays_when_a_picture_is_damaged(command_line, weights, tmp_path):
    (tmp_path / "out.csv").write_text("precious")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    code, _, _ = command_line(
        "predict", f"input={tmp_path}/cut.png", f"output={tmp_path}/out.csv", f"ckpt_path={weights}"
    )
    assert (code, (tmp_path / "out.csv").read_text()) == (2, "precious")


def test_shipped_weights_are_found_by_their_name(composed, weights, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "WEIGHTS", weights.parent)
    Image.fromarray(picture).save(tmp_path / "in.png")
    said = run(composed, weights, tmp_path / "in.png", tmp_path / "a.csv")
    options = (f"input={tmp_path}/in.png", f"output={tmp_path}/b.csv", "threads=1")
    predict.run(composed("predict", *options, "weights=zoo"))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert said[1][1] in NAMES
    with pytest.raises(InputError, match="choose one of zoo, or"):
        predict.run(composed("predict", *options))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(predict.WEIGHTS.glob("student_*.safetensors")), ids=lambda path: path.stem)
def test_shipped_students_score_on_pictures_what_their_files_say(composed, path):
    net, facts = predict.load_classifier(composed("predict", f"weights={path.stem}"))
    data = build(composed("train", f"data={facts.data}").data, "data")
    data.setup("test")
    assert facts.class_names == data.class_names
    test = data._sets["test"]
    guesses = torch.cat([classify(net, chunk, facts).argmax(1) for chunk in np.array_split(test.images, 8)])
    said = json.loads(read_metadata(path)["metrics"])[f"test/{facts.data}/top1"]
    assert 100 * np.mean(guesses.numpy() == test.labels) == pytest.approx(said, abs=0.3)


def test_help_shows_how_to_use_it(command_line):
    code, out, _ = command_line("predict", "--help")
    assert code == 0
    assert "make predict PROJECT=unikd" in out
