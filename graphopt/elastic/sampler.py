"""`Sampler`: a strategy at work, with the state that a checkpoint needs; and how many subnets a step should train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random as Dice
from typing import Any

from graphopt.elastic.choice import Choice
from graphopt.elastic.region import Region
from graphopt.elastic.sampling import Strategy, Turn, distinct
from graphopt.errors import ElasticError

FEWEST, MOST = 4, 8
"""Subnets a step, unless the user says how many."""


class Sampler:
    """Draws the subnets of step after step: the same ones for the same seed, whatever else draws random numbers.

    Args:
        region: what to draw from.
        strategy: how.
        count: how many subnets a step trains.
        seed: of the random numbers.

    Raises:
        ElasticError: a count that is not positive.
    """

    def __init__(self, region: Region, strategy: Strategy, count: int = FEWEST, *, seed: int = 0):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ElasticError(f"count: expected a positive number of subnets a step, got {count!r}")
        self.region, self.strategy, self.count = region, strategy, count
        self.step = 0
        self._dice = Dice(seed)

    def draw(self) -> tuple[Choice, ...]:
        """The subnets of the next step: at least one, none twice, the full one (if drawn) first."""
        drawn = self.strategy.draw(self.region, self.count, Turn(self.step, self._dice))
        self.step += 1
        full = self.region.full
        return tuple(sorted(distinct(drawn), key=lambda choice: choice != full)) or (full,)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the number of the step and the state of the random numbers; plain data."""
        return {"step": self.step, "random": self._dice.getstate()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises ElasticError for one that is damaged; then nothing was changed."""
        try:
            version, numbers, gauss = state["random"]
            step = int(state["step"])
            dice = Dice()
            dice.setstate((version, tuple(numbers), gauss))
        except (KeyError, TypeError, ValueError) as error:
            raise ElasticError(f"state: it is no state of a sampler ({error!r})") from error
        self.step, self._dice = step, dice


def subnets_for(targets: Sequence[float]) -> int:
    """How many subnets a step should train where these budgets are aimed at (FLOPs, seconds ... of the platforms).

    One for each factor of two between the largest and the smallest budget, and one more for the ends, but at least one
    for each budget; from 4 to 8. A subnet passes most of what it learns on to those of nearly its size, which share
    most of its weights.

    Raises ElasticError for no budgets, or ones that are not positive.

    >>> subnets_for([1e9]), subnets_for([6e8, 1e8]), subnets_for([3.2e9, 1e8, 2e7])
    (4, 5, 8)
    """
    if not targets or not all(0 < t < math.inf for t in targets):
        raise ElasticError(f"targets: expected positive budgets, got {list(targets)}")
    wanted = 2 + math.ceil(math.log2(max(targets) / min(targets)))
    return min(max(wanted, len(set(targets)), FEWEST), MOST)
