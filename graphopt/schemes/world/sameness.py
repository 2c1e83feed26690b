"""That all ranks hold the same model and optimizers: compared bit by bit, made those of rank 0 where they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from graphopt.errors import RankError
from graphopt.schemes.task import Task
from graphopt.schemes.world.ranks import World


def equalise(world: World, task: Task) -> list[str]:
    """Give all ranks the parameters, buffers and optimizer state of rank 0, as DistributedDataParallel does. The names
    of those that differed.

    Raises:
        RankError: ranks have other tensors (names, shapes, dtypes), which no copy makes the same.
    """
    tensors = dict(held(task))
    world.check_same("\n".join(f"{name}: {t.dtype} {tuple(t.shape)}" for name, t in tensors.items()))
    digests = world.digests([digest(t) for t in tensors.values()])
    differing = [name for name, *values in zip(tensors, *digests, strict=True) if len(set(values)) > 1]
    with torch.no_grad():
        for name in differing:
            (value,) = world.of_first([tensors[name]])
            tensors[name].copy_(value)
    return differing


def held(task: Task) -> Iterator[tuple[str, torch.Tensor]]:
    """What a step changes, by name: parameters, buffers and the optimizers' state."""
    names = {id(p): name for name, p in task.model.named_parameters()}
    yield from ((names.get(id(p), f"parameter {k} of the optimizers"), p) for k, p in enumerate(task.parameters))
    yield from task.model.named_buffers()
    for optimizer in task.optimizers:
        for parameter, fields in optimizer.state.items():
            owner = names.get(id(parameter), "a parameter outside of the model")
            yield from ((f"{field} of {owner}", v) for field, v in fields.items() if isinstance(v, torch.Tensor))


def digest(tensor: torch.Tensor) -> int:
    """63 bits of a cryptographic hash of its values, as they are."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise RankError(f"a tensor of layout {tensor.layout} on {tensor.device} cannot be compared between ranks")
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return int.from_bytes(hashlib.blake2b(data.tobytes(), digest_size=8).digest(), "little") >> 1


class Touched:
    """Whether somebody besides the steps wrote into a model: by autograd's counts of writes, which rise with each
    change in place (writes through ``.data`` are not counted), and by the identity of optimizer state."""

    def __init__(self, task: Task):
        self._task = task
        self._tensors = [*task.parameters, *task.model.buffers()]
        self._known: tuple[int, ...] | None = None
        self._owed = True  # somebody wrote and ranks have not compared since
        self._written = False  # since the last step
        self._times = 0  # steps in a row before which somebody wrote

    def now(self) -> bool:
        """Whether there is anything to compare. Who writes before every step is looked at ever more rarely: at the 1st,
        2nd, 4th, 8th ... step in a row, and at the first step before which nobody writes."""
        self._written = self._read() != self._known
        self._owed |= self._written
        times = self._times + 1
        return self._owed and (not self._written or times & (times - 1) == 0)

    def compared(self) -> None:
        """All ranks have the same values now."""
        self._owed = False

    def settle(self) -> None:
        """What there is now is the work of a step, which was made."""
        self._times = self._times + 1 if self._written else 0
        self._known = self._read()

    def _read(self) -> tuple[int, ...]:
        return sum(t._version for t in self._tensors), *(id(o.state) for o in self._task.optimizers)
