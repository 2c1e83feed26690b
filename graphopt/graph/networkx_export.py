"""A training graph as a networkx multigraph, as GraphML and as DOT."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx
from torch import fx

from graphopt.graph.op_rules import bytes_moved, flops
from graphopt.graph.text import argument_text, operator_text, shape_text
from graphopt.graph.training_graph import TrainingGraph

if TYPE_CHECKING:
    from graphopt.cost_model import Estimate

_FILL = {"input": "#eef0f3", "forward": "#dbe8f6", "backward": "#f8e3d8", "update": "#e6e2f1"}


def to_networkx(graph: TrainingGraph, price: Estimate | None = None) -> networkx.MultiDiGraph:
    """See `TrainingGraph.to_networkx`."""
    sizes = None if price is None else {name: price.sizes[name] for name in graph.symbols.hints}
    found = networkx.MultiDiGraph(
        name=repr(graph), **{f"size_{k}": v for k, v in (sizes or graph.symbols.hints).items()}
    )
    inputs = dict(zip(graph.placeholders, graph.inputs, strict=True))
    outputs: dict[fx.Node, list[str]] = {}
    for output, result in zip(graph.outputs, graph.results, strict=True):
        if result is not None:
            outputs.setdefault(result, []).append(str(output))
    seconds = {} if price is None else dict(zip(price.work.nodes, price.node_seconds.tolist(), strict=True))
    if price is not None and price.work.graph is not graph:
        raise ValueError("price: it is that of another graph; make one by estimate(graph, ...)")
    for position, node in enumerate(n for n in graph.nodes if n.op != "output"):
        attributes: dict[str, Any] = {
            "position": position,
            "op": operator_text(node.target) if node.op == "call_function" else node.op,
            "phase": str(node.meta.get("phase", "")),
            "module": node.meta.get("module", ""),
            "source": node.meta.get("source", ""),
            "type": shape_text(node.meta.get("val"), graph.symbols),
            "axes": ", ".join(_axis_texts(graph.axes.of(node))),
            "arguments": ", ".join(
                [*map(argument_text, node.args), *(f"{k}={argument_text(v)}" for k, v in node.kwargs.items())]
            ),
        }
        if node in inputs:
            attributes["input"] = str(inputs[node])
        if node in outputs:
            attributes["output"] = "; ".join(outputs[node])
        if placement := node.meta.get("placement"):
            attributes["placement"] = placement
        if node.op == "call_function":
            attributes["flops"] = graph.symbols.evaluate(flops(node), sizes)
            attributes["bytes"] = graph.symbols.evaluate(bytes_moved(node), sizes)
        if node in seconds:
            attributes["seconds"] = seconds[node]
        found.add_node(node.name, **attributes)
        for place, operand in enumerate(_operands(node)):
            found.add_edge(operand.name, node.name, operand=place, type=found.nodes[operand.name]["type"])
    return found


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments in order, one that is read twice twice."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _axis_texts(dims: tuple[Any, ...]) -> list[str]:
    """The axes of each dimension; those of several results in parentheses."""
    return [f"({', '.join(_axis_texts(d))})" if isinstance(d, tuple) else str(d) for d in dims]


def write_graphml(graph: TrainingGraph, path: str | PathLike[str], price: Estimate | None = None) -> None:
    """See `TrainingGraph.write_graphml`."""
    networkx.write_graphml(to_networkx(graph, price), path, named_key_ids=True)


def write_dot(graph: TrainingGraph, path: str | PathLike[str], price: Estimate | None = None) -> None:
    """See `TrainingGraph.write_dot`."""
    Path(path).write_text(dot_text(graph, price), encoding="utf-8")


def dot_text(graph: TrainingGraph, price: Estimate | None = None) -> str:
    """The graph in Graphviz's language: nodes with all their attributes, boxes around the modules."""
    found = to_networkx(graph, price)
    lines = ["digraph step {", '  node [shape=box, style="rounded,filled", fontname="Helvetica"];']
    modules: dict[str, list[str]] = {}
    for name, attributes in found.nodes(data=True):
        label = f"{attributes['op'].removeprefix('aten.')}\n{attributes['type']}"
        drawn = {"label": label, "fillcolor": _FILL.get(attributes["phase"], "#ffffff")}
        modules.setdefault(attributes["module"], []).append(f"{_quoted(name)} [{_listed({**drawn, **attributes})}];")
    for number, (module, nodes) in enumerate(modules.items()):
        inside = [f"    {node}" for node in nodes]
        if module:
            inside = [f"  subgraph cluster_{number} {{", f"    label={_quoted(module)};", *inside, "  }"]
        lines += inside
    for source, reader, attributes in found.edges(data=True):
        lines.append(f"  {_quoted(source)} -> {_quoted(reader)} [{_listed(attributes)}];")
    return "\n".join([*lines, "}", ""])


def _listed(attributes: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_quoted(value)}" for name, value in attributes.items())


def _quoted(value: Any) -> str:
    """A string of Graphviz's language."""
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{text}"'
