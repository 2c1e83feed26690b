"""Figures of subnets: what each costs and how good it is, and the front that no other one beats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from graphopt.elastic.pareto import front
from graphopt.elastic.select import Candidate, Selection
from graphopt.errors import GraphoptError
from graphopt.exploration.study import Study
from graphopt.visualize.plots.style import SERIES, SOFT, figure_of

Priced: TypeAlias = Selection | Study | Iterable[Candidate]

WIDE = 20
"""Ratio of the largest cost to the smallest from which on costs are drawn on a logarithmic axis."""


_WORDS = {"flops": "FLOPs", "latency_seconds": "seconds of a forward pass", "step_seconds": "seconds of a step"}


@dataclass(frozen=True)
class _Points:
    """What is drawn: ``(count,)`` each. ``better``: 1 where much of the quality is good, -1 where little is."""

    cost: np.ndarray
    quality: np.ndarray
    better: int
    names: tuple[str, str]
    chosen: tuple[float, float] | None
    bound: float | None


def pareto(x: Priced, *, cost: str | None = None, quality: str = "quality", budget: float | None = None) -> Figure:
    """Subnets by what they cost and how good they are: all of them as points, the front as a line, the one chosen.

    The front is the best quality that any of them has up to a cost: who lies below it is beaten by one that costs no
    more.

    Args:
        x: a `graphopt.elastic.Selection` (its front), the `Study` of a search (all models with scores), or
            `graphopt.elastic.Candidate` objects: choices with their prices and a quality, such as a measured accuracy.
        cost: which price, or which objective of the study; by default the first one.
        quality: what to write beside the axis; of a study the objective to draw, by default its main one.
        budget: draws a line at this cost; by default that of the selection or of the study.

    Raises:
        GraphoptError: nothing to draw, or nothing of that name.
    """
    if isinstance(x, Study):
        points = _of_study(x, cost, None if quality == "quality" else quality)
    elif isinstance(x, Selection):
        points = _of_candidates(x.front, cost or next(iter(x.budget.given)), quality, x)
    else:
        points = _of_candidates(tuple(x), cost, quality, None)
    figure, ax = figure_of(*(_WORDS.get(name, name.replace("_", " ")) for name in points.names))
    best = front(points.cost, points.better * points.quality)
    others = np.setdiff1d(np.arange(len(points.cost)), best)
    if len(others):
        ax.plot(points.cost[others], points.quality[others], "o", color=SOFT, alpha=0.45, markersize=4, linewidth=0,
                label=f"beaten ({len(others)})")  # fmt: skip
    edge = points.cost.max()
    line_x, line_y = np.append(points.cost[best], edge), np.append(points.quality[best], points.quality[best][-1])
    ax.step(line_x, line_y, where="post", color=SERIES[0], linewidth=1.6, gid="front")
    ax.plot(points.cost[best], points.quality[best], "o", color=SERIES[0], markersize=5.5, linewidth=0,
            label=f"front ({len(best)})")  # fmt: skip
    if points.chosen is not None:
        ax.plot(*points.chosen, "o", markersize=12, markerfacecolor="none", markeredgecolor=SERIES[1],
                markeredgewidth=1.8, label="chosen")  # fmt: skip
    bound = points.bound if budget is None else budget
    if bound is not None:
        ax.axvline(bound, color=SERIES[1], linestyle="--", linewidth=1, label="budget", gid="budget")
    if points.cost.min() > 0 and edge > WIDE * points.cost.min():
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    _unit(ax.xaxis, points.names[0])
    ax.legend(frameon=False, fontsize=8)
    return figure


def _of_candidates(found: tuple[Candidate, ...], cost: str | None, quality: str, of: Selection | None) -> _Points:
    if not found:
        raise GraphoptError("pareto: there are no candidates to draw")
    name = cost if cost is not None else next(iter(found[0].prices))
    if missing := [one for one in found if name not in one.prices]:
        raise GraphoptError(f"cost: {missing[0].choice} has no price {name!r}; it has {', '.join(missing[0].prices)}")
    at = lambda one: (float(one.prices[name]), float(one.quality))
    x, y = np.array([at(one) for one in found]).T
    chosen = None if of is None else at(of.best)
    return _Points(x, y, 1, (name, quality), chosen, None if of is None else of.budget.given.get(name))


def _of_study(study: Study, cost: str | None, quality: str | None) -> _Points:
    names, signs = study.objectives.names, study.objectives.signs
    main = quality if quality is not None else study.objectives.main
    others = [name for name in names if name != main]
    name = cost if cost is not None else next(iter(others), None)
    if name is None:
        raise GraphoptError(f"cost: the study has one objective, {main}; name a metric to draw it against")
    done = [t for t in study.trials() if t.scores is not None and name in t.metrics and main in t.metrics]
    if not done:
        raise GraphoptError(f"pareto: no trial of this study has both {main} and {name}")
    x, y = np.array([[t.metrics[name], t.metrics[main]] for t in done], dtype=float).T
    kept = study.history.done(study.budget)
    best = study.best() if kept else None
    at = None if best is None or name not in best.metrics else (best.metrics[name], best.metrics[main])
    budget: Mapping[str, float] = study.budget
    return _Points(x, y, 1 if signs.get(main, 1) > 0 else -1, (name, main), at, budget.get(name))


def _unit(axis: Axis, name: str) -> None:
    if name.endswith("seconds"):
        axis.set_major_formatter(EngFormatter("s", sep=" "))
    else:
        axis.set_major_formatter(EngFormatter("B" if "bytes" in name else "", sep=" " if "bytes" in name else ""))
