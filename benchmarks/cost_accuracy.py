"""How good prices are on this machine: predicted against measured, over models that no calibration uses.

    python -m benchmarks.cost_accuracy [--only PATTERN ...] [--seconds N] [--threads N ...]

Claims, each with its bar: step time by the analytical price, eager and flat, at each number of threads; step time at
unseen batch sizes after three bracketing measurements; peak memory; ranking of the ways to run one model; coverage and
width of intervals.

The machine is calibrated first. How fast it is changes from minute to minute where others share it, so fixed work
(steps of two networks of the calibration) is timed before and after each model at each batch size: a row's seconds are
those measured, over how much longer the fixed work took than it did around the calibration. Nothing else should run on
the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch
from rich.progress import Progress

import graphopt
from benchmarks import zoo
from benchmarks.measure import eager_step, in_own_process, machine_description, peak_bytes, print_table, write_json
from graphopt.cost_model import Machine, estimate
from graphopt.cost_model.calibrate import calibrate, settle_allocator
from graphopt.cost_model.calibration_steps import CASES, prepared
from graphopt.cost_model.interpolation import BatchCurve, bracket
from graphopt.cost_model.measured import Measurement, measure
from graphopt.cost_model.work import Mode
from graphopt.schemes import Task
from graphopt.schemes.flat import capture_task
from graphopt.step import PASSES

RESULTS = Path(__file__).parent / "results" / "cost_accuracy.json"
PAGE = Path(__file__).parents[1] / "docs" / "prices.md"

MODELS = (
    "mlp", "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121", "vgg11", "convnext_tiny",
    "vit_small", "swin_small", "regnet_y_400mf", "gpt2", "bert", "llama", "t5", "lstm_classifier", "unet", "text_cnn",
    "mixer", "transformer_encoder",
)  # fmt: skip
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
LONGEST = 1.0
"""Seconds of a step; larger batches of a model whose step takes longer are left out."""


Way: TypeAlias = tuple[Mode, int]
"""How a model is stepped: mode and threads."""


@dataclass(frozen=True)
class Row:
    """One way to run one model at one batch size: predicted and measured. ``slowness``: of the machine meanwhile,
    against around its calibration; ``seconds`` are as they would have been then."""

    model: str
    batch: int
    mode: Mode
    threads: int
    seconds: float
    half_width: float
    predicted: float
    low: float
    high: float
    peak: int
    predicted_peak: int
    peak_own: int
    predicted_own: int
    slowness: float

    @property
    def error(self) -> float:
        """Of the predicted seconds, relative to the measured ones."""
        return self.predicted / self.seconds - 1


def rows_of(
    case: zoo.Case, machines: Mapping[int, Machine], seconds: float, fixed: Mapping[int, float]
) -> Iterator[Row]:
    """Step a model in each way at each batch size, next to each other and to the fixed work, and price the same on the
    machine of as many threads. ``fixed``: seconds of the fixed work when that was calibrated."""
    settle_allocator()
    torch.manual_seed(0)
    model = case.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    flat = graphopt.optimize(model, case.batch(2), loss=case.loss, optimizer=optimizer, schemes="flat")
    ways: dict[Mode, Callable[..., Any]] = {"eager": eager_step(model, optimizer, case.loss), "flat": flat}
    run: dict[Way, Callable[..., Any]] = {
        (mode, threads): partial(_with_threads, threads, step) for mode, step in ways.items() for threads in machines
    }
    task = Task(model, case.loss or "model", (optimizer,))
    captured: list[Any] = []
    owned = [*model.parameters(), *model.buffers()]
    work = {threads: partial(_with_threads, threads, fixed_work()) for threads in machines}
    times: dict[tuple[int, Way], tuple[float, Measurement]] = {}  # slowness, and what was measured
    for _ in range(2):  # apart in time: a machine that others share is slower for some seconds now and then
        before = _seconds_of(work)
        for batch, steps in _steps(case, run, {b for b, _ in times}):
            found = measure(steps, seconds=seconds, rounds=(7, 30), warmup=2, precision=0.02)
            after = _seconds_of(work)
            for mode, threads in steps:
                slowness = (before[threads] + after[threads]) / 2 / fixed[threads]
                known = times.get((batch, (mode, threads)))
                if known is None or slowness < known[0]:
                    times[batch, (mode, threads)] = slowness, found[mode, threads]
            before = after
            if max(one.seconds for one in found.values()) > LONGEST / 2:
                break
    for batch, steps in _steps(case, run, {b for b, _ in times}):
        data = case.batch(batch)
        step = next((c for c in captured if c.admits(batch)), None)
        if step is None:
            captured.append(step := capture_task(task, data, PASSES))
        there = sum(t.numel() * t.element_size() for t in owned)
        there += sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
        there += sum(t.numel() * t.element_size() for t in (data.values() if isinstance(data, dict) else data))
        for mode, threads in steps:
            graph = step.before if mode == "eager" else step.graph
            price = estimate(graph, machines[threads], {"batch": batch}, mode=mode)
            own, (slowness, taken) = peak_bytes(steps[mode, threads]), times[batch, (mode, threads)]
            yield Row(
                case.name, batch, mode, threads, taken.seconds / slowness, taken.half_width, price.seconds,
                *price.interval, peak=there + own, predicted_peak=price.peak_bytes, peak_own=own,
                predicted_own=price.peak.own, slowness=slowness,
            )  # fmt: skip


def _rows_of(name: str, threads: Sequence[int], seconds: float, fixed: Mapping[int, float]) -> list[Row]:
    """`rows_of`, for a process of its own."""
    case = next(c for c in zoo.CASES if c.name == name)
    return list(rows_of(case, _machines(threads), seconds, fixed))


def fixed_work() -> Callable[[], None]:
    """A call that does what a calibration does too: a step of a small ResNet, and one of a small transformer."""
    chosen = [next(prepared(case)) for case in CASES if case.name in ("residual", "transformer")]

    def run() -> None:
        for one in chosen:
            one.steps["flat"]()

    return run


def _seconds_of(work: Mapping[int, Callable[[], None]]) -> dict[int, float]:
    """Of the fixed work at each number of threads, now; a few times in a row, as what stands between leaves caches."""
    found = {}
    for threads, run in work.items():
        run()
        taken = []
        for _ in range(7):
            start = perf_counter()
            run()
            taken.append(perf_counter() - start)
        found[threads] = median(taken)
    return found


def _fixed_seconds(threads: int) -> float:
    """Of the fixed work, for a process of its own."""
    settle_allocator()
    work = {threads: partial(_with_threads, threads, fixed_work())}
    return median(_seconds_of(work)[threads] for _ in range(15))


def _calibrated(threads: Sequence[int]) -> dict[int, float]:
    """Calibrate the machine for each number of threads; the seconds of the fixed work by those: the shortest of before
    and after, as a calibration takes the shortest of what it times twice."""
    fixed = {}
    for count in threads:
        before = in_own_process(_fixed_seconds, count)
        in_own_process(_calibrate, count)
        fixed[count] = min(before, in_own_process(_fixed_seconds, count))
    return fixed


def _calibrate(threads: int) -> None:
    torch.set_num_threads(threads)
    calibrate().save()


def _machines(threads: Sequence[int]) -> dict[int, Machine]:
    found = {}
    for count in threads:
        torch.set_num_threads(count)
        found[count] = Machine.current()
    return found


def _steps(
    case: zoo.Case, run: Mapping[Way, Callable[..., Any]], known: set[int]
) -> Iterator[tuple[int, dict[Way, Callable[[], Any]]]]:
    """The ways to step a model, for each batch size; for those in ``known`` only, where there are any."""
    for batch in sorted(known) or BATCHES:
        data = case.batch(batch)
        arguments = (data,) if isinstance(data, dict) else data
        yield batch, {way: partial(step, *arguments) for way, step in run.items()}


def _with_threads(threads: int, step: Callable[..., Any], *batch: Any) -> None:
    torch.set_num_threads(threads)
    step(*batch)


def claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table of claims."""
    inside = [r.low <= r.seconds <= r.high for r in rows]
    widths = [(r.high - r.low) / 2 / r.predicted for r in rows]
    unseen = list(_unseen(rows))
    made = [
        ("step time, mean absolute error", 0.15, mean(abs(r.error) for r in rows), len(rows)),
        ("step time, median absolute error", None, median(abs(r.error) for r in rows), len(rows)),
        *((f"step time, {name}", 0.15, mean(abs(r.error) for r in some), len(some)) for name, some in _ways(rows)),
        ("unseen batch after 3 measured, mean", 0.04, mean(unseen), len(unseen)),
        ("unseen batch after 3 measured, median", None, median(unseen), len(unseen)),
        ("peak memory, mean", 0.05, mean(abs(r.predicted_peak / r.peak - 1) for r in rows), len(rows)),
        ("own memory, mean", None, mean(abs(r.predicted_own / r.peak_own - 1) for r in rows), len(rows)),
        ("ranking, Kendall tau", 0.8, _ranking(rows), None),
        ("inside of the 90 % interval", (0.85, 0.95), mean(inside), len(rows)),
        ("half-width of the interval, median", 0.25, median(widths), len(rows)),
    ]
    return [{"claim": name, "bar": bar, "measured": value, "rows": count} for name, bar, value, count in made]


