"""Three frames in a row as people have them on disk: Vimeo90K, UCF101, SNU-FILM, Middlebury, Xiph, DAVIS, any film.

Every reader gives a sequence of `Triplet` that reads pixels when it is asked for one, and looks for every file before.
The protocols are those by which the field compares: Vimeo90K (Xue et al., IJCV 2019), UCF101 in the choice of Deep
Voxel Flow (Liu et al., ICCV 2017), SNU-FILM (Choi et al., AAAI 2020), Middlebury OTHER (Baker et al., IJCV 2011), Xiph
(Niklaus and Liu, CVPR 2020), DAVIS (Perazzi et al., CVPR 2016).
"""

import importlib
import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from shared.errors import InputError
from shared.io.images import read_rgb
from shared.io.shots import find_cuts, is_duplicate
from shared.io.unpacking import SafeUnpickler, read_npy
from shared.io.video import read_frames

HOW_TO_GET = {
    "vimeo90k": "unpack vimeo_triplet.zip of http://toflow.csail.mit.edu and set data.root to the folder vimeo_triplet",
    "ucf101": "unpack ucf101_interp_ours of Deep Voxel Flow (github.com/liuziwei7/voxel-flow) under data.root",
    "snufilm": "unpack SNU-FILM, frames and lists, of github.com/myungsub/CAIN into data.root",
    "middlebury": "unpack other-color-twoframes.zip and other-gt-interp.zip of https://vision.middlebury.edu/flow/data "
    "under data.root",
    "xiph": "take the first 100 frames of the eight Netflix clips of https://media.xiph.org/video/derf as "
    "<Clip>-%03d.png into data.root",
    "davis": "unpack DAVIS 480p of https://davischallenge.org and set data.root to the folder DAVIS",
}
SNUFILM_LEVELS = ("easy", "medium", "hard", "extreme")
XIPH_MODES = ("2K", "4K")
XIPH_CLIPS = (
    "BoxingPractice", "Crosswalk", "DrivingPOV", "FoodMarket", "FoodMarket2", "RitualDance", "SquareAndTimelapse",
    "Tango",
)  # fmt: skip
XIPH_SIZE = (2160, 4096)
# older pickles say __builtin__
PLAIN_MODULES, PLAIN_TYPES = ("builtins", "__builtin__"), ("dict", "set", "list", "str", "int")


@dataclass(frozen=True)
class Triplet:
    """Three frames in a row, and how the middle one corresponds to the others where that is known.

    Attributes:
        name: of the triplet within its set.
        first: (H, W, 3) uint8 RGB, at time 0; `middle` at time 1/2 and `last` at time 1 likewise.
        flows: (4, H, W) float px, from the middle to the first frame (u, v) and to the last (u, v).
        visibility: (2, H, W) bool, whether the middle frame's pixel is seen in the first frame, and in the last.
        motion: 95th percentile of the length of the flow from the first frame to the last, px.
    """

    name: str
    first: np.ndarray
    middle: np.ndarray
    last: np.ndarray
    flows: np.ndarray | None = None
    visibility: np.ndarray | None = None
    motion: float | None = None


def checked(name: str, frames: Sequence[np.ndarray], flows: np.ndarray | None = None) -> Triplet:
    """Make a triplet of three frames (H, W, 3) and flows (4, H, W).

    Raises:
        InputError: frames of different sizes, or flows of another size.
    """
    height, width = frames[0].shape[:2]
    for frame in frames[1:]:
        if frame.shape != frames[0].shape:
            sizes = f"{frame.shape[1]}x{frame.shape[0]} beside {width}x{height}"
            raise InputError(f"{name} has frames of different sizes, {sizes}; unpack the data set again")
    if flows is not None and flows.shape[1:] != (height, width):
        sizes = f"{flows.shape[2]}x{flows.shape[1]} for frames of {width}x{height}"
        raise InputError(f"{name} has flows of {sizes}; compute them again at full size")
    return Triplet(name, *frames, flows)


