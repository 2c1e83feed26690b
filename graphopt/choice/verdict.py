"""What a choice writes into its plan: what was expected of candidates, why they lost, that the machine changed."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.choice.landscape import Belief
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


def say_expected(plan: Plan, beliefs: Mapping[str, Belief | None]) -> None:
    """Say in the plan what steps of candidates should take."""
    for name, belief in beliefs.items():
        if belief is not None:
            plan.candidate(name).predicted = belief.seconds, belief.low, belief.high, belief.source


def say_drift(plan: Plan, steps: int, ratio: float) -> None:
    """Say in the plan that steps take ``ratio`` times as long as decided on; what it said of that before is gone."""
    begins = "the machine changed: "
    plan.notes[:] = [note for note in plan.notes if not note.startswith(begins)]
    plan.notes.append(f"{begins}after {steps:,} steps one took {ratio:.2f} times as long as decided on; measured again")
