"""The number of threads of a step: a process has one number, so a scheme sets its own for its steps only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from graphopt.schemes.base import Runner


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """So many threads of torch's operators within; as before behind it, also after an exception."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class WithThreads:
    """A runner whose steps run with a number of threads. Sums that threads share are taken in another order than with
    another number: results may differ in their last bits."""

    def __init__(self, runner: Runner, threads: int):
        self._runner, self._threads = runner, threads

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """One batch."""
        with thread_count(self._threads):
            return self._runner(tensors)

    def fresh(self) -> bool:
        """See `Runner`."""
        return self._runner.fresh()

    def close(self) -> None:
        """See `Runner`."""
        self._runner.close()
