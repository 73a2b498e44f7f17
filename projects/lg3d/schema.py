"""The plain part of the configurations: a mistyped key or type stops at composition."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from shared import experiment
from shared.errors import InputError


@dataclass
class TrainConfig(experiment.TrainConfig):
    """Training.

    Attributes:
        beside: what is trained likewise to stand beside: alone (the detector without guidance).
        teacher: weights of the frozen backbone that guides, ours or published; null without guidance.
    """

    beside: list[str] = field(default_factory=list)
    teacher: str | None = None


@dataclass
class EvaluateConfig(experiment.EvaluateConfig):
    """Evaluation.

    Attributes:
        net: arguments of the network in the place of what a file says, {head:{num_proposals:128}} say; null for none.
    """

    net: Any = None  # a mapping cannot be given new keys on the command line


@dataclass
class PredictConfig(experiment.PredictConfig):
    """Prediction.

    Attributes:
        weights: shipped weights to take, by their file's name without suffix.
        net: arguments of the network in the place of what a file says, {head:{num_proposals:128}} say; null for none.
        up: the axis that points upwards in the input, z or y; of points alone.
        scale: metres per unit of the input; of points alone.
        bin_columns: numbers of a point in .bin files: 6 (mmdetection3d's x, y, z and colour), 4 or 3.
        intrinsics: of depth images: a text file with a 3x3 or 4x4 matrix, or JSON with fx, fy, cx, cy; null says that
            the input is points.
        depth_scale: units of a depth image in a metre.
        level: text file with the 3x3 matrix that turns a tilted camera's x, y, z upright; null for a level one.
        num_points: points that the network sees of a scene; null takes them from the file, or what is published: 40,000
            for ScanNet's 18 classes, 20,000 for others.
        max_boxes: most boxes of a scene, the likeliest first.
        min_score: least score of a box that is written.
        nms_iou: overlap of two boxes of a class above which the less likely one goes.
        class_names: text file with the name of a class on each line; null takes them from the file.
        pictures: draw each scene from above and in perspective.
        seed: of the points drawn.
    """

    weights: str = "votenet_tiny_teacher"
    net: Any = None  # a mapping cannot be given new keys on the command line
    up: str = "z"
    scale: float = 1.0
    bin_columns: int = 6
    intrinsics: str | None = None
    depth_scale: float = 1000.0
    level: str | None = None
    num_points: int | None = None
    max_boxes: int = 64
    min_score: float = 0.3
    nms_iou: float = 0.25
    class_names: str | None = None
    pictures: bool = True
    seed: int = 0


def network_options(config: DictConfig) -> dict[str, Any]:
    """Give `net` of an evaluation or prediction as arguments.

    Raises:
        InputError: it is no mapping.
    """
    found = OmegaConf.to_container(config, resolve=True)["net"]
    if found is not None and not isinstance(found, dict):
        raise InputError(f"net is a mapping, such as net={{head:{{num_proposals:128}}}}, not {found!r}")
    return found or {}


store = ConfigStore.instance()
store.store(name="lg3d_train", node=TrainConfig)
store.store(name="lg3d_evaluate", node=EvaluateConfig)
store.store(name="lg3d_predict", node=PredictConfig)
