"""Prediction on the user's files: every kind of picture, every mistake."""

import json

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from projects.mdrn import predict
from projects.mdrn.baselines import DnCNN
from projects.mdrn.checkpoints import save_network
from projects.mdrn.inference import denoise, load_denoiser, shipped_weights
from projects.mdrn.model import MDRN
from shared.io.images import read_image
from shared.io.photographs import load_photographs

TINY = {"width": 4, "num_blocks": 1, "attention": "none", "noise_map": True, "tail_init_scale": 1.0}


@pytest.fixture
def weights(tmp_path):
    """Untrained universal networks for gray and colour pictures: weights[1], weights[3]."""
    made = {}
    for channels in (1, 3):
        torch.manual_seed(0)
        made[channels] = tmp_path / "weights" / f"{channels}.safetensors"
        options = {"in_channels": channels, **TINY}
        save_network(MDRN(**options), {"name": "mdrn", **options}, made[channels], noise_levels=json.dumps([0, 70]))
    return made


@pytest.fixture
def photo():
    (chelsea,) = [p for p in load_photographs("test") if p.name == "skimage_chelsea"]
    return np.ascontiguousarray(chelsea.pixels[100:196, 120:251])


def run(composed, weights, source, target, *overrides):
    return predict.run(
        composed("predict", f"input='{source}'", f"output='{target}'", f"ckpt_path={weights}", "threads=1", *overrides)
    )


KINDS = ["rgb.png", "gray.png", "rgba.png", "la.png", "photo.jpg", "deep.png", "deep gray.png", "a b=c, d.png"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_kind_keep_their_kind(composed, weights, photo, tmp_path, kind, channels):
    """Also gray pictures through colour weights and the other way round."""
    source = tmp_path / kind
    if kind.startswith("deep"):
        deep = photo.astype(np.uint16) * 257
        source.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(deep[..., 0] if "gray" in kind else deep)))
    else:
        mode = {"gray.png": "L", "la.png": "LA", "rgba.png": "RGBA"}.get(kind, "RGB")
        picture = Image.fromarray(photo).convert(mode)
        if mode.endswith("A"):
            picture.putalpha(Image.fromarray(photo[..., 1]))
        picture.save(source)
    run(composed, weights[channels], source, tmp_path / "out.png", "noise_level=20")
    before, after = read_image(source), read_image(tmp_path / "out.png")
    assert after.bit_depth == before.bit_depth
    assert (after.alpha is None) == (before.alpha is None)
    assert before.alpha is None or torch.equal(before.alpha, after.alpha)
    net, _ = load_denoiser(weights[channels])
    step = 1 / (2**before.bit_depth - 1)
    assert (after.pixels - denoise(net, before.pixels, 20)).abs().max() <= 0.51 * step
    assert (after.pixels - before.pixels).abs().max() > step


def test_exif_and_profile_are_kept(composed, weights, photo, tmp_path):
    source, profile = tmp_path / "in.jpg", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    Image.fromarray(photo).save(source, exif=exif, icc_profile=profile)
    run(composed, weights[3], source, tmp_path / "out.jpg", "noise_level=20")
    with Image.open(tmp_path / "out.jpg") as made:
        assert made.info["icc_profile"] == profile
        assert made.getexif()[0x010F] == "Maker"
        assert made.getexif().get(0x0112, 1) == 1
        assert made.size == (96, 131)  # turned upright


