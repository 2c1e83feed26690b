"""Depth: how many of a stage's layers there are, or which of them.

A dimension of depth is a stage (`graphopt.graph.depth`): runs with the same layers and parameters, one behind the
other. Any subset of them may be left out. In another graph of the model a run is found again by its module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import fx

from graphopt.elastic.dimension import Kind, Value
from graphopt.elastic.handles import Found, Handle, Tied
from graphopt.errors import ElasticError
from graphopt.graph.axes import Axes
from graphopt.graph.depth import Run, leave_out_of, stages
from graphopt.graph.draft import Draft
from graphopt.graph.resize import Resizer


class Depth(Handle):
    """The runs of one stage: an int k keeps the first k, a tuple those of these indices."""

    kind = Kind.DEPTH
    first = True

    def __init__(self, name: str, runs: Sequence[Run]):
        self.name, self.runs = name, tuple(runs)
        self.full = len(self.runs)
        self.where = tuple(dict.fromkeys(run.module for run in self.runs))

    def choices(self, wanted: Sequence[int | float] | None) -> tuple[Value, ...]:
        many = len(self.runs)
        if wanted is None:
            return tuple(range(1 if many > 1 else 0, many + 1))
        found = {many}
        for one in wanted:
            fits = isinstance(one, float) and 0 <= one <= 1
            if not fits and (type(one) is not int or not 0 <= one <= many):
                raise ElasticError(f"choices: {self.name} can have from 0 to {many} runs, got {one!r}")
            found.add(round(one * many) if isinstance(one, float) else int(one))
        return tuple(sorted(found))

    def kept(self, value: Value) -> tuple[int, ...]:
        """The indices of the runs that there are at ``value``."""
        return tuple(range(value)) if isinstance(value, int) else value

    def left_out(self, value: Value) -> list[Run]:
        """The runs that there are not."""
        kept = self.kept(value)
        return [run for i, run in enumerate(self.runs) if i not in kept]

    def readers(self) -> frozenset[fx.Node]:
        return frozenset(node for run in self.runs for node in run.nodes)

    def dead(self, value: Value) -> frozenset[fx.Node]:
        return frozenset(node for run in self.left_out(value) for node in run.nodes)

    def rewrite(self, draft: Draft, value: Value) -> None:
        leave_out_of(draft, self.left_out(value))

    def counterpart(self, others: Iterable[Handle]) -> Handle:
        theirs: dict[tuple[str, str], list[Run]] = {}
        for other in others:
            for run in other.runs if isinstance(other, Depth) else ():
                theirs.setdefault((run.module, run.structure), []).append(run)
        found = []
        for run in self.runs:
            same = theirs.get((run.module, run.structure))
            if not same:
                raise ElasticError(f"{self.name}: {run.module} cannot be left out in this graph")
            found.append(same.pop(0))
        return Depth(self.name, found)


def left_out(handle: Handle, value: Value) -> list[Run]:
    """The runs that there are not at ``value`` of a dimension of depth, tied or not."""
    parts = handle.parts if isinstance(handle, Tied) else (handle,)
    return [run for part in parts if isinstance(part, Depth) for run in part.left_out(value)]


def find(axes: Axes, resizer: Resizer) -> Found:
    """The stages of a graph, named by the modules around them, or by their first run where two have one module."""
    found = stages(axes, alike="parameters")
    shared = Counter(stage.name for stage in found)
    used: Counter[str] = Counter()
    handles: list[Handle] = []
    for stage in found:
        path = stage.name if shared[stage.name] == 1 else stage.runs[0].module
        used[path] += 1
        path += f"_{used[path]}" if used[path] > 1 else ""
        handles.append(Depth(f"{path}.depth" if path else "depth", stage.runs))
    return Found(tuple(handles))
