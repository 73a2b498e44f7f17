import contextlib
import dataclasses
import io
import os
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from PIL import ImageCms

from shared.errors import InputError
from shared.io import images
from shared.io.images import list_images, picture_grid, read_image, read_rgb, save_comparison, write_image

RNG = np.random.default_rng(0)
RGB8 = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
RGB16 = RNG.integers(0, 65536, (13, 17, 3), dtype=np.uint16)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def as_integers(image):
    return (image.pixels.double() * (2**image.bit_depth - 1)).round().permute(1, 2, 0).numpy().astype(np.int64)


def save(path, array, **options):
    PillowImage.fromarray(array).save(path, **options)
    return path


def one_line(info):
    message = str(info.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_rgb_8_bit_is_exact(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", RGB8, **({"lossless": True} if suffix == ".webp" else {}))
    image = read_image(path)
    assert image.pixels.dtype == torch.float32
    assert image.pixels.shape == (3, 13, 17)
    assert (image.bit_depth, image.alpha, image.is_gray) == (8, None, False)
    assert torch.equal(image.pixels, torch.from_numpy(RGB8).permute(2, 0, 1).float() / 255)
    np.testing.assert_array_equal(read_rgb(path), RGB8)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_is_exact(tmp_path, suffix, channels):
    array = RGB16 if channels == 3 else np.ascontiguousarray(RGB16[..., 0])
    encode = imagecodecs.png_encode if suffix == ".png" else imagecodecs.tiff_encode
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encode(array))
    image = read_image(path)
    assert image.bit_depth == 16
    assert image.is_gray == (channels == 1)
    np.testing.assert_array_equal(as_integers(image), array.reshape(13, 17, channels))


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_is_kept_apart(tmp_path, channels, dtype):
    array = RNG.integers(0, np.iinfo(dtype).max + 1, (5, 7, channels), dtype=dtype)
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(array))
    image = read_image(path)
    np.testing.assert_array_equal(as_integers(image), array[..., :-1])
    np.testing.assert_array_equal((image.alpha[0].double() * np.iinfo(dtype).max).round(), array[..., -1])


def test_palette_and_transparent_colour(tmp_path):
    palette = PillowImage.fromarray(RGB8 // 64 * 64).quantize(32)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "p.png"), np.array(palette.convert("RGB")))
    assert read_image(tmp_path / "p.png").alpha is None
    palette.save(tmp_path / "t.png", transparency=3)
    alpha = read_image(tmp_path / "t.png").alpha
    np.testing.assert_array_equal(alpha[0] == 0, np.array(palette) == 3)
    gray = PillowImage.fromarray(RGB8[..., 0])
    gray.save(tmp_path / "g.png", transparency=int(RGB8[0, 0, 0]))
    image = read_image(tmp_path / "g.png")
    assert image.is_gray
    assert image.alpha[0, 0, 0] == 0


def test_bilevel_and_cmyk(tmp_path):
    bits = PillowImage.fromarray(RGB8[..., 0]).convert("1")
    bits.save(tmp_path / "b.png")
    assert set(read_image(tmp_path / "b.png").pixels.unique().tolist()) == {0.0, 1.0}
    PillowImage.fromarray(RGB8).convert("CMYK").save(tmp_path / "c.jpg", icc_profile=b"x" * 16 + b"CMYK" + b"x" * 120)
    image = read_image(tmp_path / "c.jpg")
    assert image.pixels.shape == (3, 13, 17)
    assert image.icc_profile is None


def test_read_rgb_expands_rounds_and_drops(tmp_path):
    (tmp_path / "g.png").write_bytes(imagecodecs.png_encode(np.array([[0, 128, 129, 65535, 65407, 65406]], np.uint16)))
    rgb = read_rgb(tmp_path / "g.png")
    assert rgb.shape == (1, 6, 3)
    assert rgb[0, :, 1].tolist() == [0, 0, 1, 255, 255, 254]
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    (tmp_path / "e.png").write_bytes(imagecodecs.png_encode(every))
    np.testing.assert_array_equal(read_rgb(tmp_path / "e.png")[..., 0], np.floor(every / 257 + 0.5))
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(np.dstack([RGB8, RGB8[..., :1]])))
    rgb = read_rgb(tmp_path / "a.png")
    np.testing.assert_array_equal(rgb, RGB8)
    assert rgb.flags.writeable
    assert rgb.flags.c_contiguous


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_orientation_is_applied_and_reset(tmp_path, orientation, suffix):
    # four flat quarters survive JPEG; the picture is stored as the camera would turn it
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (200, 20, 20), (20, 200, 20), (20, 20, 200)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = PillowImage.fromarray(upright)
    if orientation > 1:
        # Pillow's own transposition, inverted: 6 is stored rotated by 90, 8 by 270
        stored = stored.transpose(PillowImage.Transpose(undo[orientation]))
    exif = PillowImage.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Camera"
    path = tmp_path / f"a{suffix}"
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})
    stored.save(path, exif=exif, **options)
    image = read_image(path)
    assert image.pixels.shape == (3, 32, 48)
    np.testing.assert_allclose(as_integers(image), upright, atol=8)
    np.testing.assert_allclose(read_rgb(path).astype(int), upright, atol=8)
    if suffix != ".tif":
        kept = PillowImage.Exif()
        kept.load(image.exif)
        assert kept[0x0112] == 1
        assert kept[0x010F] == "Camera"


