"""The plain part of the configurations: a mistyped key or type stops at composition."""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore

from shared import experiment


@dataclass
class TrainConfig(experiment.TrainConfig):
    """Training.

    Attributes:
        task: `rec`, reconstruction from undersampled columns, or `sr`, super-resolution; chosen with its factor by the
            group: task=rec4, rec8, sr2, sr4, joint4.
        factor: acceleration, or factor of super-resolution.
        joint: degrade the references too.
        reference_weight: of the references in the loss.
        without_reference: train the same network without its reference too, to stand beside.
    """

    task: str = "rec"
    factor: int = 4
    joint: bool = False
    reference_weight: float = 0.1
    without_reference: bool = True


@dataclass
class EvaluateConfig(experiment.EvaluateConfig):
    """Evaluation.

    Attributes:
        task, factor, joint: what the target (with joint the reference too) lacks, chosen by the group: task=rec4, rec8,
            sr2, sr4, joint4; must be what the network was trained for.
        reference_weight: of training only.
        step_size: for a file of the authors' code, see checkpoints.load_published: a number or `recomputed`.
        guided: false replaces the references by zeros; null does as in the training of a .ckpt.
        num_pictures: test slices of each set to draw.
    """

    task: str = "rec"
    factor: int = 4
    joint: bool = False
    reference_weight: float = 0.1
    step_size: Any = None
    guided: bool | None = None
    num_pictures: int = 2


@dataclass
class PredictConfig(experiment.PredictConfig):
    """Prediction.

    Attributes:
        task, factor, joint, reference_weight: what the input lacks, chosen by the group task: rec4, rec8, sr2 or sr4,
            which chooses the shipped weights; with joint4 the references lack the same. The last is of training only.
        reference: one path, or a list of as many as the network takes; folders when the input is one.
        step_size: for a file of the authors' code, see checkpoints.load_published: a number or `recomputed`.
        simulate: the input is fully sampled: degrade it first, and score zero-filled and restored against it.
        metrics: file to write these scores to, JSON.
        resample: interpolate a reference that is on another grid than the input.
        axis: the slices' axis of the input as stored: 0, 1, 2 or auto, that of largest spacing, else the third.
        phase_encoding: which lines of k-space the input lacks in a slice, columns (left to right in an axial slice) or
            rows; auto measures it in a NIfTI file and takes columns of a k-space file.
        orientation: of a k-space file, where its columns, rows and slices grow to, `LPS` say; null takes the
            reference's as stored.
        frame: which volume of an input with several, from 0.
        reference_frame: likewise of each reference.
        dtype: of the numbers written: `like` the input's, float32, int16 ...
        batch_size: slices that go through the network at once.
    """

    task: str = "rec"
    factor: int = 4
    joint: bool = False
    reference_weight: float = 0.1
    reference: Any = None
    step_size: Any = None
    simulate: bool = False
    metrics: str | None = None
    resample: bool = False
    axis: Any = "auto"
    phase_encoding: str = "auto"
    orientation: str | None = None
    frame: int | None = None
    reference_frame: int | None = None
    dtype: str = "like"
    batch_size: int = 1


store = ConfigStore.instance()
store.store(name="mccdic_train", node=TrainConfig)
store.store(name="mccdic_evaluate", node=EvaluateConfig)
store.store(name="mccdic_predict", node=PredictConfig)
