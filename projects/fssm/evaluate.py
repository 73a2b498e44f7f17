"""Score a checkpoint, ours or published: `python -m projects.fssm.evaluate ckpt_path=<file> [data=benchmarks]`."""

from omegaconf import DictConfig

from shared.errors import InputError
from shared.experiment import command, evaluate

from . import schema  # noqa: F401  (registers the configuration's types)
from .module import SuperResolution, load_module


def run(config: DictConfig) -> dict:
    """Evaluate as configured."""

    def load(path: str) -> SuperResolution:
        options = {} if config.hold is None else {"hold": config.hold}
        module = load_module(path, config.tiling, config.ensemble, **options)
        if module.net.scale != config.scale:
            raise InputError(f"{path} enlarges by {module.net.scale}, not {config.scale}; say scale={module.net.scale}")
        return module

    return evaluate(config, load)


if __name__ == "__main__":
    command(run, __file__, "evaluate")