def _ways(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: (r.mode, r.threads)):
        found[f"{row.mode}, {_threads(row.threads)}"].append(row)
    return list(found.items())


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _unseen(rows: Sequence[Row]) -> Iterator[float]:
    """Absolute errors at batch sizes between those that `bracket` chooses to measure."""
    curves: dict[tuple[str, str, int], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row.batch > 1:  # a batch of 1 runs another graph
            curves[row.model, row.mode, row.threads][row.batch] = row
    for curve in curves.values():
        if len(curve) < 4:
            continue
        predicted = partial(_predicted, curve)
        points = {_nearest(curve, batch) for batch in bracket(min(curve), max(curve), predicted)}
        measured = {b: Measurement(curve[b].seconds, curve[b].seconds, curve[b].seconds, 7) for b in points}
        found = BatchCurve(measured, shape=predicted)
        for batch in curve.keys() - points:
            yield abs(found.at(batch)[0] / curve[batch].seconds - 1)


def _nearest(curve: Mapping[int, Row], batch: int) -> int:
    return min(curve, key=lambda b: abs(b - batch))


def _predicted(curve: Mapping[int, Row], batch: int) -> float:
    """What was predicted, linear between the batch sizes that were measured."""
    return float(np.interp(batch, list(curve), [row.predicted for row in curve.values()]))


def _ranking(rows: Sequence[Row]) -> float:
    """Kendall's tau over pairs of ways to run a model at a batch size that differ by more than 5 %."""
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.model, row.batch].append(row)
    pairs = [
        (a, b) for group in groups.values() for a, b in combinations(group, 2)
        if not 1 / 1.05 < a.seconds / b.seconds < 1.05
    ]  # fmt: skip
    agree = [(a.predicted < b.predicted) == (a.seconds < b.seconds) for a, b in pairs]
    return 2 * mean(agree) - 1 if agree else float("nan")


