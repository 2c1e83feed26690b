"""What commands share: arguments, where they print, progress, and how they end.

What a command was asked for goes to the standard output, as text or, with ``--json``, as one JSON value and nothing
else. Progress, warnings and errors go to the standard error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeAlias

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.utils import _pytree as pytree

from graphopt.cost_model import Machine
from graphopt.cost_model.machine import kept
from graphopt.errors import GraphoptError
from graphopt.graph.assemble import as_optimizers
from graphopt.graph.batch import ModelLoss, flatten, normalise
from graphopt.schemes import Task
from graphopt.visualize.target import Target, load_target

NO = 1
"""Exit code of a command whose answer is no: a check that failed, a bound that is not met."""

USAGE = 2
"""Exit code where a command cannot be carried out: wrong arguments, a model that cannot be loaded or captured."""

CRASH = 3
"""Exit code of an error that nobody foresaw, in the library or in the user's code; its traceback is printed."""

TargetName = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION",
        help="A function without arguments that gives (model, batch, loss, optimizer), as far as there are.",
    ),
]
MachineName = Annotated[
    str | None, typer.Option("--machine", help="Predict for a processor by its data sheet (H100); by default this one.")
]
BatchSize = Annotated[int | None, typer.Option("--batch", min=1, help="Batch size; by default that of the example.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]

Bar: TypeAlias = Callable[[str], None]
"""Advances a bar by one and says what comes next."""


def emit(as_json: bool, data: Callable[[], Any], text: Callable[[], str]) -> None:
    """Print the result of a command, as JSON or as text."""
    typer.echo(json.dumps(data(), indent=1) if as_json else text())


def rendered(table: Table) -> str:
    """A table as text, as wide as it needs to be where nobody looks at it."""
    console = Console()
    wide = Console(width=None if console.is_terminal else 160)
    with wide.capture() as captured:
        wide.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


@contextmanager
def bar(what: str, total: int | None) -> Iterator[Bar]:
    """A progress bar on the standard error, where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(what, total=total)
        began = False

        def advance(next_: str) -> None:
            nonlocal began
            shown.update(task, advance=1 if began else 0, description=f"{what}: {next_}")
            began = True

        yield advance


def chosen_machine(name: str | None) -> Machine | None:
    """The machine of a data sheet, or the calibration of this one, None where there is none."""
    return kept() if name is None else Machine.named(name)


def sizes_of(batch: int | None) -> dict[str, int] | None:
    """Free sizes that a batch size means."""
    return None if batch is None else {"batch": batch}


def load_step(text: str) -> Target:
    """A target that is a training step. Raises GraphoptError for one without a loss and an optimizer."""
    found = load_target(text)
    if found.loss is None and found.optimizer is None:
        raise GraphoptError(
            f"{text} gives a model and a batch, but this command is about training steps; expected a loss or an "
            "optimizer behind them"
        )
    return found


def task_of(found: Target) -> Task:
    """The training step that a target describes."""
    return Task(found.model, ModelLoss if found.loss is None else found.loss, as_optimizers(found.optimizer))


def resized(batch: Any, size: int | None) -> Any:
    """A batch with so many rows: those of the example, again and again. A tuple or a dict."""
    given = normalise(batch)
    tensors, layout, rows = flatten(given)
    if size is None or size == rows:
        return given
    index = torch.arange(size) % rows
    taken = [t[index.to(t.device)] if of_batch else t for t, of_batch in zip(tensors, layout.batched, strict=True)]
    return layout.restore(taken)


def rows_of(batch: Any) -> int:
    """The batch size of an example."""
    return flatten(batch)[2]


def synchronise(batch: Any) -> None:
    """Wait for the device of a batch."""
    if any(isinstance(t, torch.Tensor) and t.is_cuda for t in pytree.tree_leaves(batch)):
        torch.cuda.synchronize()
