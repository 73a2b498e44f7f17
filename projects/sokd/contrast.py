"""Contrastive representation distillation (CRD; Tian, Krishnan and Isola, ICLR 2020), one of the hosts.

Letters: N images of the training set, B of them in a batch, M negatives of each, D width of the embeddings; s student,
t teacher. With e the normalised embeddings of a batch, m those remembered of all images and τ the temperature:

    h(i, j) = e_i · m_j / τ - log Z - log(M / N)
    L = mean over i of -log sigmoid(h(i, i)) - Σ_j log sigmoid(-h(i, j)),  j the negatives of i

once with e of the student and m of the teacher, once the other way round, both added up.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InputError

from .loss import full


class CRD(nn.Module):
    """Tell the teacher's embedding of an image from those of images of other classes, given the student's.

    Embeddings are linear maps of pooled features, brought to unit length. The memories hold one of each image and
    network; in training mode `forward` moves those of its images, memory = normalised(momentum · memory +
    (1 - momentum) · embedding), after the loss has looked at them. Z, one for each direction, is N times the mean of
    exp(e · m / τ) over the first batch in training mode, and stays. Memories and Z are part of the state.

    Args:
        student_dim: width of the student's pooled features.
        teacher_dim: width of the teacher's.
        labels: (N,) class of each image of the training set.
        num_negatives: M, drawn with replacement; at most as many as there are images of other classes.
        temperature: τ.
        momentum: share of what is remembered that stays.
        dim: D.

    Raises:
        InputError: labels that are not a vector or are of one class alone, a number of negatives below 1, a temperature
            that is not positive.
    """

    def __init__(
        self, student_dim: int, teacher_dim: int, labels: Tensor, num_negatives: int = 16384,
        temperature: float = 0.07, momentum: float = 0.5, dim: int = 128,
    ):  # fmt: skip
        super().__init__()
        if labels.ndim != 1:
            raise InputError(f"crd takes the labels of the training images as a vector, got {tuple(labels.shape)}")
        _, own, counts = labels.unique(return_inverse=True, return_counts=True)
        if len(counts) < 2:
            raise InputError("crd draws its negatives from other classes; give it training images of at least two")
        if num_negatives < 1 or temperature <= 0:
            raise InputError(f"crd needs num_negatives >= 1 and temperature > 0, got {num_negatives} and {temperature}")
        self.num_images = len(labels)
        self.num_negatives = min(num_negatives, self.num_images - int(counts.max()))
        self.temperature, self.momentum = temperature, momentum
        self.embed_student, self.embed_teacher = nn.Linear(student_dim, dim), nn.Linear(teacher_dim, dim)
        # images sorted by class: a class is a range of it
        self.register_buffer("by_class", own.argsort(stable=True), persistent=False)
        self.register_buffer("num_own", counts[own], persistent=False)
        self.register_buffer("first_own", (counts.cumsum(0) - counts)[own], persistent=False)
        bound = math.sqrt(3 / dim)  # a length of about 1
        for name in ("memory_student", "memory_teacher"):
            self.register_buffer(name, torch.empty(self.num_images, dim).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.zeros(2))  # of the student's direction, of the teacher's
        self.has_z = False

    def forward(
        self, student: Tensor, teacher: Tensor, index: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Give the loss of a batch, a scalar.

        Args:
            student: (B, student_dim) pooled features.
            teacher: (B, teacher_dim) pooled features of the same images.
            index: (B,) int64, where the images stand in the training set; no image twice.
            generator: of the negatives, on the device of the features; None draws from the global one.
        """
        candidates = torch.cat([index[:, None], self.negatives(index, generator)], 1)
        with torch.autocast(student.device.type, enabled=False):
            student = F.normalize(self.embed_student(full(student)), dim=1)
            teacher = F.normalize(self.embed_teacher(full(teacher)), dim=1)
            # products with all N and a choice among them: far less to move than M remembered rows for each image
            scores = [
                (embedded @ memory.T).gather(1, candidates) / self.temperature
                for embedded, memory in ((student, self.memory_teacher), (teacher, self.memory_student))
            ]
        scores = torch.stack(scores)  # (2, B, 1 + M)
        log_z = self.log_z if self.has_z else self.estimated_log_z(scores.detach())
        if self.training:
            self.remember(student.detach(), teacher.detach(), index, log_z)
        logits = scores - log_z[:, None, None] - math.log(self.num_negatives / self.num_images)
        positive, negative = F.logsigmoid(logits[..., 0]), F.logsigmoid(-logits[..., 1:])
        return -(positive + negative.sum(2)).sum(0).mean()

    def negatives(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw (B, M) images, uniformly and independently among those of other classes than each of `index` (B,)."""
        uniform = torch.rand(len(index), self.num_negatives, device=index.device, generator=generator)
        own, first = self.num_own[index, None], self.first_own[index, None]
        others = self.num_images - own
        place = (uniform * others).long().minimum(others - 1)  # a float may round up to `others`
        return self.by_class[place + own * (place >= first)]

    def estimated_log_z(self, scores: Tensor) -> Tensor:
        """Logarithm of N times the mean of exp over the scores (2, B, 1 + M) of each direction: (2,)."""
        return scores.flatten(1).logsumexp(1) + math.log(self.num_images / scores[0].numel())

    @torch.no_grad()
    def remember(self, student: Tensor, teacher: Tensor, index: Tensor, log_z: Tensor) -> None:
        """Move the memories of the images `index` (B,) towards their embeddings (B, D), and keep Z."""
        for name, embedded in (("memory_student", student), ("memory_teacher", teacher)):
            memory = getattr(self, name)
            moved = F.normalize(self.momentum * memory[index] + (1 - self.momentum) * embedded, dim=1)
            setattr(self, name, memory.index_copy(0, index, moved))  # a new one: backward still needs the old
        self.log_z, self.has_z = log_z, True

    def get_extra_state(self) -> dict[str, Any]:
        """Say whether Z is known, for `state_dict`."""
        return {"has_z": self.has_z}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up whether Z is known."""
        self.has_z = state["has_z"]
