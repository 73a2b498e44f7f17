"""Which augmentation a teacher's feature goes through, and how that choice is learnt (differentiable search, DAFA).

A sub-policy s is a pair of operations. Its parameters chi: alpha (S,), the logits of the choice among S sub-policies;
beta (S, 2), the probability that each operation fires; magnitude (S, 2) in [0, 1]. One sub-policy is drawn for a step
and applied to the whole batch:

    z = log softmax(alpha) + Gumbel noise      choice j = argmax z                   relaxed: softmax(z / temperature)
    y = logit(beta) + logistic noise           operation k fires where y_jk > 0      relaxed: sigmoid(y / temperature)
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError

from .operations import OPERATIONS, operations, sub_policies
from .relax import ControlVariate, conditional_gumbel, conditional_logistic, gumbel, logistic, relax_gradient

ESTIMATORS = ("gumbel_st", "relax", "dense")
SMALLEST = 1e-6  # beta stays within [SMALLEST, 1 - SMALLEST], where its logit is finite


class Chi(NamedTuple):
    """The parameters of a policy: alpha (S,), beta (S, 2), magnitude (S, 2)."""

    alpha: Tensor
    beta: Tensor
    magnitude: Tensor


class Policy(nn.Module):
    """Augmentation of teacher features, with what is drawn for the step and the optimiser of its parameters.

    Its parameters take no part in the student's training: they want no gradient there, and `learn` changes them.
    All of it is in `state_dict`: chi, the draw, the generator, and the optimiser's state.

    Args:
        ops: names of `operations.OPERATIONS` to choose pairs from.
        num_sub_policies: S, drawn by `seed` from all pairs; None takes all (36 of nine operations).
        temperature: of the relaxation, called lambda in the paper.
        estimator: of the gradient: `gumbel_st` (hard forward, relaxed backward), `relax` (score function with a learnt
            control variate) or `dense` (the mixture of all sub-policies itself, S times the work).
        per_sample: an operation draws what is random in it for each sample instead of once for the batch.
        rescale, nonnegative: see `operations.operations`.
        probability, magnitude: where beta and the magnitudes start.
        random: magnitudes and sub-policies are uniformly random in each step and nothing is learnt, the control.
        lr, betas: of Adam.
        weight_decay, magnitude_decay: of Adam, on alpha, and on beta and the magnitudes.
        seed: of the draws.

    Attributes:
        skipped: () int64, how many times `learn` was given a gradient that is not finite, and left chi as it was.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self, ops: Sequence[str] = tuple(OPERATIONS), num_sub_policies: int | None = None, temperature: float = 0.5,
        estimator: str = "gumbel_st", per_sample: bool = False, rescale: bool = False, nonnegative: bool = False,
        probability: float = 0.5, magnitude: float = 0.5, random: bool = False, lr: float = 3e-4,
        betas: Sequence[float] = (0.5, 0.999), weight_decay: float = 1e-3, magnitude_decay: float = 0.0, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        if estimator not in ESTIMATORS:
            raise InputError(f"unknown dafa.estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
        if not temperature > 0:
            raise InputError(f"dafa.temperature is above 0, not {temperature}")
        for key, value in (("probability", probability), ("magnitude", magnitude)):
            if not 0 <= value <= 1:
                raise InputError(f"dafa.{key} is a number in 0..1, not {value}")
        if random and estimator == "dense":
            raise InputError("dafa.random draws one sub-policy a step; choose another dafa.estimator than dense")
        self.operations = operations(ops, rescale=rescale, nonnegative=nonnegative)
        self.pairs = sub_policies(len(self.operations), num_sub_policies, seed).tolist()
        self.temperature, self.estimator, self.per_sample, self.random = temperature, estimator, per_sample, random
        count = len(self.pairs)
        self.alpha = nn.Parameter(torch.full((count,), 1e-3), requires_grad=False)
        self.beta = nn.Parameter(torch.full((count, 2), float(probability)), requires_grad=False)
        self.magnitude = nn.Parameter(torch.full((count, 2), float(magnitude)), requires_grad=False)
        self.beta.clamp_(SMALLEST, 1 - SMALLEST)
        self.control = None
        groups = [
            {"params": [self.alpha], "weight_decay": weight_decay},
            {"params": [self.beta, self.magnitude], "weight_decay": magnitude_decay},
        ]
        if estimator == "relax":
            self.control = ControlVariate(3 * count).requires_grad_(False)
            groups.append({"params": list(self.control.parameters()), "weight_decay": 0.0})
        self.optimizer = torch.optim.Adam(groups, lr=lr, betas=tuple(betas))
        self.generator = torch.Generator().manual_seed(seed)
        # what is drawn: the noise, and what came of it; `seed` is that of the randomness inside the operations
        self.register_buffer("gumbel", torch.zeros(count))
        self.register_buffer("logistic", torch.zeros(count, 2))
        self.register_buffer("drawn", torch.zeros(4, dtype=torch.int64))  # choice, fires (2), seed
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self._drawn: list[int] | None = None  # `drawn` on the host: a step asks the device for it once
        self.draw()

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        for state in self.optimizer.state.values():  # a module does not take its optimiser along
            state.update({key: fn(state[key]) for key in ("exp_avg", "exp_avg_sq")})
        return self

    @property
    def chi(self) -> Chi:
        """The parameters, without gradient."""
        return Chi(self.alpha.detach(), self.beta.detach(), self.magnitude.detach())

    def leaves(self) -> Chi:
        """Give copies of the parameters that gradients can be taken by."""
        return Chi(*(value.clone().requires_grad_() for value in self.chi))

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the sub-policy of the next step, which operations of it fire, and the seed of what is random in them."""
        count, device = len(self.pairs), self.alpha.device
        uniform = torch.rand(3 * count, generator=self.generator).clamp_(SMALLEST, 1 - SMALLEST)
        seed = torch.randint(2**31, (1,), generator=self.generator)
        magnitudes = torch.rand(count, 2, generator=self.generator) if self.random else None
        uniform = uniform.to(device, non_blocking=True)
        self.gumbel.copy_(gumbel(uniform[:count]))
        self.logistic.copy_(logistic(uniform[count:].view(count, 2)))
        if magnitudes is not None:
            self.magnitude.copy_(magnitudes)
        choice = self.choice_scores(self.chi).argmax()
        fires = self.fire_scores(self.chi)[choice] > 0
        self.drawn.copy_(torch.cat([choice.view(1), fires.long(), seed.to(device)]))
        self._drawn = None

    def choice_scores(self, chi: Chi) -> Tensor:
        """Give z (S,)."""
        return F.log_softmax(chi.alpha, 0) + self.gumbel

    def fire_scores(self, chi: Chi) -> Tensor:
        """Give y (S, 2)."""
        return torch.logit(chi.beta) + self.logistic

    @property
    def draw_on_host(self) -> tuple[int, tuple[bool, bool], int]:
        """Choice, which operations fire, and the seed inside them."""
        if self._drawn is None:
            self._drawn = self.drawn.tolist()
        choice, first, second, seed = self._drawn
        return choice, (bool(first), bool(second)), seed

    def forward(self, feat: Tensor, chi: Chi | None = None) -> Tensor:
        """Refine features s_chi(F) by what is drawn; an operation that needs a larger map is left out.

        Args:
            feat: (B, C, H, W).
            chi: from `leaves`, to take the gradient by; None gives the same values without.

        Returns:
            (B, C, H, W).
        """
        if self.estimator == "dense":
            return self.mixture(feat, chi or self.chi)
        choice, fires, seed = self.draw_on_host
        if chi is None:
            for k, number in enumerate(self.pairs[choice]):
                if fires[k] and self.fits(number, feat):
                    feat = self.apply(number, feat, self.magnitude[choice, k], seed + k)
            return feat
        relaxed = torch.sigmoid(self.fire_scores(chi)[choice] / self.temperature)
        for k, number in enumerate(self.pairs[choice]):
            if self.fits(number, feat):
                gate = float(fires[k]) + (relaxed[k] - relaxed[k].detach())  # hard in value, relaxed in gradient
                changed = self.apply(number, feat, chi.magnitude[choice, k], seed + k)
                feat = gate * changed + (1 - gate) * feat
        chosen = F.softmax(self.choice_scores(chi) / self.temperature, 0)[choice]
        return feat * (1 + (chosen - chosen.detach()))

    def mixture(self, feat: Tensor, chi: Chi) -> Tensor:
        """Sum softmax(alpha)_s s(F) over all sub-policies, each operation weighted by its probability to fire."""
        weights = F.softmax(chi.alpha, 0)
        total = torch.zeros_like(feat)
        for s, pair in enumerate(self.pairs):
            found = feat
            for k, number in enumerate(pair):
                if self.fits(number, feat):
                    changed = self.apply(number, found, chi.magnitude[s, k], self.draw_on_host[2] + k)
                    found = chi.beta[s, k] * changed + (1 - chi.beta[s, k]) * found
            total = total + weights[s] * found
        return total

    def fits(self, number: int, feat: Tensor) -> bool:
        """Say whether the map is large enough for an operation."""
        return min(feat.shape[-2:]) >= self.operations[number].min_side

    def apply(self, number: int, feat: Tensor, magnitude: Tensor, seed: int) -> Tensor:
        """Apply one operation; where its computation gives the magnitude no gradient, each element gets unit one."""
        operation = self.operations[number]
        value = operation.value(magnitude)
        generator = torch.Generator(feat.device).manual_seed(seed)
        if operation.pathwise and self.estimator != "relax":
            return operation.apply(feat, value, generator, self.per_sample)
        changed = operation.apply(feat, value.detach(), generator, self.per_sample)
        if not value.requires_grad:
            return changed
        return changed + (value - value.detach()).to(changed.dtype)

    def gradient(self, loss: Tensor, chi: Chi, retain_graph: bool = False) -> Chi:
        """Estimate the gradient of a loss that refined features entered with these leaves.

        Args:
            loss: scalar.
            chi: the leaves.
            retain_graph: keep the graph of the loss.

        Returns:
            Gradients of alpha, beta and magnitude; with `relax` those of the control variate's loss are left in its
            parameters' `grad`.
        """
        found = torch.autograd.grad(loss, chi, retain_graph=retain_graph, allow_unused=True)
        found = Chi(*(torch.zeros_like(x) if g is None else g for g, x in zip(found, chi, strict=True)))
        if self.estimator != "relax":
            return found
        alpha, beta, control_gradients = self.score_gradient(loss.detach())
        for parameter, gradient in zip(self.control.parameters(), control_gradients, strict=True):
            parameter.grad = gradient
        return Chi(alpha, beta, found.magnitude)

    def score_gradient(self, value: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """RELAX: gradients of alpha and beta for a loss of this value, and of the control variate's parameters."""
        chi, count = self.leaves(), len(self.pairs)
        choice = self.draw_on_host[0]
        # what fired of the sub-policies that were not chosen changes no loss, but the control variate sees it
        y = self.fire_scores(chi)
        fires = (y > 0).detach()
        # of the draw, not of the call: in differences of gradients at one draw its noise has to cancel
        generator = torch.Generator().manual_seed(self.draw_on_host[2] + 2)
        uniform = torch.rand(3 * count, generator=generator).clamp_(SMALLEST, 1 - SMALLEST).to(self.alpha.device)
        log_pi = F.log_softmax(chi.alpha, 0)
        z_given = conditional_gumbel(log_pi, choice, uniform[:count])
        y_given = conditional_logistic(chi.beta, fires, uniform[count:].view(count, 2))
        log_prob = log_pi[choice] + torch.where(fires, chi.beta.log(), torch.log1p(-chi.beta)).sum()
        parameters = {name: p.detach().requires_grad_() for name, p in self.control.named_parameters()}

        def control(z: Tensor, y: Tensor) -> Tensor:
            fired, chosen = torch.sigmoid(y / self.temperature), F.softmax(z / self.temperature, 0)
            return torch.func.functional_call(self.control, parameters, (torch.cat([fired.flatten(), chosen]),))

        gradients = relax_gradient(
            value, log_prob, control(self.choice_scores(chi), y), control(z_given, y_given), [chi.alpha, chi.beta]
        )
        spread = torch.cat([gradient.flatten() for gradient in gradients]).square().mean()
        alpha, beta = (gradient.detach() for gradient in gradients)
        return alpha, beta, list(torch.autograd.grad(spread, list(parameters.values())))

    @torch.no_grad()
    def learn(self, gradient: Chi) -> bool:
        """Take one step of Adam; a gradient that is not finite is left out and counted.

        Returns:
            Whether the step was taken.
        """
        whole = torch.cat([part.flatten() for part in gradient])
        if self.control is not None:
            whole = torch.cat([whole, *(p.grad.flatten() for p in self.control.parameters())])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(whole)
            whole = whole / torch.distributed.get_world_size()
        finite = bool(whole.isfinite().all())
        if finite:
            learnt = [*self.chi_parameters(), *(self.control.parameters() if self.control is not None else ())]
            parts = whole.split([parameter.numel() for parameter in learnt])
            for parameter, part in zip(learnt, parts, strict=True):
                parameter.grad = part.view_as(parameter)
            self.optimizer.step()
            self.beta.clamp_(SMALLEST, 1 - SMALLEST)
            self.magnitude.clamp_(0, 1)
        else:
            self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    def chi_parameters(self) -> list[nn.Parameter]:
        """List alpha, beta and magnitude."""
        return [self.alpha, self.beta, self.magnitude]

    def marginals(self) -> dict[str, float]:
        """Give, by operation, the probability that it is part of a step and fires."""
        weights = F.softmax(self.chi.alpha, 0)[:, None] * self.chi.beta
        found = weights.new_zeros(len(self.operations))
        numbers = torch.tensor(self.pairs, device=weights.device)
        found.index_add_(0, numbers.flatten(), weights.flatten())
        return dict(zip([operation.name for operation in self.operations], found.tolist(), strict=True))

    def entropy(self) -> float:
        """Give the entropy of the choice among sub-policies, ln S at the start, in nats."""
        log_pi = F.log_softmax(self.chi.alpha, 0)
        return float(-(log_pi.exp() * log_pi).sum())

    def favourites(self, count: int = 5) -> list[dict]:
        """List the likeliest sub-policies: {"weight", "ops": [{"name", "probability", "value"} twice]}."""
        weights, numbers = F.softmax(self.chi.alpha, 0).topk(min(count, len(self.pairs)))
        listed = []
        for weight, s in zip(weights.tolist(), numbers.tolist(), strict=True):
            ops = [
                {
                    "name": self.operations[number].name,
                    "probability": float(self.beta[s, k]),
                    "value": float(self.operations[number].value(self.chi.magnitude[s, k])),
                }
                for k, number in enumerate(self.pairs[s])
            ]
            listed.append({"weight": weight, "ops": ops})
        return listed

    def names(self) -> list[list[str]]:
        """List the sub-policies by the names of their operations."""
        return [[self.operations[number].name for number in pair] for pair in self.pairs]

    def get_extra_state(self) -> dict:
        """Give the optimiser's state, the generator's and the temperature, for `state_dict`."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "temperature": self.temperature,
            "sub_policies": self.names(),
        }

    def set_extra_state(self, state: dict) -> None:
        """Take up the optimiser's state, the generator's and the temperature.

        Raises:
            InputError: the state is of other sub-policies.
        """
        if state["sub_policies"] != self.names():
            raise InputError(
                "the checkpoint's search was over other sub-policies; resume with its own dafa.ops, num_sub_policies "
                "and seed"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.temperature = state["temperature"]
        self._drawn = None
