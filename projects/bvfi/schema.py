"""The plain part of the configurations: a mistyped key or type stops at composition."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from shared import experiment
from shared.predict_film import FilmConfig


@dataclass
class EvaluateConfig(experiment.EvaluateConfig):
    """Evaluation.

    Attributes:
        mode: `multi` restores all frames of an interval in one sequence, `single` each in its own, which takes longer.
        orders: Taylor terms after the first, 0 .. 16; null takes as many as in training.
        ensemble: average over the clip played forwards and backwards, each as it is and turned by 180 degrees; four
            times slower.
        peers: score warps by optical flow too.
        num_pictures: test windows of each set to draw.
    """

    mode: str = "multi"
    orders: int | None = None
    ensemble: bool = False
    peers: bool = True
    num_pictures: int = 2


@dataclass
class PredictConfig(FilmConfig):
    """Prediction; `factor` is 1, deblurring alone, .. 16.

    Attributes:
        mode: `multi` restores all new frames of an interval in one sequence, `single` each in its own, which takes
            longer.
        orders: Taylor terms after the first, 0 .. 16: fewer are faster; null takes as many as in training.
        ensemble: average over the film played forwards and backwards, each as it is and turned by 180 degrees; four
            times slower.
    """

    mode: str = "multi"
    orders: int | None = None
    ensemble: bool = False


store = ConfigStore.instance()
store.store(name="bvfi_train", node=experiment.TrainConfig)
store.store(name="bvfi_evaluate", node=EvaluateConfig)
store.store(name="bvfi_predict", node=PredictConfig)
