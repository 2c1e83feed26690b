"""``GRAPHOPT_DUMP=folder``: each captured step in files: its graph before and after each pass, plans and times.

One numbered folder a step, ``step_001_pid4711``, so that several processes can share a place:

- ``00_captured.txt``, ``.graph``: the step as text, one line an operator, and as a file for `TrainingGraph.load`;
- ``01_no_ops.txt``, ``.graph``, ``.diff``: the same after each pass that changed it, and the lines that differ;
- ``passes.txt``: what each pass did, what it left alone and why, and how long it took;
- ``code.py``: the Python code that flat schemes run;
- ``plan_batch_8.txt`` and ``.json``: the last decision for each batch size, with measured and predicted seconds;
- ``about.json``: versions, process and command line.

This is an aid for people who look for a fault: it never ends a training. Where the folder cannot be written, one
warning says so and nothing more is written by this process.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import unified_diff
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphopt.errors import GraphoptError, GraphoptWarning
from graphopt.graph.lowering import lower
from graphopt.graph.training_graph import TrainingGraph

if TYPE_CHECKING:
    from graphopt.passes import PassResult
    from graphopt.plan import Plan

__all__ = ["VARIABLE", "dumped_step", "failed", "finished", "ran", "versions", "write_plan"]

VARIABLE = "GRAPHOPT_DUMP"
"""The environment variable that names the folder; read whenever a step is captured."""

_HOME = "folder of the dump"
"""Under which the last graph of a step keeps its folder (`TrainingGraph.derived`), for the plans to come."""

_given_up: set[str] = set()  # folders that could not be written: one warning each


@dataclass
class _Step:
    """The folder of the step that is being captured. ``last``: the graph that was written last, with its text."""

    folder: Path
    number: int = 0
    last: tuple[TrainingGraph, str] | None = None

    def graph(self, name: str, graph: TrainingGraph) -> str:
        """Write a graph under the next number; its text."""
        text, stem = graph.text() + "\n", f"{self.number:02}_{name}"
        (self.folder / f"{stem}.txt").write_text(text)
        try:
            graph.save(self.folder / f"{stem}.graph")
        except GraphoptError as error:  # it calls a Python function of the user's, which no file can hold
            self.say(f"{stem}.graph could not be written: {error}")
        self.number += 1
        self.last = graph, text
        return text

    def before(self, graph: TrainingGraph) -> str:
        """The text of the graph that a pass is given, written now if no pass gave it."""
        if self.last is None or self.last[0] is not graph:
            return self.graph("captured", graph)
        return self.last[1]

    def say(self, *lines: str) -> None:
        with open(self.folder / "passes.txt", "a") as file:
            file.writelines(f"{line}\n" for line in lines)


_step: ContextVar[_Step | None] = ContextVar("graphopt dump", default=None)


@contextmanager
def dumped_step(name: str) -> Iterator[None]:
    """Passes that run inside are written into a new folder, where `VARIABLE` names a place for it; ``name`` says what
    is captured."""
    place = os.environ.get(VARIABLE)
    if not place:
        yield
        return
    made: list[_Step] = []
    _safely(place, lambda: made.append(_opened(Path(place), name)))
    token = _step.set(made[0] if made else None)
    try:
        yield
    finally:
        _step.reset(token)


def ran(name: str, before: TrainingGraph, result: PassResult, seconds: float) -> None:
    """A pass has run: on this graph, with this result."""
    step = _step.get()
    if step is not None:
        _safely(str(step.folder.parent), lambda: _write_pass(step, name, before, result, seconds))


def failed(name: str, before: TrainingGraph, error: Exception) -> None:
    """A pass has raised an error."""
    step = _step.get()
    if step is None:
        return

    def write() -> None:
        step.before(before)
        step.say(f"{name}: raised {type(error).__name__}: {error}")

    _safely(str(step.folder.parent), write)


def finished(graph: TrainingGraph) -> None:
    """All passes have run; this is the graph of the step."""
    step = _step.get()
    if step is None:
        return

    def write() -> None:
        step.before(graph)
        graph.derived[_HOME] = step.folder
        (step.folder / "code.py").write_text(lower(graph).code)

    _safely(str(step.folder.parent), write)


def write_plan(plan: Plan) -> None:
    """A decision was made. Plans of steps that could not be captured stand beside the folders."""
    place = os.environ.get(VARIABLE)
    if not place:
        return
    home: Path | None = None if plan.passes is None else plan.passes.graph.derived.get(_HOME)
    stem = f"plan_batch_{plan.batch_size}" if home else f"plan_batch_{plan.batch_size}_pid{os.getpid()}"

    def write() -> None:
        folder = home or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.txt").write_text(plan.explain() + "\n")
        (folder / f"{stem}.json").write_text(json.dumps(plan.to_dict(), indent=1))

    _safely(place, write)


def versions() -> dict[str, Any]:
    """What somebody else needs to know of this process to see the same: versions, platform, processor, threads."""
    return {
        "graphopt": sys.modules["graphopt"].__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def _opened(place: Path, name: str) -> _Step:
    place.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = place / f"step_{number:03}_pid{os.getpid()}"
        try:
            folder.mkdir()  # fails where there is one: of an earlier step, or of another container's process
        except FileExistsError:
            continue
        break
    about = {
        "step": name, "began": datetime.now(UTC).isoformat(timespec="seconds"), "pid": os.getpid(),
        "host": platform.node(), "command": sys.argv, **versions(),
    }  # fmt: skip
    (folder / "about.json").write_text(json.dumps(about, indent=1))
    return _Step(folder)


def _write_pass(step: _Step, name: str, before: TrainingGraph, result: PassResult, seconds: float) -> None:
    old = step.before(before)
    graph = result.graph
    many = f"{len(result.changes)} change{'' if len(result.changes) == 1 else 's'}"
    head = f"{name}: {many}, {len(before):,} -> {len(graph):,} operators, {seconds * 1e3:.1f} ms"
    if graph is not before:
        stem = f"{step.number:02}_{name}"
        head += f" ({stem})"
        new = step.graph(name, graph)
        lines = unified_diff(old.splitlines(), new.splitlines(), "before", name, lineterm="", n=2)
        (step.folder / f"{stem}.diff").write_text("\n".join(lines) + "\n")
    done = [f"  {c.what}  [{c.module}]  {c.source}".rstrip() for c in result.changes]
    left = [f"  left alone: {r.what}  [{r.module}]  {r.source}: {r.why}" for r in result.refusals]
    step.say(head, *done, *left)


def _safely(place: str, write: Callable[[], None]) -> None:
    """Write, or say once that it cannot be. Whatever goes wrong in here is no reason to end a training."""
    if place in _given_up:
        return
    try:
        write()
    except Exception as error:
        _given_up.add(place)
        text = f"{VARIABLE}: nothing more is written to {place}: {type(error).__name__}: {error}"
        warnings.warn(text, GraphoptWarning)
