"""What a page shows, as plain data: operators, groups, edges, saved tensors, axes, changes and the plan.

Field names are short where there are thousands of them; `graphopt/visualize/assets/model.js` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

from torch import fx

from graphopt.cost_model import Estimate
from graphopt.cost_model.kernels import Family, family
from graphopt.errors import AxisError
from graphopt.graph.axes import Axes
from graphopt.graph.op_rules import bytes_moved, flops
from graphopt.graph.storages import Storage, is_view, kept_for_backward, tensors
from graphopt.graph.text import argument_text, shape_text
from graphopt.graph.training_graph import Phase, TrainingGraph
from graphopt.passes import Refusal
from graphopt.plan import Plan
from graphopt.visualize.comparison import Comparison, Drawn, Status
from graphopt.visualize.folding import Group, fold
from graphopt.visualize.places import spots_of, word_of


@dataclass(frozen=True)
class Side:
    """One of the two graphs with what is known of it: its price (None without a machine) and its axes.

    ``figures``: FLOPs, bytes moved and predicted seconds of each operator.
    """

    graph: TrainingGraph
    sizes: Mapping[str, int]
    price: Estimate | None = None
    axes: Axes | None = None
    figures: Mapping[fx.Node, tuple[int, int, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: TrainingGraph, sizes: Mapping[str, int], price: Estimate | None) -> Side:
        """The side of a graph at certain sizes."""
        if price is not None:
            columns = price.counts.flops.tolist(), price.counts.bytes.tolist(), price.node_seconds.tolist()
            figures = dict(zip(price.work.nodes, zip(*columns, strict=True), strict=True))
        else:
            evaluate = graph.symbols.evaluate
            operators = (node for node in graph.nodes if node.op == "call_function")
            figures = {n: (evaluate(flops(n), sizes), evaluate(bytes_moved(n), sizes), 0.0) for n in operators}
        axes: Axes | None = graph.axes
        try:
            axes.groups()  # type: ignore[union-attr]
        except AxisError:  # a graph made by hand, without metadata: it is shown without axes
            axes = None
        return cls(graph, sizes, price, axes, figures)

    def evaluate(self, value: Any) -> int:
        """A symbolic number at the sizes of this side."""
        return self.graph.symbols.evaluate(value, self.sizes)

    def facts(self) -> dict[str, Any]:
        """Figures of the whole graph."""
        found: dict[str, Any] = {
            "operators": len(self.graph),
            "flops": sum(flops for flops, _, _ in self.figures.values()),
            "bytes kept": self.graph.bytes_kept(self.sizes),
        }
        if self.price is not None:
            found |= {
                "seconds": self.price.seconds,
                "interval": list(self.price.interval),
                "terms": dict(self.price.terms),
                "peak bytes": self.price.peak_bytes,
                "machine": self.price.machine,
            }
        return found


def page_data(
    compared: Comparison,
    after: Side,
    before: Side | None,
    *,
    title: str,
    refusals: Iterable[Refusal] = (),
    plan: Plan | None = None,
) -> dict[str, Any]:
    """All that a page shows (JSON-able). ``after`` and ``before`` are the sides of ``compared``."""
    drawn = compared.drawn
    axes = _AxisTable(after, before)
    spots = spots_of(compared)
    root = fold(spots)
    groups, group_of = _listed(root)
    gives = _gives(compared)
    ops = []
    for i, one in enumerate(drawn):
        side = before if one.status is Status.REMOVED and before is not None else after
        ops.append(_op(one, side, axes, spots[i].column, group_of[i], gives.get(i, [])))
    flags = {(True, True): 3, (True, False): 1, (False, True): 2}
    return {
        "title": title,
        "sizes": dict(after.sizes),
        "compared": before is not None,
        "facts": {"after": after.facts(), **({"before": before.facts()} if before is not None else {})},
        "ops": ops,
        "groups": groups,
        "edges": [[a, b, flags[both]] for (a, b), both in compared.edges.items()],
        "saved": _saved(compared, after, before),
        "axes": axes.rows,
        "changes": [
            {
                "pass": c.pass_name, "what": c.what, "module": c.module, "source": c.source, "flops": c.saving.flops,
                "moved": c.saving.bytes_moved, "kept": c.saving.bytes_kept,
            }
            for c in compared.changes
        ],
        "refusals": [
            {"pass": r.pass_name, "what": r.what, "module": r.module, "source": r.source, "why": r.why}
            for r in refusals
        ],
        "placements": after.graph.signature.tree.get("placements"),
        "plan": None if plan is None else _plan(plan),
    }  # fmt: skip


# -- operators ---------------------------------------------------------------------------------------------------------


def _op(one: Drawn, side: Side, axes: _AxisTable, column: int, group: int, gives: list[str]) -> dict[str, Any]:
    node = one.node
    dims = side.axes.of(node) if side.axes is not None else ()
    found: dict[str, Any] = {
        "n": node.name,
        "o": word_of(node) or node.op,
        "k": _kind(node),
        "c": column,
        "g": group,
        "t": shape_text(node.meta.get("val"), side.graph.symbols, dims),
    }
    if one.status is not Status.KEPT:
        found["st"] = str(one.status)
    if one.reason is not None:
        found["why"] = [one.reason.pass_name, one.reason.change]
    if len(one.names) > 1:
        found["also"] = [name for name in one.names if name != node.name]
    carried = axes.numbers(side, dims)
    if carried:
        found["a"] = carried
    for key, value in (
        ("m", node.meta.get("module")), ("src", node.meta.get("source")), ("p", node.meta.get("placement")),
        ("out", gives), ("in", _input(node, side.graph)),
    ):  # fmt: skip
        if value:
            found[key] = value
    if node.op == "call_function":
        found["args"] = _arguments(node)
        found |= {key: value for key, value in zip(("f", "b", "s"), side.figures[node], strict=True) if value}
        if one.status is Status.CHANGED and one.was is not None:
            found["was"] = _arguments(one.was)
    return found


def _kind(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return "constant"
    if not tensors(node.meta.get("val")):
        return "number"
    if family(node) is Family.COMMUNICATION or "c10d" in str(node.target):
        return "collective"
    return "view" if is_view(node) else "op"


def _input(node: fx.Node, graph: TrainingGraph) -> str:
    if node.op == "get_attr":
        return f"constant {node.target}"
    if node.op != "placeholder":
        return ""
    return _inputs(graph)[node]


def _inputs(graph: TrainingGraph) -> dict[fx.Node, str]:
    key = "visualize inputs"
    if key not in graph.derived:
        graph.derived[key] = {n: str(i) for i, n in zip(graph.inputs, graph.placeholders, strict=True)}
    return graph.derived[key]


def _arguments(node: fx.Node) -> str:
    parts = [*map(argument_text, node.args), *(f"{k}={argument_text(v)}" for k, v in node.kwargs.items())]
    text = ", ".join(parts)
    return text if len(text) <= 400 else text[:400] + " …"


def _gives(compared: Comparison) -> dict[int, list[str]]:
    """Which outputs of the step each operator gives."""
    found: dict[int, list[str]] = {}
    for output, node in zip(compared.after.outputs, compared.after.results, strict=True):
        if node is not None and (i := compared.index(node)) is not None:
            found.setdefault(i, []).append(str(output))
    return found


# -- groups, saved tensors, axes ---------------------------------------------------------------------------------------


def _listed(root: Group) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """The groups as a list, the root first, each after its parent; and the group of each operator."""
    rows: list[dict[str, Any]] = []
    group_of: dict[int, int] = {}

    def add(group: Group, parent: int) -> None:
        number = len(rows)
        rows.append({"label": group.label, "path": group.path, "kind": group.kind, "parent": parent})
        group_of.update(dict.fromkeys(group.members, number))
        for child in group.children:
            add(child, number)

    add(root, -1)
    return rows, group_of


def _saved(compared: Comparison, after: Side, before: Side | None) -> list[dict[str, Any]]:
    """Storages kept for backward: made by which operator, read by which, how large, on which side. Several results of
    one operator have storages of their own; one that has another size on the other side is listed for each."""
    found: dict[tuple[int, tuple[Any, ...], int], dict[str, Any]] = {}
    for side, flag in ((after, 2), (before, 1)):
        if side is None:
            continue
        for storage in kept_for_backward(side.graph):
            root = compared.index(storage.root)
            assert root is not None  # storages are made by operators
            size = side.evaluate(storage.nbytes)
            row = found.setdefault(
                (root, _which(storage.root), size), {"op": root, "bytes": size, "readers": [], "sides": 0}
            )
            row["sides"] |= flag
            row["readers"] = sorted({*row["readers"], *_readers(storage, compared)})
    if before is None:
        for row in found.values():
            row["sides"] = 3
    return list(found.values())


def _which(node: fx.Node) -> tuple[Any, ...]:
    """Which result of its operator a node is: the indices by which it was taken; none for the only one."""
    found: tuple[Any, ...] = ()
    while node.target is getitem:
        found, node = (node.args[1], *found), node.all_input_nodes[0]
    return found


def _readers(storage: Storage, compared: Comparison) -> set[int]:
    readers = (user for value in storage.values for user in value.users if user.meta.get("phase") == Phase.BACKWARD)
    return {i for user in readers if (i := compared.index(user)) is not None}


class _AxisTable:
    """The axes of both sides by name, as rows, and the numbers of rows that a node carries."""

    def __init__(self, after: Side, before: Side | None):
        self.rows: list[dict[str, Any]] = []
        self._number: dict[str, int] = {}
        for side in (after, before):
            if side is None or side.axes is None:
                continue
            for axis in side.axes.groups():
                if axis.name in self._number:
                    continue
                self._number[axis.name] = len(self.rows)
                self.rows.append(
                    {
                        "name": axis.name, "kind": str(axis.kind), "size": side.graph.symbols.rename(axis.size),
                        "free": axis.free, "reason": axis.reason, "shardable": axis.shardable,
                        "places": [f"{p.name}[{p.dim}]" for p in axis.places],
                    }
                )  # fmt: skip

    def numbers(self, side: Side, dims: tuple[Any, ...]) -> list[int]:
        """The rows of the axes in some dimensions."""
        found: dict[int, None] = {}
        for dim in dims:
            if isinstance(dim, tuple):
                found.update(dict.fromkeys(self.numbers(side, dim)))
                continue
            for axis in dim.axes():
                if axis.name in self._number:
                    found[self._number[axis.name]] = None
        return list(found)


# -- the plan ----------------------------------------------------------------------------------------------------------


def _plan(plan: Plan) -> dict[str, Any]:
    """The decision as the page's table shows it."""
    return {
        "batch_size": plan.batch_size,
        "chosen": plan.chosen,
        "reason": plan.reason,
        "candidates": [c.to_dict() for c in plan.candidates],
        "crossovers": [list(c) for c in plan.crossovers()],
        "valid_where": list(plan.valid_where),
        "notes": list(plan.notes),
    }
