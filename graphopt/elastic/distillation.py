"""In-place distillation: the subnets of a step learn from the largest one of the same step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from graphopt.errors import ElasticError


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The Kullback-Leibler divergence of the student's distribution from the teacher's: scalar, mean over samples.

    Args:
        student, teacher: logits, ``[N, classes, ...]`` (or ``[classes]``) as `torch.nn.functional.cross_entropy`
            takes them; mean over N and all further dimensions.
        temperature: both are divided by it and the result is multiplied by its square, so that gradients keep their
            size (Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015).
    """
    dim = 1 if student.dim() > 1 else 0
    log_student = F.log_softmax(student / temperature, dim)
    log_teacher = F.log_softmax(teacher / temperature, dim)
    each = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim)
    return each.mean() * temperature**2


@dataclass(frozen=True)
class InPlaceDistillation:
    """``(1 - w) loss(subnet, target) + w distance(subnet, largest)`` for all but the largest subnet of a step.

    ``w`` rises linearly from 0 at step ``start`` to ``weight`` at step ``start + ramp``: a largest net that has learnt
    nothing teaches nothing (small digits, 1000 steps: pure distillation from the first step costs the smallest net
    seven points).

    Args:
        weight: of the teacher in the end, 0 to 1.
        start: the step from which on it counts.
        ramp: steps until it counts in full.
        distance: ``distance(student's output, teacher's output)``, a scalar; `soft_cross_entropy` of logits by default.
            The outputs are those that the loss is given.

    Raises:
        ElasticError: a weight that is not in 0..1, or steps below 0.

    Source: Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", ICCV 2019.

    >>> [InPlaceDistillation(0.8, start=10, ramp=100).at(step) for step in (5, 60, 500)]
    [0.0, 0.4, 0.8]
    """

    weight: float = 0.5
    start: int = 0
    ramp: int = 1000
    distance: Callable[[Tensor, Tensor], Tensor] = soft_cross_entropy

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1 or self.start < 0 or self.ramp < 0:
            raise ElasticError(
                "InPlaceDistillation: expected a weight from 0 to 1 and steps of at least 0, got "
                f"weight={self.weight}, start={self.start}, ramp={self.ramp}"
            )

    def at(self, step: int) -> float:
        """The weight of the teacher at a step."""
        if step < self.start:
            return 0.0
        return self.weight * min((step - self.start) / self.ramp, 1.0) if self.ramp else self.weight

    def loss(self, student: Tensor, teacher: Tensor, own: Tensor, step: int) -> Tensor:
        """What a subnet learns from. Raises ElasticError where the outputs are no tensors, or the distance no scalar.

        Args:
            student, teacher: outputs; nothing flows back into the teacher's.
            own: the subnet's loss on the targets.
            step: the number of the step.
        """
        weight = self.at(step)
        if not weight:
            return own
        if not isinstance(student, Tensor) or not isinstance(teacher, Tensor):
            raise ElasticError(
                f"distillation: the net gives a {type(student).__name__}; expected a tensor (give a module around it)"
            )
        distance = self.distance(student, teacher.detach())
        if distance.numel() != 1:
            raise ElasticError(f"distillation: distance gave the shape {list(distance.shape)}, expected a scalar")
        return (1 - weight) * own + weight * distance.reshape(own.shape)
