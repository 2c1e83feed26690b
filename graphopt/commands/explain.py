"""``graphopt explain``: what passes do to a training step, and its price, as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from graphopt.commands.common import AsJson, BatchSize, MachineName, TargetName, chosen_machine, emit, sizes_of
from graphopt.cost_model import Estimate, estimate
from graphopt.errors import GraphoptError
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import PassResult
from graphopt.plan import pass_lines
from graphopt.visualize.target import load_target

Sizes = Mapping[str, int] | None


def explain(
    target: TargetName,
    machine: MachineName = None,
    batch: BatchSize = None,
    axes: Annotated[bool, typer.Option("--axes", help="List the axes of the model too.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph after passes too.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Lines of the table of modules.")] = 15,
    as_json: AsJson = False,
) -> None:
    """Say what passes do to a training step, and what it should cost.

    Example: graphopt explain train.py:step --machine H100
    """
    result, sizes = load_target(target).captured(), sizes_of(batch)
    before = result.graph if result.before is None else result.before
    known = chosen_machine(machine)
    priced = None if known is None else estimate(result.graph, known, sizes)

    def text() -> str:
        lines = _lines(before, result, priced, sizes, top)
        lines += [result.graph.axes.explain()] if axes else []
        return "\n".join(lines + ([str(result.graph)] if graph else []))

    emit(as_json, lambda: _data(before, result, priced, sizes), text)


def _lines(before: TrainingGraph, result: PassResult, priced: Estimate | None, sizes: Sizes, top: int) -> list[str]:
    lines = ["the step as a graph, captured -> after passes:"]
    for name, figures in _figures(before, result, sizes).items():
        lines.append(f"     {name:<14} {figures[0]:,} -> {figures[1]:,}")
    lines += pass_lines(result)
    if priced is None:
        return [
            *lines, "no prices: this machine is not calibrated; `graphopt calibrate` (a minute), or --machine H100"
        ]  # fmt: skip
    return [*lines, "prices:", priced.explain("module", top=top)]


def _figures(before: TrainingGraph, result: PassResult, sizes: Sizes) -> dict[str, tuple[int, int]]:
    try:
        return {
            "operators": (len(before), len(result.graph)),
            "FLOPs": (before.flops(sizes), result.graph.flops(sizes)),
            "bytes kept": (before.bytes_kept(sizes), result.graph.bytes_kept(sizes)),
        }
    except KeyError as error:
        raise GraphoptError(str(error.args[0])) from None


def _data(before: TrainingGraph, result: PassResult, priced: Estimate | None, sizes: Sizes) -> dict[str, Any]:
    return {
        "facts": {name: list(figures) for name, figures in _figures(before, result, sizes).items()},
        "changes": [asdict(change) for change in result.changes],
        "refusals": [asdict(refusal) for refusal in result.refusals],
        "price": None if priced is None else priced.to_dict(),
        "modules": None if priced is None else priced.by_module,
    }
