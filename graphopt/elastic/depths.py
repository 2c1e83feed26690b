"""Depth: how many of a stage's layers there are, or which of them.

A dimension of depth is a chain of runs (`graphopt.graph.depth`) that have the same parameters, one behind the other. The
grouping goes by parameters, not by operators, so that it is the same in train mode, where stochastic depth gives each
layer other operators, and in eval mode. Any subset of the runs may be left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from torch import fx

from graphopt.elastic.dimension import Kind, Value
from graphopt.elastic.handles import Found, Handle
from graphopt.errors import ElasticError
from graphopt.graph.axes import Axes
from graphopt.graph.depth import Run, leave_out_of, stages
from graphopt.graph.draft import Draft
from graphopt.graph.resize import Resizer
from graphopt.graph.training_graph import InputKind

Layout: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
"""Names within a run and shapes of the parameters that it reads."""


class Depth(Handle):
    """The runs of one stage: an int k keeps the first k, a tuple those of these indices."""

    kind = Kind.DEPTH
    first = True

    def __init__(self, name: str, runs: Sequence[Run], layouts: Sequence[Layout]):
        self.name, self.runs, self.layouts = name, tuple(runs), tuple(layouts)
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
        theirs: dict[tuple[str, Layout], list[Run]] = {}
        for other in others:
            if isinstance(other, Depth):
                for run, layout in zip(other.runs, other.layouts, strict=True):
                    theirs.setdefault((run.module, layout), []).append(run)
        found = []
        for run, layout in zip(self.runs, self.layouts, strict=True):
            same = theirs.get((run.module, layout))
            if not same:
                raise ElasticError(f"{self.name}: {run.module} cannot be left out in this graph")
            found.append(same.pop(0))
        return Depth(self.name, found, self.layouts)


def find(axes: Axes, resizer: Resizer) -> Found:
    """The runs of a graph that can be left out, grouped where they follow each other and have the same parameters."""
    names = {node: name for name, node in axes.graph.input_nodes(InputKind.PARAMETER).items()}
    groups: list[list[tuple[Run, Layout]]] = []
    for stage in stages(axes):
        for run in stage.runs:
            layout = _layout(run, names)
            last = groups[-1][-1] if groups else None
            if last is not None and last[0].exit is run.entry and last[1] == layout:
                groups[-1].append((run, layout))
            else:
                groups.append([(run, layout)])
    shared = Counter(_around([run.module for run, _ in group]) for group in groups)
    used: Counter[str] = Counter()
    handles: list[Handle] = []
    for group in groups:
        path = _around([run.module for run, _ in group])
        path = path if shared[path] == 1 else group[0][0].module
        used[path] += 1
        path += f"_{used[path]}" if used[path] > 1 else ""
        handles.append(Depth(f"{path}.depth" if path else "depth", [r for r, _ in group], [s for _, s in group]))
    return Found(tuple(handles))


def _layout(run: Run, names: dict[fx.Node, str]) -> Layout:
    found: dict[str, tuple[int, ...]] = {}
    inside = f"{run.module}." if run.module else ""
    for node in run.nodes:
        for source in node.all_input_nodes:
            if source in names:
                name = names[source].removeprefix(inside)
                found[name] = tuple(int(s) for s in source.meta["val"].shape)
    return tuple(sorted(found.items()))


def _around(paths: Sequence[str]) -> str:
    """The path of the innermost module around all of them; of one, itself."""
    columns = list(zip(*(path.split(".") for path in paths), strict=False))
    same = [column[0] for column in columns if len(set(column)) == 1]
    return ".".join(same[: next((i for i, c in enumerate(columns) if len(set(c)) > 1), len(same))])
