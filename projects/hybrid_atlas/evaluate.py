"""Score a prior and build an atlas: `python -m projects.hybrid_atlas.evaluate ckpt_path=<file> [key=value ...]`."""

from functools import partial

from omegaconf import DictConfig, OmegaConf

from shared.experiment import command, evaluate

from . import schema  # noqa: F401  (registers the configuration's types)
from .compare import checked, finish
from .module import RegistrationPrior, load_module


def run(config: DictConfig) -> dict:
    """Evaluate as configured."""
    config = checked(config)

    def load(path: str) -> RegistrationPrior:
        deformation, loss = (OmegaConf.to_container(config[name], resolve=True) for name in ("deformation", "loss"))
        return load_module(path, deformation, loss, config.num_pictures)

    return evaluate(config, load, partial(finish, config))


if __name__ == "__main__":
    command(run, __file__, "evaluate")
