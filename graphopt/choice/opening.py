"""How a choice begins at a batch size: who is measured, or who runs without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graphopt.choice.contenders import contenders
from graphopt.choice.landscape import Belief
from graphopt.choice.race import MARGIN, ROUNDS

ALONE = 3
"""Timed steps of a candidate that has no other to be compared with yet."""


@dataclass(frozen=True)
class Opening:
    """What to do first.

    Attributes:
        first: the candidates to measure, who gets ties first; the one to run, where ``rounds`` is 0.
        rounds: timed steps of each at most.
        confirms: what one step of the first is to confirm.
        expected: what is expected of one that runs without being measured.
        lost: why candidates are not measured.
    """

    first: Sequence[str]
    rounds: int = ROUNDS
    confirms: Belief | None = None
    expected: Belief | None = None
    lost: Mapping[str, str] = field(default_factory=dict)


def opening(
    names: Sequence[str], beliefs: Mapping[str, Belief | None], incumbent: str, *, others_wait: bool
) -> Opening:
    """Who of the candidates is measured, by what is expected of them.

    Where all were measured before, one step of the best confirms it; where measurements at other sizes leave one, it
    runs at once; else those that are worth it race, the incumbent first.

    Args:
        names: the candidates, best guess first.
        beliefs: what their steps should take.
        incumbent: who gets ties.
        others_wait: whether there are candidates that are tried only when their start pays back: then also a single one
            is measured, to weigh them against it.
    """
    if len(names) == 1 and not others_wait:
        return Opening(names, rounds=0)
    entrants, lost = contenders(names, beliefs)
    known = {name: belief for name in entrants if (belief := beliefs[name]) is not None}
    first = incumbent if incumbent in entrants else entrants[0]
    if len(known) == len(entrants):
        best = min(known, key=lambda name: known[name].seconds)
        if known[best].seconds * (1 + MARGIN) >= known.get(first, known[best]).seconds:
            best = first
        if all(belief.source in ("stored", "measured") for belief in known.values()):
            return Opening([best], 1, confirms=known[best], lost=lost)
        if len(entrants) == 1 and known[best].source == "interpolated":
            return Opening([best], 0, expected=known[best], lost=lost)
    rounds = ALONE if len(entrants) == 1 else ROUNDS
    return Opening([first, *(name for name in entrants if name != first)], rounds, lost=lost)
