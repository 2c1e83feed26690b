"""``graphopt elastic``: the sizes that a model can have, and a subnet of it within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from graphopt.commands.common import NO, AsJson, MachineName, TargetName, bar, chosen_machine, emit
from graphopt.elastic import Budget, Choice, Prices, Selection, Space, save, space
from graphopt.elastic.batch_norm_statistics import without_target
from graphopt.elastic.forward_arguments import tensor_arguments
from graphopt.elastic.prices import METRICS
from graphopt.elastic.report import governed
from graphopt.errors import ElasticError, GraphoptError
from graphopt.graph.batch import flatten
from graphopt.visualize.target import Target, load_target

COUNTS = ("flops", "parameters", "peak_bytes")
"""Metrics of which a number up to 1 means a share of the full model's: none of them is that small."""


def elastic(
    target: TargetName,
    select: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A bound of the subnet; may be given several times. METRIC=NUMBER of {', '.join(METRICS[:4])}; "
            "50% (of counts also 0.5) is a share of the full model's."
        ),
    ] = None,
    choose: Annotated[
        list[str] | None,
        typer.Option(help="A dimension of the subnet: NAME=SIZE, or a share; patterns as *.hidden=0.5."),
    ] = None,
    measured: Annotated[int, typer.Option(min=0, help="Time so many of the best here before one is chosen.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Save the subnet: NAME.pt2 (torch.export), or a folder.")
    ] = None,
    machine: MachineName = None,
    as_json: AsJson = False,
) -> None:
    """List the dimensions in which a model can vary; choose a subnet by a budget, and save it.

    Example: graphopt elastic train.py:step --select flops=0.5 --select latency_seconds=0.01 --out small.pt2

    A subnet has the weights that the function's model has: train the supernet first (docs/elastic_training.md). Exit
    code 1: no subnet keeps the budget.
    """
    if select and choose:
        raise GraphoptError("--select chooses by a budget, --choose by sizes; give one of them")
    if out is not None and not (select or choose):
        raise GraphoptError("--out: which subnet? Give --select flops=0.5, or --choose NAME=SIZE")
    found = load_target(target)
    with bar("elastic", 3) as told:
        told("looking for dimensions")
        with found.asking_for_the_loss():
            whole = space(found.model, _inputs(found))
        choice: Choice | None = None
        selection: Selection | None = None
        if select:
            told("looking for the best subnet")
            selection = _selected(whole, select, machine, measured)
            choice = selection.choice
        elif choose:
            choice = whole.choice({name: _number(name, value) for name, value in map(_pair, choose)})
        if choice is not None and out is not None:
            told(f"writing {out}")
            _write(whole, choice, out)
    emit(as_json, lambda: _data(whole, choice, selection, out), lambda: _text(whole, choice, selection, out))


def _inputs(found: Target) -> Any:
    """What the model is called with: the batch, without the target of a loss."""
    return found.batch if found.loss is None or isinstance(found.loss, str) else without_target(found.batch)


def _selected(whole: Space, bounds: Sequence[str], machine: str | None, measured: int) -> Selection:
    prices = Prices(whole, chosen_machine(machine))
    budget = Budget(**{name: _bound(prices, name, text) for name, text in map(_pair, bounds)})
    try:
        return whole.select(budget, prices=prices, measured=measured)  # type: ignore[no-any-return]
    except ElasticError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(NO) from None


def _bound(prices: Prices, metric: str, text: str) -> float:
    if metric not in METRICS[:4]:
        raise GraphoptError(f"--select: expected a bound of {', '.join(METRICS[:4])}, got {metric!r}")
    share = text.endswith("%")
    number = _number(metric, text.removesuffix("%"))
    number = number / 100 if share else number
    if share or (metric in COUNTS and number <= 1):
        return float(number * prices.of([prices.space.full], metric)[0])
    return number


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name or not value:
        raise GraphoptError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _number(name: str, text: str) -> Any:
    """An integer, or a float where there is a point: sizes are integers, shares are not."""
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        raise GraphoptError(f"{name}: expected a number, got {text!r}") from None


def _write(whole: Space, choice: Choice, out: Path) -> None:
    module = whole.extract(choice)
    if out.suffix != ".pt2":
        save(module, out)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(_exported(module.eval(), tensor_arguments(whole.batch)), out)


def _exported(module: nn.Module, arguments: Any) -> torch.export.ExportedProgram:
    """The module in eval mode with a free batch size, where the example has more than one row."""
    _, layout, rows = flatten(arguments)
    size = torch.export.Dim("batch", min=2)
    free: list[Any] = [({0: size} if of_batch and rows > 1 else None) for of_batch in layout.batched]
    shapes = layout.restore(free)
    if isinstance(arguments, Mapping):
        return torch.export.export(module, (), dict(arguments), dynamic_shapes=shapes)
    return torch.export.export(module, tuple(arguments), dynamic_shapes=tuple(shapes))


def _facts(whole: Space, choice: Choice) -> dict[str, int]:
    """FLOPs and parameters of a subnet's forward pass."""
    table = Prices(whole).table([choice], ["flops", "parameters"])
    return {name: int(values[0]) for name, values in table.items()}


def _data(whole: Space, choice: Choice | None, selection: Selection | None, out: Path | None) -> dict[str, Any]:
    dimensions = []
    for d in whole.dimensions:
        parameters, flops = governed(whole, d.name)
        choices = [list(c) if isinstance(c, tuple) else c for c in d.choices]
        dimensions.append(
            {"name": d.name, "kind": str(d.kind), "choices": choices,
             "where": list(d.where), "parameters": parameters, "flops": flops}
        )  # fmt: skip
    front = [] if selection is None else [
        {"choice": one.choice.to_dict(), "quality": one.quality, **one.prices,
         "measured": None if one.measured is None else asdict(one.measured)} for one in selection.front
    ]  # fmt: skip
    return {
        "dimensions": dimensions,
        "refused": [asdict(refusal) for refusal in whole.refusals],
        "notes": whole.notes,
        "choice": None if choice is None else choice.to_dict(),
        "facts": None if choice is None else _facts(whole, choice),
        "full": _facts(whole, whole.full),
        "front": front,
        "out": None if out is None else str(out),
    }


def _text(whole: Space, choice: Choice | None, selection: Selection | None, out: Path | None) -> str:
    lines = [str(whole).rstrip("\n")]
    if selection is not None:
        lines += ["", str(selection).rstrip("\n")]
    if choice is not None:
        mine, full = _facts(whole, choice), _facts(whole, whole.full)
        lines += ["", f"subnet: {', '.join(f'{name} {value}' for name, value in choice.items())}"]
        lines.append("        " + ", ".join(f"{name} {mine[name]:,} ({mine[name] / full[name]:.0%})" for name in mine))
    if out is not None:
        what = "a torch.export program" if out.suffix == ".pt2" else "subnet.py and subnet.safetensors"
        lines.append(f"written: {out} ({what})")
    return "\n".join(lines)
