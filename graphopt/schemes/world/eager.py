"""`EagerInWorld`: eager steps on every rank of a world, for what cannot be divided as a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.cost_model import Estimate
from graphopt.errors import GraphoptError, RankError
from graphopt.schemes.base import Machines, Prepared, Runner
from graphopt.schemes.eager import Eager, EagerStep
from graphopt.schemes.task import Task, clear_gradients
from graphopt.schemes.world.ranks import World

BUCKET_BYTES = 25 * 2**20
"""Gradients that go into one message, as in DistributedDataParallel."""


@dataclass(frozen=True)
class EagerInWorld(Eager):
    """Autograd on every rank, then the mean of gradients over all rows: what DistributedDataParallel computes.

    Exact for a loss that is a mean over rows which do not meet before. Batch statistics and random numbers are each
    rank's own; buffers are those of rank 0 after each step.
    """

    ranks: int

    kind: ClassVar[str] = "eager in a world"

    @property
    def name(self) -> str:
        """See `Scheme.name`."""
        return ", ".join((f"eager on {self.ranks} ranks", *self.options))

    def runner(self, prepared: Prepared) -> Runner:
        """See `OneProcessor.runner`."""
        return _EagerRank(prepared, fused=self.fused, channels_last=self.channels_last, precision=self.precision)

    def estimate(self, prepared: Prepared, size: int, machines: Machines) -> Estimate | None:
        """None: what collectives cost between ranks is not calibrated."""
        return None


class _EagerRank(EagerStep):
    """Eager steps of one rank."""

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `EagerStep`. Where another rank is gone buffers are put back, and gradients dropped."""
        buffers = list(self.task.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        try:
            return super().__call__(tensors)
        except RankError:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
            clear_gradients(self.task)
            raise

    @property
    def _world(self) -> World:
        assert self.task.world is not None
        return self.task.world

    @property
    def _share(self) -> float:
        """The rows of this rank among those of all."""
        meeting = self._world.meeting
        return meeting.rows[self._world.rank] / meeting.total

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """See `EagerStep.scaled`."""
        return super().scaled(loss) * self._share

    def backward(self, batch: Any) -> torch.Tensor:
        """See `EagerStep.backward`: gradients are summed over ranks where a step ends, buffers are those of rank 0, the
        loss is that of all rows. All that ranks exchange is exchanged before the update."""
        loss = super().backward(batch)
        if self.task.ends:
            add_gradients(self.task, self._world)
        buffers = list(self.task.model.buffers())
        with torch.no_grad():
            for buffer, value in zip(buffers, self._world.of_first(buffers), strict=True):
                if self._world.rank:
                    buffer.copy_(value)
        return self._world.add((loss * self._share).contiguous())


def add_gradients(task: Task, world: World) -> None:
    """Sum the gradients in ``.grad`` over ranks. One that no rank has stays None.

    Raises:
        GraphoptError: a gradient is sparse.
        RankError: another rank is gone.
    """
    trained = [p for p in task.parameters if p.requires_grad]
    if any(p.grad is not None and p.grad.is_sparse for p in trained):
        raise GraphoptError("model: sparse gradients are not brought together over ranks; use dense ones")
    there = [p.grad is not None for p in trained]
    counts = [sum(flags) for flags in zip(*world.digests(list(map(int, there))))]
    wanted = [p for p, count in zip(trained, counts, strict=True) if count]
    with torch.no_grad():
        for bucket in _buckets(wanted):
            parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket]
            summed = world.add(torch.cat(parts))
            for p, part in zip(bucket, summed.split([p.numel() for p in bucket]), strict=True):
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.grad.copy_(part.view(p.shape))


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters of one dtype and device, up to `BUCKET_BYTES` together."""
    alike: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        alike.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for members in alike.values():
        bucket: list[torch.nn.Parameter] = []
        size = 0
        for parameter in members:
            if bucket and size + parameter.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.nbytes
        yield bucket
