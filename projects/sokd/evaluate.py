"""Score a checkpoint, ours or published: `python -m projects.sokd.evaluate ckpt_path=<file> [teacher=<file>]`."""

from omegaconf import DictConfig

from shared.experiment import command, evaluate

from . import schema  # noqa: F401  (registers the configuration's types)
from .module import load_module


def run(config: DictConfig) -> dict:
    """Evaluate as configured."""
    options = {"name": config.name, "part": config.part, "member": config.member}
    return evaluate(config, lambda path: load_module(path, config.teacher, **options))


if __name__ == "__main__":
    command(run, __file__, "evaluate")
