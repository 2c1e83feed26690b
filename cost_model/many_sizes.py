"""Prices of one graph at many sizes at once: thousands a second, without a capture, for those who search.

The same arithmetic as `graphopt.cost_model.estimate`, on arrays with a dimension more; operators that a candidate
leaves out (layers of a network that is less deep) count for nothing. The first touch of fresh memory, which is a term
of large steps on a CPU, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import sympy

from graphopt.cost_model.analytical import binding_seconds, kernel_seconds_at, launch_seconds
from graphopt.cost_model.machine import Machine
from graphopt.cost_model.memory import Absent
from graphopt.cost_model.work import Work
from graphopt.errors import CostModelError

_AT_ONCE = 256
"""Candidates of one evaluation: arrays of some MiB, which caches hold."""


@dataclass(frozen=True)
class ManyPrices:
    """Prices of candidates, arrays ``(count,)``: FLOPs and bytes int64, seconds float64; 0 for what was not asked."""

    flops: np.ndarray
    peak_bytes: np.ndarray
    seconds: np.ndarray


def price_many(
    work: Work,
    values: Mapping[sympy.Symbol, np.ndarray],
    absent: Sequence[Absent],
    *,
    machine: Machine | None = None,
    peak: bool = False,
) -> ManyPrices:
    """Price many candidates.

    Args:
        work: of the graph, compiled with their sizes free.
        values: for each symbol int64 ``(count,)``.
        absent: for each candidate the operators that it leaves out.
        machine: for seconds of one processor; none for counts alone.
        peak: whether ``peak_bytes`` are wanted.

    Raises:
        CostModelError: a graph with an update, whose kernels go through many parameters at once.
    """
    if bool(work.updating.any()):
        raise CostModelError("graph: it has an update; price many sizes of the graph without it")
    count = len(absent)
    result = ManyPrices(np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count))
    host = launch_seconds(work, machine) if machine is not None else np.zeros(0)
    for begin in range(0, count, _AT_ONCE):
        at = slice(begin, begin + _AT_ONCE)
        some = {symbol: array[at] for symbol, array in values.items()}
        patterns: dict[Absent, list[int]] = {}
        for i, out in enumerate(absent[at]):
            patterns.setdefault(out, []).append(i)
        present = np.ones((len(work.nodes), len(absent[at])), dtype=bool)
        for out, members in patterns.items():
            gone = [k for k, node in enumerate(work.nodes) if node in out.nodes] if out.nodes else []
            present[np.ix_(gone, members)] = False
        counts = work.at_many(some)
        result.flops[at] = np.where(present, counts.flops, 0).sum(axis=0)
        if machine is not None:
            runs = present[work.node_of]
            kernel, _ = kernel_seconds_at(work, counts, machine)
            busy = np.where(runs, kernel, 0.0).sum(axis=0)
            launches = np.where(runs, host[:, None], 0.0).sum(axis=0) + binding_seconds(work, machine)
            result.seconds[at] = np.maximum(busy, launches) if machine.asynchronous else busy + launches
        if peak:
            sizes = work.memory.sizes_at_many(some)
            for out, members in patterns.items():
                part = sizes[:, members] if sizes.shape[1] > 1 else sizes
                result.peak_bytes[begin + np.array(members)] = work.memory.totals(part, out)
    return result
