"""The classifiers by name, as configurations and checkpoints say them; the names are the field's."""

from inspect import signature

from shared.errors import InputError

from .mobilenet import MobileNetV2
from .resnet import ImageNetResNet, LargeResNet, ResNet
from .shufflenet import ShuffleNetV1, ShuffleNetV2
from .taps import TappedNetwork
from .vgg import VGG
from .wide_resnet import WideResNet

X4 = (32, 64, 128, 256)
NETWORKS: dict[str, tuple[type[TappedNetwork], dict]] = {
    "resnet8": (ResNet, {"depth": 8}),
    "resnet14": (ResNet, {"depth": 14}),
    "resnet20": (ResNet, {"depth": 20}),
    "resnet32": (ResNet, {"depth": 32}),
    "resnet44": (ResNet, {"depth": 44}),
    "resnet56": (ResNet, {"depth": 56}),
    "resnet110": (ResNet, {"depth": 110}),
    "resnet8x4": (ResNet, {"depth": 8, "filters": X4}),
    "resnet32x4": (ResNet, {"depth": 32, "filters": X4}),
    "wrn_16_1": (WideResNet, {"depth": 16, "widen_factor": 1}),
    "wrn_16_2": (WideResNet, {"depth": 16, "widen_factor": 2}),
    "wrn_40_1": (WideResNet, {"depth": 40, "widen_factor": 1}),
    "wrn_40_2": (WideResNet, {"depth": 40, "widen_factor": 2}),
    "vgg8": (VGG, {"num_convs": (1, 1, 1, 1, 1)}),
    "vgg11": (VGG, {"num_convs": (1, 1, 2, 2, 2)}),
    "vgg13": (VGG, {"num_convs": (2, 2, 2, 2, 2)}),
    "vgg16": (VGG, {"num_convs": (2, 2, 3, 3, 3)}),
    "vgg19": (VGG, {"num_convs": (2, 2, 4, 4, 4)}),
    "MobileNetV2": (MobileNetV2, {}),
    "ShuffleV1": (ShuffleNetV1, {}),
    "ShuffleV2": (ShuffleNetV2, {}),
    "ResNet18": (LargeResNet, {"depth": 18}),
    "ResNet50": (LargeResNet, {"depth": 50}),
    "imagenet_resnet18": (ImageNetResNet, {"depth": 18}),
    "imagenet_resnet34": (ImageNetResNet, {"depth": 34}),
    "imagenet_resnet50": (ImageNetResNet, {"depth": 50}),
}


def build_network(arguments: dict) -> TappedNetwork:
    """Build a network from {"name": one of `NETWORKS`, "num_classes": K, and arguments of its class that override}.

    Raises:
        InputError: an unknown name or argument, no num_classes, or a value that the constructor refuses.
    """
    arguments = dict(arguments)
    name = arguments.pop("name", None)
    if name not in NETWORKS:
        raise InputError(f"unknown network {name!r}; choose one of {', '.join(NETWORKS)}")
    network, defaults = NETWORKS[name]
    known = list(signature(network).parameters)
    if unknown := [key for key in arguments if key not in known]:
        raise InputError(f"network {name} takes no {unknown[0]!r}; choose from {', '.join(known)}")
    if "num_classes" not in arguments:
        raise InputError(f"network {name} needs num_classes, the number of classes")
    return network(**{**defaults, **arguments})
