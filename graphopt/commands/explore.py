"""``graphopt explore``: run a search that a script describes, and look at one from another terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from graphopt.commands.common import AsJson, emit, rendered
from graphopt.errors import ExplorationError
from graphopt.exploration.exploring import explore
from graphopt.exploration.history import Trial
from graphopt.exploration.progress import line
from graphopt.exploration.study import Study, open_study
from graphopt.exploration.study_file import read_study
from graphopt.scripts import module_of

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Search for the best model under a budget.")

Store = Annotated[Path, typer.Argument(help="The file of the study.")]


@app.command()
def run(
    target: Annotated[str, typer.Argument(help="SCRIPT.py:NAME, the arguments of explore: a dict, or a function.")],
    store: Annotated[Path, typer.Option(help="The file of the study; made where there is none.")],
    time: Annotated[str | None, typer.Option(help="How long: 90s, 30min, 2h.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="How many models.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Trainers at a time.")] = None,
    on: Annotated[str | None, typer.Option(help="local, ray, inline.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for logs.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    proposer: Annotated[str | None, typer.Option(help="anneal, anneal_plain, evolve, random, optuna:CLASS.")] = None,
    resume: Annotated[str | None, typer.Option(help="auto, never, must, fork, backup, accept.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search, or go on with a search. What is given here goes before what the script says.

    Example: graphopt explore run train.py:search --store runs/digits.db --time 2h
    """
    given = {"time": time, "trials": trials, "workers": workers, "on": on, "tensorboard": tensorboard, "seed": seed,
             "proposer": proposer, "resume": resume}  # fmt: skip
    arguments = _arguments(target) | {name: value for name, value in given.items() if value is not None}
    if not {"space", "trial"} <= arguments.keys():
        raise ExplorationError(f"{target}: expected at least 'space' and 'trial' among {sorted(arguments)}")
    study = explore(arguments.pop("space"), arguments.pop("trial"), **arguments, store=store)
    again = [f"interrupted; the same command goes on with {store}"] if study.stopped == "interrupted" else []
    emit(
        as_json,
        lambda: {"stopped": study.stopped, "counts": study.counts(), "pareto": _rows(study, study.pareto())},
        lambda: "\n".join([line(study.history, 0, study.budget), *again]),
    )


@app.command()
def status(store: Store, as_json: AsJson = False) -> None:
    """How a study stands; it may be running.

    Example: graphopt explore status runs/digits.db
    """
    study = open_study(store)
    running = len(study.trials("running"))
    _, _, holder = read_study(store)
    lines = [line(study.history, running, study.budget)]
    if holder:
        told = f"process {holder.get('pid')} on {holder.get('host')}, {holder.get('rows')} rows"
        lines.append(f"last written to by {told}")
    emit(as_json, lambda: {"counts": study.counts(), "written_by": holder or None}, lambda: "\n".join(lines))


@app.command()
def best(store: Store, top: Annotated[int, typer.Option(min=1, help="How many.")] = 1, as_json: AsJson = False) -> None:
    """The best model under the budget of the search, or the best few.

    Example: graphopt explore best runs/digits.db --top 5
    """
    study = open_study(store)
    _show(study, [study.best()] if top == 1 else study.top(top), as_json)


@app.command()
def pareto(store: Store, as_json: AsJson = False) -> None:
    """Models that no other beats in all objectives.

    Example: graphopt explore pareto runs/digits.db
    """
    study = open_study(store)
    _show(study, study.pareto(), as_json)


@app.command()
def why(
    store: Store,
    trial: Annotated[str, typer.Argument(help="Number, or beginning of the key.")],
    as_json: AsJson = False,
) -> None:
    """What became of a model, also of one that was refused.

    Example: graphopt explore why runs/digits.db 17
    """
    text = open_study(store).why(trial)
    emit(as_json, lambda: {"trial": trial, "why": text}, lambda: text)


@app.command()
def export(
    store: Store,
    path: Annotated[Path, typer.Argument(help="NAME.csv, NAME.jsonl, or a folder.")],
    format: Annotated[str | None, typer.Option(help="csv, jsonl or tensorboard; by default by the name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write all trials to a file, or to a folder for TensorBoard.

    Example: graphopt explore export runs/digits.db trials.csv
    """
    written = open_study(store).export(path, format)
    emit(as_json, lambda: {"path": str(written)}, lambda: str(written))


def _rows(study: Study, trials: list[Trial]) -> list[dict[str, Any]]:
    rows = {row["number"]: row for row in study.rows()}
    return [rows[trial.number] for trial in trials]


def _show(study: Study, trials: list[Trial], as_json: bool) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("trial", *study.objectives.names, "what"):
        table.add_column(name)
    for trial in trials:
        values = [f"{trial.metrics[name]:.5g}" for name in study.objectives.names]
        table.add_row(str(trial.number), *values, study.space.describe(trial.point))
    emit(as_json, lambda: _rows(study, trials), lambda: rendered(table))


def _arguments(target: str) -> dict[str, Any]:
    """The arguments that ``SCRIPT.py:NAME`` says. Workers find the script's functions: it is imported under its own
    name, from its own folder."""
    path, _, name = target.rpartition(":")
    script = Path(path)
    if not name or script.suffix != ".py" or not script.is_file():
        raise ExplorationError(f"target: expected SCRIPT.py:NAME of a file that exists, got {target!r}")
    found = getattr(module_of(path), name, None)
    if callable(found):
        found = found()
    if not isinstance(found, Mapping):
        raise ExplorationError(f"{target}: expected a dict of arguments of explore, or a function that gives one")
    return dict(found)
