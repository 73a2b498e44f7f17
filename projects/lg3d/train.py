"""Train a detector, guided by its labels or alone: `python -m projects.lg3d.train [guidance=<form>] [key=value]`."""

from functools import partial

from omegaconf import DictConfig

from shared.errors import InputError
from shared.experiment import command, train

from . import schema  # noqa: F401  (registers the configuration's types)
from .compare import BESIDE, finish


def run(config: DictConfig) -> dict:
    """Train as configured; a classical baseline and the detector without guidance stand beside.

    Raises:
        InputError: `beside` names something unknown.
    """
    if unknown := [name for name in config.beside if name not in BESIDE]:
        raise InputError(f"beside lists some of {', '.join(BESIDE)}, not {unknown[0]!r}")
    return train(config, partial(finish, config))


if __name__ == "__main__":
    command(run, __file__, "train")
