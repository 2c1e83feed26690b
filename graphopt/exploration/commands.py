"""``graphopt explore``: run a search that a script describes, and look at one from another terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from graphopt.errors import ExplorationError
from graphopt.exploration.exploring import explore
from graphopt.exploration.history import Trial
from graphopt.exploration.progress import line
from graphopt.exploration.store import read_study
from graphopt.exploration.study import Study, open_study
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
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    proposer: Annotated[str | None, typer.Option(help="anneal, anneal_plain, evolve, random, optuna:CLASS.")] = None,
    resume: Annotated[str | None, typer.Option(help="auto, never, must, fork, backup, accept.")] = None,
) -> None:
    """Search, or go on with a search. What is given here goes before what the script says.

    Example: graphopt explore run train.py:search --store runs/digits.db --time 2h
    """
    given = {"time": time, "trials": trials, "workers": workers, "seed": seed, "proposer": proposer, "resume": resume}
    arguments = _arguments(target) | {name: value for name, value in given.items() if value is not None}
    if not {"space", "trial"} <= arguments.keys():
        raise ExplorationError(f"{target}: expected at least 'space' and 'trial' among {sorted(arguments)}")
    study = explore(arguments.pop("space"), arguments.pop("trial"), **arguments, store=store)
    typer.echo(line(study.history, 0, study.budget))
    if study.stopped == "interrupted":
        typer.echo(f"interrupted; the same command goes on with {store}")


@app.command()
def status(store: Store) -> None:
    """How a study stands; it may be running."""
    study = open_study(store)
    running = len(study.trials("running"))
    typer.echo(line(study.history, running, study.budget))
    _, _, holder = read_study(store)
    if holder:
        typer.echo(f"last written to by process {holder.get('pid')} on {holder.get('host')}, {holder.get('rows')} rows")


@app.command()
def best(store: Store, top: Annotated[int, typer.Option(min=1, help="How many.")] = 1) -> None:
    """The best model under the budget of the search, or the best few."""
    study = open_study(store)
    _show(study, [study.best()] if top == 1 else study.top(top))


@app.command()
def pareto(store: Store) -> None:
    """Models that no other beats in all objectives."""
    study = open_study(store)
    _show(study, study.pareto())


@app.command()
def why(store: Store, trial: Annotated[str, typer.Argument(help="Number, or beginning of the key.")]) -> None:
    """What became of a model, also of one that was refused."""
    typer.echo(open_study(store).why(trial))


@app.command()
def export(store: Store, path: Annotated[Path, typer.Argument(help="NAME.csv or NAME.jsonl.")]) -> None:
    """Write all trials to a file."""
    typer.echo(open_study(store).export(path))


def _show(study: Study, trials: list[Trial]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("trial", *study.objectives.names, "what"):
        table.add_column(name)
    for trial in trials:
        values = [f"{trial.metrics[name]:.5g}" for name in study.objectives.names]
        table.add_row(str(trial.number), *values, study.space.describe(trial.point))
    Console().print(table)


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