@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_of_16_bit(tmp_path, orientation):
    exif = PillowImage.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a.png").write_bytes(images.encode_png_16_bit(RGB16, None, exif.tobytes()))
    expected = RGB16[::-1, ::-1] if orientation == 3 else np.rot90(RGB16, -1)
    np.testing.assert_array_equal(as_integers(read_image(tmp_path / "a.png")), expected)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_of_16_bit_tiff(tmp_path, orientation):
    stored = np.ascontiguousarray(RGB16[..., 0])
    PillowImage.fromarray(stored).save(tmp_path / "a.tif", tiffinfo={274: orientation})
    image = read_image(tmp_path / "a.tif")
    expected = np.rot90(stored, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
    assert image.bit_depth == 16
    np.testing.assert_array_equal(as_integers(image)[..., 0], expected)


def test_profile_and_exif_come_back(tmp_path):
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x829A] = 0.005
    PillowImage.fromarray(RGB8).save(tmp_path / "a.jpg", icc_profile=SRGB, exif=exif)
    image = read_image(tmp_path / "a.jpg")
    assert image.icc_profile == SRGB
    for name, options in (("b.jpg", {}), ("b.png", {}), ("c.png", {"bit_depth": 16}), ("b.webp", {})):
        write_image(tmp_path / name, image.pixels, icc_profile=image.icc_profile, exif=image.exif, **options)
        again = read_image(tmp_path / name)
        assert again.icc_profile == SRGB
        assert again.pixels.shape == image.pixels.shape
        kept = PillowImage.Exif()
        kept.load(again.exif)
        assert kept[0x0112] == 1
        assert float(kept.get_ifd(0x8769)[0x829A]) == pytest.approx(0.005)
    # a colour profile on a gray picture would spoil it
    write_image(tmp_path / "g.png", image.pixels[:1], icc_profile=image.icc_profile)
    assert read_image(tmp_path / "g.png").icc_profile is None


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize(
    ("name", "bit_depth"), [("a.png", 8), ("a.png", 16), ("a.tif", 8), ("a.TIFF", 8), ("a.webp", 8)]
)
def test_written_values_come_back(tmp_path, channels, alpha, name, bit_depth):
    levels = 2**bit_depth - 1
    pixels = torch.from_numpy(RNG.integers(0, levels + 1, (channels, 6, 9)).astype(np.float32)) / levels
    mask = torch.from_numpy(RNG.integers(0, levels + 1, (1, 6, 9)).astype(np.float32)) / levels if alpha else None
    write_image(tmp_path / "new" / name, pixels, alpha=mask, bit_depth=bit_depth, quality=100)
    image = read_image(tmp_path / "new" / name)
    assert image.bit_depth == bit_depth
    # WebP knows no gray
    assert torch.equal(image.pixels, pixels if image.pixels.shape == pixels.shape else pixels.expand(3, -1, -1))
    assert torch.equal(image.alpha, mask) if alpha else image.alpha is None
    assert [file.name for file in (tmp_path / "new").iterdir()] == [name]


def test_bmp_and_jpeg(tmp_path):
    pixels = torch.from_numpy(RGB8).permute(2, 0, 1).float() / 255
    write_image(tmp_path / "a.bmp", pixels)
    assert torch.equal(read_image(tmp_path / "a.bmp").pixels, pixels)
    smooth = torch.linspace(0, 1, 64).expand(3, 64, 64)
    write_image(tmp_path / "a.jpg", smooth)
    assert (read_image(tmp_path / "a.jpg").pixels - smooth).abs().max() < 0.02
    write_image(tmp_path / "g.jpeg", smooth[:1])
    assert read_image(tmp_path / "g.jpeg").is_gray