class FileTriplets(Sequence[Triplet]):
    """Triplets of picture files, read when asked for.

    Args:
        files: the three paths of each triplet by its name.
        cure: how to get the data set.
        prepare: applied to each frame (H, W, 3) as it is read.
        flows: folder of a triplet's flow files by its name, see `read_flows`; None reads no flows.

    Raises:
        InputError: no triplets, or names the first file that is missing; when read, a triplet of different sizes.
    """

    def __init__(
        self,
        files: dict[str, tuple[str, str, str]],
        cure: str,
        prepare: Callable[[np.ndarray], np.ndarray] | None = None,
        flows: Callable[[str], str] | None = None,
    ):
        if not files:
            raise InputError(f"no triplets here; {cure}")
        for path in (path for paths in files.values() for path in paths):
            if not os.path.isfile(path):
                raise InputError(f"no file {path}; {cure}")
        self.names, self.files = list(files), list(files.values())
        self.prepare, self.flows = prepare, flows

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Triplet:
        name = self.names[index]
        frames = [read_rgb(path) for path in self.files[index]]
        if self.prepare is not None:
            # the sizes that are compared are the files'
            checked(name, frames)
            frames = [self.prepare(frame) for frame in frames]
        return checked(name, frames, None if self.flows is None else read_flows(self.flows(name)))


def read_flows(folder: str | os.PathLike) -> np.ndarray:
    """Read a triplet's flows from the middle frame to the first and to the last, px.

    Args:
        folder: holds `flow.npy` (4, H, W), or `flo21.npy` and `flo23.npy`, each (2, H, W) or (H, W, 2).

    Returns:
        (4, H, W) float32.

    Raises:
        InputError: a file that is missing, damaged, of another shape, or holds NaN or infinity.
    """
    both = Path(folder, "flow.npy")
    if both.is_file():
        return read_flow(both, 4)
    return np.concatenate([read_flow(Path(folder, name), 2) for name in ("flo21.npy", "flo23.npy")])


def read_flow(path: Path, channels: int) -> np.ndarray:
    """Read (channels, H, W) float32, or two channels as (H, W, 2)."""
    if not path.is_file():
        raise InputError(f"no file {path}, nor flow.npy beside it; compute the flows first or set data.flows to null")
    try:
        flow = read_npy(path)
    # a damaged file fails in whatever way its bytes happen to spell
    except Exception as error:
        raise InputError(f"{path} is damaged or no .npy file; compute it again") from error
    if flow.ndim == 3 and channels == 2 and flow.shape[2] == 2 and flow.shape[0] != 2:
        flow = flow.transpose(2, 0, 1)
    if flow.ndim != 3 or flow.shape[0] != channels or flow.dtype.kind != "f":
        raise InputError(f"{path} must be float ({channels}, H, W), not {flow.dtype} {flow.shape}; compute it again")
    if not np.isfinite(flow).all():
        raise InputError(f"{path} holds NaN or infinity; compute it again")
    return flow.astype(np.float32, copy=False)


