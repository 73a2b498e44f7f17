"""Pictures in and out: exact at 8 and 16 bit, whole or not at all, one clear line when a file cannot be used."""

import io
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import torch
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont
from torch import Tensor

from shared.errors import InputError
from shared.io.files import atomic_path

__all__ = [
    "Image",
    "list_images",
    "picture_grid",
    "plan_outputs",
    "read_image",
    "read_rgb",
    "save_comparison",
    "write_image",
]

# suffix -> Pillow's name of the format
WRITERS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
# "JPEG" also opens the multi-picture files of phones (MPO)
READABLE = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
WITH_ALPHA = ("PNG", "WEBP", "TIFF")
# Where Pillow itself calls a header a decompression bomb; the float picture then stays below 2.2 GB.
MAX_PIXELS = 2 * 89_478_485
ORIENTATION = 0x0112
MODE_TO_READ = {
    "1": "L",
    "La": "LA",
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "LAB": "RGB",
    "HSV": "RGB",
    "RGBX": "RGB",
    "RGBa": "RGBA",
}
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
ICC_SPACES = {1: b"GRAY", 3: b"RGB "}


@dataclass(frozen=True)
class Image:
    """A picture as it was in its file, upright.

    Attributes:
        pixels: (3, H, W) RGB or (1, H, W) gray, float32 in [0, 1]: the file's integers over 255 or 65535.
        alpha: (1, H, W) float32 in [0, 1], or None when the file has no transparency.
        bit_depth: 8 or 16.
        icc_profile: to be handed to `write_image`, or None.
        exif: to be handed to `write_image`, or None; its orientation is 1, because `pixels` are already upright.
    """

    pixels: Tensor
    alpha: Tensor | None
    bit_depth: int
    icc_profile: bytes | None = None
    exif: bytes | None = None

    @property
    def is_gray(self) -> bool:
        """Whether the file has one channel."""
        return self.pixels.shape[0] == 1


