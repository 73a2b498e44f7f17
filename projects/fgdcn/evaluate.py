"""Score a checkpoint, ours or the published one: `python -m projects.fgdcn.evaluate ckpt_path=<file> [data=ucf101]`."""

from omegaconf import DictConfig

from shared.experiment import command, evaluate

from . import schema  # noqa: F401  (registers the configuration's types)
from .module import FrameInterpolation, load_module

OPTIONS = ("metric_protocol", "flow_scale", "pad_mode", "ensemble", "peers", "num_pictures")


def run(config: DictConfig) -> dict:
    """Evaluate as configured."""

    def load(path: str) -> FrameInterpolation:
        return load_module(path, **{name: config[name] for name in OPTIONS})

    return evaluate(config, load)


if __name__ == "__main__":
    command(run, __file__, "evaluate")
