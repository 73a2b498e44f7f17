"""Train a student: `python -m projects.unikd.train [experiment=<name>] [distill=<method>] [key=value ...]`."""

from functools import partial

from omegaconf import DictConfig

from shared.experiment import command, train

from . import schema  # noqa: F401  (registers the configuration's types)
from .compare import finish


def run(config: DictConfig) -> dict:
    """Train as configured; recorded runs of the student alone and of KD stand beside where there are any."""
    return train(config, partial(finish, config))


if __name__ == "__main__":
    command(run, __file__, "train")
