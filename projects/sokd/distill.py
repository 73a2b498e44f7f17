"""A teacher's file, a host and the plug-in, as a configuration names them -> `StudentOriented`."""

from inspect import signature

import torch
from torch import Tensor, nn

from shared.errors import InputError

from .checkpoints import load_published
from .fold import folded, folded_classifier
from .hosts import Pair, build_host, check_host
from .student_oriented import StudentOriented
from .taps import TappedNetwork, tap_shapes


def check_distill(distill: dict) -> None:
    """Compare the options of a distillation with what it takes, before its teacher is read.

    Raises:
        InputError: an unknown or missing option.
    """
    try:
        signature(build_distiller).bind(None, 0, None, **distill)
    except TypeError as error:
        raise InputError(f"model.distill: {error}") from error
    if distill["host"] is not None:
        check_host(distill["host"])


def build_distiller(
    student: TappedNetwork, image_size: int, labels: Tensor | None, teacher: str, ce_weight: float, host: dict | None,
    hint: int, preact: bool, plugin: dict | None,
) -> tuple[StudentOriented | None, nn.Module]:  # fmt: skip
    """Build what teaches a student.

    Args:
        student: the network in training.
        image_size: side of the images.
        labels: (N,) of the training set, for hosts that need them.
        teacher: checkpoint of the teacher, any file that `load_published` reads.
        ce_weight: of the cross entropy, read by `module.Distillation`.
        host: {"name": one of `hosts.HOSTS`, and its options}; None compares with the teacher only.
        hint: tap that a host without the plug-in is looked at where it has its adapter there.
        preact: ReviewKD takes the student's features before their ReLU, as on ImageNet.
        plugin: keyword arguments of `StudentOriented`; None leaves the host as it is.

    Returns:
        The host with what is plugged in, and the frozen teacher in the form that it asks for.

    Raises:
        InputError: no teacher, or one of another class count or without the features that the host needs.
    """
    if not teacher:
        raise InputError("no teacher to learn from; say model.distill.teacher=<file>, or host=none for none")
    network = load_published(teacher)
    counts = [count_classes(net, image_size) for net in (student, network)]
    if counts[0] != counts[1]:
        raise InputError(
            f"the student tells {counts[0]} classes apart, the teacher {teacher} {counts[1]}; "
            "give a teacher of the same data set"
        )
    if host is None:
        return None, folded(network, preact=False).to(memory_format=torch.channels_last)
    pair = Pair(tap_shapes(student, image_size), tap_shapes(network, image_size), labels, preact)
    built = build_host(host, pair)
    for form, net, who in ((built.student_preact, student, "student"), (built.teacher_preact, network, "teacher")):
        if form and not net.has_preact:
            raise InputError(
                f"the {who}, a {type(net).__name__}, has no features before a ReLU; choose another network or host"
            )
    frozen = folded(network, built.teacher_preact).to(memory_format=torch.channels_last)
    head = folded_classifier(network) if built.through_head else None
    plugin = dict(plugin or {"hint": hint})
    if plugin.get("dam") is not None:
        plugin["dam"] = {"heat_channels": counts[0], **plugin["dam"]}
    unknown = [key for key in plugin if key not in signature(StudentOriented).parameters]
    if unknown:
        raise InputError(f"model.distill.plugin takes no {unknown[0]!r}")
    try:
        return StudentOriented(built, pair, frozen, head, **plugin), frozen
    except TypeError as error:
        raise InputError(f"model.distill.plugin: {error}") from error


@torch.no_grad()
def count_classes(network: nn.Module, image_size: int) -> int:
    """Count the outputs of a network by one picture of zeros."""
    training = network.training
    logits = network.eval()(next(network.parameters()).new_zeros(1, 3, image_size, image_size))
    network.train(training)
    return logits.shape[1]
