"""Small films that tests write and read back."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from shared.io.video import read_frames
from shared.io.video_writer import VideoWriter

SIZE = (32, 48)


class KilledError(Exception):
    """Stands for the loss of the process."""


def flat(levels: list[int] | range, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Frames (N, H, W, 3) uint8, each of one gray level."""
    return np.stack([np.full((*size, 3), level, np.uint8) for level in levels])


def noise(num: int, size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """Frames (N, H, W, 3) uint8 of independent pixels."""
    return np.random.default_rng(seed).integers(0, 256, (num, *size, 3), dtype=np.uint8)


def two_shots(seed: int = 3) -> np.ndarray:
    """Sixteen frames (72, 160), drifting noise; the later eight have no green."""
    wide = np.random.default_rng(seed).integers(60, 256, (2, 9, 40, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    wide[1, ..., 1] = 0
    return np.stack([shot[:, i : i + 160] for shot in wide for i in range(8)])


def write_film(path: Path, frames: np.ndarray, rate: Fraction | None = Fraction(24), times: list | None = None) -> Path:
    """Write frames (N, H, W, 3): .mkv without loss, else H.264; `times` in seconds for one without a rate."""
    codec = "ffv1" if path.suffix == ".mkv" else "h264"
    with VideoWriter(path, rate, frames.shape[1:3], codec=codec) as writer:
        for i, frame in enumerate(frames):
            writer.write(frame, *([times[i]] if times else []))
    return path


def write_folder(path: Path, frames: np.ndarray) -> Path:
    """Write frames (N, H, W, 3) as 1.png, 2.png ..."""
    path.mkdir()
    for i, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(path / f"{i}.png")
    return path


def pixels_of(path: Path) -> np.ndarray:
    """Read a film or a folder: (N, H, W, 3) uint8."""
    return np.stack([frame.pixels for frame in read_frames(path)])


def levels_of(path: Path) -> list[int]:
    """Read the mean level of each frame."""
    return pixels_of(path).mean((1, 2, 3)).round().astype(int).tolist()


def film_with_sound(path: Path, num: int = 12) -> Path:
    """Write half a second at 24 frames per second, levels 0, 20, 40 ..., with a tone."""
    with av.open(path, "w") as container:
        video, audio = container.add_stream("libx264", rate=24), container.add_stream("aac", rate=48000)
        video.height, video.width, video.pix_fmt = *SIZE, "yuv420p"
        for frame in flat(range(0, 20 * num, 20)):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(video.encode(None))
        tone = (8000 * np.sin(np.arange(num * 2000) / 20)).astype(np.int16).repeat(2)[None]
        tone = av.AudioFrame.from_ndarray(tone, "s16", "stereo")
        tone.sample_rate = 48000
        container.mux(audio.encode(tone))
        container.mux(audio.encode(None))
    return path


def sound_of(path: Path) -> list[tuple[float, bytes]]:
    """Read a film's sound: (seconds, packet)."""
    with av.open(path) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
        return [(round(float(packet.pts * packet.time_base), 3), bytes(packet)) for packet in packets]
