"""Train a prior and build an atlas: `python -m projects.hybrid_atlas.train [experiment=<name>] [key=value ...]`."""

from functools import partial

from omegaconf import DictConfig

from shared.experiment import command, train

from . import schema  # noqa: F401  (registers the configuration's types)
from .compare import checked, finish


def run(config: DictConfig) -> dict:
    """Train as configured, then build the atlas with what was trained, and others to stand beside."""
    config = checked(config)
    return train(config, partial(finish, config))


if __name__ == "__main__":
    command(run, __file__, "train")
