"""Blurry videos as people have them on disk: Adobe240, GoPro, YouTube240 and Sony, in the folders of the BIN benchmark.

    <root>/test/<video>/00001.png            every sharp frame, 240 or 250 a second
    <root>/test_blur/<video>/00017.png       blurry frames, each named by the sharp frame that it is centred at
    <root>/test_list/<video>_im_list.txt     names of the blurry frames, one a line

and `train`, `train_blur`, `train_list` likewise. Without a list all blurry frames of the folder count; without blurry
frames they are made of the sharp ones when they are asked for (blur.py writes them once and for all, which is faster).
A window is n consecutive blurry frames; for B_0 = 00025 the sharp frame at step 3 is 00028 (protocol of DeMFI; Oh and
Kim, ECCV 2022, on the data of Shen et al., CVPR 2020).
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from shared.errors import InputError
from shared.io.images import read_rgb
from shared.io.shots import find_cuts
from shared.io.video import read_frames

from .blur import Blur, Frames, PictureFiles, reduced

HOW_TO_GET = {
    "adobe240": "follow github.com/laomao0/BIN to get Adobe240, or extract the videos of Adobe240 at 640x352 and run "
    "python -m projects.bvfi.blur; then set data.root to Adobe_240fps_blur",
    "youtube240": "ask the authors of BIN (github.com/laomao0/BIN) for YouTube240 and set data.root to its folder",
    "gopro": "unpack GOPRO_Large_all of https://seungjunnah.github.io/Datasets/gopro and set data.root to the folder "
    "with train and test",
    "sony": "get the Sony videos of Jin et al. 2019 (github.com/MeiguangJin/slow-motion), extract every frame into "
    "test/<video>/00000.png ... and set data.root",
}
# folder that an archive holds, where data.root may stop above it
INNER = {"adobe240": "Adobe_240fps_blur", "gopro": "GOPRO_Large_all"}
SMALLEST = 11  # side of a film once reduced, px; SSIM needs as many
NUMBERED = re.compile(r"(\d+)(\.png|\.jpg|\.jpeg)", re.IGNORECASE)


@dataclass(frozen=True)
class Window:
    """Consecutive blurry frames, and what is between the two in the middle.

    Attributes:
        name: of the window within its set.
        scene: the video it is of.
        is_last: whether it is the video's last window.
        frames: (n, H, W, 3) uint8, consecutive blurry frames, n even; the two in the middle are at times 0 and 1.
        times: (T,) float32 in (0, 1), ascending.
        targets: (T + 2, H, W, 3) uint8, the sharp frames at 0, the times, and 1.
        blurry_targets: (T, H, W, 3) uint8, blurry frames at the times, or None.
        flows: (T, 4, H, W) float32 px, from each time to 0 (u, v) and to 1 (u, v), or None.
        visibility: (T, 2, H, W) bool, whether what is seen at the time is seen at 0, and at 1, or None.
    """

    name: str
    scene: str
    is_last: bool
    frames: np.ndarray
    times: np.ndarray
    targets: np.ndarray
    blurry_targets: np.ndarray | None = None
    flows: np.ndarray | None = None
    visibility: np.ndarray | None = None


@dataclass(frozen=True)
class Numbered:
    """A folder of pictures <number>.png.

    Attributes:
        folder: where they are.
        digits: of each name, leading zeros included.
        suffix: ".png", say.
        numbers: ascending, a range where none is missing in between.
    """

    folder: Path
    digits: int
    suffix: str
    numbers: Sequence[int]

    def path(self, number: int) -> Path:
        """File of a number."""
        return self.folder / f"{number:0{self.digits}}{self.suffix}"


def numbered(folder: Path, cure: str) -> Numbered:
    """List the numbered pictures of a folder.

    Raises:
        InputError: the folder is missing or holds none, or their names have different lengths or endings.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; {cure}")
    found = [match.groups() for name in os.listdir(folder) if (match := NUMBERED.fullmatch(name))]
    if not found:
        raise InputError(f"{folder} holds no numbered pictures; {cure}")
    kinds = {(len(number), suffix) for number, suffix in found}
    if len(kinds) > 1:
        raise InputError(f"{folder} mixes names of different lengths or endings; name all as 00001.png, or {cure}")
    (digits, suffix), numbers = kinds.pop(), sorted(int(number) for number, _ in found)
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        numbers = range(numbers[0], numbers[-1] + 1)
    return Numbered(folder, digits, suffix, numbers)


def subfolders(folder: Path, cure: str) -> list[str]:
    """Names of the folders in a folder, sorted.

    Raises:
        InputError: the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; {cure}")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not found:
        raise InputError(f"{folder} is empty; {cure}")
    return found


def read_list(path: Path, cure: str) -> list[int]:
    """Read the numbers of the frames that a list names, in its order; folders before a name are passed over.

    Raises:
        InputError: the list is no text, empty, or a line is not the name of a numbered picture.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text; {cure}") from error
    names = [re.split(r"[/\\]", line)[-1] for line in lines if line]
    if not names:
        raise InputError(f"{path} is empty; {cure}")
    for name in names:
        if not NUMBERED.fullmatch(name):
            raise InputError(f"{path} names {name!r}, which is no numbered picture; {cure}")
    return [int(NUMBERED.fullmatch(name)[1]) for name in names]


