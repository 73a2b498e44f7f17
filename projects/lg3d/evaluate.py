"""Score a checkpoint, ours or published: `python -m projects.lg3d.evaluate ckpt_path=<file> [data=<set>]`."""

from omegaconf import DictConfig

from shared.experiment import command, evaluate

from .compare import finish_evaluation
from .module import load_module
from .schema import network_options


def run(config: DictConfig) -> dict:
    """Evaluate as configured."""
    options = network_options(config)
    return evaluate(config, lambda path: load_module(path, **options), finish_evaluation)


if __name__ == "__main__":
    command(run, __file__, "evaluate")
