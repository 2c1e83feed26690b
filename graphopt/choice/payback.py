"""What a choice may cost: measuring has its bounds, and a candidate that is dear to start has to pay back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphopt.choice.landscape import Landscape
from graphopt.plan import Plan, duration

GUESS = 0.2
"""Share of a step that a candidate without a price is taken to gain."""


HORIZON = 200
"""Steps over which measuring has to pay, where nobody said how many there will be."""

SHARE, FREE_SECONDS = 0.02, 1.5
"""What measuring may cost: this share of the time of all steps, and some seconds besides."""


def allowance(horizon: float) -> Callable[[float], float]:
    """Seconds that measuring may take, by those of the best candidate's step, where so many steps are to come.

    >>> allowance(1000)(0.1)
    3.5
    """
    return lambda best: FREE_SECONDS + SHARE * horizon * best


def time_for_another(steps: int, seconds: float) -> bool:
    """Whether so many steps of so many seconds have made up for measuring one more candidate."""
    return SHARE * steps * seconds > FREE_SECONDS + 2 * seconds


@dataclass(frozen=True)
class Payback:
    """Whether a candidate that is dear to start is worth its start.

    Attributes:
        cost: seconds once.
        gain: seconds a step that it should be faster by; 0 or less: none.
    """

    cost: float
    gain: float

    @property
    def steps(self) -> float:
        """Steps after which the start is paid back, infinite where nothing is gained.

        >>> Payback(cost=40.0, gain=0.01).steps
        4000.0
        """
        return self.cost / self.gain if self.gain > 0 else float("inf")

    def worth(self, remaining: float) -> bool:
        """Whether so many steps pay it back."""
        return self.gain * remaining > self.cost


def worth_a_start(
    late: Sequence[str],
    others: Sequence[str],
    plan: Plan,
    landscape: Landscape,
    cost: Callable[[str], float],
    remaining: float,
) -> str | None:
    """The first of the ``late`` candidates whose start the ``remaining`` steps pay back beside the chosen scheme.

    What it should gain is measured, interpolated or priced (a bare price corrected by how far those of ``others`` are
    off), or guessed. The plan says of each that is not worth it after how many steps it would be.
    """
    best = landscape.belief(plan.chosen, plan.batch_size)
    if best is None:
        return None
    for name in late:
        likely = landscape.likely(name, plan.batch_size, others)
        gain = GUESS * best.seconds if likely is None else best.seconds - likely
        payback = Payback(cost(name), gain)
        candidate = plan.candidate(name)
        candidate.break_even = payback.steps if gain > 0 else None
        if payback.worth(remaining):
            return name
        if gain <= 0:
            candidate.lost = f"not tried: expected at {duration(best.seconds - gain)}, no gain over {plan.chosen}"
        else:
            by = f"{'at a guess ' * (likely is None)}{duration(gain)} a step less"
            candidate.lost = (
                f"not tried: {duration(payback.cost)} to start and {by} pay back after {payback.steps:,.0f} steps; "
                f"{remaining:,.0f} are expected"
            )
    return None
