"""Find boxes of furniture in scans of rooms: `python -m projects.lg3d.predict input=<file or folder> output=<path>`."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor, nn

from shared.classify import read_names, shipped_weights
from shared.errors import InputError
from shared.experiment import choose_device, command
from shared.io.depth import SUFFIXES as DEPTH
from shared.io.depth import points_of_depth, read_depth, read_intrinsics, read_rotation
from shared.io.files import write_json
from shared.io.images import natural_key, write_image
from shared.io.points import UNLABELLED, list_points, read_points, write_ply
from shared.metrics.boxes import corners

from .boxes import points_in_boxes
from .checkpoints import load_published
from .data import FLOOR_PERCENTILE, choose
from .detection import Postprocessing, detect
from .export import read_training
from .layouts import SCANNET_CLASSES, SUNRGBD_CLASSES
from .pictures import COLORS, draw_scene
from .schema import network_options

WEIGHTS = Path(__file__).parent / "weights"
PUBLISHED = {10: (SUNRGBD_CLASSES, 20000), 18: (SCANNET_CLASSES, 40000)}  # by the number of classes
MESH_FACTOR = 4  # points drawn on a mesh for one that the network sees
ROOM = (0.5, 20.0)  # m: what is less wide, or more, is probably of another unit
DRAWN = 100_000  # points in a picture


@dataclass(frozen=True)
class Facts:
    """What a network was trained on.

    Attributes:
        class_names: K names in the order of the labels; none where they are not known.
        num_points: N that it sees.
    """

    class_names: Sequence[str] = ()
    num_points: int = 20000


@dataclass(frozen=True)
class Frame:
    """How the coordinates of the input become metres with z up.

    Attributes:
        up: z or y, the axis that points upwards in the input; its axes are right-handed.
        scale: metres per unit.
    """

    up: str = "z"
    scale: float = 1.0

    def enter(self, xyz: np.ndarray) -> np.ndarray:
        """Bring points (..., 3) of the input to metres, z up, float64."""
        xyz = np.asarray(xyz, np.float64) * self.scale
        return xyz if self.up == "z" else xyz[..., [0, 2, 1]] * (1, -1, 1)

    def leave(self, xyz: np.ndarray) -> np.ndarray:
        """Undo `enter`."""
        return (xyz if self.up == "z" else xyz[..., [0, 2, 1]] * (1, 1, -1)) / self.scale

    def describe(self, boxes: Tensor, origin: np.ndarray) -> list[dict]:
        """Say boxes in the input's coordinates and unit.

        Args:
            boxes: (K, 7), metres, z up.
            origin: (3,) of these boxes' coordinates, metres, z up.

        Returns:
            for each "center" [x, y, z], "size" along the box's own x, y, z, "yaw" (rad) and "corners" 8 x [x, y, z].
        """
        boxes = boxes.double()
        centers, sizes = self.leave(boxes[:, :3].numpy() + origin), boxes[:, 3:6].numpy() / self.scale
        outlines = self.leave(corners(boxes).numpy() + origin)
        if self.up == "y":
            # the box's own y is what was its z, its own z the reverse of what was its y
            sizes, outlines = sizes[:, [0, 2, 1]], outlines[:, [2, 0, 3, 1, 6, 4, 7, 5]]
        parts = zip(centers, sizes, boxes[:, 6].numpy(), outlines, strict=True)
        names = ("center", "size", "yaw", "corners")
        return [dict(zip(names, map(rounded, values), strict=True)) for values in parts]


@dataclass(frozen=True)
class Room:
    """A scene as the network takes it.

    Attributes:
        xyz: (n, 3) float32 of all points: metres, z up, the floor at z = 0, the middle at x = y = 0.
        origin: (3,) float64, what was subtracted from them.
        chosen: (N,) int64, places of the points that the network sees.
    """

    xyz: np.ndarray
    origin: np.ndarray
    chosen: np.ndarray


def run(config: DictConfig) -> list[Path]:
    """Find boxes in every scene of the input; return the .json files that were written.

    Raises:
        InputError: a file, the weights or an option cannot be used.
    """
    if not config.input or not config.output:
        raise InputError("say where to find boxes and where to write them: INPUT=<file or folder> OUTPUT=<path>")
    frame, how = check_options(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    path = Path(config.ckpt_path or shipped_weights(config.weights, WEIGHTS))
    net = load_published(path, **network_options(config)).to(choose_device(config.device))
    facts = facts_of(path, net, config)
    read = reader(config, MESH_FACTOR * facts.num_points)
    jobs = plan(config)
    doubts, counts = [], Counter()
    for file, target in track(jobs.items(), description="scenes"):
        xyz = read(file)
        room = prepare(xyz, frame, facts.num_points, config.seed, file)
        doubts += doubt(room.xyz, file.name)
        found = find(net, room, how, config.max_boxes)
        names = [facts.class_names[k] for k in found["labels"].tolist()]
        counts.update(names)
        if config.pictures:
            write_picture(target.with_suffix(".png"), room, found, facts.class_names, config.seed)
        write_points(target.with_suffix(".ply"), xyz, room, found)
        boxes = frame.describe(found["boxes"], room.origin)
        scores = found["scores"].tolist()
        write_json(target, {
            "source": file.name,
            "points": len(xyz),
            "weights": config.ckpt_path or path.name,
            "convention": convention(frame, config.intrinsics is not None),
            "boxes": [
                {"class": name, "score": round(score, 4), **box}
                for name, score, box in zip(names, scores, boxes, strict=True)
            ],
        })  # fmt: skip
    if doubts:
        print(doubts[0])
    said = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    said = said or f"nothing above min_score={config.min_score:g}; a lower one shows what comes next"
    print(f"found {said}")
    print(f"wrote {next(iter(jobs.values())) if len(jobs) == 1 else f'{len(jobs)} scenes to {config.output}'}")
    return list(jobs.values())


# --- What the user asks for -------------------------------------------------------------------------------------------


def check_options(config: DictConfig) -> tuple[Frame, Postprocessing]:
    """Give the options as what they mean.

    Raises:
        InputError: an option is out of range, or does not go with the kind of input.
    """
    if config.up not in ("y", "z"):
        raise InputError(f"up is y or z, not {config.up!r}")
    if not 0 < config.scale < math.inf:
        raise InputError(f"scale is metres per unit, above 0, not {config.scale}")
    if config.max_boxes < 1:
        raise InputError(f"max_boxes is at least 1, not {config.max_boxes}")
    if config.seed < 0:
        raise InputError(f"the seed must be at least 0, not {config.seed}")
    if config.intrinsics is None and config.level is not None:
        raise InputError("level is of depth images, which need intrinsics=<file> too")
    if config.intrinsics is not None and (config.up, config.scale) != ("z", 1):
        raise InputError("up and scale are of points; of depth images say depth_scale and level")
    return Frame(config.up, config.scale), Postprocessing(config.nms_iou, config.min_score, per_class=False)


def facts_of(path: Path, net: nn.Module, config: DictConfig) -> Facts:
    """Give the names of all classes, and how many points the network is to see: as the user says, or its file.

    Raises:
        InputError: they do not fit the network, or the network needs more than points.
    """
    num_classes, least, channels = net.head.num_classes, net.backbone.num_points[0], net.backbone.in_channels
    if channels > 1:
        raise InputError(f"{path} takes {channels} features of a point; predict makes one, the height, or none")
    facts = read_facts(path, num_classes)
    names = tuple(read_names(config.class_names) if config.class_names else facts.class_names)
    if names and len(names) != num_classes:
        raise InputError(f"{len(names)} names of classes are given, but the network tells {num_classes} apart")
    num_points = facts.num_points if config.num_points is None else config.num_points
    if num_points < least:
        raise InputError(f"num_points is at least {least} for this network, not {num_points}")
    return Facts(names or tuple(map(str, range(num_classes))), num_points)


def read_facts(path: Path, num_classes: int) -> Facts:
    """Read what a file of ours says of its training, a .ckpt by its run; of any other file what is published.

    Raises:
        InputError: what it says is damaged.
    """
    said = read_training(path)
    facts = Facts(*PUBLISHED.get(num_classes, ()))
    try:
        names = tuple(map(str, json.loads(said["class_names"]))) if "class_names" in said else facts.class_names
        return Facts(names, int(json.loads(said["num_points"])) if "num_points" in said else facts.num_points)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"what {path} says of its data is damaged ({error}); export it again") from error


def plan(config: DictConfig) -> dict[Path, Path]:
    """Say for each scene of the input which .json file it becomes; a picture and points go beside.

    Raises:
        InputError: no scene there, an output of another kind, one that cannot be written, or one that would overwrite
            something of the user's.
    """
    source, target = Path(config.input), Path(config.output)
    files = list_depth(source) if config.intrinsics else list_scans(source)
    if target.suffix.lower() == ".json":
        if source.is_dir() or target.is_dir():
            raise InputError(f"cannot write {target}: a folder of scenes goes to a folder, a scene to a file")
        jobs = {source: target}
    elif target.suffix and not target.is_dir():
        raise InputError(f"cannot write {target}: end the name with .json, or give a folder")
    else:
        jobs = {file: target / f"{file.stem}.json" for file in files}
    given = [*files, *filter(None, (config.intrinsics, config.level, config.class_names, config.ckpt_path))]
    given = {Path(file).resolve() for file in given}
    taken: dict[Path, Path] = {}
    for file, made in jobs.items():
        for suffix in (".json", ".ply", ".png"):
            if made.with_suffix(suffix).resolve() in given:
                raise InputError(f"{made.with_suffix(suffix)} would overwrite its input; choose another OUTPUT")
        if made in taken:
            raise InputError(f"{taken[made].name} and {file.name} would both become {made}; rename one")
        taken[made] = file
    nearest = next(parent for parent in next(iter(taken)).absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"cannot write {target}: {nearest} takes no files; choose a folder you may write to")
    return jobs


def list_scans(source: Path) -> list[Path]:
    """The point files of a folder in natural order, or the one file given.

    Raises:
        InputError: there is none, or pictures, which need a camera.
    """
    hint = InputError(f"{source}: pictures need the camera's intrinsics=<file>, and are depth images; or give points")
    try:
        files = list_points(source)
    except InputError as error:
        raise hint if any(source.glob("*.png")) else error from None
    if files[0].suffix.lower() == ".png":
        raise hint
    return files


def list_depth(source: Path) -> list[Path]:
    """The depth images of a folder in natural order, or the one file given; hidden files are left out.

    Raises:
        InputError: there is none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InputError(f"{source} does not exist; give a depth image or a folder of them")
    files = [file for file in source.iterdir() if file.suffix.lower() in DEPTH and file.name[0] != "."]
    if not files:
        raise InputError(f"{source} holds no depth images; it needs files named *{', *'.join(DEPTH)}")
    return sorted(files, key=natural_key)


