"""``graphopt show``: a training step as a page."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from graphopt.commands.common import AsJson, BatchSize, MachineName, TargetName, chosen_machine, emit, sizes_of
from graphopt.visualize.show import show as make_page
from graphopt.visualize.target import load_target


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
        found.captured(), output, machine=chosen_machine(machine), sizes=sizes_of(batch),
        title=f"{type(found.model).__name__} ({target})",
    )  # fmt: skip
    emit(
        as_json,
        lambda: {"path": str(output), **page.data["facts"]},
        lambda: f"{output}: {len(page.data['ops']):,} operators, {output.stat().st_size / 2**20:.1f} MiB",
    )
    if browser:
        webbrowser.open(output.resolve().as_uri())
