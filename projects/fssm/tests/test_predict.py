"""Enlarging the user's own pictures, and every way of asking wrongly."""

import json
import shutil

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image

from projects.fssm import predict
from projects.fssm.checkpoints import load_published, save_network
from projects.fssm.model import FMambaIR
from shared.errors import InputError
from shared.io.images import read_image
from shared.io.photographs import load_photographs
from shared.metrics import imresize, psnr

TINY = {"scale": 2, "embed_dim": 8, "depths": [1, 1], "d_state": 2, "expand": 1.2, "cab": "depthwise", "hold": "foh_1"}


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    save_network(FMambaIR(**TINY), TINY, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.fixture
def photo():
    (chelsea,) = [p for p in load_photographs("test") if p.name == "skimage_chelsea"]
    return np.ascontiguousarray(chelsea.pixels[100:196, 120:250])


def run(composed, weights, source, target, *overrides):
    return predict.run(
        composed("predict", f"input='{source}'", f"output='{target}'", f"ckpt_path={weights}", "threads=1", *overrides)
    )


@pytest.mark.parametrize("kind", ["rgb.png", "gray.png", "rgba.png", "photo.jpg", "deep.png", "a b=c, d.png"])
def test_pictures_of_every_kind_keep_their_kind(composed, weights, photo, tmp_path, kind):
    source = tmp_path / kind
    if kind == "deep.png":
        source.write_bytes(imagecodecs.png_encode(photo.astype(np.uint16) * 257))
    else:
        mode = {"gray.png": "L", "rgba.png": "RGBA"}.get(kind, "RGB")
        Image.fromarray(photo).convert(mode).save(source)
    run(composed, weights, source, tmp_path / "out.png")
    before, after = read_image(source), read_image(tmp_path / "out.png")
    assert after.pixels.shape == (before.pixels.shape[0], 192, 260)
    assert after.bit_depth == before.bit_depth
    assert (after.alpha is None) == (before.alpha is None)


def test_folder_goes_into_a_folder_and_nothing_else_is_written(composed, weights, photo, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(photo[:40, :40]).save(tmp_path / "in" / name)
    run(composed, weights, tmp_path / "in", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 5), (37, 61)])
