"""`misfits`: dimensions that do not fit a graph after all, found by running every operator without data."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.elastic.choice import Choice
from graphopt.elastic.dimension import Dimension, Kind
from graphopt.elastic.supergraph import Supergraph
from graphopt.errors import AxisError, ElasticError


def misfits(supergraph: Supergraph, dimensions: Sequence[Dimension]) -> dict[str, str]:
    """Why some dimensions cannot take their smallest value in this graph: by name.

    All layers are there, everything else is at its smallest; shapes are compared with what the axes say. The analysis
    is to refuse beforehand what does not fit, so this is a second line, and usually one trial.
    """
    wrong: dict[str, str] = {}
    while True:
        rest = [d for d in dimensions if d.name not in wrong and d.kind is not Kind.DEPTH]
        problem = _problem(supergraph, dimensions, rest)
        if not problem:
            return wrong
        alone = {d.name: _problem(supergraph, dimensions, [d]) for d in rest}
        found = {name: why for name, why in alone.items() if why}
        wrong.update(found or _together(supergraph, dimensions, rest))


def _together(supergraph: Supergraph, dimensions: Sequence[Dimension], rest: Sequence[Dimension]) -> dict[str, str]:
    """The first dimension that does not fit together with those before it."""
    for many in range(2, len(rest) + 1):
        if problem := _problem(supergraph, dimensions, rest[:many]):
            return {rest[many - 1].name: problem}
    raise AssertionError("all of them together did not fit")


def _problem(supergraph: Supergraph, dimensions: Sequence[Dimension], small: Sequence[Dimension]) -> str:
    values = {d.name: d.full for d in dimensions} | {d.name: d.smallest for d in small}
    try:
        supergraph.subnet(Choice(values), checked=True)
    except (AxisError, ElasticError) as error:
        return str(error)
    return ""