@dataclass(frozen=True)
class Video:
    """A video in folders; no pixel is read before it is asked for.

    Attributes:
        name: of the video.
        sharp: its sharp frames, numbered without a gap.
        blurry: its blurry frames, or None to make them of the sharp ones.
        shift: number of a blurry frame's centre less the number in its name.
        centers: numbers of the sharp frames at which the blurry ones are centred, `stride` apart.
    """

    name: str
    sharp: Numbered
    blurry: Numbered | None
    shift: int
    centers: Sequence[int]

    @property
    def place(self) -> Path:
        """Where it and its like are."""
        return self.sharp.folder.parent

    def label(self, center: int) -> str:
        """Name of the window whose B_0 is centred at this sharp frame."""
        return f"{self.name}_{center - self.shift:0{self.sharp.digits}}"

    def open(self) -> "SharpFrames":
        """Its sharp frames, by their numbers."""
        return SharpFrames(self.sharp.path)

    def blurry_frames(self, centers: Sequence[int], blur: Blur, sharp: Frames) -> list[np.ndarray]:
        """Blurry frames (H, W, 3) uint8 at these centres, read or made."""
        if self.blurry is None:
            return list(blur.average(sharp, centers))
        return [read_rgb(self.blurry.path(center - self.shift)) for center in centers]


@dataclass(frozen=True)
class Film:
    """A film of one shot, held in memory, whose neighbouring frames differ by so little that they can be averaged.

    Attributes:
        place: its file.
        pixels: (n, H, W, 3) uint8.
        centers: indices of the frames at which the blurry ones are centred.
    """

    place: Path
    pixels: np.ndarray
    centers: Sequence[int]

    @property
    def name(self) -> str:
        """Name of the film."""
        return self.place.stem

    def label(self, center: int) -> str:
        """Name of the window whose B_0 is centred at this frame."""
        return f"{self.name}_{center:05}"

    def open(self) -> np.ndarray:
        """Its frames."""
        return self.pixels

    def blurry_frames(self, centers: Sequence[int], blur: Blur, sharp: Frames) -> list[np.ndarray]:
        """Blurry frames (H, W, 3) uint8 at these centres."""
        return list(blur.average(sharp, centers))


def read_film(path: str | os.PathLike, blur: Blur, repeats: Sequence[int], reduce: int) -> Film:
    """Read a film whose frames are to be averaged.

    Args:
        path: a film or a folder of pictures.
        blur: how.
        repeats: indices of frames that repeat the one before and are left out.
        reduce: whole factor by which frames are reduced, means of pixels, from 1.

    Raises:
        InputError: as `read_frames`; or a film with a cut, or reduced to fewer than 11 px a side.
    """
    left_out = set(repeats)
    frames = [
        np.floor(reduced(frame.pixels, reduce) + 0.5).astype(np.uint8)
        for i, frame in enumerate(read_frames(path))
        if i not in left_out
    ]
    if min(frames[0].shape[:2]) < SMALLEST:
        sizes = f"{frames[0].shape[1]}x{frames[0].shape[0]}"
        raise InputError(f"{path} has {sizes} pixels once reduced by {reduce}; set data.reduce lower")
    if cuts := find_cuts(frames):
        raise InputError(f"{path} cuts at frame {cuts[0]}, and blur would mix two shots; give a film of one shot")
    return Film(Path(path), np.stack(frames), blur.centers(len(frames)))


def read_video(root: Path, split: str, name: str, blur: Blur, cure: str) -> Video:
    """Find a video's frames.

    Args:
        root: see the head of the file.
        split: "train" or "test".
        name: of the video.
        blur: how blurry frames were made, or are to be.
        cure: how to get the data set.

    Raises:
        InputError: names the folder or file that is missing, or frames that do not follow one another as they should.
    """
    sharp = numbered(root / split / name, cure)
    if not isinstance(sharp.numbers, range):
        gap = next(number for number, following in pairwise(sharp.numbers) if following > number + 1) + 1
        raise InputError(f"no file {sharp.path(gap)}; {cure}")
    first = sharp.numbers[0]
    # names of protocol uti count the sharp frames from 0, whatever their own names
    shift = first if blur.protocol == "uti" else 0
    folder, listed = root / f"{split}_blur" / name, root / f"{split}_list" / f"{name}_im_list.txt"
    blurry = numbered(folder, cure) if folder.parent.is_dir() else None
    if listed.is_file():
        names = read_list(listed, cure)
    elif blurry is not None:
        names = list(blurry.numbers)
    else:
        names = [first + center - shift for center in blur.centers(len(sharp.numbers))]
    for number in names if blurry is not None else ():
        if number not in blurry.numbers:
            raise InputError(f"no file {blurry.path(number)}; {cure}")
    centers = [number + shift for number in names]
    for center, following in pairwise(centers):
        if following != center + blur.stride:
            raise InputError(
                f"{folder}: blurry frame {following - shift} follows {center - shift}, not {blur.stride} sharp frames "
                f"after it; set data.blur.stride, or {cure}"
            )
    # between two blurry frames every sharp one is a target; made blur reaches further
    reach = (blur.before, blur.window - 1 - blur.before) if blurry is None else (0, 0)
    for number in (centers[0] - reach[0], centers[-1] + reach[1]) if centers else ():
        if number not in sharp.numbers:
            raise InputError(f"no file {sharp.path(number)}; {cure}")
    return Video(name, sharp, blurry, shift, centers)