def reader(config: DictConfig, mesh_points: int) -> Callable[[Path], np.ndarray]:
    """Give what reads the points (n, 3) float32 of a scene, in its own coordinates.

    Args:
        config: see schema.py.
        mesh_points: drawn on the faces of a mesh.

    Raises:
        InputError: the camera cannot be read, which is done at once.
    """
    if config.intrinsics is not None:
        camera = read_intrinsics(config.intrinsics)
        level = None if config.level is None else read_rotation(config.level)
        return lambda file: points_of_depth(read_depth(file, config.depth_scale), camera, level)

    def read(file: Path) -> np.ndarray:
        cloud = read_points(file, bin_columns=config.bin_columns)
        if cloud.is_mesh:
            cloud = read_points(file, mesh_points, config.seed)
        return cloud.xyz

    return read


# --- From points to boxes ---------------------------------------------------------------------------------------------


def prepare(xyz: np.ndarray, frame: Frame, num_points: int, seed: int, source: object) -> Room:
    """Bring a scene to what the network saw: metres, z up, so many points drawn at random, fewer repeated.

    Args:
        xyz: (n, 3) in the input's coordinates, n at least 1.
        frame: of the input.
        num_points: N.
        seed: of the points drawn.
        source: the file, for messages.

    Raises:
        InputError: all points are the same, so that there is nothing to see.
    """
    room = frame.enter(xyz)
    low, high = room.min(0), room.max(0)
    if not (high - low).max() > 1e-6 * np.abs(room).max():
        raise InputError(f"all points of {source} are in one place; a room needs more than one")
    # coordinates near 0 keep their digits
    origin = np.append((low + high)[:2] / 2, np.percentile(room[:, 2], FLOOR_PERCENTILE))
    chosen = choose(len(room), num_points, np.random.default_rng(seed))
    return Room((room - origin).astype(np.float32), origin, chosen)