def test_folder_goes_into_a_folder_with_an_estimate_for_each_picture(command_line, weights, photo, tmp_path):
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for name, level in (("b.png", 30), ("a.jpg", 10)):
        noisy = np.clip(128 + level * rng.standard_normal((96, 96, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / "in" / name, quality=100, subsampling=0)
    Image.new("L", (40, 30), 99).save(tmp_path / "in" / "flat.png")
    code, out, error = command_line(
        "predict", f"input={tmp_path}/in", f"output={tmp_path}/out", f"ckpt_path={weights[3]}", "threads=1"
    )
    assert code == 0, error
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "flat.png"]
    told = {line.split(":")[0]: float(line.split()[3]) for line in out.splitlines() if "estimated" in line}
    assert told == {"a.jpg": pytest.approx(10, abs=2), "b.png": pytest.approx(30, abs=2), "flat.png": 0}
    assert (np.array(Image.open(tmp_path / "out" / "flat.png")) == 99).all()


@pytest.mark.parametrize("options", [["tile=32"], ["folded=false"], ["tile=48", "folded=false"]])
def test_tiles_and_folding_leave_the_result(composed, weights, photo, tmp_path, options):
    Image.fromarray(photo).save(tmp_path / "in.png")
    run(composed, weights[3], tmp_path / "in.png", tmp_path / "a.png", "noise_level=30")
    run(composed, weights[3], tmp_path / "in.png", tmp_path / "b.png", "noise_level=30", *options)
    a, b = (np.array(Image.open(tmp_path / name)).astype(int) for name in ("a.png", "b.png"))
    assert np.abs(a - b).max() <= 1  # rounding of float32 near half a level


def test_ensemble_and_a_network_of_one_level(composed, weights, photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "in.png")
    for name, options in (("a.png", []), ("b.png", ["ensemble=true"])):
        run(composed, weights[3], tmp_path / "in.png", tmp_path / name, "noise_level=30", *options)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    torch.save(DnCNN(3, 3, 4).state_dict(), tmp_path / "dncnn.pth")
    run(composed, tmp_path / "dncnn.pth", tmp_path / "in.png", tmp_path / "c.png")
    assert read_image(tmp_path / "c.png").pixels.shape == (3, *photo.shape[:2])


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
    other, ckpt = tmp_path / "other.pth", f"ckpt_path={weights[3]}"
    torch.save({"fc.weight": torch.zeros(2, 2)}, other)
    out = tmp_path / "out.png"
    cases = [
        ([], "say what to denoise"),
        (["input=absent.png", f"output={out}"], "absent.png"),
        ([f"input={tmp_path}/cut.png", f"output={out}", ckpt], "cut.png"),
        ([f"input={tmp_path}/text.png", f"output={out}", ckpt], "text.png"),
        ([f"input={tmp_path}/empty", f"output={out}"], "empty"),
        ([f"input={good}", f"output={tmp_path}/file/out.png", ckpt], "cannot write"),
        ([f"input={good}", f"output={tmp_path}/out.xyz"], "xyz"),
        ([f"input={good}", f"output={good}"], "overwrite"),
        ([f"input={tmp_path}/twins", f"output={tmp_path}/made"], "both become"),
        ([f"input={good}", f"output={out}", "size=huge"], "no shipped weights of size=huge; choose one of tiny, small"),
        ([f"input={good}", f"output={out}", f"ckpt_path={other}"], "other.pth"),
        ([f"input={good}", f"output={out}", "ckpt_path=absent.ckpt"], "absent.ckpt"),
        ([f"input={good}", f"output={out}", ckpt, "noise_level=71"], "noise_level=71 is not what"),
        ([f"input={good}", f"output={out}", ckpt, "noise_level=-1"], "noise_level=-1"),
        ([f"input={good}", f"output={out}", ckpt, "noise_level=nan"], "noise_level=nan"),
        ([f"input={good}", f"output={out}", ckpt, "noise_level=much"], "noise_level"),
        ([f"input={good}", f"output={out}", ckpt, "tile=0"], "tile=0"),
        ([f"input={good}", f"output={out}", ckpt, "devcie=cpu"], "devcie"),
        ([f"input={good}", f"output={out}", ckpt, "device=gpu9"], "no device"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in cases:
        code, _, error = command_line("predict", *arguments)
        lines = error.strip().splitlines()
        assert (code, len(lines), lines[0].startswith("error: ")) == (2, 1, True), (arguments, error)
        assert message in lines[0]
        assert sorted(tmp_path.rglob("*")) == before, arguments


@pytest.mark.parametrize(("size", "mode"), [("tiny", "L"), ("small", "RGB")])
def test_shipped_weights_are_the_default(command_line, photo, tmp_path, size, mode):
    clean = np.array(Image.fromarray(photo).convert(mode)).astype(float)
    noisy = np.clip(clean + 25 * np.random.default_rng(0).standard_normal(clean.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(tmp_path / "in.png")
    code, _, error = command_line(
        "predict", f"input={tmp_path}/in.png", f"output={tmp_path}/out.png", f"size={size}", "threads=1"
    )
    assert code == 0, error
    assert shipped_weights(size, 1 if mode == "L" else 3).stat().st_size < 2**21
    errors = [np.square(np.array(Image.open(tmp_path / f"{name}.png")) - clean).mean() for name in ("in", "out")]
    assert errors[1] < errors[0] / 5
