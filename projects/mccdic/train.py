"""Train a network: `python -m projects.mccdic.train [task=<name>] [experiment=<name>] [key=value ...]`."""

from functools import partial

from omegaconf import DictConfig

from shared.experiment import command, train

from . import schema  # noqa: F401  (registers the configuration's types)
from .compare import finish


def run(config: DictConfig) -> dict:
    """Train as configured, and the same network without its reference to stand beside."""
    return train(config, partial(finish, config))


if __name__ == "__main__":
    command(run, __file__, "train")
