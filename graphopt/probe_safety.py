"""When a probe runs out of memory: whether another candidate may take the batch, as if nothing had been run."""

from __future__ import annotations

import torch

from graphopt.schemes import Task

_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")


def out_of_memory(error: Exception) -> bool:
    """Whether an error of torch says that memory did not suffice, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in _MESSAGES)


def first_line(error: Exception) -> str:
    """The first line of its message."""
    return str(error).strip().partition("\n")[0]


class Before:
    """What a step may change, as it was before it: versions of parameters, buffers and state, and the random state.

    Autograd's version counters rise with each change in place, by whatever operator.
    """

    def __init__(self, task: Task):
        self._task = task
        self._versions = self._now()
        self._random = torch.get_rng_state()

    def _now(self) -> list[tuple[int, int]]:
        task = self._task
        state = (v for o in task.optimizers for s in o.state.values() for v in s.values())
        tensors = (*task.parameters, *task.model.buffers(), *(v for v in state if isinstance(v, torch.Tensor)))
        return [(id(t), t._version) for t in tensors]

    def restored(self) -> bool:
        """Whether nothing was changed that lasts; then the random state is put back, and gradients so far are gone."""
        if self._task.accumulate > 1 or self._now() != self._versions:
            return False
        torch.set_rng_state(self._random)
        for parameter in self._task.parameters:
            parameter.grad = None
        return True
