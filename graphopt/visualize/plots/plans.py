"""Figures of plans: seconds of schemes over batch sizes, and prices against what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from graphopt.choice import Landscape
from graphopt.errors import GraphoptError
from graphopt.plan import Plan
from graphopt.training_step import TrainingStep
from graphopt.visualize.plots.style import SERIES, SOFT, Planned, figure_of, plan_of, seconds_on

_REACH = 4
"""How far beyond the batch sizes at hand times are drawn, as a factor."""


def step_times(
    planned: Planned,
    sizes: Sequence[int] | None = None,
    *,
    schemes: Iterable[str] | None = None,
    per_sample: bool = False,
) -> Figure:
    """Seconds of a step by each scheme over batch sizes: lines with their intervals, points where they were measured,
    and dashed lines at the crossovers.

    Args:
        planned: a plan, or a training step (the plan of its last batch).
        sizes: batch sizes to draw; by default from a fourth of the smallest that was decided on to four times the
            largest.
        schemes: names; by default all candidates of which something is known.
        per_sample: draw seconds for each sample of the batch.

    Raises:
        GraphoptError: nothing is known of any scheme: a plan that was not made by `optimize`, or before the first step.
    """
    plan = plan_of(planned)
    landscape = plan.landscape
    if landscape is None:
        raise GraphoptError("step_times: this plan knows one batch size only; take that of a step made by optimize()")
    names = [c.scheme for c in plan.candidates] if schemes is None else list(schemes)
    chosen = _grid(landscape, names, plan.batch_size) if sizes is None else sorted(set(sizes))
    figure, ax = figure_of("batch size", "seconds a sample" if per_sample else "seconds a step")
    drawn = 0
    for name, colour in zip(names, SERIES * (1 + len(names) // len(SERIES))):
        found = [(n, belief) for n in chosen if (belief := landscape.belief(name, n)) is not None]
        if not found:
            continue
        drawn += 1
        at = np.array([n for n, _ in found])
        share = at if per_sample else np.ones(len(at))
        line, low, high = (np.array([getattr(b, k) for _, b in found]) / share for k in ("seconds", "low", "high"))
        ax.plot(at, line, color=colour, label=name, linewidth=2.2 if name == plan.chosen else 1.4)
        ax.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
        points = sorted((n, m) for n, m in landscape.measured_at(name).items() if chosen[0] <= n <= chosen[-1])
        if points:
            n = np.array([size for size, _ in points])
            share = n if per_sample else np.ones(len(n))
            middle, bottom, top = (
                np.array([getattr(m, k) for _, m in points]) / share for k in ("seconds", "low", "high")
            )
            ax.errorbar(n, middle, yerr=[middle - bottom, top - middle], fmt="o", color=colour, markersize=5, capsize=3,
                        label=f"{name}, measured")  # fmt: skip
    if not drawn:
        raise GraphoptError("step_times: nothing is known of any scheme yet; run some steps, or `graphopt calibrate`")
    for crossover in plan.crossovers():
        if chosen[0] <= crossover.size <= chosen[-1]:
            ax.axvline(crossover.size, color=SOFT, linestyle="--", linewidth=1, gid=f"crossover {crossover.size}")
            ax.annotate(
                f"{crossover.after}\nfrom {crossover.size}", (crossover.size, 0.98), (4, 0), fontsize=8, color=SOFT,
                xycoords=("data", "axes fraction"), textcoords="offset points", va="top",
            )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    seconds_on(ax.yaxis)
    ax.legend(frameon=False, fontsize=8)
    return figure


def _grid(landscape: Landscape, names: Sequence[str], size: int) -> list[int]:
    known = {size, *(n for name in names for n in landscape.measured_at(name))}
    smallest, largest = max(2, min(known) // _REACH), max(known) * _REACH
    return sorted({*known, *(round(n) for n in np.geomspace(smallest, largest, 25))})


def predicted_against_measured(planned: Planned | Iterable[Planned]) -> Figure:
    """Seconds that were expected of each candidate over those that it took, with both intervals, for one plan or many.

    Prices of the cost model where there are some, else what was interpolated or stored. On the diagonal they agree.

    Raises:
        GraphoptError: no candidate has both.
    """
    plans = [plan_of(planned)] if isinstance(planned, (Plan, TrainingStep)) else [plan_of(one) for one in planned]
    rows: dict[str, list[tuple[float, ...]]] = {}
    for plan in plans:
        for candidate in plan.candidates:
            took = candidate.measurement
            if candidate.estimate is not None:
                expected = candidate.estimate.seconds, *candidate.estimate.interval
            elif candidate.predicted is not None:
                expected = candidate.predicted[:3]
            else:
                continue
            if took is not None:
                rows.setdefault(candidate.scheme, []).append((took.seconds, took.low, took.high, *expected))
    if not rows:
        raise GraphoptError("predicted_against_measured: no candidate has both a price and a measurement")
    figure, ax = figure_of("measured seconds", "predicted seconds")
    everything = np.array([row for found in rows.values() for row in found])
    ends = [everything.min() / 1.3, everything.max() * 1.3]
    ax.plot(ends, ends, color="#1d2430", linewidth=1, label="equal")
    for (scheme, found), colour in zip(rows.items(), SERIES * (1 + len(rows) // len(SERIES))):
        x, low, high, y, bottom, top = np.array(found).T
        ax.errorbar(
            x, y, xerr=[x - low, high - x], yerr=[y - bottom, top - y], fmt="o", color=colour, markersize=5, capsize=2,
            label=scheme,
        )  # fmt: skip
    ratio = [row[3] / row[0] for row in everything]
    title = f"predicted / measured: {median(ratio):.2f} (median), {min(ratio):.2f} to {max(ratio):.2f}"
    ax.set_title(title, fontsize=9, color=SOFT, loc="left")
    ax.set_xscale("log")
    ax.set_yscale("log")
    seconds_on(ax.yaxis)
    seconds_on(ax.xaxis)
    ax.legend(frameon=False, fontsize=8)
    return figure
