"""What the first step of a scheme costs besides: a capture, a compilation, or what is left of one made ahead."""

from __future__ import annotations

import torch

from graphopt.choice.first_capture import capture_seconds
from graphopt.choice.landscape import Landscape
from graphopt.choice.prices import Prices
from graphopt.cost_model.machine import available_cores
from graphopt.schemes import Prepared, Scheme
from graphopt.schemes.base import UnderWay

UNKNOWN_START = 30.0
"""Seconds that a compiler is taken to need where there is no price of it."""

RELOAD = 0.3
"""Share of a compilation that is left here of one that was made ahead: the trace, and loading what is on disk. Four
layers of a transformer took this process 1.8 to 2.2 s in place of 5.7 s, without those of the C++ compiler."""

SLOWED = {True: 0.1, False: 0.5}
"""Share of the seconds of a compilation ahead that steps take longer meanwhile, a guess: with a core to spare (memory
is shared all the same), and without one (it has low priority, but the threads of a step wait for each other)."""


class Starts:
    """Starts of the schemes of one situation, and the compilations that were begun ahead."""

    def __init__(self, prices: Prices, landscape: Landscape):
        self._prices, self._landscape = prices, landscape
        self._under_way: dict[tuple[str, int, int], UnderWay] = {}  # by scheme, batch size and captured step

    def cost(self, scheme: Scheme, prepared: Prepared, size: int, *, built: bool) -> float:
        """Seconds that its first step at ``size`` takes more than any other, or that training loses to them. ``built``:
        whether it has run at another size."""
        if scheme.needs_graph and prepared.step is None:
            return capture_seconds(prepared.task.model)
        seconds = 0.0 if built else scheme.start_seconds(prepared)
        if scheme.compiles and len(self._landscape.measured_at(scheme.name)) < 2:  # then it is compiled for free sizes
            found = self._prices.of(scheme, prepared, size)
            seconds += self._left(scheme, prepared, size) * (UNKNOWN_START if found is None else found.compile_seconds)
        return seconds

    def _left(self, scheme: Scheme, prepared: Prepared, size: int) -> float:
        """The share of its compilation that training pays for."""
        under_way = self._under_way.get(_place(scheme, prepared, size))
        if under_way is not None:
            return 1.0 if under_way.failed else RELOAD
        spare = torch.get_num_threads() < available_cores()
        return RELOAD + SLOWED[spare] if scheme.compiles_ahead else 1.0

    def ahead(self, scheme: Scheme, prepared: Prepared, size: int) -> UnderWay | None:
        """Its compilation for this size of this step in another process, begun now if it was not; None where there is
        none."""
        place = _place(scheme, prepared, size)
        if scheme.compiles_ahead and place not in self._under_way:
            begun = scheme.ahead(prepared, size)
            if begun is not None:
                self._under_way[place] = begun
        return self._under_way.get(place)

    def close(self) -> None:
        """End what is under way."""
        while self._under_way:
            self._under_way.popitem()[1].close()


def _place(scheme: Scheme, prepared: Prepared, size: int) -> tuple[str, int, int]:
    """What a compilation is of. (A situation keeps its steps, so that their ids stay theirs.)"""
    return scheme.name, size, id(prepared.step)
