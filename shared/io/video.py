"""Films in: upright RGB frames with their true times, one after another, from video files and folders of pictures.

Colours are converted by the matrix and range that the film names (ITU-R BT.601, BT.709, BT.2020; H.273 code points).
HDR is not tone-mapped, interlaced fields are not separated, transparency is dropped. Writing is in
`shared.io.video_writer`, cuts and repeated frames in `shared.io.shots`.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from shared.errors import InputError
from shared.io.images import list_images, read_rgb

__all__ = ["Frame", "VideoInfo", "read_frames", "read_info"]

# H.273 code points of matrices that swscale converts -> our name; 5 and 6 are the same numbers
MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
# our name -> the number by which swscale knows the matrix
SWS_MATRICES = {"bt709": 1, "fcc": 4, "bt601": 5, "smpte240m": 7, "bt2020": 9}
UNSPECIFIED = 2
# Without accurate rounding swscale is up to 4 levels off; into planes, unlike into packed RGB, it is fast even so.
TO_RGB = Interpolation.BILINEAR | Interpolation.ACCURATE_RND
GBR = (2, 0, 1)
MAX_PIXELS = 2**26  # of a frame: 8192 x 8192


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a film without decoding more than its first frame.

    Attributes:
        width: of a frame as it is read, rotation applied, px.
        height: likewise.
        frame_rate: frames per second on average; None for a folder of pictures.
        num_frames: as many as the file has packets; None where a packet is no frame (interlaced film, VP8).
        duration: from the first frame's start to the last frame's end, seconds; None for a folder.
        rotation: 0, 90, 180 or 270 degrees counter-clockwise that the file asks for; `read_frames` has applied them.
        pixel_format: FFmpeg's name, "yuv420p" say.
        color_range: "limited" (16 .. 235) or "full"; a guess where the film does not say.
        colorspace: "bt601", "bt709", "bt2020", "fcc", "smpte240m", or "rgb" for a film without chroma planes. A film
            that does not say is bt709 when it is wider than 1279 or taller than 576 px, else bt601.
        color_primaries: code point of ITU-T H.273; 2 is unspecified.
        color_transfer: likewise.
        sample_aspect_ratio: width of a pixel over its height, after rotation.
        codec: FFmpeg's name, "h264" say; for a folder the suffix of its first picture.
        has_audio: whether there is sound.
        variable_frame_rate: whether some interval between frames differs from the median by more than a quarter.
    """

    width: int
    height: int
    frame_rate: Fraction | None
    num_frames: int | None
    duration: Fraction | None
    rotation: int
    pixel_format: str
    color_range: str
    colorspace: str
    color_primaries: int
    color_transfer: int
    sample_aspect_ratio: Fraction
    codec: str
    has_audio: bool
    variable_frame_rate: bool


@dataclass(frozen=True)
class Frame:
    """One picture of a film.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, upright. The three planes lie one after another in memory, so
            `torch.from_numpy(pixels).permute(2, 0, 1)` is contiguous.
        time: seconds since the film's first frame; None in a folder of pictures.
        index: 0 for the film's first frame.
    """

    pixels: np.ndarray
    time: Fraction | None
    index: int


def read_info(path: str | os.PathLike) -> VideoInfo:
    """Describe a film, or a folder of pictures as a film. The file is read once, one frame is decoded.

    Raises:
        InputError: the file is missing, is no film we can decode, or holds no frame; the folder holds no picture.
    """
    path = Path(path)
    if path.is_dir():
        return folder_info(path)
    with open_film(path) as (container, stream):
        first, stamps, last_duration = None, [], None
        try:
            for packet in container.demux(stream):
                if first is None:
                    first = next(iter(packet.decode()), None)
                if packet.size and not packet.is_discard:
                    stamps.append(packet.dts if packet.pts is None else packet.pts)
                    last_duration = packet.duration
        except av.FFmpegError as error:
            # a film that breaks later is reported where it breaks, by `read_frames`
            if first is None:
                raise no_frames(path) from error
        if first is None:
            raise no_frames(path)
        rate, duration, varies = timing(stream, stamps, last_duration)
        height, width = (first.width, first.height) if turns_sideways(first) else (first.height, first.width)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        is_frame = stream.codec_context.codec.canonical_name != "vp8" and not first.interlaced_frame
        return VideoInfo(
            width=width,
            height=height,
            frame_rate=rate,
            num_frames=len(stamps) if is_frame else None,
            duration=duration,
            rotation=round(first.rotation / 90) * 90 % 360,
            pixel_format=first.format.name,
            color_range="full" if range_of(first) == ColorRange.JPEG else "limited",
            colorspace=matrix_of(first),
            color_primaries=int(first.color_primaries),
            color_transfer=int(first.color_trc),
            sample_aspect_ratio=1 / aspect if turns_sideways(first) else aspect,
            codec=stream.codec_context.codec.canonical_name,
            has_audio=bool(container.streams.audio),
            variable_frame_rate=varies,
        )


