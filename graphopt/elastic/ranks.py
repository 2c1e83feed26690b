"""`Ranks`: a step of subnets on all ranks of `torch.distributed`, by autograd on each rank's rows.

For subnets that no graph holds: those that are drawn anew in each step. Sets of subnets that come again run as divided
graphs (`graphopt.elastic.graph_steps`).
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import torch

from graphopt.elastic.choice import Choice
from graphopt.elastic.subnet import BatchNorm, batch_norm
from graphopt.elastic.synchronized_norm import synchronized_batch_norm
from graphopt.errors import GraphoptWarning
from graphopt.graph.batch import flatten
from graphopt.schemes.task import Task
from graphopt.schemes.world.eager import add_gradients
from graphopt.schemes.world.ranks import World
from graphopt.schemes.world.sameness import Touched, equalise

Norms = Literal["synchronized", "local"]


class Ranks:
    """What ranks do together around the subnets of a step.

    The gradient is that of one processor on the rows of all ranks, up to the order of sums, for a loss that is a mean
    over rows. Random numbers of dropout are each rank's own.

    Args:
        world: the ranks.
        task: what is trained.
        norms: ``"synchronized"``: batch norms take the statistics of all rows; ``"local"``: of each rank's rows, and
            running statistics are those of rank 0.
    """

    def __init__(self, world: World, task: Task, norms: Norms):
        self.world, self._task, self._norms = world, task, norms
        self._touched = Touched(task)

    @property
    def norm(self) -> BatchNorm:
        """What runs batch norms."""
        return synchronized_batch_norm if self._norms == "synchronized" else batch_norm

    @property
    def share(self) -> float:
        """The rows of this rank among those of all, in the step that ranks last met for."""
        return self.world.meeting.rows[self.world.rank] / self.world.meeting.total

    def meet(self, batch: Any, choices: Sequence[Choice], how: str) -> None:
        """Before a step: ranks run the same subnets on the same model, and know each other's rows.

        Ranks whose models differ get the parameters, buffers and optimizer state of rank 0. ``how``: what else must be
        the same on all. Raises RankError where ranks differ, or one cannot take the step; then nothing was changed.
        """
        try:
            rows = flatten(batch)[2]
            modes = sorted(name for name, module in self._task.model.named_modules() if module.training)
            text = "\n".join([f"subnets: {[c.to_dict() for c in choices]}", how, f"in train mode: {modes}"])
            touched = self._touched.now()
        except Exception as error:
            self.world.refuse(error)
            raise
        if self.world.meet(rows, zlib.crc32(text.encode()), lambda: text, touched=touched).touched:
            if differing := equalise(self.world, self._task):
                listed = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
                warnings.warn(
                    f"ranks differed in {listed}: all have the values of rank 0 now", GraphoptWarning, stacklevel=4
                )
            self._touched.compared()

    def add(self, losses: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Behind the backward of all subnets: gradients are summed over ranks, buffers are those of rank 0. The losses
        of all rows. Nothing of the user's but gradients and buffers was changed."""
        add_gradients(self._task, self.world)
        buffers = list(self._task.model.buffers())
        with torch.no_grad():
            for buffer, value in zip(buffers, self.world.of_first(buffers), strict=True):
                if self.world.rank:
                    buffer.copy_(value)
        together = self.world.add(torch.stack(list(losses)) * self.share)
        return list(together.unbind())

    def settle(self) -> None:
        """The step was made: what was written until now was written by it."""
        self._touched.settle()