def test_written_values_are_clamped_and_rounded_half_up(tmp_path):
    pixels = torch.tensor([[[-1.0, 2.0, 0.5 / 255, 1.5 / 255, 2.4999 / 255]]], dtype=torch.float64)
    write_image(tmp_path / "a.png", pixels)
    assert as_integers(read_image(tmp_path / "a.png")).flatten().tolist() == [0, 255, 1, 2, 2]
    write_image(tmp_path / "h.png", pixels.half())
    assert read_image(tmp_path / "h.png").is_gray


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.gif", {}, "suffix"),
        ("a", {}, "suffix"),
        ("a.jpg", {"alpha": torch.ones(1, 4, 4)}, "transparency.*png"),
        ("a.bmp", {"alpha": torch.ones(1, 4, 4)}, "transparency.*png"),
        ("a.jpg", {"bit_depth": 16}, "16 bit.*png"),
    ],
)
def test_formats_that_cannot_hold_it(tmp_path, name, options, message):
    with pytest.raises(InputError, match=message) as info:
        write_image(tmp_path / name, torch.zeros(3, 4, 4), **options)
    assert name in one_line(info)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_leaves_the_old_file(tmp_path, value):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    pixels = torch.zeros(3, 4, 4)
    pixels[1, 2, 3] = value
    with pytest.raises(InputError, match="NaN"):
        write_image(path, pixels)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (torch.zeros(4, 4), {}),
        (torch.zeros(2, 4, 4), {}),
        (torch.zeros(1, 3, 4, 4), {}),
        (torch.zeros(3, 0, 4), {}),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), {}),
        (torch.zeros(3, 4, 4), {"alpha": torch.ones(1, 4, 5)}),
        (torch.zeros(3, 4, 4), {"bit_depth": 12}),
    ],
)
def test_what_is_no_picture(tmp_path, pixels, options):
    with pytest.raises(ValueError):
        write_image(tmp_path / "a.png", pixels, **options)
    assert list(tmp_path.iterdir()) == []


def test_too_wide_for_webp(tmp_path):
    with pytest.raises(InputError, match=r"a\.webp"):
        write_image(tmp_path / "a.webp", torch.zeros(1, 1, 16_400))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="folder you may write"):
        write_image(tmp_path / "a.png", torch.zeros(3, 4, 4))


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot write"):
        write_image(tmp_path / "file" / "a.png", torch.zeros(3, 4, 4))
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_image(tmp_path / "a.png", torch.zeros(3, 4, 4))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6, 0.9, 0.97])
def test_cut_short(tmp_path, suffix, fraction):
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"cut{suffix}", noise)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    for read in (read_image, read_rgb):
        with pytest.raises(InputError, match="cut") as info:
            read(path)
        assert str(path) in one_line(info)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_rest_is_zeros(tmp_path, suffix):
    # what an interrupted download into a preallocated file leaves
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"zeros{suffix}", noise)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(InputError, match="zeros"):
        read_image(path)


@pytest.mark.parametrize("bits", [8, 16])
def test_flipped_bits_in_png(tmp_path, bits):
    array = RNG.integers(0, 2**bits, (32, 32, 3)).astype(np.uint8 if bits == 8 else np.uint16)
    data = bytearray(imagecodecs.png_encode(array))
    data[len(data) // 2] ^= 16
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        read_image(tmp_path / "a.png")


def test_16_bit_cut_short(tmp_path):
    data = imagecodecs.png_encode(RGB16)
    (tmp_path / "a.png").write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(InputError, match=r"a\.png"):
        read_image(tmp_path / "a.png")


def test_jpeg_with_more_behind_its_end(tmp_path):
    # phones append films and further pictures
    path = save(tmp_path / "a.jpg", RGB8)
    path.write_bytes(path.read_bytes() + b"\xff\xda" + bytes(100))
    assert read_rgb(path).shape == RGB8.shape


def test_jpeg_with_a_preview_inside(tmp_path):
    preview = io.BytesIO()
    PillowImage.fromarray(RGB8).save(preview, "JPEG")
    exif = PillowImage.Exif()
    exif[0x010F] = "Camera"
    path = tmp_path / "a.jpg"
    PillowImage.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        path, exif=exif.tobytes() + preview.getvalue(), progressive=True
    )
    assert read_rgb(path).shape == (64, 64, 3)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3] + bytes(1000))
    with pytest.raises(InputError, match="cut short"):
        read_rgb(path)


