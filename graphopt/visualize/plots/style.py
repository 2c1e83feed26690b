"""What all figures share: axes, colours, and what they take for a plan or a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from graphopt.errors import GraphoptError
from graphopt.graph.training_graph import Phase, TrainingGraph
from graphopt.passes import PassResult
from graphopt.plan import Plan
from graphopt.training_step import TrainingStep

Planned: TypeAlias = Plan | TrainingStep
Drawable: TypeAlias = TrainingGraph | PassResult | tuple[TrainingGraph, TrainingGraph] | Planned

SERIES = ("#2f6db5", "#c0562f", "#2e8b6d", "#6a5aa8", "#b08a00", "#b0368f", "#4a5565", "#3aa0b8")
PHASES = {Phase.FORWARD: "#dfeaf7", Phase.BACKWARD: "#f9e6dc", Phase.UPDATE: "#e8e4f4"}
SOFT, LINE = "#5b6675", "#dfe4ea"


def figure_of(x: str, y: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained", dpi=110)
    ax = figure.add_subplot()
    ax.set_xlabel(x, color=SOFT)
    ax.set_ylabel(y, color=SOFT)
    ax.grid(color=LINE, linewidth=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(colors=SOFT, labelsize=8)
    return figure, ax


def seconds_on(axis: Axis) -> None:
    """Seconds with their unit on a logarithmic axis."""
    axis.set_major_formatter(EngFormatter("s", sep=" "))
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_formatter(NullFormatter())


def plan_of(planned: Planned) -> Plan:
    """The plan itself, or that of a step's last batch."""
    return planned.plan if isinstance(planned, TrainingStep) else planned


def graphs_of(
    x: Drawable, sizes: Mapping[str, int] | None
) -> tuple[TrainingGraph | None, TrainingGraph, Mapping[str, int] | None]:
    """The graph before (None: there is none), the graph after, and the sizes."""
    if isinstance(x, (Plan, TrainingStep)):
        plan = plan_of(x)
        if plan.passes is None:
            raise GraphoptError("the step of this plan could not be captured: there is no graph to draw")
        if sizes is None and "batch" in plan.passes.graph.symbols.hints:
            sizes = {"batch": plan.batch_size}
        x = plan.passes
    if isinstance(x, PassResult):
        return x.before, x.graph, sizes
    if isinstance(x, TrainingGraph):
        return None, x, sizes
    before, after = x
    return before, after, sizes
