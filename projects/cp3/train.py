"""Prune and fine-tune, or train: `python -m projects.cp3.train [prune=<criterion>] [experiment=<name>] [key=value]`."""

from functools import partial

from omegaconf import DictConfig

from shared.errors import InputError
from shared.experiment import command, train

from . import schema  # noqa: F401  (registers the configuration's types)
from .compare import BESIDE, finish


def run(config: DictConfig) -> dict:
    """Train as configured; the dense network and other criteria at the same rate stand beside.

    Raises:
        InputError: `beside` names something unknown, or the best epoch of an iterative pruning is asked for, which may
            be one before the last step.
    """
    if unknown := [name for name in config.beside if name not in BESIDE]:
        raise InputError(f"beside lists some of {', '.join(BESIDE)}, not {unknown[0]!r}")
    steps = config.model.prune.steps if config.model.get("prune") else 1
    if isinstance(steps, int) and steps > 1 and list(config.tested) != ["last"]:
        raise InputError(
            "with model.prune.steps above 1 the best epoch may be one of a wider network; say tested=[last]"
        )
    return train(config, partial(finish, config))


if __name__ == "__main__":
    command(run, __file__, "train")