def report(rows: Sequence[Row], machines: Mapping[int, Machine]) -> list[dict[str, Any]]:
    """Write what is known, with the table of claims."""
    table = claims(rows)
    known = {threads: {"scales": dict(m.scales), "spread": m.spread} for threads, m in machines.items()}
    write_json(
        RESULTS,
        {"machine": machine_description(), "calibrated": known, "claims": table, "rows": [asdict(r) for r in rows]},
    )
    return table


def write_page() -> None:
    """Put the table of the last run into docs/prices.md."""
    data = json.loads(RESULTS.read_text())
    models = sorted({row["model"] for row in data["rows"]})
    lines = [
        f"{data['machine']['cpu']}, {' and '.join(_threads(int(n)) for n in data['calibrated'])}, torch "
        f"{data['machine']['torch']}; {len(models)} models: {', '.join(models)}; batch sizes 1 to 128, up to steps "
        "of about a second.",
        "",
        "| claim | bar | measured |",
        "|---|---|---:|",
        *(f"| {c['claim']} | {_bar(c)} | {_shown(c, c['measured'])} |" for c in data["claims"]),
    ]
    before, rest = PAGE.read_text().split("<!-- cost_accuracy -->\n")
    _, after = rest.split("<!-- /cost_accuracy -->")
    text = "\n".join(lines)
    PAGE.write_text(f"{before}<!-- cost_accuracy -->\n{text}\n<!-- /cost_accuracy -->{after}")


def _bar(claim: Mapping[str, Any]) -> str:
    bar = claim["bar"]
    if isinstance(bar, list):
        return " to ".join(_shown(claim, b) for b in bar)
    return "" if bar is None else _shown(claim, bar)


def _shown(claim: Mapping[str, Any], value: float) -> str:
    return f"{value:.2f}" if "tau" in claim["claim"] else f"{value:.1%}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost_accuracy", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", metavar="PATTERN", nargs="+", default=list(MODELS), help="names of models")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each model and batch size (%(default)s)")
    parser.add_argument(
        "--threads", metavar="N", type=int, nargs="+", default=[torch.get_num_threads()], help="of torch"
    )
    options = parser.parse_args(arguments)
    cases = [c for c in zoo.CASES if c.captures and any(fnmatch(c.name, p) for p in options.only)]
    if not cases:
        parser.error(f"no model matches {options.only!r}")
    rows: list[Row] = []
    fixed = _calibrated(options.threads)
    machines = _machines(options.threads)
    with Progress() as bar:
        for case in bar.track(cases, description="models"):
            found = in_own_process(_rows_of, case.name, options.threads, options.seconds, fixed)
            rows += found
            report(rows, machines)  # an interrupted run loses nothing
            errors = "  ".join(f"{r.batch}{r.mode[0]}{r.threads} {r.error:+.0%}" for r in found)
            bar.console.print(f"{case.name}: {errors}")
    print_table(report(rows, machines), title="prices")
    write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
