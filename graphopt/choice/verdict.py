"""What a plan says of candidates that were measured: how much slower than the chosen one, or as fast."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.choice.race import MARGIN
from graphopt.cost_model.measured import Measurement
from graphopt.plan import Plan


def verdict(plan: Plan, chosen: str, measured: Mapping[str, Measurement]) -> str:
    """Say in the plan why the others lost against ``chosen``, where nothing was said; the reason of the choice."""
    others = {name: m.seconds / measured[chosen].seconds for name, m in measured.items() if name != chosen}
    for name, ratio in others.items():
        if not plan.candidate(name).lost:
            near = ratio <= 1 + MARGIN
            plan.candidate(name).lost = f"as fast as {chosen}" if near else slower(ratio, chosen)
    listed = ", ".join(f"{name} takes {ratio:.2f} times as long" for name, ratio in others.items())
    return f"measured: {listed}" if others else "measured"


def slower(ratio: float, chosen: str) -> str:
    """Why a candidate lost that was measured."""
    return f"took {ratio:.2f} times as long as {chosen}"
