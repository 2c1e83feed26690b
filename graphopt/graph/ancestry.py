"""`ancestors`: what nodes of a graph are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx


def ancestors(nodes: Iterable[fx.Node], within: Callable[[fx.Node], bool] | None = None) -> set[fx.Node]:
    """``nodes`` and all that they are computed from, through nodes that are ``within`` (by default all)."""
    found = set(nodes)
    waiting = list(found)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found and (within is None or within(source)):
                found.add(source)
                waiting.append(source)
    return found