def read_frames(
    path: str | os.PathLike, start: int = 0, stop: int | None = None, *, allow_truncated: bool = False
) -> Iterator[Frame]:
    """Read a film, or a folder of pictures in natural order (2.png before 10.png), one frame after another.

    No more than a few frames are held at a time. Frames before `start` are decoded too, but not converted. Most codecs
    have no checksums: damage that leaves a decodable picture passes.

    Args:
        path: a video file, an animated GIF or PNG, or a folder of pictures.
        start: index of the first frame to give.
        stop: index after the last one; None reads to the end. Fewer frames come from a shorter film.
        allow_truncated: end quietly where a damaged or truncated film breaks.

    Raises:
        InputError: at once if there is nothing at `path`; at the first frame if it is no film or folder of pictures
            we can read; and, after every frame before it was given, at the frame where a film breaks or where a
            picture has another size than the first.
        ValueError: start and stop are no range.
    """
    path = Path(path)
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"read_frames needs 0 <= start <= stop, got {start}, {stop}")
    if path.is_dir():
        return folder_frames(path, start, stop)
    require_film(path)
    return film_frames(path, start, stop, allow_truncated)


def require_film(path: Path) -> None:
    """Refuse a path where no file with content is."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a video file or a folder of pictures")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes); copy or download it again")


@contextlib.contextmanager
def open_film(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and pick its film; a cover picture of a song is none."""
    require_film(path)
    try:
        container = av.open(path, metadata_errors="replace")
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is no film we can read, or is cut short ({reason(error)}); copy or download it again"
        ) from error
    with container:
        films = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not films:
            raise InputError(f"{path} holds no video; give a video file or a folder of pictures")
        if films[0].codec_context is None:
            raise InputError(f"{path} is coded in a way we cannot decode; convert it to H.264")
        width, height = films[0].codec_context.width, films[0].codec_context.height
        if width * height > MAX_PIXELS:
            raise InputError(f"{path} has frames of {width}x{height}, more than {MAX_PIXELS} pixels; scale it down")
        # a damaged stream may say otherwise than its container
        films[0].codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        yield container, films[0]


def reason(error: Exception) -> str:
    """What an FFmpeg error says, on one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def no_frames(path: Path) -> InputError:
    """The error for a film of which nothing can be shown."""
    return InputError(f"{path} holds no frame that can be decoded; copy or download it again")


def decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames in the order they are shown.

    Raises:
        av.FFmpegError: where the film breaks, after the whole frames shown before that place.
    """
    has_key = False
    for packet in container.demux(stream):
        # a recording may start between two key frames; what comes before the first cannot be decoded
        has_key = has_key or packet.is_keyframe or not packet.size
        if not has_key:
            continue
        broken, frames = None, []
        try:
            if packet.is_corrupt:
                raise av.InvalidDataError(0, "damaged packet")
            frames = packet.decode()
        except av.FFmpegError as error:
            broken = error
            # whole frames still wait in the decoder
            with contextlib.suppress(av.FFmpegError):
                waiting = stream.codec_context.decode(None)
                frames = [f for f in waiting if f.pts is None or packet.pts is None or f.pts < packet.pts]
        for frame in frames:
            if frame.is_corrupt:
                raise broken or av.InvalidDataError(0, "damaged picture")
            yield frame
        if broken:
            raise broken


