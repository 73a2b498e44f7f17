"""The plain part of the configurations: a mistyped key or type stops at composition."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from shared import experiment


@dataclass
class TrainConfig(experiment.TrainConfig):
    """Training.

    Attributes:
        scale: factor of data and network, 2, 3 or 4.
    """

    scale: int = 2


@dataclass
class EvaluateConfig(experiment.EvaluateConfig):
    """Evaluation.

    Attributes:
        scale: factor of the data; must be the network's.
        hold: hold mode to run the weights in; null keeps the file's own.
        tiling: `whole`, or `mambair` for the parts in which MambaIR's tables were measured.
        ensemble: average the eight flips and transpositions.
    """

    scale: int = 2
    hold: str | None = None
    tiling: str = "whole"
    ensemble: bool = False


@dataclass
class PredictConfig(experiment.PredictConfig):
    """Prediction.

    Attributes:
        scale: factor of the shipped weights to take.
        hold: hold mode to run the weights in; null keeps the file's own.
        tile, overlap: side of the pieces a large picture is cut into and what they share, in input pixels.
        ensemble: average the eight flips and transpositions; eight times slower.
    """

    scale: int = 2
    hold: str | None = None
    tile: int = 192
    overlap: int = 32
    ensemble: bool = False


store = ConfigStore.instance()
store.store(name="fssm_train", node=TrainConfig)
store.store(name="fssm_evaluate", node=EvaluateConfig)
store.store(name="fssm_predict", node=PredictConfig)
