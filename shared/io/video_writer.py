"""Films out: H.264, HEVC or lossless FFV1 with the sound of another film, or a folder of numbered PNG files.

What is written appears only when it is complete. `SegmentWriter` also survives being killed: it goes on where it was.
Reading is in `shared.io.video`.
"""

import contextlib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import av
import imagecodecs
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from shared.errors import InputError
from shared.io.files import atomic_path, write_json
from shared.io.video import (
    GBR,
    MATRICES,
    SWS_MATRICES,
    VideoInfo,
    decoded,
    open_film,
    plane_pixels,
    reason,
    require_film,
    stamp,
)

__all__ = ["SegmentWriter", "VideoWriter"]

Codec = Literal["h264", "hevc", "ffv1"]
# codec -> FFmpeg's encoder, suffixes of files that hold it
CODECS = {
    "h264": ("libx264", (".mp4", ".mov", ".mkv")),
    "hevc": ("libx265", (".mp4", ".mov", ".mkv")),
    "ffv1": ("ffv1", (".mkv", ".avi")),
}
# in smaller pictures libx265 uses memory that is not its own: results vary from run to run, some end in a crash
MIN_HEVC_SIZE = 128
BT709 = 1
# Averages the chroma of four pixels; flat colours come back within 2 levels, within 4 with a bicubic filter.
FROM_RGB = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
# for frames at any time: the clock of MPEG, which counts the common frame rates exactly
CLOCK = Fraction(1, 90_000)
AAC_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
FRAME_FILE = re.compile(r"\d{8}\.png")