def film_frames(path: Path, start: int, stop: int | None, allow_truncated: bool) -> Iterator[Frame]:
    """`read_frames` of a video file."""
    with open_film(path) as (container, stream):
        reformatter, index, origin, size = VideoReformatter(), 0, None, None
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        frames, what = decoded(container, stream), None
        while stop is None or index < stop:
            try:
                frame = next(frames, None)
            except av.FFmpegError as error:
                what = reason(error)
                break
            if frame is None:
                what = "the file ends too early" if is_cut_short(path) else None
                break
            time = stamp(container, stream, frame)
            if size is None:
                # once: a frame whose side data were looked at refers to itself and stays in memory
                origin, size, matrix = time, (frame.width, frame.height), display_matrix(frame)
            if (frame.width, frame.height) != size:
                raise InputError(
                    f"frame {index} of {path} is {frame.width}x{frame.height}, those before are {size[0]}x{size[1]}; "
                    "cut the film there"
                )
            if index >= start:
                time = index / rate if time is None or origin is None else time - origin
                yield Frame(to_rgb(frame, reformatter, matrix), time, index)
            index += 1
    if index == 0 and stop != 0:
        raise no_frames(path)
    if what and not allow_truncated:
        raise InputError(
            f"{path} is damaged or cut short at frame {index} ({what}); copy or download it again, "
            f"or allow truncated films to use the {index} frames before"
        )


def stamp(container: InputContainer, stream: VideoStream, frame: VideoFrame) -> Fraction | None:
    """The time a file gives to a frame, seconds; None in AVI, which numbers them as decoded, and raw streams."""
    if frame.pts is None or container.format.name == "avi":
        return None
    return frame.pts * stream.time_base


