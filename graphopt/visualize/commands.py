"""The commands ``graphopt show`` and ``graphopt explain``."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.cost_model import Estimate, Machine, estimate
from graphopt.cost_model.machine import kept
from graphopt.errors import GraphoptError
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import PassResult
from graphopt.plan import pass_lines
from graphopt.visualize.show import show as make_page
from graphopt.visualize.target import load_target

TargetName = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION",
        help="A function without arguments that gives (model, batch), with a loss and an optimizer if there are some.",
    ),
]
MachineName = Annotated[
    str | None, typer.Option("--machine", help="Predict for a processor by its data sheet (H100); by default this one.")
]
BatchSize = Annotated[int | None, typer.Option("--batch", min=1, help="Batch size; by default that of the example.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


def show(
    target: TargetName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the page.")] = Path("step.html"),
    machine: MachineName = None,
    batch: BatchSize = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in the web browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a training step as a page: what it computes, what that costs, what passes did to it.

    Example: graphopt show train.py:step --output step.html
    """
    found = load_target(target)
    page = make_page(
        found.captured(), output, machine=_machine(machine), sizes=_sizes(batch),
        title=f"{type(found.model).__name__} ({target})",
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({"path": str(output), **page.data["facts"]}, indent=1))
    else:
        typer.echo(f"{output}: {len(page.data['ops']):,} operators, {output.stat().st_size / 2**20:.1f} MiB")
    if browser:
        webbrowser.open(output.resolve().as_uri())


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
    result = load_target(target).captured()
    before = result.graph if result.before is None else result.before
    priced = _priced(result.graph, _machine(machine), _sizes(batch))
    if as_json:
        typer.echo(json.dumps(_data(before, result, priced, _sizes(batch)), indent=1))
        return
    lines = ["the step as a graph, captured -> after passes:"]
    for name, figures in _figures(before, result, _sizes(batch)).items():
        lines.append(f"     {name:<14} {figures[0]:,} -> {figures[1]:,}")
    lines += pass_lines(result)
    if priced is not None:
        lines += ["prices:", priced.explain("module", top=top)]
    else:
        lines.append("no prices: this machine is not calibrated; `graphopt calibrate` (a minute), or --machine H100")
    if axes:
        lines.append(result.graph.axes.explain())
    if graph:
        lines.append(str(result.graph))
    typer.echo("\n".join(lines))


def _machine(name: str | None) -> Machine | None:
    return kept() if name is None else Machine.named(name)


def _sizes(batch: int | None) -> dict[str, int] | None:
    return None if batch is None else {"batch": batch}


def _priced(graph: TrainingGraph, machine: Machine | None, sizes: Mapping[str, int] | None) -> Estimate | None:
    return None if machine is None else estimate(graph, machine, sizes)


def _figures(before: TrainingGraph, result: PassResult, sizes: Mapping[str, int] | None) -> dict[str, tuple[int, int]]:
    try:
        return {
            "operators": (len(before), len(result.graph)),
            "FLOPs": (before.flops(sizes), result.graph.flops(sizes)),
            "bytes kept": (before.bytes_kept(sizes), result.graph.bytes_kept(sizes)),
        }
    except KeyError as error:
        raise GraphoptError(str(error.args[0])) from None


def _data(
    before: TrainingGraph, result: PassResult, priced: Estimate | None, sizes: Mapping[str, int] | None
) -> dict[str, Any]:
    return {
        "facts": {name: list(figures) for name, figures in _figures(before, result, sizes).items()},
        "changes": [asdict(change) for change in result.changes],
        "refusals": [asdict(refusal) for refusal in result.refusals],
        "price": None if priced is None else priced.to_dict(),
        "modules": None if priced is None else priced.by_module,
    }
