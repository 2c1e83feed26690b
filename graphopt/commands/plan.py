"""``graphopt plan``: which scheme is best at which batch size."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from graphopt.commands.common import (
    AsJson,
    BatchSize,
    MachineName,
    TargetName,
    bar,
    chosen_machine,
    emit,
    load_step,
    rendered,
    rows_of,
)
from graphopt.commands.pricing import Pricing, measured_plans
from graphopt.errors import GraphoptError
from graphopt.plan import Candidate, Plan, duration
from graphopt.settings import Settings, as_schemes


def plan(
    target: TargetName,
    batch: BatchSize = None,
    batch_sizes: Annotated[str | None, typer.Option("--batch-sizes", help="Several, to be compared: 1,8,64.")] = None,
    machine: MachineName = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time real steps too; trains the model a little.")] = False,
    schemes: Annotated[str, typer.Option(help="auto, exact, or names: flat,eager.")] = "auto",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to come: whether a compilation pays back.")] = None,
    processors: Annotated[int | None, typer.Option(min=1, help="Let so many share a batch.")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16 allows schemes that compute in it.")] = None,
    memory: Annotated[int | None, typer.Option(min=1, help="Bytes that a step may need at its peak.")] = None,
    as_json: AsJson = False,
) -> None:
    """Price all schemes of a training step, at one batch size or several. Nothing is run without --measure.

    Example: graphopt plan train.py:step --batch-sizes 1,8,64 --machine H100

    With several batch sizes it says from which one on another scheme is best.
    """
    if measure and machine is not None:
        raise GraphoptError("--measure times this machine; leave --machine out")
    named = schemes if schemes in ("auto", "exact") else tuple(filter(None, map(str.strip, schemes.split(","))))
    settings = Settings(as_schemes(named, processors), processors, steps, precision, memory=memory)
    found = load_step(target)
    sizes = _sizes(batch, batch_sizes) or [rows_of(found.batch)]
    if measure:
        options = {
            "schemes": named, "steps": steps, "processors": processors, "precision": precision, "memory": memory
        }  # fmt: skip
        with bar("measuring", len(sizes)) as told:
            plans = measured_plans(found, sizes, options, told)
    else:
        known = chosen_machine(machine) if machine is not None else None
        pricing = Pricing(found, settings, known)
        with bar("pricing", len(sizes)) as told:
            plans = []
            for size in sizes:
                told(f"batch size {size}")
                plans.append(pricing.plan(size))
    emit(as_json, lambda: _data(plans, machine), lambda: plans[0].explain() if len(plans) == 1 else _compared(plans))


def _sizes(batch: int | None, listed: str | None) -> list[int]:
    if listed is None:
        return [] if batch is None else [batch]
    try:
        found = sorted({int(part) for part in listed.split(",")} | ({batch} if batch is not None else set()))
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise GraphoptError(f"--batch-sizes: expected positive integers, as in 1,8,64, got {listed!r}")
    return found


def _data(plans: list[Plan], machine: str | None) -> dict[str, Any]:
    return {
        "machine": machine,
        "plans": [one.to_dict() for one in plans],
        "crossovers": [list(c) for c in plans[-1].crossovers()],
    }


def _compared(plans: list[Plan]) -> str:
    """Plans for several batch sizes side by side."""
    table = Table(title="seconds of a step (* chosen, ? no price)", box=None, title_justify="left")
    table.add_column("scheme")
    for one in plans:
        table.add_column(f"batch {one.batch_size}", justify="right")
    for name in dict.fromkeys(c.scheme for one in plans for c in one.candidates):
        table.add_row(name, *(_cell(one, name) for one in plans))
    lines = [rendered(table), ""]
    crossovers = plans[-1].crossovers()
    lines += [f"from batch size {c.size} on {c.after} instead of {c.before}" for c in crossovers]
    if not crossovers:
        lines.append(f"no crossover: {plans[-1].chosen} is best at all of these sizes")
    notes = dict.fromkeys(note for one in plans for note in one.notes)
    lines += [
        f"{c.scheme}: {c.lost} at batch size {one.batch_size}" for one in plans for c in one.candidates if c.break_even
    ]
    lost = dict.fromkeys(f"{c.scheme}: {c.why_not}" for one in plans for c in one.candidates if c.why_not)
    return "\n".join([*lines, *(f"left out, {why}" for why in lost), *(f"note: {note}" for note in notes)])


def _cell(plan: Plan, name: str) -> str:
    found: Candidate | None = next((c for c in plan.candidates if c.scheme == name), None)
    if found is None or found.why_not is not None:
        return "-"
    took = found.median_seconds
    seconds = took if took is not None else None if found.predicted is None else found.predicted[0]
    text = "?" if seconds is None else duration(seconds)
    return f"{text} *" if name == plan.chosen else f"{text}  "
