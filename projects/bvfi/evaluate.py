"""Score a checkpoint: `python -m projects.bvfi.evaluate ckpt_path=<file> [data=adobe240]`."""

from omegaconf import DictConfig

from shared.experiment import command, evaluate

from . import schema  # noqa: F401  (registers the configuration's types)
from .module import BlurryInterpolation, load_module

OPTIONS = ("mode", "orders", "ensemble", "peers", "num_pictures")


def run(config: DictConfig) -> dict:
    """Evaluate as configured."""

    def load(path: str) -> BlurryInterpolation:
        return load_module(path, **{name: config[name] for name in OPTIONS})

    return evaluate(config, load)


if __name__ == "__main__":
    command(run, __file__, "evaluate")
