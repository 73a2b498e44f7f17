"""The plain part of the configurations: a mistyped key or type stops at composition."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from shared import experiment


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
class PredictConfig(experiment.PredictConfig):
    """Prediction.

    Attributes:
        factor: new frames for each one of the film, 2 .. 64; null where `frame_rate` is given, else 2.
        frame_rate: frames per second of the new film, such as 60 or 60000/1001; it lasts as long as the old one.
        slow_motion: keep the old frame rate instead, so that the film lasts `factor` times as long, without sound.
        start: seconds of the film where to begin; null is its beginning.
        stop: seconds of the film where to end; null is its end.
        last: second of two pictures, the first being the input, whose middle is wanted.
        input_frame_rate: frames per second of a folder of pictures; null takes 25.
        cuts: find cuts and do not interpolate across them.
        duplicates: `repair` replaces frames that repeat the one before, `keep` leaves them.
        depth: halvings of an interval, 1 .. 6, that times are rounded to; halves, quarters ... stay exact. Null takes
            3, or as many as keep the new frames apart.
        tile: side of the pieces a frame is cut into, px; null is the largest that `memory_gb` allows.
        overlap: px that neighbouring pieces share and are blended over.
        memory_gb: that the network may take, by estimate, 1e9 bytes.
        precision: of the convolutions, 32, 16 or bf16; auto takes 16 on a GPU, else 32.
        flow_scale: resolution at which the flow is found: 1, 0.5 or 0.25; lower for large motion in large frames.
        ensemble: average over both orders of the frames and a turn by 180 degrees; four times slower.
        codec: of the new film, h264, hevc or ffv1.
        quality: constant rate factor of h264 and hevc, 0 (best) .. 51.
        allow_truncated: use the whole frames of a film that is damaged or cut short.
    """

    factor: int | None = None
    frame_rate: str | None = None
    slow_motion: bool = False
    start: float | None = None
    stop: float | None = None
    last: str | None = None
    input_frame_rate: str | None = None
    cuts: bool = True
    duplicates: str = "repair"
    depth: int | None = None
    tile: int | None = None
    overlap: int = 64
    memory_gb: float = 4.0
    precision: str = "auto"
    flow_scale: float = 1.0
    ensemble: bool = False
    codec: str = "h264"
    quality: int = 16
    allow_truncated: bool = False


store = ConfigStore.instance()
store.store(name="fgdcn_train", node=experiment.TrainConfig)
store.store(name="fgdcn_evaluate", node=EvaluateConfig)
store.store(name="fgdcn_predict", node=PredictConfig)
