"""The plain part of the configurations: a mistyped key or type stops at composition."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from shared import experiment


@dataclass
class TrainConfig(experiment.TrainConfig):
    """Training.

    Attributes:
        channels: of data and network, 1 (gray) or 3 (colour).
    """

    channels: int = 1


@dataclass
class EvaluateConfig(experiment.EvaluateConfig):
    """Evaluation.

    Attributes:
        channels: of the data; must be the network's.
        levels: noise levels to score at, 0..255; an IRCNN file takes the one level given.
        protocol: `gaussian` (unclipped), `clipped_u8` (clipped and rounded) or `camera`.
        peers: classical methods to score beside the network, of classic.py.
        ensemble: average the eight flips and transpositions.
        num_pictures: test pictures of each set and level to draw.
    """

    channels: int = 1
    levels: list[float] = field(default_factory=lambda: [15, 25, 50])
    protocol: str = "gaussian"
    peers: list[str] = field(default_factory=list)
    ensemble: bool = False
    num_pictures: int = 4


@dataclass
class PredictConfig(experiment.PredictConfig):
    """Prediction.

    Attributes:
        noise_level: standard deviation of the noise on 0..255; null estimates it for each picture.
        size: shipped weights to take, `tiny` or `small`.
        tile: side of the pieces a large picture is cut into.
        ensemble: average the eight flips and transpositions; eight times slower.
        folded: run the algebraically folded network: the same numbers, faster.
    """

    noise_level: float | None = None
    size: str = "small"
    tile: int = 512
    ensemble: bool = False
    folded: bool = True


store = ConfigStore.instance()
store.store(name="mdrn_train", node=TrainConfig)
store.store(name="mdrn_evaluate", node=EvaluateConfig)
store.store(name="mdrn_predict", node=PredictConfig)
