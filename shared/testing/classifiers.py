"""A project's classifiers in small, for the tests of what reads, uses and exports them."""

import torch
from torch import Tensor, nn

from shared.errors import InputError
from shared.io.classifiers import Classifiers

NETWORKS = {"thin": (4, 1), "wide": (8, 1), "deep": (4, 2)}  # name -> channels, convolutions


class Toy(nn.Module):
    """Convolutions with batch norm, and a linear layer of the mean: (B, 3, H, H) -> (B, num_classes)."""

    def __init__(self, num_classes: int, width: int, depth: int):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Conv2d(width if i else 3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits."""
        return self.fc(self.layers(images).mean((2, 3)))


def build(arguments: dict) -> Toy:
    """Build {"name": one of `NETWORKS`, "num_classes": K, "width": other than the name's}."""
    arguments = dict(arguments)
    name, num_classes = arguments.pop("name"), arguments.pop("num_classes")
    if name not in NETWORKS or arguments.keys() - {"width"}:
        raise InputError(f"no toy {name!r} of {arguments}")
    width, depth = NETWORKS[name]
    return Toy(num_classes, arguments.get("width", width), depth)


def trained(seed: int = 0, **arguments: object) -> Toy:
    """Build a toy in eval mode whose batch norms do something and which is sure enough that pictures differ.

    Args:
        seed: of its weights.
        arguments: those of `build` that differ from a thin one of four classes.
    """
    torch.manual_seed(seed)
    net = build({"name": "thin", "num_classes": 4, **arguments})
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    with torch.no_grad():
        net.fc.weight *= 30
    return net.eval()


TOYS = Classifiers(NETWORKS, build, [{"name": "wide", "width": 16}])
