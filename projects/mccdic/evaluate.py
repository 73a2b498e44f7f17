"""Score a checkpoint: `python -m projects.mccdic.evaluate ckpt_path=<file> [task=<name>] [data=ixi]`."""

from omegaconf import DictConfig

from shared.experiment import command, evaluate

from . import schema  # noqa: F401  (registers the configuration's types)
from .module import MultiContrastRestoration, load_module

OPTIONS = ("step_size", "guided", "num_pictures")


def run(config: DictConfig) -> dict:
    """Evaluate as configured."""

    def load(path: str) -> MultiContrastRestoration:
        return load_module(path, **{name: config[name] for name in OPTIONS})

    return evaluate(config, load)


if __name__ == "__main__":
    command(run, __file__, "evaluate")
