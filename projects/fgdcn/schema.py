"""The plain part of the configurations: a mistyped key or type stops at composition."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from shared import experiment
from shared.predict_film import FilmConfig


@dataclass
class EvaluateConfig(experiment.EvaluateConfig):
    """Evaluation.

    Attributes:
        metric_protocol: `float` scores the network's numbers as they are, `round8` the saved picture.
        flow_scale: resolution at which the flow is found: 1, 0.5 or 0.25.
        pad_mode: how frames are padded to multiples of 16, `replicate` or `zeros`.
        ensemble: average over both orders of the frames and a turn by 180 degrees; four times slower.
        peers: score a warp by a classical optical flow too.
        num_pictures: test triplets of each set to draw.
    """

    metric_protocol: str = "float"
    flow_scale: float = 1.0
    pad_mode: str = "replicate"
    ensemble: bool = False
    peers: bool = True
    num_pictures: int = 4


@dataclass
class PredictConfig(FilmConfig):
    """Prediction; `factor` is 2 .. 64.

    Attributes:
        last: second of two pictures, the first being the input, whose middle is wanted.
        depth: halvings of an interval, 1 .. 6, that times are rounded to; halves, quarters ... stay exact. Null takes
            3, or as many as keep the new frames apart.
        flow_scale: resolution at which the flow is found: 1, 0.5 or 0.25; lower for large motion in large frames.
        ensemble: average over both orders of the frames and a turn by 180 degrees; four times slower.
    """

    last: str | None = None
    depth: int | None = None
    flow_scale: float = 1.0
    ensemble: bool = False


store = ConfigStore.instance()
store.store(name="fgdcn_train", node=experiment.TrainConfig)
store.store(name="fgdcn_evaluate", node=EvaluateConfig)
store.store(name="fgdcn_predict", node=PredictConfig)