def list_images(path: str | os.PathLike) -> list[Path]:
    """The picture files of a folder in natural order (2.png before 10.png), or the one file given.

    Subfolders and hidden files are left out.

    Raises:
        InputError: the path does not exist, or the folder holds no picture.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist; give a picture file or a folder of pictures")
    try:
        files = [file for file in path.iterdir() if file.suffix.lower() in WRITERS and file.name[0] != "."]
        files = [file for file in files if file.is_file()]
    except OSError as error:
        raise InputError(f"cannot list {path}: {error.strerror}; choose a folder you may read") from error
    if not files:
        raise InputError(f"{path} holds no pictures; it needs files named *{', *'.join(WRITERS)}")
    return sorted(files, key=natural_key)


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sorting key in which digits count as numbers."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts] + [(2, 0, path.name)]


def plan_outputs(source: str | os.PathLike, target: str | os.PathLike) -> dict[Path, Path]:
    """Say for each picture of `source` which file it becomes; those of a folder .png files.

    Raises:
        InputError: no picture there, an output that cannot be a picture, or one that would overwrite something of ours.
    """
    source, target = Path(source), Path(target)
    files = list_images(source)
    targets = {file: target / f"{file.stem}.png" for file in files} if source.is_dir() else {source: target}
    for file, made in targets.items():
        if made.suffix.lower() not in WRITERS:
            raise InputError(f"cannot write {made}: end the name with one of {', '.join(WRITERS)}")
        if made.resolve() in {other.resolve() for other in files}:
            raise InputError(f"{made} would overwrite its input; choose another OUTPUT")
        if twin := next((other for other in files if other != file and targets[other] == made), None):
            raise InputError(f"{file.name} and {twin.name} would both become {made}; rename one")
    return targets


def read_pixels(path: Path) -> tuple[np.ndarray, bytes | None, bytes | None]:
    """Decode a file.

    Returns:
        (H, W, C) uint8 or uint16, upright, C = 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha; the ICC profile; the
        EXIF block with its orientation reset.

    Raises:
        InputError: the file is missing, empty, damaged, too large, or no picture that we read.
    """
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; give a picture file")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty (0 bytes); copy or download it again")
        # huge headers are refused by the limit below, not by a warning
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            with PillowImage.open(file, formats=READABLE) as image:
                return decode(image, path)
    except InputError:
        raise
    except PillowImage.DecompressionBombError as error:
        raise InputError(f"{path} is larger than {MAX_PIXELS / 1e6:.0f} megapixels; cut it into parts") from error
    except PillowImage.UnidentifiedImageError as error:
        raise InputError(f"{path} is no picture we can read; give a PNG, JPEG, WebP, BMP or TIFF file") from error
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; give a picture file or a folder of pictures") from error
    except PermissionError as error:
        raise InputError(f"{path} may not be read ({error.strerror}); change its permissions") from error
    # decoders raise whatever a damaged file makes them stumble over
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is damaged or cut short ({reason}); copy or download it again") from error


def decode(image: PillowImage.Image, path: Path) -> tuple[np.ndarray, bytes | None, bytes | None]:
    """`read_pixels` of a file whose header Pillow has read."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{path} has {width}x{height} pixels, more than {MAX_PIXELS / 1e6:.0f} million; cut it into parts"
        )
    if image.format in ("PNG", "WEBP", "TIFF") and getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{path} holds {image.n_frames} pictures; save the one you mean as a file of its own")
    whole = {"JPEG": jpeg_is_whole, "MPO": jpeg_is_whole, "PNG": png_is_whole}.get(image.format)
    if whole and not whole(path.read_bytes()):
        raise InputError(f"{path} is damaged or cut short; copy or download it again")
    if image.mode in ("I", "F"):
        raise InputError(f"{path} holds 32-bit pixels; save it with 8 or 16 bits per channel")

    exif, orientation = upright_exif(image)
    icc_profile = image.info.get("icc_profile")
    if is_16_bit(image, path):
        pixels = decode_16_bit(image, path)
    else:
        has_transparency = "transparency" in image.info
        image.load()
        # Pillow turns TIFF files upright by itself
        orientation = 1 if image.format == "TIFF" else orientation
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA" if has_transparency or image.mode == "PA" else "RGB")
        elif has_transparency and image.mode in ("1", "L", "RGB"):
            image = image.convert("RGBA" if image.mode == "RGB" else "LA")
        elif image.mode in MODE_TO_READ:
            image = image.convert(MODE_TO_READ[image.mode])
        if image.mode not in ("L", "LA", "RGB", "RGBA"):
            raise InputError(f"{path} has pixels of the kind {image.mode}; save it as RGB or gray")
        pixels = np.array(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    pixels = turn_upright(pixels, orientation)
    return pixels, matching_profile(icc_profile, pixels.shape[2] - 1 + pixels.shape[2] % 2), exif


def is_16_bit(image: PillowImage.Image, path: Path) -> bool:
    """Whether the file has 16 bits per channel, from its header: Pillow's mode says 8 for 16-bit colour."""
    if image.format == "PNG":
        with open(path, "rb") as file:
            # signature 8, length 4, "IHDR" 4, width 4, height 4, then the depth
            return file.read(25)[24] == 16
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,))) > 8
    return False


