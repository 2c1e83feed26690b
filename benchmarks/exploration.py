"""How well and how cheaply a search finds good models.

    python -m benchmarks.exploration                # quality, overhead, 10,000 trials; some minutes
    python -m benchmarks.exploration quality --seeds 10 --trials 200

**Quality** on two spaces made by a formula, with eight simulated workers whose trials take different times (a fake
clock: nothing is trained): ``interactions``, where knobs matter in products of two and three, so that no knob is good
by itself; and ``elastic``, a net of stages with depth and widths (those of layers that are left out do not count),
hyper-parameters that depend on its size, noise in the scores, and a budget of seconds a step that a third of all points
keep. Each proposer runs with each seed; the figure is the true score of the model it would pick.

**Overhead**: seconds a trial for trials that do nothing. **Scale**: proposal, store and resume at 10,000 trials.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks.measure import machine_description, print_table, write_json
from benchmarks.simulated_engine import SimulatedEngine
from graphopt.errors import ExplorationError
from graphopt.exploration import choice, linear, log
from graphopt.exploration.gate import Gate
from graphopt.exploration.generator import GeneratorSetup
from graphopt.exploration.history import History
from graphopt.exploration.hyper_parameters import HyperParameter
from graphopt.exploration.limits import Limits
from graphopt.exploration.master import Master
from graphopt.exploration.outcome import Objectives, Outcome
from graphopt.exploration.pool import Model, Pool, Result
from graphopt.exploration.proposers import answer, as_proposer
from graphopt.exploration.search_space import Knob, SearchSpace
from graphopt.exploration.sieve import Request

RESULTS = Path(__file__).resolve().parent / "results" / "exploration.json"
PROPOSERS = ("random", "evolve", "anneal_plain", "anneal", "optuna:TPESampler")


@dataclass(frozen=True)
class Problem:
    """A space, the true score of its points, the noise of a trial, and what a step costs (the budget is 1)."""

    space: SearchSpace
    score: Callable[[tuple[int, ...]], float]
    noise: float = 0.0
    seconds: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] | None = None


def interactions(seed: int) -> Problem:
    """20 knobs of 4 values. The score is a sum of 40 tables over two or three knobs each, drawn by chance: what a knob
    does depends on others, and averages of one knob tell little."""
    random = np.random.default_rng([seed, 1])
    knobs = [Knob(f"k{i}", "net", choice(0, 1, 2, 3)) for i in range(20)]
    tables = []
    for i in range(40):
        places = random.choice(20, size=2 + i % 2, replace=False)
        table = random.normal(size=(4,) * len(places))
        for axis in range(table.ndim):  # no effect of a single knob
            table -= table.mean(axis=axis, keepdims=True)
        tables.append((places, table))

    def score(point: tuple[int, ...]) -> float:
        return sum(float(table[tuple(point[p] for p in places)]) for places, table in tables) / math.sqrt(40)

    return Problem(SearchSpace(knobs), score)


def elastic(seed: int) -> Problem:
    """4 stages of up to 4 layers, a width each, and three hyper-parameters: 23 knobs."""
    random = np.random.default_rng([seed, 2])
    knobs = []
    for s in range(4):
        knobs.append(Knob(f"depth{s}", "net", choice(1, 2, 3, 4)))
        for layer in range(4):
            when = {f"depth{s}": list(range(layer + 1, 5))}
            knobs.append(Knob(f"width{s}.{layer}", "net", choice(0.25, 0.5, 0.75, 1.0, when=when)))
    knobs += [
        Knob("lr", "hp", log(1e-4, 1e-1, steps=31)),
        Knob("decay", "hp", linear(0, 0.1, steps=11)),
        Knob("batch", "hp", choice(32, 64, 128, 256)),
    ]
    space = SearchSpace(knobs)
    gain, decay = random.uniform(0.5, 2.0, (4, 4)), float(random.uniform(0.02, 0.08))
    cost = random.uniform(0.5, 1.5, (4, 4)) * np.array([1.0, 1.5, 2.0, 3.0])[:, None]

    def widths(sizes: Mapping[str, Any]) -> np.ndarray:
        return np.array(
            [[sizes[f"width{s}.{i}"] if i < sizes[f"depth{s}"] else 0.0 for i in range(4)] for s in range(4)]
        )

    def score(point: tuple[int, ...]) -> float:
        sizes, hp = space.sizes(point), space.hyper_parameters(point)
        w = widths(sizes)
        capacity = float((gain * np.sqrt(w)).sum())
        # A narrow layer between wide ones holds all back; the best rate falls with size and rises with the batch.
        neck = min(float(w[s][: sizes[f"depth{s}"]].min()) for s in range(4))
        best_lr = math.log10(0.03) - 0.05 * capacity + 0.5 * math.log10(hp["batch"] / 64)
        off = (math.log10(hp["lr"]) - best_lr) ** 2
        return 10 * math.log1p(capacity) + 4 * neck - 3 * off - 200 * (hp["decay"] - decay) ** 2 - (2 if off > 1 else 0)

    def seconds(sizes: Mapping[str, Any], hp: Mapping[str, Any]) -> dict[str, Any]:
        return {"step_seconds": float((cost * widths(sizes)).sum()) * (0.5 + hp["batch"] / 128)}

    draws = [seconds(space.sizes(p), space.hyper_parameters(p))["step_seconds"]
             for p in (space.sample(random) for _ in range(500))]  # fmt: skip
    limit = float(np.quantile(draws, 0.35))
    return Problem(space, score, 0.3, lambda sizes, hp: {"step_seconds": seconds(sizes, hp)["step_seconds"] / limit})


SPACES: dict[str, Callable[[int], Problem]] = {"interactions": interactions, "elastic": elastic}


def search(problem: Problem, proposer: str, trials: int, seed: int, workers: int = 8) -> tuple[float, History, float]:
    """The true score of the model that a search picks, its history, and seconds of the proposer for each model."""
    random = np.random.default_rng([seed, 3])
    objectives = Objectives("score")

    def trial(number: int, point: tuple[int, ...]) -> tuple[Outcome, float]:
        noisy = problem.score(point) + problem.noise * float(np.random.default_rng([seed, 4, number]).normal())
        return Outcome("done", {"score": noisy}, "", 1.0), float(random.uniform(0.5, 2.0))

    budget = {"step_seconds": 1.0} if problem.seconds is not None else {}
    setup = GeneratorSetup(problem.space, as_proposer(proposer), seed, budget, problem.seconds, 0.9, learns=False)
    engine = SimulatedEngine(setup, trial, speeds=[1.0] * workers)
    history = History(problem.space, objectives)
    Master(engine, history, Limits(trials=trials, ahead=workers), seed, lambda events: None).run()
    best = max(history.done(), key=lambda t: t.metrics["score"])
    return problem.score(best.point), history, engine.proposing / trials


def quality(seeds: int, trials: int, proposers: Sequence[str] = PROPOSERS) -> list[dict[str, Any]]:
    """A row for each space and proposer: mean true score, and its gain over random search within the same seed."""
    rows = []
    for name, make in SPACES.items():
        found: dict[str, list[float]] = {}
        took: dict[str, float] = {}
        for proposer in proposers:
            try:
                as_proposer(proposer)
            except ExplorationError as error:
                print(f"{proposer} is left out: {error}")
                continue
            runs = [search(make(seed), proposer, trials, seed) for seed in range(seeds)]
            found[proposer] = [score for score, _, _ in runs]
            took[proposer] = mean(seconds for _, _, seconds in runs)
            for _, history, _ in runs:
                assert len({t.key for t in history.trials}) == trials, "a model was tried twice"
        for proposer, scores in found.items():
            behind = [a - b for a, b in zip(found["anneal"], scores)]
            rows.append(
                {
                    "space": name, "proposer": proposer, "score": mean(scores), "gain over random":
                    mean(s - r for s, r in zip(scores, found["random"])), "anneal is ahead by": mean(behind),
                    "standard error": _standard_error(behind), "seconds a model": took[proposer],
                    "seeds": seeds, "trials": trials,
                }
            )  # fmt: skip
    return rows


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
        gate = Gate(problem.space, {"step_seconds": 1.0}, problem.seconds)
        start, before = time.perf_counter(), _cpu()
        answer(proposer, 0, Request(i, 2, trials, trials), pool.view(trials, trials), gate)
        taken.append((time.perf_counter() - start) / 2)
        used.append((_cpu() - before) / 2)
    return {"first": taken[0], "median": float(np.median(taken)), "median cpu": float(np.median(used))}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exploration")
    parser.add_argument("parts", nargs="*", default=["quality", "overhead", "scale"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--proposers", nargs="+", default=PROPOSERS, help="random and anneal among them")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    found: dict[str, Any] = {"machine": machine_description()}
    if "quality" in given.parts:
        found["quality"] = quality(given.seeds, given.trials, given.proposers)
        print_table(found["quality"], title=f"{given.trials} trials, 8 simulated workers, {given.seeds} seeds")
    if "overhead" in given.parts:
        found["overhead"] = overhead()
        print_table(found["overhead"], title="trials that do nothing")
    if "scale" in given.parts:
        found["scale"] = scale()
        print(found["scale"])
    write_json(given.json, found)


if __name__ == "__main__":
    main()
