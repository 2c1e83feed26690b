"""`show`: a training step as a page to look at."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TypeAlias

from graphopt.cost_model import Estimate, Machine, estimate
from graphopt.cost_model.machine import kept
from graphopt.errors import CostModelError, GraphoptError
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import PassResult
from graphopt.plan import Plan
from graphopt.training_step import TrainingStep
from graphopt.visualize.comparison import Comparison
from graphopt.visualize.page import Page
from graphopt.visualize.page_data import Side, page_data

Shown: TypeAlias = TrainingGraph | PassResult | Plan | TrainingStep | tuple[TrainingGraph, TrainingGraph]


def show(
    x: Shown,
    path: str | PathLike[str] | None = None,
    *,
    machine: Machine | None = None,
    sizes: Mapping[str, int] | None = None,
    title: str | None = None,
    height: int = 720,
) -> Page:
    """A training step as one self-contained HTML page: what it computes, what that costs, and what passes did to it.

    The joint graph is folded by module path, forward on the left, backward on the right, what is kept for backward
    between them. Colours show predicted seconds, FLOPs or bytes. What passes removed is ghosted, with the reason.

    Args:
        x: a `TrainingGraph`; the `PassResult` of a pass or a pipeline; two graphs ``(before, after)``; a `Plan`; a
            `TrainingStep` (the plan of its last batch).
        path: where to write the page. Without one it is only made: a notebook displays it, `Page.save` writes it and
            `Page.open` shows it in a browser.
        machine: for predicted seconds; by default what ``graphopt calibrate`` has kept of this machine. Without one
            there are FLOPs and bytes, and no seconds.
        sizes: free sizes by name, at which figures are counted; by default those of the capture, or of the plan.
        title: of the page.
        height: of the frame in a notebook, pixels.

    Raises:
        GraphoptError: ``x`` is nothing that can be shown, a plan whose step is no graph, unknown sizes.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batch = (torch.randn(5, 4), torch.randint(2, (5,)))
        >>> graph = graphopt.capture(net, batch, loss=torch.nn.functional.cross_entropy)
        >>> page = graphopt.show(graph, title="a small step")
        >>> page
        Page('a small step', ... operators; save(path) or open() shows it)
        >>> "<html" in page.html
        True
    """
    plan: Plan | None = None
    if isinstance(x, TrainingStep):
        x = x.plan
    if isinstance(x, Plan):
        plan, x = x, _captured(x)
    if isinstance(x, TrainingGraph):
        result = PassResult(x)
    elif isinstance(x, PassResult):
        result = x
    elif isinstance(x, tuple) and len(x) == 2 and all(isinstance(graph, TrainingGraph) for graph in x):
        result = PassResult(x[1], before=x[0])
    else:
        raise GraphoptError(
            "show: expected a TrainingGraph, a PassResult, two graphs (before, after), a Plan or a TrainingStep, got "
            f"{type(x).__name__}"
        )
    if sizes is None and plan is not None and "batch" in result.graph.symbols.hints:
        sizes = {"batch": plan.batch_size}
    machine = machine if machine is not None else kept()
    after = _side(result.graph, sizes, machine)
    before = None if result.before is None else _side(result.before, sizes, machine)
    if title is None:
        title = f"training step at {_sizes_text(after.sizes)}"
    data = page_data(Comparison.of(result), after, before, title=title, refusals=result.refusals, plan=plan)
    page = Page(data, height)
    if path is not None:
        page.save(path)
    return page


def _captured(plan: Plan) -> PassResult:
    """What passes did to a plan's step. Raises GraphoptError where there is no graph."""
    if plan.passes is not None:
        return plan.passes
    why = dict.fromkeys([c.why_not for c in plan.candidates if c.why_not] + plan.notes)
    raise GraphoptError(f"show: this plan has no graph to show: {'; '.join(why) or 'its step was not captured'}")


def _side(graph: TrainingGraph, sizes: Mapping[str, int] | None, machine: Machine | None) -> Side:
    chosen = {**graph.symbols.hints, **(sizes or {})}
    try:
        graph.symbols.substitution(chosen)
    except KeyError as error:
        raise GraphoptError(f"show: {error.args[0]}") from None
    return Side.of(graph, chosen, _priced(graph, chosen, machine))


def _priced(graph: TrainingGraph, sizes: Mapping[str, int], machine: Machine | None) -> Estimate | None:
    """The price of a graph, None without a machine. Operators only: collectives are shown without their seconds where
    the machine has no link."""
    if machine is None or not len(graph):
        return None
    processors = int((graph.signature.tree.get("placements") or {}).get("processors", 1))
    try:
        return estimate(graph, machine, sizes, processors=processors if machine.link is not None else 1)
    except CostModelError as error:
        raise GraphoptError(f"show: no price at {_sizes_text(sizes)}: {error}") from error


def _sizes_text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "fixed sizes"