def png_header(width, height, depth=8):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("size", [(100_000, 100_000), (20_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_huge_header_is_refused_before_decoding(tmp_path, monkeypatch, depth, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size, depth))
    monkeypatch.setattr(imagecodecs, "png_decode", lambda data: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"bomb\.png.*parts") as info:
        read_image(tmp_path / "bomb.png")
    one_line(info)


def test_large_picture_below_the_limit_reads_without_a_warning(tmp_path, monkeypatch, recwarn):
    # Pillow warns above its limit and refuses above twice of it
    monkeypatch.setattr(PillowImage, "MAX_IMAGE_PIXELS", RGB8.shape[0] * RGB8.shape[1] - 1)
    assert read_rgb(save(tmp_path / "a.png", RGB8)).shape == RGB8.shape
    assert not recwarn.list
    monkeypatch.setattr(images, "MAX_PIXELS", RGB8.shape[0] * RGB8.shape[1] - 1)
    with pytest.raises(InputError, match="parts"):
        read_rgb(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello, I am no picture", "no picture"),
        (b"\x89PNG\r\n\x1a\n", "damaged|no picture"),
        (b"\xff\xd8\xff", "damaged|no picture"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "damaged|no picture"),
        (b"GIF89a" + bytes(50), "no picture"),
        (png_header(0, 5), "damaged|no picture"),
    ],
)
def test_no_picture(tmp_path, content, message):
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    for read in (read_image, read_rgb):
        with pytest.raises(InputError, match=message) as info:
            read(path)
        assert str(path) in one_line(info)


def test_missing_and_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path)


def test_several_pictures_in_one_file(tmp_path):
    frames = [PillowImage.fromarray(RGB8), PillowImage.fromarray(255 - RGB8)]
    for name in ("a.tif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(InputError, match="2 pictures"):
            read_image(tmp_path / name)


def test_pixels_we_do_not_read(tmp_path):
    PillowImage.fromarray(RGB8[..., 0].astype(np.float32)).save(tmp_path / "f.tif")
    (tmp_path / "c.tif").write_bytes(imagecodecs.tiff_encode(RGB16.astype(np.int16)))
    for name in ("f.tif", "c.tif"):
        with pytest.raises(InputError, match=name) as info:
            read_image(tmp_path / name)
        one_line(info)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_random_damage_never_escapes(tmp_path, suffix):
    rng = np.random.default_rng(1)
    path = save(tmp_path / f"a{suffix}", RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    data = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 400), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):
            assert read_image(path).pixels.isfinite().all()


def test_list_is_in_natural_order(tmp_path):
    for name in ("10.png", "9.PNG", "a2.jpg", "a10.jpg", ".hidden.png", "notes.txt", "b.webp"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub.png").mkdir()
    (tmp_path / "sub.png" / "x.png").write_bytes(b"")
    names = [path.name for path in list_images(tmp_path)]
    assert names == ["9.PNG", "10.png", "a2.jpg", "a10.jpg", "b.webp"]
    assert list_images(tmp_path / "10.png") == [tmp_path / "10.png"]


def test_list_of_nothing(tmp_path):
    with pytest.raises(InputError, match=r"holds no pictures.*\.png"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        list_images(tmp_path / "none")


def test_grid_holds_the_pictures(tmp_path):
    lq, sr = torch.rand(3, 8, 10), torch.rand(3, 16, 20)
    grid = picture_grid([[lq, sr], [lq, sr]], ["input", "a rather long caption for so small a picture"])
    assert grid.shape[0] == 3
    assert grid.dtype == torch.float32
    found = grid.unfold(1, 16, 1).unfold(2, 20, 1)
    distance = (found - sr[:, None, None]).abs().amax(dim=(0, 3, 4))
    assert int((distance == 0).sum()) == 2
    enlarged = lq.repeat_interleave(2, 1).repeat_interleave(2, 2)
    distance = (found - enlarged[:, None, None]).abs().amax(dim=(0, 3, 4))
    assert int((distance == 0).sum()) == 2
    # the captions are there
    assert (grid[:, :22] < 0.5).any()


def test_comparison_is_written(tmp_path):
    save_comparison(tmp_path / "c.png", [("gray", torch.rand(1, 12, 12)), ("out of range", 2 * torch.rand(3, 12, 12))])
    assert read_image(tmp_path / "c.png").pixels.shape[0] == 3


def test_grid_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="one picture per label"):
        picture_grid([[torch.rand(3, 4, 4)]], ["a", "b"])
    with pytest.raises(ValueError, match="one picture per label"):
        picture_grid([], [])
    with pytest.raises(ValueError, match="H, W"):
        picture_grid([[torch.rand(4, 4)]], ["a"])


def test_image_is_frozen():
    image = images.Image(torch.zeros(1, 2, 2), None, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        image.bit_depth = 16
