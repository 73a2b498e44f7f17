"""RELAX (Grathwohl et al., ICLR 2018): unbiased gradients through discrete samples, with a learnt control variate.

    gradient = (f - Q(z~)) d log p(b) + d Q(z) - d Q(z~)

b is the discrete sample, f the loss at it, z the relaxed sample b was read off, z~ a relaxed sample drawn given b.
"""

import torch
from torch import Tensor, nn


class ControlVariate(nn.Module):
    """Q: relaxed choices in [0, 1] (n,) -> scalar, by one hidden layer of 100."""

    def __init__(self, size: int):
        super().__init__()
        self.hidden = nn.Linear(size, 100)
        self.out = nn.Linear(100, 1)

    def forward(self, relaxed: Tensor) -> Tensor:
        """Map (n,) to ()."""
        return self.out(torch.tanh(self.hidden(2 * relaxed - 1))).squeeze(-1)


def gumbel(uniform: Tensor) -> Tensor:
    """Turn numbers uniform in (0, 1) into Gumbel noise of the same shape."""
    return -torch.log(-torch.log(uniform))


def logistic(uniform: Tensor) -> Tensor:
    """Turn numbers uniform in (0, 1) into logistic noise of the same shape."""
    return torch.logit(uniform)


def conditional_gumbel(log_pi: Tensor, choice: int, uniform: Tensor) -> Tensor:
    """Draw z~ (S,) = log_pi + Gumbel noise given that its largest is `choice`.

    Args:
        log_pi: (S,) log probabilities.
        choice: number of the largest.
        uniform: (S,) in (0, 1).
    """
    top = -torch.log(uniform[choice])
    others = -torch.log(-torch.log(uniform) / log_pi.exp() + top)
    chosen = torch.arange(len(log_pi), device=log_pi.device) == choice
    return torch.where(chosen, -torch.log(top), others)


def conditional_logistic(probability: Tensor, fires: Tensor, uniform: Tensor) -> Tensor:
    """Draw y~ = logit(p) + logistic noise given whether it is above 0.

    Args:
        probability: p of any shape, in (0, 1).
        fires: bool of the same shape.
        uniform: of the same shape, in (0, 1).
    """
    # logit(p) + logit(u'), u' = 1 - p + u p or u (1 - p), in forms whose sign no rounding changes
    odds = probability / (1 - probability)
    above = torch.log1p(uniform * odds) - torch.log1p(-uniform)
    below = uniform.log() - torch.log1p((1 - uniform) / odds)
    return torch.where(fires, above, below)


def relax_gradient(
    value: Tensor, log_prob: Tensor, control: Tensor, control_given: Tensor, parameters: list[Tensor]
) -> list[Tensor]:
    """Give the gradients of E[f] by the parameters, with a graph to the control variate's own.

    Args:
        value: f, without graph.
        log_prob: log probability of the discrete sample, a function of the parameters.
        control: Q(z).
        control_given: Q(z~).
        parameters: of the distribution. All may also be (N,), of N samples that have a parameter each.
    """
    score = torch.autograd.grad(log_prob.sum(), parameters, retain_graph=True)
    free = torch.autograd.grad(control.sum(), parameters, create_graph=True)
    given = torch.autograd.grad(control_given.sum(), parameters, create_graph=True)
    return [(value - control_given) * s + a - b for s, a, b in zip(score, free, given, strict=True)]