def decode_16_bit(image: PillowImage.Image, path: Path) -> np.ndarray:
    """The uint16 pixels of a PNG or TIFF file."""
    data = path.read_bytes()
    if image.format == "PNG":
        pixels = imagecodecs.png_decode(data)
    else:
        # photometric 1: black is zero, 2: RGB; sample format 1: unsigned integers
        if image.tag_v2.get(262) not in (1, 2) or set(image.tag_v2.get(339, (1,))) != {1}:
            raise InputError(f"{path} is a TIFF of an uncommon kind; save it as 16-bit RGB or gray, or as PNG")
        pixels = imagecodecs.tiff_decode(data)
        if pixels.ndim == 3 and image.tag_v2.get(284) == 2:
            pixels = np.moveaxis(pixels, 0, -1)
    width, height = image.size
    if image.format == "TIFF" and image.tag_v2.get(274, 1) in (5, 6, 7, 8) and pixels.shape[:2] == (width, height):
        width, height = height, width
    if pixels.dtype != np.uint16 or pixels.shape[:2] != (height, width) or pixels.ndim > 3 or pixels.shape[2:] > (4,):
        raise InputError(
            f"{path} holds {pixels.dtype} pixels of shape {pixels.shape}; save it as 16-bit RGB or gray PNG"
        )
    return pixels


def jpeg_is_whole(data: bytes) -> bool:
    """Whether the first picture of a JPEG file reaches its end marker.

    Pillow fills what is missing with gray when the rest of the file is zeros, as after an interrupted download.
    """
    position = 2
    while 0 <= position < len(data) - 1:
        marker = data[position + 1]
        if data[position] != 0xFF:
            return False
        if marker == 0xD9:
            return True
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 1 if marker == 0xFF else 2
            continue
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:
            # coded pixels: a real marker is FF followed by neither a stuffed zero nor a restart
            found = JPEG_MARKER.search(data, position)
            position = found.start() if found else -1
    return False


def png_is_whole(data: bytes) -> bool:
    """Whether every chunk that the picture needs carries its right checksum, up to the end chunk.

    Pillow does not look at the checksums: zeros amid hardly compressed pixels pass as black.
    """
    position = 8
    while position + 8 <= len(data):
        name, end = (
            data[position + 4 : position + 8],
            position + 8 + int.from_bytes(data[position : position + 4], "big"),
        )
        if name == b"IEND":
            return True
        # a capital first letter: the picture cannot do without
        if name[:1].isupper() and zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        position = end + 4
    return False


def upright_exif(image: PillowImage.Image) -> tuple[bytes | None, int]:
    """The EXIF block with orientation 1, and the orientation (1 .. 8) that it had; a broken block counts as none."""
    try:
        exif = image.getexif()
        orientation = exif.get(ORIENTATION, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        # the tags of a TIFF file are its layout on disk, not a description to carry on
        if image.format == "TIFF" or not len(exif):
            return None, orientation
        if ORIENTATION in exif:
            exif[ORIENTATION] = 1
        return exif.tobytes(), orientation
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return None, 1


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 .. 8) on (H, W, C)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def matching_profile(profile: bytes | None, channels: int) -> bytes | None:
    """The ICC profile if it is one for pictures of this many channels, else None: another would spoil the colours."""
    return profile if profile and profile[16:20] == ICC_SPACES[channels] else None


def read_image(path: str | os.PathLike) -> Image:
    """Read a PNG, JPEG, WebP, BMP or TIFF file.

    16-bit PNG and TIFF keep all their bits; palettes become RGB; CMYK and YCbCr are converted; EXIF orientation is
    applied. Only PNG has checksums: in the other formats what is cut short is refused, but flipped bits may pass.

    Raises:
        InputError: the file is missing, empty, damaged, cut short, too large, of another format, or holds several
            pictures.
    """
    pixels, icc_profile, exif = read_pixels(Path(path))
    bit_depth = 8 * pixels.dtype.itemsize
    planes = torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1).copy()) / (2**bit_depth - 1)
    num_colours = 1 if pixels.shape[2] <= 2 else 3
    alpha = planes[num_colours:] if pixels.shape[2] in (2, 4) else None
    return Image(planes[:num_colours], alpha, bit_depth, icc_profile, exif)


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """Read a picture as training data: (H, W, 3) uint8, upright, gray repeated, transparency dropped, 16 bit rounded.

    Raises:
        InputError: as `read_image`.
    """
    pixels, _, _ = read_pixels(Path(path))
    if pixels.dtype == np.uint16:
        # 65535 = 257 * 255: the nearest of the 256 levels, never a tie
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.shape[2] <= 2:
        return np.repeat(pixels[..., :1], 3, axis=2)
    return np.ascontiguousarray(pixels[..., :3])