def to_rgb(frame: VideoFrame, reformatter: VideoReformatter, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A decoded frame as (H, W, 3) uint8, turned by a display matrix."""
    is_rgb = frame.format.is_rgb
    planar = reformatter.reformat(
        frame,
        format="gbrp",
        interpolation=TO_RGB,
        src_colorspace=None if is_rgb else SWS_MATRICES[matrix_of(frame)],
        src_color_range=None if is_rgb else range_of(frame),
        dst_color_range=ColorRange.JPEG,
    )
    pixels = np.empty((3, planar.height, planar.width), np.uint8)
    for channel, plane in zip(pixels, GBR, strict=True):
        channel[:] = plane_pixels(planar, plane)
    return np.ascontiguousarray(upright(pixels, matrix)).transpose(1, 2, 0)


def plane_pixels(frame: VideoFrame, index: int) -> np.ndarray:
    """One 8-bit plane of a frame as (H, W), without a copy: writing to it changes the frame."""
    plane = frame.planes[index]
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def matrix_of(frame: VideoFrame) -> str:
    """The name of the matrix between R'G'B' and Y'CbCr; for a film that does not say the usual one of its size."""
    if frame.format.is_rgb:
        return "rgb"
    usual = "bt709" if frame.width >= 1280 or frame.height > 576 else "bt601"
    return MATRICES.get(int(frame.colorspace), usual)


def range_of(frame: VideoFrame) -> ColorRange:
    """Limited or full range; RGB and JPEG's own formats are full, other films limited unless they say."""
    if frame.format.is_rgb or frame.format.name.startswith("yuvj"):
        return ColorRange.JPEG
    return ColorRange.JPEG if frame.color_range == ColorRange.JPEG else ColorRange.MPEG


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """Where the frame's x and y axes point when it is shown: (x to x, x to y, y to x, y to y), fixed point."""
    for data in frame.side_data:
        if data.type == Type.DISPLAYMATRIX:
            a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
            return a, b, c, d
    return 1, 0, 0, 1


def turns_sideways(frame: VideoFrame) -> bool:
    """Whether width and height change places when the frame is shown."""
    a, b, _, _ = display_matrix(frame)
    return abs(b) > abs(a)


def upright(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Apply a display matrix, to the nearest quarter turn with or without mirroring, to (C, H, W)."""
    a, b, c, d = matrix
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(1, 2), c, b
    return pixels[:, :: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def timing(stream: VideoStream, stamps: list[int | None], last_duration: int | None) -> tuple[Fraction, Fraction, bool]:
    """Average frame rate, duration in seconds, and whether the intervals differ, from the packets' time stamps."""
    named = stream.average_rate or stream.guessed_rate or Fraction(25)
    if len(stamps) < 2 or None in stamps or max(stamps) == min(stamps):
        return named, len(stamps) / named, False
    stamps = sorted(stamps)
    steps = [after - before for before, after in pairwise(stamps)]
    usual = median(steps)
    # one tick: a clock too coarse for the rate makes neighbours differ
    varies = any(abs(step - usual) > usual / 4 + 1 for step in steps)
    span = stamps[-1] - stamps[0]
    measured = len(steps) / (span * stream.time_base)
    # the header's 30000/1001 is exact where the stamps are rounded
    is_right = abs(named / measured - 1) <= Fraction(2, span) + Fraction(1, 1000)
    rate = named if is_right and not varies else measured
    duration = len(stamps) / rate if not varies else (span + (last_duration or usual)) * stream.time_base
    return rate, Fraction(duration), varies


def is_cut_short(path: Path) -> bool:
    """Whether a file ends before it says: the boxes of MP4 and MOV, the chunks of AVI, the segment of Matroska."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        if head[4:] in (b"ftyp", b"moov", b"mdat", b"moof", b"wide", b"free", b"skip"):
            return end_of_boxes(file, size) > size
        if head[:4] == b"RIFF":
            return end_of_chunks(file, size) > size
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return end_of_segment(file) > size
    return False


def end_of_boxes(file: BinaryIO, size: int) -> int:
    """Where the last box of an MP4 file ends (ISO/IEC 14496-12, 4.2)."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        # 0: up to the end of the file, whatever that is; less than a head: no box
        if length < 8:
            return size
        position += length
    return position


def end_of_chunks(file: BinaryIO, size: int) -> int:
    """Where the last RIFF chunk of an AVI file ends."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(8)
        if head[:4] != b"RIFF":
            return size
        position += 8 + int.from_bytes(head[4:], "little")
    return position


def end_of_segment(file: BinaryIO) -> int:
    """Where the segment of a Matroska file ends (RFC 8794, 4 and 5); 0 if it was left open."""
    file.seek(4)
    file.seek(ebml_size(file) or 0, os.SEEK_CUR)
    is_segment = file.read(4) == b"\x18\x53\x80\x67"
    length = ebml_size(file)
    return file.tell() + length if is_segment and length is not None else 0


def ebml_size(file: BinaryIO) -> int | None:
    """A number of variable length: as many zero bits before the first one as bytes follow; None if it is all ones."""
    first = file.read(1)
    num_following = 8 - first[0].bit_length() if first and first[0] else 0
    value = int.from_bytes(first + file.read(num_following), "big") & ((1 << 7 * (num_following + 1)) - 1)
    return None if value == (1 << 7 * (num_following + 1)) - 1 else value


def folder_info(folder: Path) -> VideoInfo:
    """`read_info` of a folder of pictures."""
    files = list_images(folder)
    height, width, _ = read_rgb(files[0]).shape
    return VideoInfo(
        width=width,
        height=height,
        frame_rate=None,
        num_frames=len(files),
        duration=None,
        rotation=0,
        pixel_format="rgb24",
        color_range="full",
        colorspace="rgb",
        color_primaries=UNSPECIFIED,
        color_transfer=UNSPECIFIED,
        sample_aspect_ratio=Fraction(1),
        codec=files[0].suffix.lower().removeprefix("."),
        has_audio=False,
        variable_frame_rate=False,
    )


def folder_frames(folder: Path, start: int, stop: int | None) -> Iterator[Frame]:
    """`read_frames` of a folder of pictures."""
    files = list_images(folder)
    first_shape = None
    for index, file in islice(enumerate(files), start, stop):
        pixels = read_rgb(file)
        first_shape = first_shape or (pixels if index == 0 else read_rgb(files[0])).shape
        if pixels.shape != first_shape:
            (height, width, _), (first_height, first_width, _) = pixels.shape, first_shape
            raise InputError(
                f"{file} is {width}x{height}, but {files[0].name} is {first_width}x{first_height}; "
                "give pictures of one size"
            )
        yield Frame(np.ascontiguousarray(pixels.transpose(2, 0, 1)).transpose(1, 2, 0), None, index)
