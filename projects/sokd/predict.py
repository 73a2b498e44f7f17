"""Classify pictures: `python -m projects.sokd.predict input=<file or folder> output=labels.csv [top=3]`."""

from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from shared.classify import CIFAR100, IMAGENET, Facts, predict
from shared.experiment import command

from . import schema  # noqa: F401  (registers the configuration's types)
from .checkpoints import load_published
from .resnet import ImageNetResNet

WEIGHTS = Path(__file__).parent / "weights"


def usual_facts(net: nn.Module) -> Facts:
    """Give ImageNet's facts for a network with its stem, CIFAR-100's for any other."""
    return IMAGENET if isinstance(net, ImageNetResNet) else CIFAR100


def run(config: DictConfig) -> Path:
    """Classify every picture of the input; return the table."""
    return predict(config, load_published, usual_facts, WEIGHTS)


if __name__ == "__main__":
    command(run, __file__, "predict")
