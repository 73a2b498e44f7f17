"""The plain part of the configurations: a mistyped key or type stops at composition."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from shared import experiment
from shared.errors import InputError


@dataclass
class TrainConfig(experiment.TrainConfig):
    """Training, or pruning and fine-tuning.

    Attributes:
        beside: what is pruned and fine-tuned likewise to stand beside: base (the criterion without CP3's two scores),
            random, l1.
    """

    beside: list[str] = field(default_factory=list)


@dataclass
class EvaluateConfig(experiment.EvaluateConfig):
    """Evaluation.

    Attributes:
        net: arguments of the network that a published file does not say, {radius: 0.1} say; null for none.
    """

    net: Any = None  # a mapping cannot be given new keys on the command line


@dataclass
class PredictConfig(experiment.PredictConfig):
    """Prediction.

    Attributes:
        weights: shipped weights to take, by their file's name without suffix.
        net: arguments of the network that a published file does not say, {radius: 0.1} say; null for none.
        up: the axis that points upwards in the input, y or z.
        num_points: points that the network sees of a cloud; null takes them from the file, or 1,024.
        mesh_points: points drawn on the surface of a mesh, and the most that are looked at of a cloud, drawn at random.
        batch_size: clouds per step.
        top: probabilities to write for each cloud, the largest first.
        class_names: text file with the name of a class on each line; null takes them from the file, or numbers.
        pictures: write <output>_pictures.png, the first 40 clouds with what they were taken for.
        seed: of the points drawn.
    """

    weights: str = "pointnext_tiny_hard_cp3"
    net: Any = None  # a mapping cannot be given new keys on the command line
    up: str = "y"
    num_points: int | None = None
    mesh_points: int = 10000
    batch_size: int = 16
    top: int = 3
    class_names: str | None = None
    pictures: bool = False
    seed: int = 0


def network_options(config: DictConfig) -> dict[str, Any]:
    """Give `net` of an evaluation or prediction as arguments.

    Raises:
        InputError: it is no mapping.
    """
    found = OmegaConf.to_container(config, resolve=True)["net"]
    if found is not None and not isinstance(found, dict):
        raise InputError(f"net is a mapping, such as net={{radius: 0.1}}, not {found!r}")
    return found or {}


store = ConfigStore.instance()
store.store(name="cp3_train", node=TrainConfig)
store.store(name="cp3_evaluate", node=EvaluateConfig)
store.store(name="cp3_predict", node=PredictConfig)
