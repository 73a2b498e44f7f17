import os
import pickle
import pickletools
import random
import struct

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from shared.errors import InputError
from shared.io.animals import load_animals
from shared.io.labelled import ImageFolder, LabelledImages, load_digits_rgb, read_cifar, read_pickle

NAMES = {"cifar100": [f"thing {i}" for i in range(5)], "cifar10": ["plane", "car", "ship"]}


def python2_pickle(content: dict) -> bytes:
    """Protocol 2 as Python 2 and NumPy 1 wrote the real files: all text is bytes, arrays are `numpy.core`'s."""

    def opcodes(value) -> bytes:
        if isinstance(value, dict):
            items = b"".join(opcodes(key) + opcodes(item) for key, item in value.items())
            return b"}(" + items + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, str):
            return b"T" + struct.pack("<i", len(value)) + value.encode("latin1")
        shape = b"(" + b"".join(map(opcodes, value.shape)) + b"t"
        dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        data = value.tobytes()
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        return array + b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"

    return b"\x80\x02" + opcodes(content) + b"."


def python3_pickle(content: dict) -> bytes:
    """Protocol 2 as Python 3 and this NumPy write it, text keys as bytes."""
    return pickle.dumps({key.encode(): value for key, value in content.items()}, protocol=2)


def cifar_tree(root, name, dump=python2_pickle) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Write the layout on disk -> data (n, 3072) and labels by file."""
    generator = np.random.default_rng(0)
    names = NAMES[name]
    written = {}
    if name == "cifar100":
        folder, files = root / "cifar-100-python", ("train", "test")
        label_key, meta = "fine_labels", ("meta", {"fine_label_names": names, "coarse_label_names": ["all"]})
    else:
        folder, files = root / "cifar-10-batches-py", (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
        label_key, meta = "labels", ("batches.meta", {"num_cases_per_batch": 4, "label_names": names, "num_vis": 3072})
    folder.mkdir(parents=True)
    for file in files:
        data = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels = generator.integers(0, len(names), 4).tolist()
        content = {"filenames": [f"{i}.png" for i in range(4)], "batch_label": "a batch", label_key: labels}
        content |= {"coarse_labels": [0] * 4, "data": data}
        (folder / file).write_bytes(dump(content))
        written[file] = data, labels
    (folder / meta[0]).write_bytes(dump(meta[1]))
    return written


def numbered(labels) -> LabelledImages:
    """A set whose pictures and boxes carry their own number."""
    labels = np.array(labels)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    return LabelledImages(images, labels, ("a", "b", "c"), np.arange(len(labels))[:, None].repeat(4, axis=1))


def test_subsets_keep_pictures_labels_and_boxes_together():
    whole = numbered([0, 1, 2, 1, 0])
    part = whole.subset([3, 0])
    assert (len(whole), len(part)) == (5, 2)
    assert part.images[:, 0, 0, 0].tolist() == [3, 0]
    assert part.labels.tolist() == [1, 0]
    assert part.boxes.tolist() == [[3] * 4, [0] * 4]
    assert whole.subset(whole.labels == 1).images[:, 0, 0, 0].tolist() == [1, 3]
    assert LabelledImages(whole.images, whole.labels, whole.class_names).subset([1]).boxes is None


def test_arrays_that_are_no_labelled_images_are_refused():
    images, labels = np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64)
    for wrong in (
        (images[..., :1], labels, ("a",)),
        (images.astype(float), labels, ("a",)),
        (images, labels[:1], ("a",)),
        (images, labels + 1, ("a",)),
        (images, labels - 1, ("a",)),
        (images, labels.astype(float), ("a",)),
        (images, labels, ("a",), np.zeros((2, 3), np.int64)),
        (images, labels, ("a",), np.zeros((1, 4), np.int64)),
        (images, labels, ("a",), np.zeros((2, 4))),
    ):
        with pytest.raises(ValueError):
            LabelledImages(*wrong)


@pytest.mark.parametrize("dump", [python2_pickle, python3_pickle])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inside", [True, False])
def test_cifar_is_read_from_its_layout(tmp_path, name, dump, inside):
    written = cifar_tree(tmp_path, name, dump)
    root = next(tmp_path.iterdir()) if inside else tmp_path
    for train in (True, False):
        read = read_cifar(root, train, name)
        files = [content for file, content in written.items() if file.startswith("test") != train]
        assert len(files) == (5 if train and name == "cifar10" else 1)
        assert read.labels.tolist() == [label for _, labels in files for label in labels]
        assert read.class_names == tuple(NAMES[name])
        planes = np.concatenate([data for data, _ in files]).reshape(-1, 3, 32, 32)
        assert read.images.shape == (len(planes), 32, 32, 3)
        assert (read.images[..., 2] == planes[:, 2]).all()
        assert (read.images[:, 5, 9, 0] == planes[:, 0, 5, 9]).all()
        assert read.images.flags.c_contiguous
        assert read.images.flags.writeable


def test_the_forged_python_2_files_hold_what_the_real_ones_do():
    content = python2_pickle({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [3]})
    names = [argument for opcode, argument, _ in pickletools.genops(content) if opcode.name == "GLOBAL"]
    assert names == ["numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"]
    assert not any(opcode.name.endswith("UNICODE") for opcode, _, _ in pickletools.genops(content))


@pytest.mark.parametrize("missing", ["train", "meta"])
def test_a_missing_file_of_cifar_is_named_with_its_source(tmp_path, missing):
    cifar_tree(tmp_path, "cifar100")
    (tmp_path / "cifar-100-python" / missing).unlink()
    with pytest.raises(InputError, match=rf"cifar-100-python/{missing} is missing.*www\.cs\.toronto\.edu"):
        read_cifar(tmp_path, True)


def test_a_missing_folder_or_an_unknown_cifar_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere/batches.meta is missing.*cifar-10-batches-py"):
        read_cifar(tmp_path / "nowhere", True, "cifar10")
    with pytest.raises(InputError, match="cifar1000"):
        read_cifar(tmp_path, True, "cifar1000")


@pytest.mark.parametrize("dump", [python2_pickle, python3_pickle])
def test_a_file_cut_at_any_place_is_refused(tmp_path, dump):
    cifar_tree(tmp_path, "cifar100", dump)
    path = tmp_path / "cifar-100-python" / "train"
    whole = path.read_bytes()
    for length in (0, 1, 2, 30, 150, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="train is cut short"):
            read_cifar(tmp_path, True)


def test_damaged_bytes_never_escape_as_another_error(tmp_path):
    whole = bytearray(python2_pickle({"data": np.zeros((1, 4), np.uint8), "fine_labels": [3, 1], "names": ["a", "b"]}))
    path, generator, messages = tmp_path / "file", random.Random(0), []
    for _ in range(1000):
        data = whole.copy()
        data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            read_pickle(path)
        except InputError as error:
            messages.append(str(error))
    assert 100 < len(messages) < 1000
    assert not any("\n" in message for message in messages)


class Malicious:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("call", ["system", "eval", "getattr"])
def test_a_file_with_code_is_refused_and_nothing_runs(tmp_path, protocol, call):
    cifar_tree(tmp_path, "cifar100")
    trace = tmp_path / "trace"
    code = {
        "system": Malicious(os.system, f"touch {trace}"),
        "eval": Malicious(eval, f"open({str(trace)!r}, 'w')"),
        "getattr": Malicious(getattr, np.ndarray, "tofile"),
    }[call]
    path = tmp_path / "cifar-100-python" / "train"
    path.write_bytes(pickle.dumps({"data": code}, protocol))
    with pytest.raises(InputError, match=r"train holds code \('(posix|nt|builtins|__builtin__)\."):
        read_cifar(tmp_path, True)
    assert not trace.exists()
    if call == "system":
        # the test itself can tell: the same bytes do run elsewhere
        pickle.loads(path.read_bytes())
        assert trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"ccopyreg\n_reconstructor\n.",
        b"c_codecs\ndecode\n.",
        b"cnumpy\ndtype.type\n.",
        b"c__builtin__\nbytes\n(J\xff\xff\xff\x7ftR.",
    ],
)
def test_other_names_of_the_admitted_modules_are_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match="holds code"):
        read_pickle(tmp_path / "file")


def test_arrays_of_objects_other_encodings_and_outside_references_are_refused(tmp_path):
    contents = [
        pickle.dumps(np.array([{}, []], dtype=object), 2),
        pickle.dumps(np.array([(1, 2)], dtype=[("a", "i4"), ("b", "i4")]), 2),
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",
        b"\x80\x02U\x01aQ.",
    ]
    for content in contents:
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(InputError):
            read_pickle(tmp_path / "file")


def test_arrays_of_any_whole_numbers_and_orders_are_read(tmp_path):
    arrays = {
        "little": np.arange(6, dtype="<i8").reshape(2, 3),
        "big": np.arange(6, dtype=">u2"),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
    }
    for protocol in (0, 2, 4):
        (tmp_path / "file").write_bytes(pickle.dumps(arrays, protocol))
        read = read_pickle(tmp_path / "file")
        assert all(np.array_equal(read[name], array) for name, array in arrays.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros((4, 3071), np.uint8)}, r"\(n, 3072\) uint8"),
        ({"data": np.zeros((4, 3072), np.int64)}, r"\(n, 3072\) uint8"),
        ({"data": [1, 2, 3, 4]}, r"\(n, 3072\) uint8"),
        ({"fine_labels": [0, 1, 2, 5]}, r"outside 0 .. 4"),
        ({"fine_labels": [0, 1, 2, -1]}, r"outside 0 .. 4"),
        ({"fine_labels": [0, 1, 2]}, "one whole number"),
        ({"fine_labels": [0, 1, 2, 0.5]}, "one whole number"),
        ({"fine_labels": "0123"}, "one whole number"),
        ({"data": np.zeros((0, 3072), np.uint8), "fine_labels": []}, "no pictures"),
    ],
)
def test_wrong_content_of_cifar_is_named(tmp_path, change, message):
    cifar_tree(tmp_path, "cifar100")
    content = {"data": np.zeros((4, 3072), np.uint8), "fine_labels": [0, 1, 2, 3]} | change
    (tmp_path / "cifar-100-python" / "test").write_bytes(pickle.dumps(content, 4))
    with pytest.raises(InputError, match=rf"test .*{message}"):
        read_cifar(tmp_path, False)


def test_labels_saved_again_as_an_array_are_read(tmp_path):
    cifar_tree(tmp_path, "cifar100")
    content = {"data": np.zeros((2, 3072), np.uint8), "fine_labels": np.array([4, 0], np.int32)}
    (tmp_path / "cifar-100-python" / "test").write_bytes(pickle.dumps(content, 2))
    assert read_cifar(tmp_path, False).labels.tolist() == [4, 0]


@pytest.mark.parametrize("content", [["no", "dictionary"], {"other": 1}, {"fine_label_names": [1, 2]}])
def test_wrong_names_of_cifar_are_refused(tmp_path, content):
    cifar_tree(tmp_path, "cifar100")
    (tmp_path / "cifar-100-python" / "meta").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(InputError, match=r"meta holds .*unpack cifar-100-python\.tar\.gz again"):
        read_cifar(tmp_path, True)


def test_digits_are_split_once_and_learnable():
    train, test = load_digits_rgb(True), load_digits_rgb(False)
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape[1:] == (32, 32, 3)
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert (train.images[..., 0] == train.images[..., 2]).all()
    assert (train.images[:, ::4, ::4] == train.images[:, 3::4, 3::4]).all()
    assert np.array_equal(load_digits_rgb(False).images, test.images)
    small = [d.images[:, ::4, ::4, 0].reshape(len(d), -1) / 255 for d in (train, test)]
    assert 0.92 < LogisticRegression(max_iter=200).fit(small[0], train.labels).score(small[1], test.labels) < 1


def test_animals_are_balanced_and_none_of_the_test_side_is_in_training():
    train, test = load_animals(True), load_animals(False)
    assert np.bincount(train.labels).tolist() == [800] * 10
    assert np.bincount(test.labels).tolist() == [200] * 10
    assert train.images.shape == (8000, 32, 32, 3)
    assert not train.images[:, :2].any()
    assert not train.images[:, :, -2:].any()
    sides = [{picture.tobytes() for picture in d.images[..., 0]} for d in (train, test)]
    assert len(sides[1]) == 2000
    assert not sides[0] & sides[1]
    assert np.array_equal(load_animals(False).labels, test.labels)
    assert (np.diff(train.labels) != 0).mean() > 0.8


def test_animals_bear_the_right_names():
    train, test = load_animals(True), load_animals(False)
    area = {name: (train.images[train.labels == c] > 127).mean() for c, name in enumerate(train.class_names)}
    assert area["elephant"] > 1.5 * area["giraffe"]
    between = (train.images > 40) & (train.images < 215)
    stripes = [between[train.labels == c].mean() for c in range(10)]
    assert train.class_names[int(np.argmax(stripes))] == "zebra"
    means = np.stack([train.images[train.labels == c, ..., 0].mean(0).ravel() for c in range(10)])
    x = test.images[..., 0].reshape(len(test), -1).astype(np.float64)
    nearest = ((means**2).sum(1) - 2 * x @ means.T).argmin(1)
    assert 0.3 < (nearest == test.labels).mean() < 0.8


def picture(path, value: int, size=(5, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)


def test_a_folder_of_classes_is_read_in_the_order_of_the_names(tmp_path):
    picture(tmp_path / "train/n02/n02_2.JPEG", 40)
    picture(tmp_path / "train/n02/n02_1.JPEG", 30)
    picture(tmp_path / "train/n01/b.png", 20, (3, 7))
    picture(tmp_path / "train/n01/a.jpg", 10, mode="L")
    picture(tmp_path / "train/n10/x.jpeg", 50, mode="CMYK")
    picture(tmp_path / "train/.hidden/x.png", 0)
    (tmp_path / "train/n01/readme.txt").write_text("not a picture")
    (tmp_path / "train/list.txt").write_text("not a class")
    folder = ImageFolder(tmp_path, "train")
    assert folder.class_names == ("n01", "n02", "n10")
    assert [os.path.basename(path) for path in folder.paths] == ["a.jpg", "b.png", "n02_1.JPEG", "n02_2.JPEG", "x.jpeg"]
    assert folder.labels.tolist() == [0, 0, 1, 1, 2]
    assert folder.labels.dtype == np.int64
    assert len(folder) == 5
    read = [folder.read(i) for i in range(5)]
    assert [image.shape for image in read] == [(4, 5, 3), (7, 3, 3), (4, 5, 3), (4, 5, 3), (4, 5, 3)]
    assert [int(image[0, 0, 1]) for image in read[:4]] == [10, 20, 30, 40]


def test_tiny_imagenet_is_read_from_its_layout(tmp_path):
    for i, name in enumerate(("n02", "n01", "n02")):
        picture(tmp_path / f"train/{name}/images/{name}_{i}.JPEG", 10 * i)
        (tmp_path / f"train/{name}/{name}_boxes.txt").write_text(f"{name}_{i}.JPEG\t0\t0\t3\t3\n")
        picture(tmp_path / f"val/images/val_{i}.JPEG", 10 * i)
    lines = [f"val_{i}.JPEG\t{name}\t0\t0\t3\t3\n" for i, name in enumerate(("n02", "n01", "n02"))]
    (tmp_path / "val/val_annotations.txt").write_text("".join(lines))
    for split, names in (
        ("train", ["n01_1.JPEG", "n02_0.JPEG", "n02_2.JPEG"]),
        ("val", ["val_1.JPEG", "val_0.JPEG", "val_2.JPEG"]),
    ):
        folder = ImageFolder(tmp_path, split)
        assert folder.class_names == ("n01", "n02")
        assert [os.path.basename(path) for path in folder.paths] == names
        assert folder.labels.tolist() == [0, 1, 1]
        assert int(folder.read(2)[0, 0, 0]) == 20
    for text in ("val_9.JPEG\tn01\t0\t0\t3\t3\n", "val_0.JPEG\n"):
        (tmp_path / "val/val_annotations.txt").write_text(text)
        with pytest.raises(InputError, match=r"val_annotations.txt lists 'val_[09].JPEG'"):
            ImageFolder(tmp_path, "val")
    (tmp_path / "val/val_annotations.txt").write_text("")
    with pytest.raises(InputError, match="lists no pictures"):
        ImageFolder(tmp_path, "val")


def test_folders_that_hold_no_classes_or_an_empty_class_are_named(tmp_path):
    with pytest.raises(InputError, match="val is missing"):
        ImageFolder(tmp_path, "val")
    picture(tmp_path / "val/ILSVRC2012_val_00000001.JPEG", 0)
    with pytest.raises(InputError, match="val holds no class folders"):
        ImageFolder(tmp_path, "val")
    picture(tmp_path / "val/n01/a.JPEG", 0)
    (tmp_path / "val/n02").mkdir()
    with pytest.raises(InputError, match="n02 holds no pictures"):
        ImageFolder(tmp_path, "val")


def test_a_corrupt_picture_is_named_when_it_is_read(tmp_path):
    picture(tmp_path / "train/n01/a.JPEG", 9, (64, 64))
    whole = (tmp_path / "train/n01/a.JPEG").read_bytes()
    (tmp_path / "train/n01/b.JPEG").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/n01/c.JPEG").write_bytes(b"")
    folder = ImageFolder(tmp_path, "train")
    assert folder.read(0).shape == (64, 64, 3)
    for index, name in ((1, "b"), (2, "c")):
        with pytest.raises(InputError, match=rf"n01/{name}\.JPEG"):
            folder.read(index)