class VideoWriter:
    """Writes frames as a film, or as 00000000.png, 00000001.png ... into a folder; a context manager.

    A film appears under its name only when the `with` block ends well; in a folder each picture appears when it is
    complete. H.264 and HEVC are written as 4:2:0, of odd sizes as 4:4:4, which keeps every row and column but not
    every player shows; FFV1 as RGB without any loss. Pixels are converted by the matrix and range of `like`, or
    BT.709, limited, and the film says so.

    Args:
        path: ends in .mp4, .mov, .mkv, or for FFV1 .mkv, .avi; a name without a suffix is a folder. Missing folders
            are made.
        frame_rate: frames per second; None for a film with frames at any time.
        size: (height, width), px.
        like: a film whose colour range, matrix, primaries, transfer and pixel shape the new one takes over.
        audio_from: a file whose sound is copied whole, with its time relative to the first frame; where the new
            file cannot hold it as it is, it is encoded again as AAC. A folder has no sound.
        codec: "h264", "hevc" or "ffv1".
        quality: constant rate factor of H.264 and HEVC, 0 (best) .. 51.
        first: index of the first frame: the number of its picture file, and times frame duration when it is shown.

    Raises:
        InputError: unknown suffix, codec that the suffix or size does not allow, missing `audio_from`, no frame
            written, a folder that cannot be written, a full disk.
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        frame_rate: Fraction | int | None,
        size: tuple[int, int],
        *,
        like: VideoInfo | None = None,
        audio_from: str | os.PathLike | None = None,
        codec: Codec = "h264",
        quality: int = 16,
        first: int = 0,
    ):
        self.path, self.size, self.like, self.codec, self.quality = Path(path), tuple(size), like, codec, quality
        self.frame_rate = None if frame_rate is None else Fraction(frame_rate)
        self.audio_from = None if audio_from is None else Path(audio_from)
        self.index, self.num_written, self.last_tick = first, 0, None
        self.is_folder = names_folder(self.path)
        if min(self.size) < 1 or not 0 <= quality <= 51 or first < 0 or (frame_rate is not None and frame_rate <= 0):
            raise ValueError(
                f"VideoWriter needs positive size and frame rate, quality 0 .. 51, first >= 0; "
                f"got {self.size}, {frame_rate}, {quality}, {first}"
            )
        if not self.is_folder:
            check_codec(self.path, codec, self.size)
        if self.audio_from is not None:
            require_film(self.audio_from)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            if self.is_folder:
                make_folder(self.path)
            else:
                self.open(stack)
            stack.push(self.finish)
            self.stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stack.__exit__(kind, error, traceback)

    def open(self, stack: contextlib.ExitStack) -> None:
        """Open the film and its encoder."""
        self.time_base = CLOCK if self.frame_rate is None else 1 / self.frame_rate
        self.reformatter = VideoReformatter()
        self.container = stack.enter_context(film_file(self.path, self.time_base))
        self.stream, self.conversion = self.add_video()
        self.audio = AudioTrack(self.audio_from, self.container, self.path) if self.audio_from else None
        if self.audio:
            stack.callback(self.audio.close)

    def add_video(self) -> tuple[VideoStream, dict[str, int]]:
        """The film's stream with its encoder set up, and how to convert RGB for it."""
        encoder, _ = CODECS[self.codec]
        stream = self.container.add_stream(encoder, rate=self.frame_rate, options=self.encoder_options())
        context = stream.codec_context
        context.height, context.width = self.size
        context.time_base = self.time_base
        range_, matrix, context.color_primaries, context.color_trc, aspect = colours_of(self.like)
        context.sample_aspect_ratio = aspect
        if self.codec == "ffv1":
            context.pix_fmt, context.gop_size = "bgr0", 1
            return stream, {}
        context.pix_fmt = "yuv444p" if any(length % 2 for length in self.size) else "yuv420p"
        context.color_range, context.colorspace = range_, next(key for key, name in MATRICES.items() if name == matrix)
        if self.codec == "hevc" and self.path.suffix.lower() != ".mkv":
            # the name under which Apple's players know it
            context.codec_tag = "hvc1"
        return stream, {"dst_color_range": range_, "dst_colorspace": SWS_MATRICES[matrix]}

    def encoder_options(self) -> dict[str, str]:
        """Options of the encoder; frames at any time are not reordered, else the last one would lose its time."""
        is_variable = self.frame_rate is None
        match self.codec:
            case "ffv1":
                return {"level": "3", "slicecrc": "1"}
            case "hevc":
                params = "log-level=error" + (":bframes=0" if is_variable else "")
                return {"crf": str(self.quality), "x265-params": params}
            case _:
                return {"crf": str(self.quality)} | ({"bf": "0"} if is_variable else {})

    def write(self, pixels: np.ndarray, time: Fraction | None = None) -> None:
        """Write the next frame.

        Args:
            pixels: (H, W, 3) uint8 RGB.
            time: seconds, later than the frame before; given exactly when the film has no frame rate.

        Raises:
            InputError: the disk is full or the encoder fails.
            ValueError: another shape or dtype, a time too much, missing or not later.
        """
        if pixels.dtype != np.uint8 or pixels.shape != (*self.size, 3):
            raise ValueError(f"write needs uint8 {(*self.size, 3)}, got {pixels.dtype} {pixels.shape}")
        if self.is_folder:
            with atomic_path(self.path / f"{self.index:08d}.png") as temporary:
                temporary.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels)))
        else:
            self.encode(pixels, time)
        self.index += 1
        self.num_written += 1

    def encode(self, pixels: np.ndarray, time: Fraction | None) -> None:
        """Write a frame of a film, and the sound up to it."""
        if (time is None) == (self.frame_rate is None):
            raise ValueError("a frame needs a time exactly when the film has no frame rate")
        tick = self.index if time is None else round(time / self.time_base)
        if self.last_tick is not None and tick <= self.last_tick:
            raise ValueError(f"frame {self.index} at {float(time):.6f} s is not later than the frame before")
        self.last_tick = tick
        frame = self.reformatter.reformat(
            as_planes(pixels),
            format=self.stream.pix_fmt,
            interpolation=FROM_RGB,
            src_color_range=ColorRange.JPEG,
            **self.conversion,
        )
        frame.pts, frame.time_base = tick, self.time_base
        if self.audio:
            self.audio.copy_until(tick * self.time_base)
        self.container.mux(self.stream.encode(frame))

    def finish(self, kind: type[BaseException] | None, *_) -> None:
        """Write what the encoder still holds and the rest of the sound, unless something failed."""
        if kind is not None:
            return
        if not self.num_written:
            raise no_input(self.path)
        if not self.is_folder:
            self.container.mux(self.stream.encode(None))
            if self.audio:
                self.audio.copy_until(None)


