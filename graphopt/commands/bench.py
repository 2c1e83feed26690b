"""``graphopt bench``: the optimised step against eager and torch.compile, timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from graphopt.commands.common import (
    NO,
    AsJson,
    Bar,
    BatchSize,
    TargetName,
    bar,
    emit,
    load_step,
    rendered,
    resized,
    rows_of,
    task_of,
)
from graphopt.commands.common import synchronise as wait_for
from graphopt.commands.pricing import decide
from graphopt.cost_model.measured import Measurement, measure
from graphopt.errors import GraphoptError
from graphopt.graph.batch import check_loss, compute_loss, normalise
from graphopt.plan import duration
from graphopt.schemes.task import clear_gradients
from graphopt.step import TrainingStep, optimize
from graphopt.visualize.target import Target

EAGER, OURS = "eager", "graphopt"

Step = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One candidate: its measurement, its ratio to eager with the interval, and seconds of its first step."""

    name: str
    first_seconds: float
    measured: Measurement
    ratio: float
    interval: tuple[float, float]


def bench(
    target: TargetName,
    batch: BatchSize = None,
    compilers: Annotated[str, typer.Option(help="Backends of torch.compile to time too: inductor,aot_eager.")] = "",
    schemes: Annotated[str, typer.Option(help="Of graphopt: auto, exact, or names: flat,eager.")] = "auto",
    seconds: Annotated[float, typer.Option(min=0.1, help="The most that measuring may take.")] = 60.0,
    at_most: Annotated[
        float | None, typer.Option("--at-most", help="Ratio to eager above which the answer is no (exit code 1).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time a training step by graphopt against eager, and against torch.compile where asked for.

    Example: graphopt bench train.py:step --batch 64 --compilers inductor --at-most 1.0

    Steps run in turn in this process, each on a model of its own (the function is called once for each), so that all of
    them see the same machine. Ratios are those of medians, with the widest interval that the two medians allow. Exit
    code 1: with --at-most, graphopt takes more.
    """
    backends = [name for name in map(str.strip, compilers.split(",")) if name]
    named = schemes if schemes in ("auto", "exact") else tuple(filter(None, map(str.strip, schemes.split(","))))
    with bar("bench", 3 + len(backends)) as told:
        rows, failed, step = _measured(target, batch, backends, named, seconds, told)
    ours = next(row for row in rows if row.name == OURS)
    emit(as_json, lambda: _data(rows, failed, step), lambda: _text(rows, failed, step))
    if at_most is not None and ours.ratio > at_most:
        typer.echo(f"graphopt takes {ours.ratio:.2f} times as long as eager, more than {at_most:g}", err=True)
        raise typer.Exit(NO)


def _measured(
    target: str, size: int | None, backends: Sequence[str], schemes: Any, seconds: float, told: Bar
) -> tuple[list[Row], dict[str, str], TrainingStep]:
    """The rows of the table, why candidates are not in it, and the optimised step."""
    told("eager")
    found = load_step(target)
    batch = resized(found.batch, size)
    made = [found]

    def another() -> Target:
        one = load_step(target)
        if any(one.model is other.model for other in made):
            raise GraphoptError(
                f"{target} gave the same model twice; each candidate trains one of its own: build it in the function"
            )
        made.append(one)
        return one

    steps: dict[str, Step] = {EAGER: _eager(found, batch)}
    first = {EAGER: _seconds(steps[EAGER], batch)}

    told("graphopt chooses a scheme")
    own = another()
    step = optimize(own.model, normalise(batch), loss=own.loss, optimizer=own.optimizer, schemes=schemes)
    first[OURS] = _seconds(partial(step, batch), batch)
    decide(step, batch, rows_of(batch))
    steps[OURS] = partial(step, batch)

    failed: dict[str, str] = {}
    for backend in backends:
        name = f"torch.compile ({backend})"
        told(name)
        one = another()
        try:
            steps[name] = _eager(one, batch, torch.compile(one.model, backend=backend))
            first[name] = _seconds(steps[name], batch)
        except Exception as error:  # whatever a compiler provokes: it is a row of the table that is missing
            steps.pop(name, None)
            failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    told("measuring, in turn")
    taken = measure(steps, seconds=seconds)
    step.close()
    base = taken[EAGER]
    rows = [
        Row(name, first[name], m, m.seconds / base.seconds, (m.low / base.high, m.high / base.low))
        for name, m in taken.items()
    ]
    return rows, failed, step


def _eager(found: Target, batch: Any, model: Any = None) -> Step:
    """A step as users write it; with a compiled ``model`` in place of the target's."""
    task = task_of(found)
    called = found.model if model is None else model

    def step() -> torch.Tensor:
        clear_gradients(task)
        loss = check_loss(compute_loss(called, batch, task.loss or "model"))
        loss.backward()
        for optimizer in task.optimizers:
            optimizer.step()
        return loss.detach()

    return step


def _seconds(step: Step, batch: Any) -> float:
    wait_for(batch)
    began = perf_counter()
    step()
    wait_for(batch)
    return perf_counter() - began


def _data(rows: Sequence[Row], failed: dict[str, str], step: TrainingStep) -> dict[str, Any]:
    listed = [
        {"name": row.name, "first_seconds": row.first_seconds, "ratio": row.ratio, "ratio_interval": list(row.interval),
         **asdict(row.measured)}
        for row in rows
    ]  # fmt: skip
    return {"batch_size": step.plan.batch_size, "scheme": step.plan.chosen, "rows": listed, "failed": failed}


def _text(rows: Sequence[Row], failed: dict[str, str], step: TrainingStep) -> str:
    table = Table(title=f"a step of batch {step.plan.batch_size}", box=None, title_justify="left")
    for name in ("", "median", "interval", "of eager", "interval", "first step"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        low, high = row.interval
        table.add_row(
            f"{row.name}: {step.plan.chosen}" if row.name == OURS else row.name, duration(row.measured.seconds),
            f"{duration(row.measured.low)} to {duration(row.measured.high)}", f"{row.ratio:.2f}",
            "" if row.name == EAGER else f"{low:.2f} to {high:.2f}", duration(row.first_seconds),
        )  # fmt: skip
    lines = [rendered(table), *(f"left out, {name}: {why}" for name, why in failed.items())]
    noisy = dict.fromkeys(row.measured.noisy for row in rows if row.measured.noisy)
    return "\n".join([*lines, *(f"not quiet: {why}" for why in noisy)])
