"""The plain part of the configurations: a mistyped key or type stops at composition."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from shared import experiment


@dataclass
class TrainConfig(experiment.TrainConfig):
    """Training.

    Attributes:
        num_classes: of data and network.
        without: train the host without the plug-in too, to stand beside.
    """

    num_classes: int = 100
    without: bool = True


@dataclass
class EvaluateConfig(experiment.EvaluateConfig):
    """Evaluation.

    Attributes:
        num_classes: of the data; must be the network's.
        teacher: a second checkpoint whose scores stand beside; null for none.
        name: the network in a published file that does not say; null reads it from the file or its folder.
        part: `student` or `teacher` of a file that holds both; null is the student.
        member: the network in an archive of teachers.
    """

    num_classes: int = 100
    teacher: str | None = None
    name: str | None = None
    part: str | None = None
    member: str | None = None


@dataclass
class PredictConfig(experiment.PredictConfig):
    """Prediction.

    Attributes:
        weights: shipped weights to take, by their file's name without suffix.
        name: the network in a published file that does not say; null reads it from the file or its folder.
        part: `student` or `teacher` of a published file that holds both; null is the student.
        member: the network in an archive of teachers.
        batch_size: pictures per step.
        top: probabilities to write for each picture, the largest first.
        mean, std: of each channel on [0, 1]; null takes them from the file.
        image_size: side of the network's input; null takes it from the file.
        resize: shorter side of a picture before its middle is cut out; null takes it from the file, or image_size.
        class_names: text file with the name of a class on each line; null takes them from the file, or numbers.
    """

    weights: str = "student_shapes"
    name: str | None = None
    part: str | None = None
    member: str | None = None
    batch_size: int = 64
    top: int = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    image_size: int | None = None
    resize: int | None = None
    class_names: str | None = None


store = ConfigStore.instance()
store.store(name="sokd_train", node=TrainConfig)
store.store(name="sokd_evaluate", node=EvaluateConfig)
store.store(name="sokd_predict", node=PredictConfig)
