"""The bi-level step of the search: a policy that, after the student has learnt from it, suits the student.

    upper: min over chi of L_aug(theta'(chi), chi)
    lower: theta' = theta - eta (grad_theta L_train(theta, chi) + weight_decay theta)

L_aug is half the mean squared distance between refined teacher feature and adapted student feature. How its gradient by
chi sees theta' is the choice of `hypergrad`:

    first_order   theta' is held constant: d L_aug(theta', chi) / d chi, the direct term
    finite_diff   direct term - eta (grad_chi L_train(theta+) - grad_chi L_train(theta-)) / (2R),
                  theta± = theta ± R v, v = grad_theta' L_aug, R = 0.01 / ||v||   (DARTS, ICLR 2019)
    exact         differentiated through the step: the reference, for small networks
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shared.errors import InputError

from .policy import Chi, Policy

HYPERGRADS = ("first_order", "finite_diff", "exact")
Parameters = dict[str, Tensor]
Loss = Callable[[Parameters, Chi | None], Tensor]


def check_search(
    hypergrad: str, eta: float, weight_decay: float, scale_by_eta: bool, direct_term: bool, estimator: str
) -> None:
    """Compare the options of `hypergradient` with each other.

    Raises:
        InputError: an unknown choice, or one that has no gradient.
    """
    if hypergrad not in HYPERGRADS:
        raise InputError(f"unknown search.hypergrad {hypergrad!r}; choose one of {', '.join(HYPERGRADS)}")
    if not eta > 0 or weight_decay < 0:
        raise InputError(f"search.eta is above 0 and search.weight_decay at least 0, not {eta} and {weight_decay}")
    if hypergrad == "exact" and estimator == "relax":
        raise InputError("search.hypergrad=exact needs a differentiable draw; choose dafa.estimator=gumbel_st or dense")
    if hypergrad != "finite_diff" and not (scale_by_eta and direct_term):
        raise InputError("search.scale_by_eta and search.direct_term are of search.hypergrad=finite_diff alone")


def hypergradient(
    policy: Policy, parameters: Parameters, train_loss: Loss, upper_loss: Loss, hypergrad: str = "first_order",
    eta: float = 0.01, weight_decay: float = 1e-4, scale_by_eta: bool = True, direct_term: bool = True,
) -> Chi:  # fmt: skip
    """Give the gradient of the upper loss by chi at the virtual step.

    Args:
        policy: whose draw and estimator are used.
        parameters: theta, what the student's optimiser trains, by name; nothing is written to them.
        train_loss: L_train at given parameters; with chi differentiable by it, with None not.
        upper_loss: L_aug, likewise.
        hypergrad: see above.
        eta: length of the virtual step, which has no momentum.
        weight_decay: in the virtual step.
        scale_by_eta: of `finite_diff`; without it and `direct_term`, the published development code's form.
        direct_term: of `finite_diff`.
    """
    chi = policy.leaves()
    exact = hypergrad == "exact"
    theta = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    loss = train_loss(theta, chi if exact else None)
    slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=exact, allow_unused=True)
    ahead = {
        name: value - eta * (weight_decay * value + (0 if slope is None else slope))
        for (name, value), slope in zip(theta.items(), slopes, strict=True)
    }
    if exact:
        return policy.gradient(upper_loss(ahead, chi), chi)
    ahead = {name: value.detach() for name, value in ahead.items()}
    if hypergrad == "first_order":
        return policy.gradient(upper_loss(ahead, chi), chi)
    for value in ahead.values():
        value.requires_grad_()
    upper = upper_loss(ahead, chi)
    v = torch.autograd.grad(upper, list(ahead.values()), retain_graph=True, allow_unused=True)
    direct = policy.gradient(upper, chi)
    control = take_control_gradients(policy)
    norm = torch.stack([slope.square().sum() for slope in v if slope is not None]).sum().sqrt()
    radius = 0.01 / norm
    sides = []
    for sign in (1, -1):
        moved = {
            name: value.detach() + (0 if slope is None else sign * radius * slope)
            for (name, value), slope in zip(parameters.items(), v, strict=True)
        }
        sides.append(policy.gradient(train_loss(moved, chi), chi))
    put_control_gradients(policy, control)
    scale = (eta if scale_by_eta else 1.0) / (2 * radius)
    # where the upper loss no longer depends on theta there is no way through it
    implicit = [torch.where(norm > 0, scale * (minus - plus), 0) for plus, minus in zip(*sides, strict=True)]
    return Chi(*(a + b if direct_term else b for a, b in zip(direct, implicit, strict=True)))


def take_control_gradients(policy: Policy) -> list[Tensor | None]:
    """Keep the gradients of the control variate, which is fitted to the upper loss alone."""
    return [] if policy.control is None else [parameter.grad for parameter in policy.control.parameters()]


def put_control_gradients(policy: Policy, gradients: list[Tensor | None]) -> None:
    """Give the control variate back the gradients that were kept."""
    if policy.control is not None:
        for parameter, gradient in zip(policy.control.parameters(), gradients, strict=True):
            parameter.grad = gradient
