"""``graphopt bisect``: the first pass after which a step computes something else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.bisection import bisect as search
from graphopt.commands.common import NO, AsJson, TargetName, bar, emit, load_step
from graphopt.errors import GraphoptError
from graphopt.passes import Pass
from graphopt.scripts import module_of


def bisect(
    target: TargetName,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION", help="A check of your own, asked after each pass; see graphopt.bisect."
        ),
    ] = None,
    passes: Annotated[
        str | None, typer.Option(metavar="MODULE:NAME", help="Passes of your own: a list of them, or a function.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Make the checks of the library.")] = True,
    precision: Annotated[str | None, typer.Option(help="bf16: check that form of the step too.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for what to attach to a bug report.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the pass that makes a training step wrong: run the passes one by one, with checks after each.

    Example: graphopt bisect train.py:step --out report

    Loss, gradients and new values are held against eager and float64. Exit code 1: something is wrong; the report says
    after which pass, at which operator, and what to attach to a bug report.
    """
    found = load_step(target)
    own = None if check is None else _object(check)
    chosen = None if passes is None else _passes(passes)
    with bar("bisect", None) as told:
        result = search(
            found.model, found.batch, loss=found.loss, optimizer=found.optimizer, passes=chosen, check=own,
            verify=verify, precision=precision, told=told,
        )  # fmt: skip
    written = [] if out is None or result.culprit is None else result.save(out)
    emit(
        as_json,
        lambda: {**result.to_dict(), "written": [str(path) for path in written]},
        lambda: "\n".join([result.explain(), *(f"written: {path}" for path in written)]),
    )
    if result.culprit is not None:
        raise typer.Exit(NO)


def _passes(text: str) -> list[Pass]:
    found = _object(text)
    found = found() if callable(found) and not isinstance(found, Pass) else found
    if not isinstance(found, Iterable):
        raise GraphoptError(f"{text}: expected passes, or a function that gives some, got {type(found).__name__}")
    return list(found)


def _object(text: str) -> Any:
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise GraphoptError(f"expected module:name or file.py:name, got {text!r}")
    module = module_of(place)
    if not hasattr(module, name):
        raise GraphoptError(f"{place} has no {name!r}")
    return getattr(module, name)
