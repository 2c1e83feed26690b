"""What ``schemes="auto"`` takes."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.schemes.base import Prepared, Scheme
from graphopt.schemes.eager import Eager
from graphopt.schemes.flat import Flat
from graphopt.schemes.task import Task


def candidates(task: Task, prepared: Prepared, *, threads: Sequence[int], precision: str | None) -> tuple[Scheme, ...]:
    """The schemes that may be fastest for a task, best guess first.

    Args:
        task: what is trained.
        prepared: its captured step, if there is one.
        threads: numbers of threads to run with.
        precision: what the user allows beside full precision.
    """
    return Flat(), Eager()
