"""`World`: the ranks of `torch.distributed` that take each step together, and what they tell each other.

Every rank runs the user's script and calls the step with rows of its own. What they exchange before a step (how many
rows, whether all are in the same state) is a few numbers over gloo, so that nothing waits for a device.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import distributed, nn

from graphopt.errors import GraphoptError, RankError
from graphopt.schemes.workers.worker import of_a_collective

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}

NOT_MADE = "the step was not made: parameters, buffers and optimizer state of this rank are as before it"


@dataclass(frozen=True)
class Meeting:
    """What all ranks said before a step: their rows of the batch, and whether somebody else wrote into the model of one
    of them since the last step (``touched``). ``begin``: the first row of this rank in the whole batch."""

    rows: tuple[int, ...]
    begin: int
    touched: bool

    @property
    def total(self) -> int:
        """Rows of the whole batch."""
        return sum(self.rows)


class World:
    """The ranks of the default group, as this one sees them.

    Attributes:
        rank, size: of this process; of all.
        group: the name of the default group, for collectives in graphs.
        meeting: the last one.
    """

    def __init__(self) -> None:
        """Made by all ranks together (`find_world`)."""
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        whole = distributed.group.WORLD
        assert whole is not None
        self.group = str(whole.group_name)
        self.meeting = Meeting((1,) * self.size, self.rank, touched=False)
        talks = "gloo" in str(distributed.get_backend())
        self._control = whole if talks else distributed.new_group(backend="gloo")

    # -- before a step ----------------------------------------------------------------------------------------------

    def meet(self, rows: int, state: int, describe: Callable[[], str], *, touched: bool) -> Meeting:
        """Say how many rows this rank has, and hear it of the others.

        Args:
            rows: of the batch on this rank.
            state: a checksum of all that must be the same on all ranks.
            describe: the same as text, asked for where ranks differ.
            touched: whether the model was written to since the last step.

        Raises:
            RankError: ranks differ, or one cannot take the step, or is gone. Nothing was changed.
        """
        told = self._told([0, rows, state, int(touched)])
        if any(failed for failed, *_ in told):
            self.give_up(self.failure(None) or "for a reason that it does not give")
        if len({state for _, _, state, _ in told}) > 1:
            self._differ(self.exchange(describe()))
        counts = tuple(count for _, count, _, _ in told)
        self.meeting = Meeting(counts, sum(counts[: self.rank]), any(flag for *_, flag in told))
        return self.meeting

    def refuse(self, error: BaseException) -> None:
        """Tell the others, who meet, that this rank cannot take the step."""
        self._told([1, 0, 0, 0])
        self.failure(f"{type(error).__name__}: {error}")

    # -- off the hot path -------------------------------------------------------------------------------------------

    def exchange(self, text: str) -> list[str]:
        """What each rank says."""
        data = text.encode()
        lengths = [length for (length,) in self._told([len(data)])]
        mine = torch.zeros(max(lengths), dtype=torch.uint8)
        mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        if not max(lengths):
            return [""] * self.size
        found = self._gathered(mine)
        return [bytes(t[:n].tolist()).decode() for t, n in zip(found, lengths, strict=True)]

    def failure(self, error: str | None) -> str | None:
        """Why one of the ranks cannot go on, None where all can: each says why it cannot."""
        said = self.exchange(error or "")
        return next((f"rank {k}: {why}" for k, why in enumerate(said) if why), None)

    def check_same(self, text: str) -> None:
        """Raise RankError where ranks say different things."""
        said = self.exchange(text)
        if len(set(said)) > 1:
            self._differ(said)

    def slowest(self, seconds: float) -> float:
        """The most seconds that a rank took."""
        return max(float(t) for t in self._gathered(torch.tensor(seconds, dtype=torch.float64)))

    # -- values -----------------------------------------------------------------------------------------------------

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its sum over all ranks, in place. The tensor is contiguous."""
        with self.reaching():
            distributed.all_reduce(tensor)
        return tensor

    def of_first(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Values of rank 0: one message for each dtype and device."""
        found = [t.detach() for t in tensors]
        alike: dict[Any, list[int]] = {}
        for k, tensor in enumerate(found):
            alike.setdefault((tensor.dtype, tensor.device), []).append(k)
        for members in alike.values():
            flat = torch.cat([found[k].reshape(-1) for k in members])
            with self.reaching():
                distributed.broadcast(flat, 0)
            pieces = flat.split([found[k].numel() for k in members])
            for k, piece in zip(members, pieces, strict=True):
                found[k] = piece.view(found[k].shape)
        return found

    def digests(self, numbers: Sequence[int]) -> list[list[int]]:
        """What each rank gives: as many numbers on all."""
        return self._told(numbers)

    @contextmanager
    def random_of_first(self, devices: Sequence[torch.device]) -> Iterator[None]:
        """The random numbers of rank 0 within. Behind it the generators of rank 0 are where the step left them, and
        those of other ranks where they were; after an exception, all."""
        sources = [_generator(device) for device in dict.fromkeys((torch.device("cpu"), *devices))]
        mine = [read() for read, _ in sources]
        for state, (_, write) in zip(mine, sources, strict=True):
            shared = state.clone()
            with self.reaching():
                distributed.broadcast(shared, 0, group=self._control)
            write(shared)
        done = False
        try:
            yield
            done = True
        finally:
            if self.rank or not done:
                for state, (_, write) in zip(mine, sources, strict=True):
                    write(state)

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Collectives run within: one that fails becomes a RankError."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, distributed.DistError) and not of_a_collective(str(error)):
                raise
            first_line = str(error).strip().partition("\n")[0]
            raise RankError(
                f"another rank is gone, has failed or did not answer within the timeout of the group; {NOT_MADE}. "
                f"torch.distributed says: {first_line}"
            ) from error

    # -- how --------------------------------------------------------------------------------------------------------

    def _told(self, numbers: Sequence[int]) -> list[list[int]]:
        return [t.tolist() for t in self._gathered(torch.tensor(numbers, dtype=torch.int64))]

    def _gathered(self, mine: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self.reaching():
            distributed.all_gather(found, mine, group=self._control)
        return found

    def give_up(self, why: str) -> NoReturn:
        """Raise the RankError of a rank that goes no further because of another one."""
        raise RankError(f"another rank cannot take the step, {why}; {NOT_MADE}")

    def _differ(self, said: Sequence[str]) -> NoReturn:
        k = next(k for k, text in enumerate(said) if text != said[0])
        ours, theirs = said[0].splitlines(), said[k].splitlines()
        lines = [(a, b) for a, b in zip(ours, theirs) if a != b]
        a, b = lines[0] if lines else (f"{len(ours)} lines", f"{len(theirs)} lines")
        raise RankError(
            f"ranks differ, but must all be in the same state: rank 0 has {a!r}, rank {k} has {b!r}; {NOT_MADE}"
        )


def find_world(model: nn.Module, processors: int | None) -> World | None:
    """The world that shares the steps of ``model``, None for a process by itself.

    It is the default group of `torch.distributed` where that is initialised or a launcher (torchrun) has set what it
    takes to initialise it: with gloo, and NCCL for a model on CUDA. Called by all ranks together.

    Args:
        model: what is trained. One in DistributedDataParallel or FSDP brings its gradients together by itself: None.
        processors: 1 leaves the world alone; another number must be that of its ranks.

    Raises:
        GraphoptError: the world has another number of ranks.
    """
    if processors == 1 or not distributed.is_available() or synchronises_itself(model):
        return None
    if not distributed.is_initialized():
        if not launched(os.environ):
            return None
        cuda = any(p.is_cuda for p in model.parameters())
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        atexit.register(_leave)
    size = distributed.get_world_size()
    if processors not in (None, size):
        raise GraphoptError(
            f"processors: got {processors}, but torch.distributed has a world of {size}, which takes the "
            f"step together; expected {size}, None, or 1 to leave each rank by itself"
        )
    return World() if size > 1 else None


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process as one of several.

    >>> launched({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    True
    """
    return all(name in environment for name in _LAUNCHED) and environment["WORLD_SIZE"] not in ("", "1")


def synchronises_itself(model: nn.Module) -> bool:
    """Whether the model is wrapped so that its backward brings gradients of ranks together."""
    return any(base.__name__ in _WRAPPERS for m in model.modules() for base in type(m).__mro__)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _generator(device: torch.device) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], None]]:
    if device.type == "cpu":
        return torch.get_rng_state, torch.set_rng_state
    module = torch.get_device_module(device)
    return lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device)