def test_any_size_is_enlarged(weights, size):
    net = load_published(weights)
    assert predict.enlarge(net, torch.rand(3, *size), tile=24, overlap=8).shape == (3, 2 * size[0], 2 * size[1])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_shipped_weights_beat_bicubic_on_held_out_photographs(photo, scale):
    side = [n // scale * scale for n in photo.shape[:2]]
    gt = torch.from_numpy(photo[: side[0], : side[1]]).permute(2, 0, 1).float() / 255
    lq = (imresize(gt, 1 / scale).clamp(0, 1) * 255).round() / 255
    sr = predict.enlarge(load_published(predict.shipped_weights(scale)), lq, tile=192, overlap=32)
    bicubic = imresize(lq, scale).clamp(0, 1)
    ours, floor = (psnr(x[None], gt[None], crop_border=scale).item() for x in (sr, bicubic))
    assert ours > floor + 0.3


def test_seams_are_invisible(photo):
    """Tiled and whole differ by less than 0.1 dB, and not more at the seams than elsewhere."""
    (bridge,) = [p for p in load_photographs("test") if "bridge" in p.name]
    pixels = bridge.pixels[: 2 * (bridge.pixels.shape[0] // 2), : 2 * (bridge.pixels.shape[1] // 2)]
    gt = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
    lq = (imresize(gt, 0.5).clamp(0, 1) * 255).round() / 255
    net = load_published(predict.shipped_weights(2))
    whole = predict.enlarge(net, lq, tile=4096, overlap=32)
    tiled = predict.enlarge(net, lq, tile=96, overlap=32)
    scores = [psnr(x[None], gt[None], crop_border=2).item() for x in (whole, tiled)]
    assert scores[0] == pytest.approx(scores[1], abs=0.1)
    assert (whole - tiled).abs().mean() < 1 / 255
    assert (whole - tiled).abs().max() < 0.1


def test_bad_input_is_one_line_and_exit_code_2(command_line, weights, photo, tmp_path):
    good = tmp_path / "good.png"
    Image.fromarray(photo).save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "twins").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.fromarray(photo).save(tmp_path / "twins" / name)
    (tmp_path / "file").write_text("")
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(2, 2)}, other)
    out = tmp_path / "out.png"
    cases = [
        ([], "say what to enlarge"),
        (["input=absent.png", f"output={out}"], r"absent.png"),
        ([f"input={tmp_path}/cut.png", f"output={out}"], "cut.png"),
        ([f"input={tmp_path}/text.png", f"output={out}"], "text.png"),
        ([f"input={tmp_path}/empty", f"output={out}"], "empty"),
        ([f"input={good}", f"output={tmp_path}/file/out.png"], "cannot write"),
        ([f"input={good}", f"output={tmp_path}/out.xyz"], "xyz"),
        ([f"input={good}", f"output={good}"], "overwrite"),
        ([f"input={tmp_path}/twins", f"output={tmp_path}/made"], "both become"),
        ([f"input={good}", f"output={out}", "scale=5"], "no shipped weights for scale=5"),
        ([f"input={good}", f"output={out}", f"ckpt_path={other}"], "no MambaIR-light"),
        ([f"input={good}", f"output={out}", f"ckpt_path={weights}", "scale=3"], "enlarges by 2, not 3"),
        ([f"input={good}", f"output={out}", f"ckpt_path={weights}", "hold=second"], "unknown hold 'second'"),
        ([f"input={good}", f"output={out}", f"ckpt_path={weights}", "tile=32"], "overlap=32"),
        ([f"input={good}", f"output={out}", "devcie=cpu"], "devcie"),
        ([f"input={good}", f"output={out}", "device=gpu9"], "no device"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in cases:
        code, _, error = command_line("predict", *arguments)
        lines = error.strip().splitlines()
        assert (code, len(lines), lines[0].startswith("error: ")) == (2, 1, True), (arguments, error)
        assert message in lines[0]
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_shipped_weights_name_the_scales_there_are():
    with pytest.raises(InputError, match="there are some for 2, 3, 4"):
        predict.shipped_weights(7)


def test_bad_training_and_evaluation_input(command_line, weights, tmp_path):
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"net.fc.weight": torch.zeros(2, 2)}}, other)
    cases = [
        ("train", ["model.net.hold=second"], "unknown hold 'second'"),
        ("train", ["data.patch_size=300"], "smaller than the crop of 300"),
        ("train", ["scale=7"], "scale is 2, 3 or 4"),
        ("train", ["experiment=table_x2", f"data.root={tmp_path}"], "DIV2K"),
        ("train", ["experiment=tabel_x2"], "tabel_x2"),
        ("train", ["model.optimiser.lr=1"], "optimiser"),
        ("train", ["seed=one"], "seed"),
        ("train", ["resume=absent.ckpt"], "absent.ckpt"),
        ("train", ["run_dir=/proc/none"], "run folder"),
        ("train", ["threads=0"], "threads is at least 1"),
        ("evaluate", [], "CKPT=<file>"),
        ("evaluate", ["ckpt_path=absent.pth"], "absent.pth"),
        ("evaluate", [f"ckpt_path={other}"], "no MambaIR-light"),
        ("evaluate", [f"ckpt_path={weights}", "scale=3"], "enlarges by 2, not 3"),
        ("evaluate", [f"ckpt_path={weights}", "data=benchmarks", f"data.root={tmp_path}"], "Set5"),
        ("evaluate", [f"ckpt_path={weights}", "tiling=half"], "unknown tiling"),
    ]
    for entry, arguments, message in cases:
        folder = [] if any("run_dir" in a for a in arguments) else [f"run_dir={tmp_path}/run"]
        code, _, error = command_line(entry, *arguments, *folder)
        lines = error.strip().splitlines()
        assert (code, len(lines), lines[0].startswith("error: ")) == (2, 1, True), (arguments, error)
        assert message in lines[0]
        assert not (tmp_path / "run" / "metrics.json").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_evaluation_scores_a_checkpoint_in_every_way(command_line, weights, tmp_path):
    scores = []
    for index, option in enumerate(["tiling=whole", "tiling=mambair", "ensemble=true"]):
        folder = tmp_path / str(index)
        arguments = [f"ckpt_path={weights}", f"run_dir={folder}", "trainer.limit_test_batches=1", option]
        code, out, error = command_line("evaluate", *arguments)
        assert code == 0, error
        assert "psnr_y" in out
        scores.append(json.loads((folder / "metrics.json").read_text())["metrics"]["test/photographs/psnr_y"])
    # untrained weights: the three ways differ, parts and whole hardly
    assert len(set(scores)) == 3
    assert scores[0] == pytest.approx(scores[1], abs=0.1)
