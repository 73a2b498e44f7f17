"""The data sets through their configurations: embedded ones, and the layouts people have on disk."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from shared.errors import InputError
from shared.experiment import build


@pytest.fixture
def configured(composed):
    """The data module of configs/data/<name>.yaml, and its number of classes."""

    def make(name, *overrides):
        config = composed("evaluate", f"data={name}", "data.num_workers=0", *[f"data.{o}" for o in overrides])
        return build(config.data, "data"), config.num_classes

    return make


def batches(data, loader):
    return [data.on_after_batch_transfer(plan, 0) for plan in loader]


@pytest.mark.parametrize("name", ["digits", "animals", "shapes"])
def test_embedded_sets_train_and_test_without_a_download(configured, tmp_path, name):
    small = [f"cache_dir={tmp_path}", "num_train=60", "num_test=20", "num_validation=10"] if name == "shapes" else []
    data, num_classes = configured(name, "batch_size=8", *small)
    data.setup()
    assert data.num_classes == num_classes == len(data.class_names)
    assert data.image_size == 32
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch["images"].shape == (8, 3, 32, 32)
    assert batch["label"].max() < num_classes
    everything = data.on_device("train", torch.device("cpu"))[0][:, :, 4:-4, 4:-4] / 255
    # what the configuration normalises by is of the order of the set's own
    assert np.allclose(everything.mean((0, 2, 3)), data.mean, atol=0.1)
    assert np.allclose(everything.std((0, 2, 3)), data.std, atol=0.1)
    assert (data.boxes("test") is not None) == (name == "shapes")


def write_cifar(folder, files, meta, label_key, names):
    """Write files of the Python version's layout, 4 pictures each -> pixels (n, 3072) and labels by file."""
    folder.mkdir(parents=True)
    written, generator = {}, np.random.default_rng(0)
    for file in files:
        data = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels = generator.integers(0, len(names), 4).tolist()
        content = {b"data": data, label_key: labels, b"filenames": [f"{i}.png".encode() for i in range(4)]}
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
        written[file] = data, labels
    (folder / meta).write_bytes(pickle.dumps({b"label_names" if meta[0] == "b" else b"fine_label_names": names}, 2))
    return written


@pytest.mark.parametrize("name", ["cifar100", "cifar10"])
def test_cifar_is_read_from_the_layout_on_disk(configured, tmp_path, name):
    names = [f"thing {i}".encode() for i in range(100 if name == "cifar100" else 10)]
    if name == "cifar100":
        written = write_cifar(tmp_path / "cifar-100-python", ["train", "test"], "meta", b"fine_labels", names)
    else:
        files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        written = write_cifar(tmp_path / "cifar-10-batches-py", files, "batches.meta", b"labels", names)
    data, num_classes = configured(name, f"root={tmp_path}", "batch_size=3", "augment=none")
    data.setup()
    assert (data.num_classes, data.image_size) == (num_classes, 32)
    found = batches(data, data.train_dataloader())
    index, images = (torch.cat([batch[key] for batch in found]) for key in ("index", "images"))
    pixels, labels = (
        np.concatenate(parts) for parts in zip(*[w for f, w in written.items() if "test" not in f], strict=True)
    )
    assert sorted(index.tolist()) == list(range(len(pixels)))
    np.testing.assert_array_equal((images * 255).round().numpy(), pixels.reshape(-1, 3, 32, 32)[index])
    assert torch.cat([batch["label"] for batch in found]).tolist() == labels[index].tolist()
    assert len(batches(data, data.test_dataloader())[0]["images"]) == 4


def test_cifar_that_is_missing_is_named(configured, tmp_path):
    data, _ = configured("cifar100", f"root={tmp_path}/elsewhere")
    with pytest.raises(InputError, match=r"elsewhere.* is missing; download cifar-100-python\.tar\.gz"):
        data.setup()


def write_picture(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 200, np.uint8)).save(path)


@pytest.fixture
def tree(tmp_path):
    """Two classes in ImageNet's layout; val holds a landscape and a portrait."""
    for wnid, size in (("n01440764", (60, 90)), ("n01443537", (90, 60))):
        for i in range(3):
            write_picture(tmp_path / "train" / wnid / f"{wnid}_{i}.JPEG", 96, 64 + 8 * i)
        write_picture(tmp_path / "val" / wnid / "ILSVRC2012_val_00000001.JPEG", *size)
    return tmp_path


SMALL = ["image_size=32", "resize=40", "batch_size=4", "test_batch_size=2"]


def test_imagenet_is_read_from_the_layout_on_disk(configured, tree):
    data, num_classes = configured("imagenet", f"root={tree}", *SMALL)
    assert num_classes == 1000
    data.setup("fit")
    assert (data.num_classes, data.class_names) == (2, ("n01440764", "n01443537"))
    found = batches(data, data.train_dataloader())
    assert [batch["images"].shape for batch in found] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    assert sorted(torch.cat([batch["index"] for batch in found]).tolist()) == list(range(6))
    for batch in found:
        assert batch["label"].tolist() == (batch["index"] // 3).tolist()
    (tested,) = batches(data, data.test_dataloader())
    assert tested["label"].tolist() == [0, 1]
    assert (tested["images"] * 255 - 200).abs().max() < 2


def test_imagenet_that_is_missing_is_named(configured, tree):
    (tree / "train").rename(tree / "away")
    data, _ = configured("imagenet", f"root={tree}", *SMALL)
    data.setup("test")
    with pytest.raises(InputError, match=r"train is missing; give the folder that holds train/<class>"):
        data.setup("fit")