def read_videos(root: str | os.PathLike, split: str, kind: str, blur: Blur) -> list[Video]:
    """Find all videos of a side of the split, sorted by name.

    Args:
        root: see the head of the file; it may stop above the folder that the archive holds.
        split: "train" or "test".
        kind: "adobe240", "youtube240", "gopro" or "sony", to say how to get what is missing.
        blur: how blurry frames were made, or are to be.

    Raises:
        InputError: names what is missing.
    """
    cure, root = HOW_TO_GET[kind], Path(root)
    inner = INNER.get(kind)
    if inner is not None and not (root / split).is_dir() and (root / inner).is_dir():
        root = root / inner
    lists = sorted((root / f"{split}_list").glob("*_im_list.txt"))
    names = [path.name.removesuffix("_im_list.txt") for path in lists] or subfolders(root / split, cure)
    return [read_video(root, split, name, blur, cure) for name in names]


class VideoWindows:
    """Windows of `num_inputs` consecutive blurry frames of videos, in the order of time.

    Args:
        videos: to take them of.
        num_inputs: blurry frames of a window, n, even.
        blur: see `read_video`.
        edge: "drop" leaves out windows that reach beyond a video's ends, so that L blurry frames give L - n + 1; with
            "clamp" the first and the last frame are repeated instead, L - 1 windows.
        cure: how to get the data set.
        per_video: of each video only so many windows, at equal distances, the first and the last among them; None takes
            all.
        with_blurry_targets: make blurry frames at the times.

    Raises:
        InputError: no window in any video; when read, frames of different sizes.
    """

    def __init__(
        self, videos: Sequence[Video], num_inputs: int, blur: Blur, edge: str, cure: str, per_video: int | None = None,
        with_blurry_targets: bool = False,
    ):  # fmt: skip
        half = num_inputs // 2
        rim = half - 1 if edge == "drop" else 0
        self.places: list[tuple[Video | Film, int, bool]] = []
        for video in videos:
            starts = range(rim, len(video.centers) - 1 - rim)
            chosen = starts
            if per_video is not None and per_video < len(starts):
                chosen = [starts[i] for i in np.linspace(0, len(starts) - 1, per_video).round().astype(int)]
            self.places += [(video, i, i == starts[-1]) for i in chosen]
        if not self.places:
            raise InputError(
                f"no video in {videos[0].place} has {num_inputs} blurry frames in a row; give longer ones, or {cure}"
            )
        self.num_inputs, self.blur, self.cure, self.stride = num_inputs, blur, cure, blur.stride
        self.with_blurry_targets = with_blurry_targets

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int, steps: Sequence[int]) -> Window:
        """Read a window with the sharp frames at these steps between B_0 and B_1, 1 .. stride - 1, ascending.

        A sharp frame that is asked for several times, as averages do, is read once.
        """
        video, i, is_last = self.places[index]
        half, last = self.num_inputs // 2, len(video.centers) - 1
        inputs = [video.centers[min(max(j, 0), last)] for j in range(i - half + 1, i + half + 1)]
        steps, start = list(steps), video.centers[i]
        name, sharp = video.label(start), video.open()
        frames = video.blurry_frames(inputs, self.blur, sharp)
        targets = [self.blur.sharp(sharp[start + step]) for step in (0, *steps, self.stride)]
        blurry_targets = None
        if self.with_blurry_targets:
            made = list(self.blur.average(sharp, [start + step for step in steps]))
            blurry_targets = np.stack(made) if made else np.empty((0, *targets[0].shape), np.uint8)
        for frame in (*frames, *targets):
            if frame.shape != frames[0].shape:
                sizes = " beside ".join(f"{x.shape[1]}x{x.shape[0]}" for x in (frame, frames[0]))
                raise InputError(f"{name} has frames of different sizes, {sizes}; {self.cure}")
        times = (np.array(steps) / self.stride).astype(np.float32)
        return Window(name, video.name, is_last, np.stack(frames), times, np.stack(targets), blurry_targets)


class SharpFrames(PictureFiles):
    """Sharp frames by their numbers, each read once."""

    def __init__(self, path: Callable[[int], Path]):
        super().__init__(path)
        self.held: dict[int, np.ndarray] = {}

    def __getitem__(self, index: int) -> np.ndarray:
        if index not in self.held:
            self.held[index] = super().__getitem__(index)
        return self.held[index]
