"""How good the choice of a scheme is: every candidate measured in turn, and what was chosen beside the best of them.

    python -m benchmarks.selection [--only PATTERN ...] [--batches N ...] [--seconds N] [--samples N] [--compilers]

For each model and batch size: the regret of the choice for a long training (the chosen candidate and the best one
re-measured in fresh interleaved runs; 0 where their intervals meet), the step beside eager as written, eager with a
fused optimizer and, with ``--compilers``, ``torch.compile`` with defaults. For trainings of 100, 1,000 and 10,000
steps, each announced (``steps=``) and with nothing measured before: the total time, capture and measuring included,
against the best candidate held fixed. For each model: a run whose batch size doubles from 4 to 256
and back, with equal samples at each size, against each of the same held fixed.

A calibration of this machine is used if there is one; what was measured by earlier runs is not. Nothing else should
run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from scipy.stats import gmean
from torch import nn

import graphopt
from benchmarks import zoo
from benchmarks.measure import eager_step, in_own_process, machine_description, print_table, write_json
from graphopt.cost_model.cache import cache_dir
from graphopt.cost_model.calibrate import settle_allocator
from graphopt.cost_model.machine import kept
from graphopt.cost_model.measured import Measurement, measure

RESULTS = Path(__file__).parent / "results" / "selection.json"

MODELS = (
    "mlp", "resnet18", "resnet50", "mobilenet_v2", "vgg11", "alexnet", "vit_small", "gpt2", "lstm_classifier",
    "transformer_encoder",
)  # fmt: skip
BATCHES = (1, 4, 16, 64, 256)
SCHEDULE = (4, 8, 16, 32, 64, 128, 256)
LONGEST = 1.0
"""Seconds of a step; larger batches of a model are left out."""

LEAST_SECONDS = 3.0
"""Of a training before it is taken to go on as it does."""

EAGER, FUSED, COMPILE = "eager", "eager, fused optimizer", "torch.compile"
HORIZONS = (100, 1_000, 10_000)
"""Steps of the trainings whose total time counts; the choice for the longest one is compared with the best."""

Step = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """One model at one batch size. Times in seconds; ``totals`` by number of steps: ours, and the best held fixed."""

    model: str
    batch: int
    chosen: str
    best: str
    candidates: int
    probed_steps: int
    until_decided: float
    seconds: float
    regret: float
    speedup: Mapping[str, float]
    totals: Mapping[int, tuple[float, float]]
    all_seconds: Mapping[str, float]


@dataclass(frozen=True)
class Schedule:
    """One model under a batch size that doubles and comes back: seconds of ours and of each held fixed."""

    model: str
    samples: int
    ours: float
    fixed: Mapping[str, float]
    own: Mapping[str, float]


def _made(case: zoo.Case, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = case.build()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, **options)


def _given(batch: Any) -> tuple[Any, ...]:
    return (batch,) if isinstance(batch, dict) else batch


def baselines(case: zoo.Case, compilers: bool) -> dict[str, Step]:
    """The steps that a user would write, each with a model of its own."""
    found: dict[str, Step] = {}
    for name, options in ((EAGER, {}), (FUSED, {"fused": True})):
        found[name] = eager_step(*_made(case, **options), case.loss)
    if compilers:
        torch.compiler.reset()
        model, optimizer = _made(case)
        found[COMPILE] = eager_step(torch.compile(model), optimizer, case.loss)
    return found


def ours(case: zoo.Case, schemes: Any = "auto", steps: int | None = None) -> Any:
    """The optimised step of a fresh model."""
    model, optimizer = _made(case)
    return graphopt.optimize(model, case.batch(2), loss=case.loss, optimizer=optimizer, schemes=schemes, steps=steps)


@dataclass(frozen=True)
class Decision:
    """A training that was announced to have ``horizon`` steps, up to where a scheme is chosen: in ``steps`` steps and
    ``seconds``, capture included."""

    step: Any
    horizon: int
    steps: int
    seconds: float


def decide(case: zoo.Case, size: int, horizon: int) -> Decision:
    """Train until a scheme is chosen, nothing is compiled in another process any more and some seconds have gone (few
    steps begin with eager, and may capture later), or all steps are done."""
    torch.manual_seed(1)
    batch = _given(case.batch(size))
    start, taken = perf_counter(), 0
    with _own_cache():
        step = ours(case, steps=horizon)

        def going() -> bool:
            choice = step.situation.choices[size]
            return perf_counter() - start < LEAST_SECONDS or not choice.decided or choice.compiling

        while taken == 0 or (taken < horizon and going()):
            step(*batch)
            taken += 1
    return Decision(step, horizon, taken, perf_counter() - start)


def row(case: zoo.Case, size: int, written: Mapping[str, Step], seconds: float) -> Row:
    """Decide at one batch size for each horizon, then measure every candidate in turn."""
    batch = case.batch(size)
    shorter = [decide(case, size, horizon) for horizon in HORIZONS[:-1]]
    for one in shorter:  # what they compile ahead in other processes would slow down all that follows
        one.step.close()
    found = decide(case, size, HORIZONS[-1])
    step = found.step
    plan, situation = step.plan, step.situation
    tensors = list(batch.values()) if isinstance(batch, dict) else list(batch)
    runners = {
        c.scheme: partial(situation.runner(c.scheme, size), tensors)
        for c in plan.candidates
        if c.why_not is None and (c.start_seconds is not None or not situation.compiles(c.scheme))
    }
    starts = {}
    for name, run in runners.items():  # first runs of those that were not tried
        begun = perf_counter()
        run()
        starts[name] = plan.candidate(name).start_seconds or perf_counter() - begun
    every = measure(runners, seconds=seconds, rounds=(7, 30), warmup=1, precision=0.01)
    best = min(every, key=lambda name: every[name].seconds)
    again = measure({name: runners[name] for name in {plan.chosen, best}}, seconds=seconds, rounds=(11, 50), warmup=1)
    beside = measure(
        {"ours": partial(step, *_given(batch)), **{name: partial(s, *_given(batch)) for name, s in written.items()}},
        seconds=seconds, rounds=(7, 30), warmup=2, precision=0.02,
    )  # fmt: skip
    seconds_of = {name: again.get(name, one).seconds for name, one in every.items()}
    result = Row(
        case.name,
        size,
        plan.chosen,
        best,
        len(runners),
        found.steps,
        found.seconds,
        again[plan.chosen].seconds,
        regret=_regret(again[plan.chosen], again[best]),
        speedup={name: beside[name].seconds / beside["ours"].seconds for name in written},
        totals={
            one.horizon: (_total(one, seconds_of), _best_total(one.horizon, plan, seconds_of, starts))
            for one in (*shorter, found)
        },
        all_seconds={name: one.seconds for name, one in every.items()},
    )
    step.close()
    return result


def _regret(chosen: Measurement, best: Measurement) -> float:
    """How much longer the chosen takes, 0 where the intervals meet."""
    return 0.0 if chosen.low <= best.high else chosen.seconds / best.seconds - 1


def _total(decision: Decision, seconds_of: Mapping[str, float]) -> float:
    """Seconds of a whole training, its decision included."""
    chosen = decision.step.plan.candidate(decision.step.plan.chosen)
    each = seconds_of.get(chosen.scheme) or chosen.measurement.seconds
    return decision.seconds + (decision.horizon - decision.steps) * each


def _best_total(steps: int, plan: Any, seconds_of: Mapping[str, float], starts: Mapping[str, float]) -> float:
    """Seconds of so many steps of the best candidate held fixed, its start and capture included."""
    capture = plan.facts.capture_seconds if plan.facts else 0.0
    return min(
        starts[name] + (0.0 if name.startswith(EAGER) else capture) + (steps - 1) * each
        for name, each in seconds_of.items()
    )


def schedule(case: zoo.Case, samples: int, compilers: bool, candidates: Sequence[str]) -> Schedule:
    """Train over batch sizes that double and come back; ours, and each way held fixed, in turn."""
    sizes = [*SCHEDULE, *reversed(SCHEDULE[:-1])]
    batches = {size: _given(case.batch(size)) for size in SCHEDULE}

    def total(step: Step) -> float:
        start = perf_counter()
        for size in sizes:
            for _ in range(max(samples // size, 1)):
                step(*batches[size])
        return perf_counter() - start

    mine = total(ours(case))
    fixed = {name: total(step) for name, step in baselines(case, compilers).items()}
    own = {name: total(ours(case, [name])) for name in candidates}
    return Schedule(case.name, samples, mine, fixed, own)


def claims(rows: Sequence[Row], schedules: Sequence[Schedule]) -> list[dict[str, Any]]:
    """The table of claims, each with its bar."""
    regrets = [r.regret for r in rows]
    made: list[tuple[str, float | None, float]] = [
        ("regret, mean", 0.02, float(np.mean(regrets))),
        ("regret, 95th percentile", 0.05, float(np.quantile(regrets, 0.95))),
    ]
    for name, bar in ((EAGER, 1.3), (FUSED, None), (COMPILE, 1.2)):
        if all(name in r.speedup for r in rows):
            made.append((f"geometric mean against {name}", bar, float(gmean([r.speedup[name] for r in rows]))))
    better = [min(r.speedup[EAGER], r.speedup[FUSED]) for r in rows]
    made.append(("geometric mean against the better eager", 1.1, float(gmean(better))))
    made.append(("slowest against the best as users write them", 0.97, min(min(r.speedup.values()) for r in rows)))
    for steps in HORIZONS:
        behind = [r.totals[steps][0] - 1.03 * r.totals[steps][1] for r in rows]
        bar = 2.0 if steps == HORIZONS[0] else 0.0
        made.append((f"seconds beyond 3 % behind the best fixed, {steps:,} steps, most", bar, max(behind)))
    if schedules:
        made.append(("doubling batch against the best written, most", 0.85,
                     max(s.ours / min(s.fixed.values()) for s in schedules)))  # fmt: skip
        if own := [s.ours / min(s.own.values()) for s in schedules if s.own]:
            made.append(("doubling batch against our own best held fixed, most", 1.0, max(own)))
    return [{"claim": name, "bar": bar, "measured": value} for name, bar, value in made]


@dataclass(frozen=True)
class Asked:
    """What is asked of a model: batch sizes, seconds a measurement, samples at each size of the schedule (0: none)."""

    batches: tuple[int, ...]
    seconds: float
    samples: int
    compilers: bool


def _of_model(name: str, asked: Asked) -> tuple[list[Row], list[Schedule]]:
    """All of one model, for a process of its own."""
    warnings.simplefilter("ignore", graphopt.GraphoptWarning)  # the plan says the same
    settle_allocator()
    case = next(c for c in zoo.CASES if c.name == name)
    rows = list(_rows(case, asked))
    if not asked.samples:
        return rows, []
    own = dict.fromkeys(r.chosen for r in rows)
    return rows, [schedule(case, asked.samples, asked.compilers, list(own))]


def _rows(case: zoo.Case, asked: Asked) -> Iterator[Row]:
    written = baselines(case, asked.compilers)
    for size in sorted(asked.batches):
        batch = _given(case.batch(size))
        written[EAGER](*batch)
        start = perf_counter()
        written[EAGER](*batch)
        if perf_counter() - start > LONGEST:
            return
        yield row(case, size, written, asked.seconds)


@contextmanager
def _own_cache() -> Iterator[None]:
    """A cache folder with the calibrations of this machine, and nothing measured."""
    before = os.environ.get("GRAPHOPT_CACHE_DIR")
    # Whoever still holds the store there may write to it meanwhile.
    with tempfile.TemporaryDirectory(prefix="graphopt-selection-", ignore_cleanup_errors=True) as folder:
        for path in cache_dir().glob("machine-*.json"):
            shutil.copy(path, folder)
        os.environ["GRAPHOPT_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["GRAPHOPT_CACHE_DIR"]
            if before is not None:
                os.environ["GRAPHOPT_CACHE_DIR"] = before


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selection", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", metavar="PATTERN", nargs="+", default=list(MODELS), help="names of models")
    parser.add_argument("--batches", metavar="N", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=6.0, help="for each measurement (%(default)s)")
    parser.add_argument(
        "--samples", type=int, default=2048, help="at each size of the schedule; 0: no schedule (%(default)s)"
    )
    parser.add_argument("--compilers", action="store_true", help="torch.compile as a baseline too")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON to write")
    options = parser.parse_args(arguments)
    cases = [c for c in zoo.CASES if c.captures and any(fnmatch(c.name, p) for p in options.only)]
    if not cases:
        parser.error(f"no model matches {options.only!r}")
    asked = Asked(tuple(options.batches), options.seconds, options.samples, options.compilers)
    rows: list[Row] = []
    schedules: list[Schedule] = []
    with _own_cache(), Progress() as bar:
        calibrated = kept() is not None
        for case in bar.track(cases, description="models"):
            found, doubled = in_own_process(_of_model, case.name, asked)
            for one in found:
                speed = "  ".join(f"{s:.2f} x {name}" for name, s in one.speedup.items())
                bar.console.print(
                    f"{case.name} {one.batch}: {one.chosen} after {one.probed_steps} steps, best {one.best}, "
                    f"regret {one.regret:.1%}  {speed}"
                )
            for each in doubled:
                bar.console.print(each)
            rows, schedules = rows + found, schedules + doubled
            _write(options.output, rows, schedules, calibrated)  # an interrupted run loses nothing
    print_table(claims(rows, schedules), title="the choice" + ("" if calibrated else ", without prices"))
    return 0


def _write(path: Path, rows: Sequence[Row], schedules: Sequence[Schedule], calibrated: bool) -> None:
    if not rows:
        return
    write_json(
        path,
        {
            "machine": machine_description(), "calibrated": calibrated, "claims": claims(rows, schedules),
            "rows": [asdict(r) for r in rows], "schedules": [asdict(s) for s in schedules],
        },
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
