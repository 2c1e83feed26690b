"""A choice of regions as text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from graphopt.graph.op_rules import bytes_moved, flops
from graphopt.graph.training_graph import Phase
from graphopt.passes._placement import Partial, Replicated, Sharded
from graphopt.passes._strategies import Regime, is_sums
from graphopt.schemes.region_prices import Form

if TYPE_CHECKING:
    from graphopt.schemes.regions import Regions


def explained(regions: Regions) -> Iterator[str]:
    """Runs of modules with their axis, then the collectives with their bytes: the lines of `Regions.explain`."""
    graph, processors = regions.strategies.graph, regions.strategies.processors
    yield (
        f"batch {regions.size} on {processors} processors: {regions.kind}, {_time(regions.seconds)} "
        f"(all along the batch {_time(regions.rows)}, nothing divided {_time(regions.whole)})"
    )
    if regions.bound < 0.999 * regions.best:
        yield f"  the search was ended early: the best may take {_time(regions.bound)}"
    yield "forward, module by module:"
    runs = list(_runs(regions))
    width = max((len(where) for where, _ in runs), default=0)
    yield from (f"  {where:{width}}  {axis}" for where, axis in runs)
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        found = [c for c in regions.conversions if c.collective and c.value.meta.get("phase") == phase]
        inner = sum(len(regions.chosen[n.name].inner) for n in graph.nodes
                    if n.name in regions.chosen and n.meta.get("phase") == phase)  # fmt: skip
        inside = f", and {inner} of the sums inside batch normalisations" if inner else ""
        yield f"{phase}: {len(found)} collectives{inside}"
        for c in found:
            where = c.value.meta.get("module") or "outside of modules"
            change = " -> ".join(map(_lying, (c.source, c.target)))
            what = f"{c.collective.replace('_', '-')} of {_bytes(c.nbytes)}, {_time(c.seconds)}"
            yield f"  {what}: {c.value.name} at {where}, {change}"
    if gathered := [c.nbytes for c in regions.conversions if c.collective and c.value.op == "placeholder"]:
        yield f"parameters gathered: {len(gathered)}, {_bytes(sum(gathered))}"
    for word, kind in (("summed", Partial), ("put together of parts", Sharded), ("whole on each", Replicated)):
        sizes = [size for _, (_, placement), size in regions.handed_over if isinstance(placement, kind)]
        if sizes:
            yield f"gradients {word}: {len(sizes)}, {_bytes(sum(sizes))}"


def _runs(regions: Regions) -> Iterator[tuple[str, str]]:
    """Neighbouring modules that run along the same axis in forward, with its name: that of most of their work. Modules
    of views alone have none."""
    graph = regions.strategies.graph
    axes: dict[str, dict[Regime, int]] = {}
    for node in graph.nodes:
        if node.name in regions.chosen and node.meta.get("phase") == Phase.FORWARD:
            work = graph.symbols.evaluate(flops(node)) + graph.symbols.evaluate(bytes_moved(node))
            regime = regions.chosen[node.name].regime
            if work:
                weights = axes.setdefault(str(node.meta.get("module") or "(outside of modules)"), {})
                weights[regime] = weights.get(regime, 0) + work
    main = [(module, max(weights, key=lambda regime: weights[regime])) for module, weights in axes.items()]
    for regime, run in groupby(main, key=lambda each: each[1]):
        modules = [module for module, _ in run]
        where = modules[0] if len(modules) == 1 else f"{modules[0]} ... {modules[-1]}"
        yield where, "whole" if regime is None else f"along {regime}" if not is_sums(regime) else regime


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < float("inf") else "impossible"


def _lying(of: Form) -> str:
    axis, placement = of
    if isinstance(placement, Sharded):
        return f"parts of {axis}"
    return "whole" if isinstance(placement, Replicated) else "sum of parts"


def _bytes(number: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"