def write_image(
    path: str | os.PathLike,
    pixels: Tensor,
    *,
    alpha: Tensor | None = None,
    bit_depth: int = 8,
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
    quality: int = 95,
) -> None:
    """Write a picture, whole or not at all; the suffix chooses the format.

    Args:
        path: ends in .png, .jpg, .jpeg, .webp, .bmp, .tif or .tiff; missing folders are made.
        pixels: (3, H, W) or (1, H, W), floating point; clamped to [0, 1] and rounded half up.
        alpha: (1, H, W) in [0, 1]; PNG, WebP and TIFF only.
        bit_depth: 8, or 16 for PNG.
        icc_profile: kept when it fits the number of channels; BMP has no place for it.
        exif: as `Image.exif`; BMP and TIFF leave it out.
        quality: of JPEG (without chroma subsampling) and WebP, 1 .. 100; WebP at 100 is lossless.

    Raises:
        InputError: an unknown suffix, a folder that cannot be written, transparency or 16 bit in a format without it,
            NaN or infinity, more pixels a side than the format holds.
        ValueError: shapes that are no picture, a bit depth that does not exist.
    """
    path = Path(path)
    file_format = WRITERS.get(path.suffix.lower())
    if file_format is None:
        raise InputError(f"cannot write {path}: unknown suffix; end the name with one of {', '.join(WRITERS)}")
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or pixels.numel() == 0 or not pixels.is_floating_point():
        raise ValueError(
            f"write_image needs floating-point (3, H, W) or (1, H, W), got {pixels.dtype} {tuple(pixels.shape)}"
        )
    if alpha is not None and alpha.shape != (1, *pixels.shape[1:]):
        raise ValueError(
            f"alpha must be (1, H, W) of the same size, got {tuple(alpha.shape)} for {tuple(pixels.shape)}"
        )
    if bit_depth not in (8, 16):
        raise ValueError(f"bit_depth must be 8 or 16, got {bit_depth}")
    if bit_depth == 16 and file_format != "PNG":
        raise InputError(f"cannot write {path}: 16 bit is written as PNG only; end the name with .png")
    if alpha is not None and file_format not in WITH_ALPHA:
        raise InputError(f"cannot write {path}: {file_format} holds no transparency; end the name with .png")

    planes = pixels if alpha is None else torch.cat([pixels, alpha.to(pixels)])
    planes = planes.detach().cpu().double()
    if not planes.isfinite().all():
        raise InputError(f"cannot write {path}: the picture holds NaN or infinity; check the checkpoint or the input")
    levels = 2**bit_depth - 1
    array = (planes.clamp(0, 1) * levels + 0.5).floor().permute(1, 2, 0).numpy()
    array = np.ascontiguousarray(array.astype(np.uint8 if bit_depth == 8 else np.uint16))
    icc_profile = matching_profile(icc_profile, pixels.shape[0])
    with atomic_path(path) as temporary:
        if bit_depth == 16:
            temporary.write_bytes(encode_png_16_bit(array, icc_profile, exif))
            return
        image = PillowImage.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        options = {"icc_profile": icc_profile, "exif": exif}
        options = {name: value for name, value in options.items() if value is not None}
        if file_format == "TIFF":
            options.pop("exif", None)
        if file_format == "JPEG":
            options |= {"quality": quality, "subsampling": 0}
        if file_format == "WEBP":
            options |= {"quality": quality, "lossless": quality == 100, "exact": True}
        # in memory: Pillow writes JPEG and TIFF files without noticing that the disk is full
        content = io.BytesIO()
        try:
            image.save(content, format=file_format, **options)
        except (ValueError, OSError) as error:
            raise InputError(f"cannot write {path}: {' '.join(str(error).split())}; try the suffix .png") from error
        temporary.write_bytes(content.getbuffer())