def doubt(xyz: np.ndarray, name: str) -> list[str]:
    """Give a warning if points (n, 3), metres, but for single ones, are much less or much more than a room."""
    width = np.ptp(np.percentile(xyz, (1, 99), axis=0), axis=0).max()
    if ROOM[0] <= width <= ROOM[1]:
        return []
    return [
        f"warning: {name} is {width:.4g} m wide, which is no room; if its unit is not the metre say what it is: "
        "scale=0.001 for millimetres (of depth images depth_scale=1000)"
    ]


@torch.inference_mode()
def find(net: nn.Module, room: Room, how: Postprocessing, max_boxes: int) -> dict[str, Tensor]:
    """Give "boxes" (k, 7), "scores" (k,), falling, and "labels" (k,) in a room, in its coordinates, on the CPU.

    Raises:
        InputError: the network gives NaN, as one with damaged weights does.
    """
    xyz = torch.from_numpy(room.xyz[room.chosen])[None].to(next(net.parameters()).device)
    # z is the height above the floor
    features = xyz[:, None, :, 2] if net.backbone.in_channels else xyz.new_zeros(1, 0, xyz.shape[1])
    outputs = net(xyz, features)
    if not all(value.isfinite().all() for value in outputs.values()):
        raise InputError("the network gives NaN; its weights are damaged")
    (found,) = detect(outputs, xyz, net.head.coder, how)
    # the score of a box counts, which is less than its objectness
    count = min(max_boxes, int((found["scores"] >= how.min_score).sum()))
    return {key: value[:count].cpu() for key, value in found.items()}


