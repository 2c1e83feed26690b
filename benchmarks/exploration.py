"""How well and how cheaply a search finds good models.

    python -m benchmarks.exploration                # quality, overhead, scale; an hour, of which Optuna takes most
    python -m benchmarks.exploration quality --spaces digits --proposers anneal evolve
    python -m benchmarks.exploration real --seconds 300

**Quality** on the spaces of `benchmarks.exploration_spaces`, with eight simulated workers whose trials take different
times (a fake clock: nothing is trained). Each proposer runs with each seed; the figure is the true score of the model
that it would pick by the scores it saw.

**Overhead**: seconds a trial for trials that do nothing. **Scale**: proposal, store and resume at 10,000 trials.
**Real**: a search on digits with two workers, see `benchmarks.exploration_real`.

Each part replaces its own part of the results; of quality only seeds that are missing are run, unless ``--anew``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks.exploration_spaces import SPACES, Problem, elastic
from benchmarks.measure import machine_description, print_table, write_json
from benchmarks.simulated_engine import SimulatedEngine
from graphopt.errors import ExplorationError
from graphopt.exploration import linear
from graphopt.exploration.gate import Gate
from graphopt.exploration.generator import GeneratorSetup
from graphopt.exploration.history import History
from graphopt.exploration.hyper_parameters import HyperParameter
from graphopt.exploration.limits import Limits
from graphopt.exploration.master import Master
from graphopt.exploration.outcome import Objectives, Outcome
from graphopt.exploration.pool import Model, Pool, Result
from graphopt.exploration.proposers import answer, as_proposer
from graphopt.exploration.sieve import Request

RESULTS = Path(__file__).resolve().parent / "results" / "exploration.json"
PROPOSERS = ("random", "evolve", "anneal_plain", "anneal", "optuna:TPESampler")


def search(problem: Problem, proposer: str, trials: int, seed: int, workers: int = 8) -> tuple[History, float]:
    """The history of a search on simulated workers, and seconds of the proposer for each model."""
    objectives = Objectives("score")

    def trial(number: int, point: tuple[int, ...]) -> tuple[Outcome, float]:
        random = np.random.default_rng([seed, 4, number])
        found, seconds = problem.measured(point, random), problem.seconds(point, random)
        return objectives.outcome(found, {}, seconds), seconds

    budget = {name: 1.0 for name in ("step_seconds", "peak_bytes")} if problem.needs is not None else {}
    setup = GeneratorSetup(problem.space, as_proposer(proposer), seed, budget, problem.needs, 0.9, learns=False)
    engine = SimulatedEngine(setup, trial, speeds=[1.0] * workers)
    history = History(problem.space, objectives)
    Master(engine, history, Limits(trials=trials, ahead=workers), seed, lambda events: None).run()
    assert len({t.key for t in history.trials}) == len(history.trials), "a model was tried twice"
    return history, engine.proposing / trials


def picked(problem: Problem, history: History, results: int | None = None) -> float:
    """The true score of the model with the best score of the first ``results`` results (of all)."""
    trials = [history.trials[number] for number in history.ended[:results]]
    best = max((trial for trial in trials if trial.scores), key=lambda trial: trial.scores[0])
    return problem.score(best.point)


def quality(rows: list[dict[str, Any]], seeds: int, trials: int, space: str, proposer: str) -> Iterator[None]:
    """Add to the row of a space and a proposer in ``rows`` the seeds that it lacks, one after another: what was picked
    after all results and after a quarter of them."""
    row = next((r for r in rows if (r["space"], r["proposer"], r["trials"]) == (space, proposer, trials)), None)
    if row is None:
        row = {"space": space, "proposer": proposer, "trials": trials, "seeds": [], "scores": [], "after a quarter": [],
               "seconds a model": []}  # fmt: skip
        rows.append(row)
    for seed in sorted({*range(seeds)} - {*row["seeds"]}):
        problem = SPACES[space](seed)
        history, seconds = search(problem, proposer, trials, seed)
        found = picked(problem, history), picked(problem, history, trials // 4), seconds
        for name, value in zip(("seeds", "scores", "after a quarter", "seconds a model"), (seed, *found)):
            row[name].append(float(f"{value:.6g}") if name != "seeds" else value)
        yield


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table of `quality`: means, and how far `anneal` is ahead in the seeds that both have."""
    found = []
    for row in rows:
        ours = next((r for r in rows if r["space"] == row["space"] and r["proposer"] == "anneal"), row)
        line = {"space": row["space"], "proposer": row["proposer"], "seeds": len(row["seeds"])}
        for name, told in (("scores", "score"), ("after a quarter", "after a quarter")):
            theirs = dict(zip(row["seeds"], row[name]))
            ahead = [score - theirs[seed] for seed, score in zip(ours["seeds"], ours[name]) if seed in theirs]
            line |= {told: mean(row[name]), "anneal is ahead" if told == "score" else "ahead":
                     f"{mean(ahead):.3g} +- {_standard_error(ahead):.2g}" if row is not ours else ""}  # fmt: skip
        found.append(line | {"ms a model": 1e3 * mean(row["seconds a model"])})
    return found


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def nothing(net: Any, hyper_parameters: Mapping[str, Any], context: Any) -> float:
    """A trial that does nothing."""
    return float(hyper_parameters["a"])