def read_list(path: Path, cure: str) -> list[str]:
    """Read the lines of a text file without the blank ones.

    Raises:
        InputError: the file is missing, no text, or has nothing in it.
    """
    if not path.is_file():
        raise InputError(f"no file {path}; {cure}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text; {cure}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"{path} is empty; {cure}")
    return lines


def subfolders(folder: Path, cure: str) -> list[Path]:
    """The folders in a folder, sorted by name.

    Raises:
        InputError: the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; {cure}")
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    if not found:
        raise InputError(f"{folder} is empty; {cure}")
    return found


def vimeo90k(root: str | os.PathLike, split: str, flows: str | None = None) -> FileTriplets:
    """Vimeo90K: 51313 triplets of 448x256 to train on, 3782 to test on.

    Args:
        root: holds `tri_trainlist.txt`, `tri_testlist.txt` and `sequences/AAAAA/BBBB/im1.png` ... `im3.png`.
        split: "train" or "test".
        flows: folder under root with `AAAAA/BBBB/`, see `read_flows`: "flows", or "sequences" for flows that lie
            beside the frames.

    Raises:
        InputError: see `FileTriplets`.
    """
    names = read_list(Path(root, f"tri_{split}list.txt"), HOW_TO_GET["vimeo90k"])
    folder = os.path.join(root, "sequences")
    files = {
        name.replace("/", "_"): tuple(os.path.join(folder, name, f"im{n}.png") for n in (1, 2, 3)) for name in names
    }
    where = None if flows is None else (lambda name: os.path.join(root, flows, *name.split("_")))
    return FileTriplets(files, HOW_TO_GET["vimeo90k"], flows=where)


class LmdbTriplets(Sequence[Triplet]):
    """Vimeo90K packed into an LMDB: key `AAAAA_BBBB_n` is frame n (1, 2, 3), raw BGR bytes (H, W, 3).

    Args:
        path: the database's folder.
        keys: pickled {"resolution": "3_<H>_<W>", "keys": a set of `AAAAA_BBBB`}; nothing but plain values is loaded.
        flows: folder with `AAAAA/BBBB/`, see `read_flows`.

    Raises:
        InputError: a file that is missing, damaged or of another content, or the package `lmdb` is missing; when read,
            a frame that is missing or of another size.
    """

    def __init__(self, path: str | os.PathLike, keys: str | os.PathLike, flows: str | os.PathLike | None = None):
        import_lmdb()
        if not Path(path).exists():
            raise InputError(f"no LMDB {path}; pack the frames of Vimeo90K first or set data.lmdb to null")
        content = read_plain_pickle(Path(keys))
        shape = re.fullmatch(r"3_(\d+)_(\d+)", str(content.get("resolution"))) if isinstance(content, dict) else None
        names = content.get("keys") if shape else None
        if not isinstance(names, set | list) or not names or not all(is_vimeo_key(name) for name in names):
            raise InputError(f"{keys} must hold resolution '3_<H>_<W>' and keys 'AAAAA_BBBB'; pack the frames again")
        self.names, self.shape = sorted(names), (int(shape[1]), int(shape[2]), 3)
        self.path, self.flows = str(path), flows

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Triplet:
        name, lmdb = self.names[index], import_lmdb()
        # opened for each triplet (0.1 ms): an open one must be neither opened twice nor carried into a forked process
        options = {"readonly": True, "lock": False, "readahead": False}
        try:
            with lmdb.open(self.path, **options) as environment, environment.begin() as transaction:
                values = [transaction.get(f"{name}_{n}".encode()) for n in (1, 2, 3)]
        except lmdb.Error as error:
            raise InputError(f"{self.path} is damaged or no LMDB ({error}); pack the frames again") from error
        for n, value in enumerate(values, start=1):
            if value is None or len(value) != np.prod(self.shape):
                found = "is missing" if value is None else f"has {len(value)} bytes, not {np.prod(self.shape)}"
                raise InputError(f"frame {name}_{n} of {self.path} {found}; pack the frames again")
        # stored as BGR
        frames = [np.frombuffer(value, np.uint8).reshape(self.shape)[..., ::-1] for value in values]
        flows = None if self.flows is None else read_flows(Path(self.flows, *name.split("_")))
        return checked(name, frames, flows)


def import_lmdb() -> ModuleType:
    """The package `lmdb`, which only this layout needs.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("lmdb")
    except ImportError as error:
        raise InputError("data.lmdb needs a package; pip install lmdb, or set it to null to read PNG files") from error


def is_vimeo_key(name: object) -> bool:
    """Whether this is AAAAA_BBBB."""
    return isinstance(name, str) and re.fullmatch(r"\d+_\d+", name) is not None


class PlainUnpickler(SafeUnpickler):
    """Loads dictionaries, sets, lists, strings and numbers; refuses whatever could run code."""

    def find_class(self, module: str, name: str) -> type:
        """Look up a global."""
        if module not in PLAIN_MODULES or name not in PLAIN_TYPES:
            raise pickle.UnpicklingError(f"{module}.{name} is refused")
        return super().find_class(module, name)


def read_plain_pickle(path: Path) -> object:
    """Load a pickle of plain values.

    Raises:
        InputError: the file is missing, damaged, or holds anything that could run code.
    """
    if not path.is_file():
        raise InputError(f"no file {path}, the list of keys of the LMDB; give it as data.keys")
    try:
        return PlainUnpickler(path.read_bytes()).load()
    # a damaged pickle makes the loader stumble over anything
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is damaged or holds more than plain values ({reason}); pack it again") from error


def ucf101(root: str | os.PathLike) -> FileTriplets:
    """UCF101 in the choice of Deep Voxel Flow: 379 triplets of 256x256.

    Args:
        root: holds `ucf101_interp_ours/<id>/frame_00.png`, `frame_01_gt.png` and `frame_02.png`.

    Raises:
        InputError: see `FileTriplets`.
    """
    folders = subfolders(Path(root, "ucf101_interp_ours"), HOW_TO_GET["ucf101"])
    parts = ("frame_00.png", "frame_01_gt.png", "frame_02.png")
    folders.sort(key=lambda path: (len(path.name), path.name))  # 2 before 10
    files = {folder.name: tuple(str(folder / part) for part in parts) for folder in folders}
    return FileTriplets(files, HOW_TO_GET["ucf101"])


def snufilm(root: str | os.PathLike, level: str) -> FileTriplets:
    """One of the four levels of SNU-FILM: 310 triplets of 1280x720 or so.

    Args:
        root: holds `test-<level>.txt` or `eval_modes/test-<level>.txt`; each line names the first, the middle and the
            last frame as `data/SNU-FILM/test/...`. The frames are found whether root holds `data`, `test`, or what is
            in `test`.
        level: "easy", "medium", "hard" or "extreme": the farther, the more time lies between the frames.

    Raises:
        InputError: see `FileTriplets`; or a line that does not name three frames.
    """
    if level not in SNUFILM_LEVELS:
        raise InputError(f"unknown level {level!r} of SNU-FILM; choose from {', '.join(SNUFILM_LEVELS)}")
    table = Path(root, f"test-{level}.txt")
    if not table.is_file() and Path(root, "eval_modes", table.name).is_file():
        table = Path(root, "eval_modes", table.name)
    rows = [line.split() for line in read_list(table, HOW_TO_GET["snufilm"])]
    for number, row in enumerate(rows, start=1):
        if len(row) != 3:
            raise InputError(f"row {number} of {table} names {len(row)} files, not 3; download the list again")
    # how many leading folders of the list's paths are not below root
    parts = Path(rows[0][0]).parts
    dropped = next((n for n in range(len(parts)) if Path(root, *parts[n:]).is_file()), 0)
    files = {
        f"{level}_{number:03}": tuple(str(Path(root, *Path(p).parts[dropped:])) for p in row)
        for number, row in enumerate(rows, start=1)
    }
    return FileTriplets(files, HOW_TO_GET["snufilm"])


def middlebury(root: str | os.PathLike) -> FileTriplets:
    """Middlebury OTHER: the sequences with a true middle frame that are there, 12 or, without Dimetrodon, 11.

    Args:
        root: holds `other-data/<sequence>/frame10.png`, `frame11.png` and `other-gt-interp/<sequence>/frame10i11.png`.

    Raises:
        InputError: see `FileTriplets`.
    """
    files = {}
    for folder in subfolders(Path(root, "other-gt-interp"), HOW_TO_GET["middlebury"]):
        ends = [str(Path(root, "other-data", folder.name, name)) for name in ("frame10.png", "frame11.png")]
        files[folder.name] = (ends[0], str(folder / "frame10i11.png"), ends[1])
    return FileTriplets(files, HOW_TO_GET["middlebury"])


def xiph(root: str | os.PathLike, mode: str) -> FileTriplets:
    """Xiph: the even frames 2 .. 98 of eight clips of 4096x2160, each from its two neighbours, 392 triplets.

    Args:
        root: holds `<Clip>-001.png` ... `<Clip>-099.png` (or -100).
        mode: "2K" reduces all frames by 2 (means of 2x2 pixels, rounded), "4K" cuts out their middle 2048x1080.

    Raises:
        InputError: see `FileTriplets`; or, when read, a frame of another size.
    """
    if mode not in XIPH_MODES:
        raise InputError(f"unknown mode {mode!r} of Xiph; choose from {', '.join(XIPH_MODES)}")
    files = {
        f"{clip}-{n:03}": tuple(os.path.join(root, f"{clip}-{m:03}.png") for m in (n - 1, n, n + 1))
        for clip in XIPH_CLIPS
        for n in range(2, 99, 2)
    }

    def prepare(frame: np.ndarray) -> np.ndarray:
        if frame.shape[:2] != XIPH_SIZE:
            height, width = frame.shape[:2]
            raise InputError(f"frames in {root} are {width}x{height}, not 4096x2160; {HOW_TO_GET['xiph']}")
        return reduced(frame, 2) if mode == "2K" else frame[540:-540, 1024:-1024]

    return FileTriplets(files, HOW_TO_GET["xiph"], prepare)


def davis(root: str | os.PathLike) -> FileTriplets:
    """DAVIS at 480p: of each sequence the odd frames 1, 3, 5 ..., each from its two even neighbours.

    Args:
        root: holds `JPEGImages/480p/<sequence>/00000.jpg` ...

    Raises:
        InputError: see `FileTriplets`.
    """
    files = {}
    for folder in subfolders(Path(root, "JPEGImages", "480p"), HOW_TO_GET["davis"]):
        count = sum(path.suffix == ".jpg" for path in folder.iterdir())
        for n in range(1, count - 1, 2):
            files[f"{folder.name}_{n:05}"] = tuple(str(folder / f"{m:05}.jpg") for m in (n - 1, n, n + 1))
    return FileTriplets(files, HOW_TO_GET["davis"])


def reduced(picture: np.ndarray, factor: int) -> np.ndarray:
    """Means of factor x factor pixels of (H, W, C) uint8, rounded half up; the rest of the division is cut off."""
    height, width = (side // factor * factor for side in picture.shape[:2])
    whole = picture[:height, :width].astype(np.uint32)
    total = sum(whole[i::factor, j::factor] for i in range(factor) for j in range(factor))
    return ((total + factor**2 // 2) // factor**2).astype(np.uint8)


def film_triplets(
    path: str | os.PathLike, spans: Sequence[tuple[int, int | None]] = ((0, None),), reduce: int = 1
) -> list[Triplet]:
    """Frames i, i+1, i+2 of a film wherever they cross no cut and none repeats the one before; held in memory.

    Args:
        path: a film or a folder of pictures.
        spans: ranges (start, stop) of frames within which a triplet lies; a stop of None is the end.
        reduce: whole factor by which frames are reduced, means of pixels.

    Returns:
        Triplets in the order of time, named by the film and the index of the middle frame.

    Raises:
        InputError: as `read_frames`; or no triplet in any of the spans.
        ValueError: a span that is no range, or a factor below 1.
    """
    if reduce < 1 or not spans or any(stop is not None and not 0 <= start < stop for start, stop in spans):
        raise ValueError(f"film_triplets needs spans (start, stop) and reduce >= 1, got {spans} and {reduce}")
    first = min(start for start, _ in spans)
    stop = None if any(stop is None for _, stop in spans) else max(stop for _, stop in spans)
    frames = [
        frame.pixels if reduce == 1 else reduced(frame.pixels, reduce) for frame in read_frames(path, first, stop)
    ]
    # breaks[i]: frame i does not go on from frame i - 1
    breaks = set(find_cuts(frames))
    breaks |= {i for i in range(1, len(frames)) if i not in breaks and is_duplicate(frames[i - 1], frames[i])}
    name = Path(path).stem
    triplets = []
    for start, end in sorted(spans):
        for i in range(start - first + 1, min(len(frames), len(frames) if end is None else end - first) - 1):
            if not breaks & {i, i + 1}:
                triplets.append(checked(f"{name}_{first + i:04}", frames[i - 1 : i + 2]))
    if not triplets:
        raise InputError(f"{path} has no three frames in a row without a cut or a repeated frame; give a longer film")
    return triplets
