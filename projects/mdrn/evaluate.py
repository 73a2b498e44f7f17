"""Score a checkpoint, ours or published: `python -m projects.mdrn.evaluate ckpt_path=<file> [data=benchmarks]`."""

from omegaconf import DictConfig, OmegaConf

from shared.errors import InputError
from shared.experiment import command, evaluate

from . import schema  # noqa: F401  (registers the configuration's types)
from .module import Denoising, load_module


def run(config: DictConfig) -> dict:
    """Evaluate as configured."""

    def load(path: str) -> Denoising:
        options = {key: OmegaConf.to_container(config)[key] for key in ("peers", "ensemble", "num_pictures")}
        noise = {"kind": config.protocol, "level": 0}
        ircnn = None if len(config.levels) != 1 else config.levels[0]
        module = load_module(path, ircnn, noise=noise, test_levels=list(config.levels), **options)
        if module.net.in_channels != config.channels:
            raise InputError(f"{path} takes {module.net.in_channels} channels; say channels={module.net.in_channels}")
        return module

    return evaluate(config, load)


if __name__ == "__main__":
    command(run, __file__, "evaluate")