def _many() -> dict[str, HyperParameter]:
    return {name: linear(0, 1, steps=101) for name in "abcd"}


def overhead(trials: int = 2000, workers: int = 2) -> list[dict[str, Any]]:
    """Seconds a trial of a search whose trials do nothing, store on file; without the start of the processes."""
    from graphopt.exploration import explore

    rows = []
    for proposer, generation in (("random", "workers"), ("random", "master"), ("evolve", "workers")):
        folder = Path(tempfile.mkdtemp(prefix="graphopt-bench-"))
        options: dict[str, Any] = {"hyper_parameters": _many(), "workers": workers, "proposer": proposer,
                                   "generation": generation, "progress": False}  # fmt: skip
        try:
            taken, used = [], []
            for count in (1, trials):
                start, before = time.perf_counter(), _cpu()
                explore(None, nothing, trials=count, store=folder / f"{count}.db", **options)
                taken.append(time.perf_counter() - start)
                used.append(_cpu() - before)
        finally:
            shutil.rmtree(folder)
        rows.append({"proposer": proposer, "generation": generation, "trials": trials, "workers": workers,
                     "start seconds": taken[0], "seconds a trial": (taken[1] - taken[0]) / (trials - 1),
                     "CPU seconds a trial": (used[1] - used[0]) / (trials - 1)})  # fmt: skip
    return rows


def _cpu() -> float:
    """Seconds of processor time of this process and of those it has ended: what a busy machine does not disturb."""
    return sum(os.times()[:4])


def scale(trials: int = 10_000) -> dict[str, Any]:
    """A study of so many trials: seconds of a proposal, bytes of the store, seconds until it goes on."""
    from graphopt.exploration import explore

    folder = Path(tempfile.mkdtemp(prefix="graphopt-bench-"))
    store = folder / "many.db"
    options: dict[str, Any] = {"hyper_parameters": _many(), "on": "inline", "progress": False, "store": store}
    try:
        explore(None, nothing, trials=trials, proposer="random", **options)
        size = sum(
            path.stat().st_size for path in folder.glob("many.db*") if path.is_file() and "lock" not in path.name
        )
        start, before = time.perf_counter(), _cpu()
        explore(None, nothing, trials=trials, proposer="random", resume="must", **options)
        resumed, used = time.perf_counter() - start, _cpu() - before
    finally:
        shutil.rmtree(folder)
    return {
        "trials": trials,
        "store_bytes": size,
        "resume_seconds": resumed,
        "resume_cpu_seconds": used,
        "proposal_seconds": _proposal(trials),
    }


def _proposal(trials: int) -> dict[str, float]:
    """Median seconds (and processor time) of one model of `anneal` on the larger space when the pool has so many."""
    problem = elastic(0)
    pool = Pool(problem.space)
    random = np.random.default_rng(0)
    while len(pool.models) < trials:
        point = problem.space.sample(random)
        key = problem.space.key(point)
        if pool.number_of(key) is None:
            number = len(pool.models)
            pool.add_model(Model(number, key, point, number))
            pool.add_result(Result(number, "done", (problem.score(point),)))
    proposer, taken, used = as_proposer("anneal"), [], []
    for i in range(12):
        gate = Gate(problem.space, {"step_seconds": 1.0}, problem.needs)
        start, before = time.perf_counter(), _cpu()
        found = answer(proposer, 0, Request(i, 2, trials, trials), pool.view(trials, trials), gate)
        taken.append((time.perf_counter() - start) / 2)
        used.append((_cpu() - before) / 2)
        assert len(found.models) == 2
    return {"first": taken[0], "median": float(np.median(taken)), "median cpu": float(np.median(used))}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exploration")
    parser.add_argument("parts", nargs="*", default=["quality", "overhead", "scale"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=list(SPACES))
    parser.add_argument("--proposers", nargs="+", default=PROPOSERS)
    parser.add_argument("--anew", action="store_true", help="all seeds again, not only those that are missing")
    parser.add_argument("--seconds", type=float, default=300.0, help="of the real run, with its supernet")
    parser.add_argument("--busy", action="store_true", help="the real run on a machine whose clocks mean nothing")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    found: dict[str, Any] = json.loads(given.json.read_text()) if given.json.exists() else {}
    found["machine"] = machine_description()
    if "quality" in given.parts:
        asked = [(space, proposer) for space, proposer in product(given.spaces, given.proposers)]
        rows = [
            row for row in found.get("quality", ()) if not given.anew or (row["space"], row["proposer"]) not in asked
        ]
        found["quality"] = rows
        for space, proposer in asked:
            try:
                as_proposer(proposer)
            except ExplorationError as error:
                print(f"{proposer} is left out: {error}")
                continue
            for _ in quality(rows, given.seeds, given.trials, space, proposer):
                write_json(given.json, found)  # an interrupted run loses nothing
        print_table(compared(rows), title=f"{given.trials} trials, 8 simulated workers")
    if "overhead" in given.parts:
        found["overhead"] = overhead()
        print_table(found["overhead"], title="trials that do nothing")
    if "scale" in given.parts:
        found["scale"] = scale()
        print(found["scale"])
    if "real" in given.parts:
        from benchmarks.exploration_real import real

        found["real"] = real(given.seconds, given.busy)
        print(json.dumps(found["real"], indent=1))
    write_json(given.json, found)


if __name__ == "__main__":
    main()