def owners(xyz: np.ndarray, boxes: Tensor) -> np.ndarray:
    """Give for each point (n, 3) the place of the smallest box (k, 7) that holds it, -1 for none: (n,) int64."""
    points = torch.from_numpy(xyz)
    owner = torch.full((len(points),), -1)
    # the smallest come last; box by box, as a scan may have millions of points
    for i in boxes[:, 3:6].prod(1).argsort(descending=True, stable=True).tolist():
        owner[points_in_boxes(points, boxes[i : i + 1])[:, 0]] = i
    return owner.numpy()


# --- What is written --------------------------------------------------------------------------------------------------


def convention(frame: Frame, is_depth: bool) -> dict[str, str]:
    """Say in words how boxes are written."""
    where = "camera at the origin, x to the right, y forward" if is_depth else "that of the input"
    unit = "m" if frame.scale == 1 else f"the input's unit, {frame.scale:g} m"
    return {
        "frame": f"{where}; {frame.up} is up; lengths in {unit}",
        "center": "x, y, z of the centre of gravity",
        "size": "full lengths along the box's own x, y and z, which are the frame's turned by yaw",
        "yaw": f"rad, about the {frame.up} axis, counter-clockwise seen from above; +x of a box is its front",
        "corners": "x, y, z of each; corner 4a + 2b + c is at the upper end of the box's own x if a is 1, of its y if "
        "b is 1, of its z if c is 1, and otherwise at the lower end",
        "score": "probability that there is an object, times that of its class",
    }


def rounded(values: np.ndarray) -> list | float:
    """Numbers with nine digits, which is more than float32 has."""
    digits = np.array([float(f"{value:.9g}") for value in np.ravel(values)])
    return digits.reshape(np.shape(values)).tolist()


def write_points(path: Path, xyz: np.ndarray, room: Room, found: dict[str, Tensor]) -> None:
    """Write all points (n, 3) of the input with the class of the smallest box that holds them, and the box's place."""
    owner = owners(room.xyz, found["boxes"])
    # the last of these is of points in no box, whose place is -1
    labels = np.append(found["labels"].numpy(), -1)[owner]
    rgb = np.where((labels < 0)[:, None], UNLABELLED, COLORS[labels % len(COLORS)])
    write_ply(path, xyz, rgb=rgb, label=labels, scalars={"box": owner})


def write_picture(path: Path, room: Room, found: dict[str, Tensor], names: Sequence[str], seed: int) -> None:
    """Draw the boxes from above and in perspective."""
    drawn = np.random.default_rng(seed).permutation(len(room.xyz))[:DRAWN]
    boxes, scores, labels = (found[key].numpy() for key in ("boxes", "scores", "labels"))
    picture = draw_scene(room.xyz[drawn], None, boxes, labels, scores, names)
    write_image(path, torch.from_numpy(picture).permute(2, 0, 1) / 255)


if __name__ == "__main__":
    command(run, __file__, "predict")
