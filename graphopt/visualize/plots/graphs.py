"""Figures of graphs: memory over a step, and operators under the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter
from torch import fx

from graphopt.cost_model import Estimate, Machine, estimate
from graphopt.cost_model.kernels import Family
from graphopt.cost_model.memory import peak
from graphopt.cost_model.work import Mode
from graphopt.errors import GraphoptError
from graphopt.graph.text import operator_text
from graphopt.graph.training_graph import TrainingGraph
from graphopt.visualize.plots.style import PHASES, SERIES, SOFT, Drawable, figure_of, graphs_of


def memory(
    x: Drawable,
    sizes: Mapping[str, int] | None = None,
    *,
    mode: Literal["flat", "eager"] = "flat",
) -> Figure:
    """Bytes that live after each operator of a step; of what passes changed, before and after them.

    An operator that both graphs hold stands at one place for both, so that the curves can be compared.

    Args:
        x: a graph, the result of passes, two graphs ``(before, after)``, a plan or a training step.
        sizes: free sizes by name; by default those of the capture, or of the plan.
        mode: ``flat`` (straight-line code) or ``eager`` (what PyTorch holds).

    Raises:
        GraphoptError: nothing to draw, unknown sizes.
    """
    before, after, sizes = graphs_of(x, sizes)
    figure, ax = figure_of("operator of the step", "bytes")
    first = before if before is not None else after
    position = {node.name: i for i, node in enumerate(_schedule(first))}
    _shade(ax, first)
    most = 0
    for graph, label, colour in (
        (before, "captured", SERIES[1]),
        (after, "after passes" if before else "step", SERIES[0]),
    ):
        if graph is None:
            continue
        found, last, at = peak(graph, sizes, mode), 0, []
        for node in _schedule(graph):
            last = max(last, position.get(node.name, last))
            at.append(last)
        ax.step(at, found.timeline, where="post", color=colour, label=label, linewidth=1.6)
        if found.node is not None:
            place = at[_schedule(graph).index(found.node)]
            ax.plot([place], [found.total], "v", color=colour, markersize=7, label=f"{label}, peak")
            text = f"{EngFormatter('B', places=2, sep=' ')(found.total)} at {operator_text(found.node.target)}"
            left = place < len(position) / 2
            ax.annotate(
                text, (place, found.total), xytext=(7 if left else -7, 4), ha="left" if left else "right",
                textcoords="offset points", fontsize=8, color=colour,
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1},
            )  # fmt: skip
        most = max(most, found.total, max(found.timeline, default=0))
    ax.set_ylim(0, 1.2 * most)
    ax.yaxis.set_major_formatter(EngFormatter("B", sep=" "))
    ax.legend(frameon=False, fontsize=8, loc="lower center", ncols=4, bbox_to_anchor=(0.5, 1.0))
    return figure


def _schedule(graph: TrainingGraph) -> list[fx.Node]:
    """The nodes that `Peak.timeline` speaks of, in its order."""
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def _shade(ax: Axes, graph: TrainingGraph) -> None:
    """Phases as bands, with their names where there is room."""
    phases = [node.meta.get("phase") for node in _schedule(graph)]
    begin = 0
    for i in range(1, len(phases) + 1):
        if i == len(phases) or phases[i] != phases[begin]:
            colour = PHASES.get(phases[begin])  # type: ignore[arg-type]
            if colour is not None and i - begin > 1:
                ax.axvspan(begin, i, color=colour, linewidth=0, zorder=0)
                if i - begin > len(phases) / 12:
                    ax.text((begin + i) / 2, 0.985, str(phases[begin]), transform=ax.get_xaxis_transform(), fontsize=8,
                            color=SOFT, ha="center", va="top")  # fmt: skip
            begin = i


def roofline(
    x: Drawable,
    machine: Machine | None = None,
    sizes: Mapping[str, int] | None = None,
    *,
    mode: Mode = "flat",
    named: int = 5,
) -> Figure:
    """The operators of a step under the roof of a machine: FLOP/s over FLOPs for each byte, area by predicted seconds.

    Below the roof lies what launches, small sizes and unfavourable shapes cost. Operators without FLOPs are not drawn;
    the title says which share of the step they take.

    Args:
        x: a graph, the result of passes, a plan or a training step.
        machine: `Machine.current()` by default.
        sizes, mode: as for `graphopt.cost_model.estimate`.
        named: how many of the dearest operators get their names.

    Raises:
        GraphoptError: no operator has FLOPs.
    """
    _, graph, sizes = graphs_of(x, sizes)
    machine = machine if machine is not None else Machine.current()
    price = estimate(graph, machine, sizes, mode=mode)
    seconds, flops, moved = price.node_seconds, price.counts.flops, price.counts.bytes
    shown = np.flatnonzero((flops > 0) & (moved > 0) & (seconds > 0))
    if not len(shown):
        raise GraphoptError("roofline: no operator of this graph has FLOPs")
    figure, ax = figure_of("FLOPs for each byte", "FLOP/s")
    family = _families(price)
    rate, bandwidth = _roof(machine)
    intensity, speed = flops[shown] / moved[shown], flops[shown] / seconds[shown]
    ends = np.array([min(intensity.min(), rate / bandwidth) / 2, max(intensity.max(), rate / bandwidth) * 2])
    ridge = np.array([ends[0], rate / bandwidth, ends[1]])
    ax.plot(ridge, np.minimum(rate, bandwidth * ridge), color="#1d2430", linewidth=1.8, label=f"roof of {machine.name}")
    area = 12 + 900 * seconds[shown] / seconds.sum()
    for name, colour in zip(dict.fromkeys(family[i] for i in shown), SERIES * 5):
        of = np.array([k for k, i in enumerate(shown) if family[i] == name])
        ax.scatter(
            intensity[of],
            speed[of],
            s=area[of],
            color=colour,
            alpha=0.6,
            linewidths=0.5,
            edgecolors="white",
            label=name,
        )
    _label(ax, [price.work.nodes[i] for i in shown], intensity, speed, seconds[shown], named)
    ax.set_xscale("log")
    ax.set_yscale("log")
    steep = np.log(ridge[1] / ends[0]) > 0.4 * np.log(ends[1] / ends[0])  # the list of names fits above the slope
    ax.set_ylim(min(speed.min() / 2, rate / 100), (2 if steep else 40) * rate)
    ax.yaxis.set_major_formatter(EngFormatter("FLOP/s", sep=" "))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    share = seconds[shown].sum() / seconds.sum()
    ax.set_title(f"{share:.0%} of the predicted time is in operators with FLOPs", fontsize=9, color=SOFT, loc="left")
    for handle in ax.legend(frameon=False, fontsize=8).legend_handles:
        if isinstance(handle, PathCollection):  # areas mean seconds in the figure only
            handle.set_sizes([28])
    return figure


def _label(ax: Axes, nodes: Sequence[fx.Node], x: np.ndarray, y: np.ndarray, seconds: np.ndarray, most: int) -> None:
    """Numbers at the dearest operators, and their names in a list. Those at one place, as layers of one size are, share
    a number."""
    places: dict[tuple[float, float, str], list[int]] = {}
    for k in np.argsort(-seconds):
        operator = operator_text(nodes[k].target).removeprefix("aten.")
        places.setdefault((round(np.log10(x[k]), 1), round(np.log10(y[k]), 1), operator), []).append(int(k))
    dearest = sorted(places.items(), key=lambda item: -seconds[item[1]].sum())[:most]
    listed, numbers = [], dict[tuple[float, float], list[str]]()
    for number, ((at_x, at_y, operator), which) in enumerate(dearest, 1):
        where = nodes[which[0]].meta.get("module") or nodes[which[0]].name
        listed.append(f"{number}  {operator}  {where}" + (f" and {len(which) - 1} more" if len(which) > 1 else ""))
        numbers.setdefault((at_x, at_y), []).append(str(number))
    for (at_x, at_y, _), which in dearest:
        if found := numbers.pop((at_x, at_y), None):
            place = x[which[0]], y[which[0]]
            ax.annotate(", ".join(found), place, (7, 5), textcoords="offset points", fontsize=8)
    above: dict[str, Any] = {"transform": ax.transAxes, "va": "top", "fontsize": 7.5, "color": SOFT, "linespacing": 1.5}
    ax.text(0.015, 0.985, "\n".join(listed), **above)  # nothing lies above the roof


def _roof(machine: Machine) -> tuple[float, float]:
    """FLOP/s of large products, and bytes/s of streams."""
    rates = machine.curves[Family.GEMM].rates
    moved, seconds = machine.curves[Family.POINTWISE].points[-1]
    rate = rates["tf32"] if machine.tf32 and "tf32" in rates else rates["fp32"]
    return rate / machine.scales.get("gemm", 1.0), moved / seconds / machine.scales.get("pointwise", 1.0)


def _families(price: Estimate) -> list[str]:
    """The family of the first kernel of each operator."""
    found = ["none"] * len(price.work.nodes)
    for at, kernel in zip(reversed(price.work.node_of.tolist()), reversed(price.work.kernels)):
        found[at] = str(kernel.family)
    return found