def encode_png_16_bit(array: np.ndarray, icc_profile: bytes | None, exif: bytes | None) -> bytes:
    """A PNG file of (H, W, C) uint16 with its profile and EXIF block."""
    data = imagecodecs.png_encode(array[..., 0] if array.shape[2] == 1 else array)
    chunks = b""
    if icc_profile is not None:
        chunks += png_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile))
    if exif is not None:
        chunks += png_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    # the header chunk ends at byte 33: signature 8, length 4, name 4, content 13, checksum 4
    return data[:33] + chunks + data[33:]


def png_chunk(name: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def picture_grid(rows: Sequence[Sequence[Tensor]], labels: Sequence[str]) -> Tensor:
    """Pictures side by side, one column per label with the label above it.

    A picture smaller than its row's largest (a low-resolution input, say) is enlarged by a whole factor, pixels
    repeated.

    Args:
        rows: each a list of (3, H, W) or (1, H, W) in [0, 1], one per label.
        labels: captions of the columns.

    Returns:
        (3, H, W) float32 in [0, 1].

    Raises:
        ValueError: no pictures, a row that does not fit the labels, shapes that are no picture.
    """
    if not rows or not labels or any(len(row) != len(labels) for row in rows):
        raise ValueError(
            f"picture_grid needs one picture per label, got rows of {[len(row) for row in rows]} for {labels}"
        )
    for picture in (picture for row in rows for picture in row):
        if picture.ndim != 3 or picture.shape[0] not in (1, 3) or picture.numel() == 0:
            raise ValueError(f"picture_grid needs (3, H, W) or (1, H, W), got {tuple(picture.shape)}")
    cells = [[enlarged(picture, row) for picture in row] for row in rows]
    margin, font = 4, ImageFont.load_default(14)
    captions = [math.ceil(font.getlength(label)) for label in labels]
    caption_height = 22
    widths = [max(caption, *(row[i].shape[2] for row in cells)) for i, caption in enumerate(captions)]
    heights = [max(picture.shape[1] for picture in row) for row in cells]
    width = sum(widths) + margin * (len(widths) + 1)
    height = caption_height + sum(heights) + margin * (len(heights) + 1)

    canvas = PillowImage.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    lefts = [margin + sum(widths[:i]) + margin * i for i in range(len(widths))]
    for left, label, cell, caption in zip(lefts, labels, widths, captions, strict=True):
        draw.text((left + (cell - caption) // 2, 3), label, fill="black", font=font)
    grid = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255
    top = caption_height + margin
    for row, row_height in zip(cells, heights, strict=True):
        for left, cell, picture in zip(lefts, widths, row, strict=True):
            y, x = top + (row_height - picture.shape[1]) // 2, left + (cell - picture.shape[2]) // 2
            grid[:, y : y + picture.shape[1], x : x + picture.shape[2]] = picture
        top += row_height + margin
    return grid


def enlarged(picture: Tensor, row: Sequence[Tensor]) -> Tensor:
    """The picture, clamped, enlarged by the largest whole factor that keeps it within the largest of its row."""
    height, width = (max(other.shape[dim] for other in row) for dim in (1, 2))
    factor = max(1, min(height // picture.shape[1], width // picture.shape[2]))
    picture = picture.detach().cpu().float().nan_to_num().clamp(0, 1)
    return picture.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def save_comparison(path: str | os.PathLike, panels: Sequence[tuple[str, Tensor]]) -> None:
    """Write one row of captioned pictures.

    Args:
        path: as `write_image`.
        panels: (caption, picture) from left to right; pictures as for `picture_grid`.

    Raises:
        InputError: as `write_image`.
        ValueError: as `picture_grid`.
    """
    write_image(path, picture_grid([[picture for _, picture in panels]], [caption for caption, _ in panels]))
