"""Who of the candidates is worth a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphopt.choice.landscape import Belief

MOST = 5
"""Candidates that are measured at one batch size at most."""

LEAST = 3
"""Candidates that are measured even where bare prices speak against them."""


def contenders(names: Sequence[str], beliefs: Mapping[str, Belief | None]) -> tuple[list[str], dict[str, str]]:
    """The candidates to measure, and why the others are not.

    Who was measured (here or at other batch sizes) so that its interval lies above the best one's is left out; by a
    price alone, who is not among the three cheapest besides. Who nothing is known of goes first: there is no other
    way to learn of it.

    Args:
        names: the candidates, best guess first.
        beliefs: what their steps should take.

    Returns:
        Names to measure, at most five, and reasons by name.
    """
    known = {name: belief for name in names if (belief := beliefs.get(name)) is not None}
    unknown = [name for name in names if name not in known]
    ranked = sorted(known, key=lambda name: known[name].seconds)
    measured = [name for name in ranked if known[name].source != "priced"]
    lost: dict[str, str] = {}
    for rank, name in enumerate(ranked):
        bare = known[name].source == "priced"
        best = ranked[0] if bare else measured[0]  # a bare price is no reason against what was measured
        if known[name].low > known[best].high and (not bare or rank >= LEAST):
            ratio = known[name].seconds / known[best].seconds
            lost[name] = f"not measured: {known[name].source} at {ratio:.2f} times {best}"
    hopeful = [name for name in ranked if name not in lost]
    places = max(MOST - len(hopeful), 2) if hopeful else MOST
    entrants = [*unknown[:places], *hopeful]
    for name in (*unknown[places:], *entrants[MOST:]):
        lost[name] = f"not measured: not among the {MOST} most promising"
    return entrants[:MOST], lost