class SegmentWriter:
    """Writes frames like `VideoWriter`, and keeps what is done when it is killed; a context manager.

    Frames go into complete films of `segment_size` frames in `<path>.parts/`, which become one film at the end by
    copying packets, without encoding again. After a kill `finished_frames()` says how many frames of the film need
    not be computed again; go on writing with that frame.

    Args:
        path, frame_rate, size, like, audio_from, codec, quality: as `VideoWriter`.
        segment_size: frames that at most are lost when killed; each segment starts with a costly key frame.
        made_from: what the frames depend on (names of the source and of the weights, say); segments made from
            something else are not taken up.

    Raises:
        InputError: as `VideoWriter`; segments of other settings are there; a folder holds frames of another run.
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        frame_rate: Fraction | int | None,
        size: tuple[int, int],
        *,
        like: VideoInfo | None = None,
        audio_from: str | os.PathLike | None = None,
        codec: Codec = "h264",
        quality: int = 16,
        segment_size: int = 240,
        made_from: str = "",
    ):
        if segment_size < 1:
            raise ValueError(f"segment_size must be positive, got {segment_size}")
        self.path, self.segment_size = Path(path), segment_size
        self.audio_from = None if audio_from is None else Path(audio_from)
        whole = self.path.absolute()
        self.parts = whole.with_name(f"{whole.name}.parts")
        self.options = {"like": like, "codec": codec, "quality": quality}
        self.frame_rate, self.size = frame_rate, size
        # made only for its checks
        VideoWriter(path, frame_rate, size, audio_from=audio_from, **self.options)
        self.settings = {
            "frame_rate": str(frame_rate),
            "size": list(size),
            "codec": codec,
            "quality": quality,
            "colours": [str(value) for value in colours_of(like)],
            "made_from": made_from,
        }
        self.check_settings()
        self.index, self.segment = self.finished_frames(), None

    def check_settings(self) -> None:
        """Refuse to go on with what other settings have begun."""
        begun = frame_files(self.path) if names_folder(self.path) else self.finished_parts()
        if not begun:
            return
        file = self.parts / "settings.json"
        if not file.is_file():
            raise InputError(f"{self.path} holds the frames of another run; delete them or choose another OUTPUT")
        try:
            found = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{file} is damaged; delete {self.parts} to start again") from error
        if other := [key for key, value in self.settings.items() if found.get(key) != value]:
            raise InputError(
                f"{self.parts} was begun with another {' and '.join(other)}; delete it to start again, "
                "or use the same settings"
            )

    def finished_frames(self) -> int:
        """How many frames are written for good, counted from the film's first."""
        if names_folder(self.path):
            numbers = {int(file.stem) for file in frame_files(self.path)}
            return next(i for i in range(len(numbers) + 1) if i not in numbers)
        return sum(self.finished_parts().values())

    def finished_parts(self) -> dict[Path, int]:
        """The segments in order, each with the number of its frames."""
        found = {}
        while count := num_packets(part := self.part(sum(found.values()))):
            found[part] = count
        return found

    def part(self, start: int) -> Path:
        """The file of the segment that starts with this frame; MP4 keeps every time exactly, but not FFV1."""
        return self.parts / f"{start:08d}{'.mkv' if self.options['codec'] == 'ffv1' else '.mp4'}"

    def __enter__(self) -> Self:
        write_json(self.parts / "settings.json", self.settings)
        return self

    def write(self, pixels: np.ndarray, time: Fraction | None = None) -> None:
        """Write the next frame, as `VideoWriter.write`; the first one is number `finished_frames()`."""
        if self.segment is None:
            self.segment = self.next_segment().__enter__()
        self.segment.write(pixels, time)
        self.index += 1
        if self.segment.num_written == self.segment_size:
            self.close_segment()

    def next_segment(self) -> VideoWriter:
        """A writer for the frames that come now."""
        if names_folder(self.path):
            return VideoWriter(self.path, self.frame_rate, self.size, first=self.index)
        return VideoWriter(self.part(self.index), self.frame_rate, self.size, first=self.index, **self.options)

    def close_segment(self, *failure) -> None:
        """Complete the open segment, or drop it when something failed."""
        segment, self.segment = self.segment, None
        segment.__exit__(*(failure or (None, None, None)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.segment is not None:
            self.close_segment(kind, error, traceback)
        if kind is not None or not self.index:
            # nothing is done that would be worth keeping
            if not self.finished_frames():
                shutil.rmtree(self.parts, ignore_errors=True)
            if kind is None:
                raise no_input(self.path)
            return
        if not names_folder(self.path):
            join(list(self.finished_parts()), self.path, self.frame_rate, self.audio_from)
        shutil.rmtree(self.parts, ignore_errors=True)


def names_folder(path: Path) -> bool:
    """Whether frames written to this path become files in a folder."""
    return path.is_dir() or not path.suffix


def frame_files(folder: Path) -> list[Path]:
    """The numbered pictures of a folder, in any order."""
    return [file for file in folder.iterdir() if FRAME_FILE.fullmatch(file.name)] if folder.is_dir() else []


def make_folder(path: Path) -> None:
    """Make a folder unless it is there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose a folder you may write to") from error


def no_input(path: Path) -> InputError:
    """The error for a film without frames."""
    return InputError(f"cannot write {path}: there are no frames; give a longer film")


def check_codec(path: Path, codec: str, size: tuple[int, int]) -> None:
    """Refuse a suffix we do not write, and a codec that does not fit it or the size."""
    if codec not in CODECS:
        raise InputError(f"unknown codec {codec!r}; choose one of {', '.join(CODECS)}")
    suffixes = CODECS[codec][1]
    if path.suffix.lower() not in suffixes:
        raise InputError(
            f"cannot write {path} as {codec}: end the name with one of {', '.join(suffixes)}, "
            "or give a folder, a name without a suffix"
        )
    if codec == "hevc" and min(size) < MIN_HEVC_SIZE:
        raise InputError(f"cannot write {path}: hevc needs {MIN_HEVC_SIZE} px a side; choose codec h264")


def colours_of(like: VideoInfo | None) -> tuple[ColorRange, str, int, int, Fraction]:
    """Range, matrix, primaries, transfer and pixel shape of a new film; those of RGB say nothing of its chroma."""
    if like is None:
        return ColorRange.MPEG, "bt709", BT709, BT709, Fraction(1)
    if like.colorspace == "rgb":
        return ColorRange.MPEG, "bt709", BT709, BT709, like.sample_aspect_ratio
    range_ = ColorRange.JPEG if like.color_range == "full" else ColorRange.MPEG
    return range_, like.colorspace, like.color_primaries, like.color_transfer, like.sample_aspect_ratio


def as_planes(pixels: np.ndarray) -> VideoFrame:
    """(H, W, 3) uint8 as a frame of three planes."""
    frame = VideoFrame(pixels.shape[1], pixels.shape[0], "gbrp")
    for channel, plane in enumerate(GBR):
        plane_pixels(frame, plane)[:] = pixels[..., channel]
    return frame


@contextlib.contextmanager
def film_file(path: Path, time_base: Fraction) -> Iterator[OutputContainer]:
    """A film that appears under its name when the block ends well.

    Raises:
        InputError: it cannot be written.
    """
    # MP4 notes delays in this unit, by default thousandths of a second: too coarse to find a frame's time again
    unit = time_base.denominator * -(-90_000 // time_base.denominator)
    options = {"movie_timescale": str(unit)} if path.suffix.lower() in (".mp4", ".mov") else {}
    with atomic_path(path) as temporary:
        try:
            with av.open(temporary, "w", container_options=options) as container:
                yield container
        except av.FFmpegError as error:
            raise InputError(
                f"cannot write {path}: {reason(error)}; free disk space or try another codec or suffix"
            ) from error


def num_packets(path: Path) -> int:
    """How many frames a segment holds; 0 if it is not there."""
    if not path.is_file():
        return 0
    with open_film(path) as (container, stream):
        return stream.frames or sum(packet.size > 0 for packet in container.demux(stream))


def join(parts: list[Path], path: Path, frame_rate: Fraction | int | None, audio_from: Path | None) -> None:
    """Make one film of segments whose frames carry the film's times, by copying packets.

    Raises:
        InputError: a segment is damaged or was encoded otherwise; the film cannot be written.
    """
    with contextlib.ExitStack() as stack:
        _, like = stack.enter_context(open_film(parts[0]))
        container = stack.enter_context(film_file(path, like.time_base))
        stream = container.add_stream_from_template(like)
        if frame_rate is not None:
            # else Matroska says none, and readers guess it from times rounded to milliseconds
            stream.codec_context.framerate = Fraction(frame_rate)
        if like.codec_context.codec_tag == "hvc1" and path.suffix.lower() != ".mkv":
            stream.codec_context.codec_tag = "hvc1"
        audio = stack.enter_context(contextlib.closing(AudioTrack(audio_from, container, path))) if audio_from else None
        for part in parts:
            with open_film(part) as (source, segment):
                if segment.codec_context.extradata != like.codec_context.extradata:
                    raise InputError(f"{part} was encoded otherwise than {parts[0]}; delete {part.parent}")
                for packet in source.demux(segment):
                    # the last one is empty
                    if packet.size:
                        if audio:
                            audio.copy_until(packet.pts * packet.time_base)
                        packet.stream = stream
                        container.mux(packet)
        if audio:
            audio.copy_until(None)


class AudioTrack:
    """The sound of one file on its way into another, packet by packet beside the pictures.

    Args:
        source: a file with sound, or without; then nothing is copied.
        container: the new film, before its first packet.
        path: its name, for the warning that it cannot hold the sound.
    """

    def __init__(self, source: Path, container: OutputContainer, path: Path):
        self.container, self.name = container, source
        self.origin = first_time(source)
        self.targets: dict[int, AudioStream] = {}
        self.encoded: set[int] = set()
        try:
            self.source = av.open(source)
            for stream in self.source.streams.audio:
                self.add(stream, path)
        except av.FFmpegError as error:
            raise InputError(f"{source} holds no sound we can read ({reason(error)}); leave the sound out") from error
        self.waiting = self.packets()
        self.next = next(self.waiting, None)

    def close(self) -> None:
        """Close the source."""
        self.source.close()

    def add(self, stream: AudioStream, path: Path) -> None:
        """Give the new film a stream for one of the source: the same, or AAC, or with a warning none."""
        # AVI has no times: sound that starts later than the pictures would come too early
        if path.suffix.lower() == ".avi" or stream.codec_context is None:
            warnings.warn(f"{path} cannot hold the sound of {self.name}; it is left out", stacklevel=2)
        elif takes(self.container.format.name, self.name, stream.index):
            self.targets[stream.index] = self.container.add_stream_from_template(stream)
        else:
            rate = stream.rate if stream.rate in av.Codec("aac", "w").audio_rates else 48_000
            layout = AAC_LAYOUTS.get(stream.channels, "stereo")
            self.targets[stream.index] = self.container.add_stream("aac", rate=rate, layout=layout)
            self.targets[stream.index].bit_rate = 96_000 * self.targets[stream.index].channels
            self.encoded.add(stream.index)

    def packets(self) -> Iterator[tuple[Fraction, list[Packet]]]:
        """Packets of the new film, each with the time from which it is heard."""
        streams = [self.source.streams[index] for index in self.targets]
        try:
            for packet in self.source.demux(streams) if streams else ():
                yield from self.converted(packet)
        except av.FFmpegError as error:
            warnings.warn(f"the sound of {self.name} breaks off ({reason(error)})", stacklevel=2)

    def converted(self, packet: Packet) -> Iterator[tuple[Fraction, list[Packet]]]:
        """What becomes of one packet; the empty one at the end empties the encoder."""
        index = packet.stream.index
        target = self.targets[index]
        if index not in self.encoded:
            if packet.dts is not None:
                delay = round(self.origin / packet.time_base)
                packet.dts -= delay
                packet.pts = packet.dts if packet.pts is None else packet.pts - delay
                packet.stream = target
                yield packet.pts * packet.time_base, [packet]
            return
        for frame in packet.decode():
            if frame.pts is not None:
                frame.pts -= round(self.origin / packet.time_base)
                yield frame.pts * packet.time_base, target.encode(frame)
        if not packet.size:
            yield Fraction(0), target.encode(None)

    def copy_until(self, time: Fraction | None) -> None:
        """Write the sound that begins up to `time`, seconds; None: all that is left."""
        while self.next is not None and (time is None or self.next[0] <= time):
            self.container.mux(self.next[1])
            self.next = next(self.waiting, None)


def takes(file_format: str, source: Path, index: int) -> bool:
    """Whether a format holds a stream as it is; tried out, because some refuse only when the file is closed."""
    try:
        with av.open(source) as film, av.open(io.BytesIO(), "w", format=file_format) as trial:
            stream = trial.add_stream_from_template(film.streams[index])
            for packet in islice(film.demux(film.streams[index]), 8):
                if packet.dts is not None:
                    packet.stream = stream
                    trial.mux(packet)
    except (ValueError, av.FFmpegError):
        return False
    return True


def first_time(path: Path) -> Fraction:
    """The time that a file gives to its first frame, seconds; 0 for one without pictures."""
    try:
        with open_film(path) as (container, stream):
            frame = next(decoded(container, stream), None)
            return (stamp(container, stream, frame) if frame else None) or Fraction(0)
    except (InputError, av.FFmpegError):
        return Fraction(0)
