"""`select`: the best subnet within a budget, found on prices; then, if asked, the best few are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from graphopt.cost_model.machine import Machine
from graphopt.cost_model.measured import Measurement, measure
from graphopt.elastic.choice import Choice
from graphopt.elastic.forward_arguments import tensor_arguments
from graphopt.elastic.modes import evaluating
from graphopt.elastic.pareto import EXACT, search
from graphopt.elastic.prices import METRICS, Prices
from graphopt.elastic.region import Region
from graphopt.elastic.space import Space
from graphopt.errors import ElasticError
from graphopt.graph.batch import call_model


@dataclass(frozen=True)
class Budget:
    """What a subnet may cost at most; at least one of these. See `graphopt.elastic.prices.METRICS` for what they mean.

    >>> Budget(flops=1e9, latency_seconds=0.02)
    Budget(flops=1000000000.0, latency_seconds=0.02)
    """

    flops: float | None = None
    parameters: float | None = None
    peak_bytes: float | None = None
    latency_seconds: float | None = None
    step_seconds: float | None = None

    def __post_init__(self) -> None:
        given = self.given
        if not given or any(
            isinstance(v, bool) or not isinstance(v, (int, float)) or not v > 0 for v in given.values()
        ):
            raise ElasticError(f"budget: expected positive numbers for some of {', '.join(METRICS)}, got {given}")

    @property
    def given(self) -> dict[str, float]:
        """The bounds by metric."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"


@dataclass(frozen=True)
class Candidate:
    """A subnet with its prices, its quality, and the seconds of its forward pass where that was measured."""

    choice: Choice
    prices: Mapping[str, float]
    quality: float
    measured: Measurement | None = None


@dataclass(frozen=True)
class Selection:
    """What `select` found.

    ``best``: of the highest quality within the budget. ``front``: candidates that none is better than in both load (the
    largest share of any bound that they need) and quality, by rising load; those beyond the budget too. ``exact``:
    whether every choice of the space was looked at.
    """

    best: Candidate
    front: tuple[Candidate, ...]
    budget: Budget
    exact: bool

    @property
    def choice(self) -> Choice:
        """The choice of ``best``."""
        return self.best.choice

    def __str__(self) -> str:
        table = Table(title=f"front for {self.budget}", box=None)
        names = list(self.best.prices)
        for name in [*names, "quality", "measured ms", "choice"]:
            table.add_column(name.replace("_", " "), justify="left" if name == "choice" else "right")
        for one in self.front:
            measured = f"{one.measured.seconds * 1e3:.3g}" if one.measured else ""
            chosen = " <- chosen" if one.choice == self.choice else ""
            cells = [f"{one.prices[name]:,.4g}" for name in names]
            table.add_row(*cells, f"{one.quality:.4g}", measured, f"{one.choice}{chosen}")
        console = Console(width=200, no_color=True, force_jupyter=False, force_terminal=False)
        with console.capture() as captured:
            console.print(table)
        return captured.get()


Quality = Callable[[Sequence[Choice]], Any]
"""Qualities of choices, many at once: the larger, the better."""


def select(
    space: Space,
    budget: Budget | Mapping[str, float],
    *,
    machine: Machine | None = None,
    prices: Prices | None = None,
    quality: Quality | None = None,
    among: Sequence[str] = ("*",),
    measured: int = 0,
    candidates: int = 8_000,
    seed: int = 0,
) -> Selection:
    """The best subnet within a budget.

    Args:
        space: the space.
        budget: a `Budget`, or its bounds by name: ``{"flops": 1e9}``.
        machine: that seconds are of, ``Machine.named("H100")`` or one that was calibrated; by default this one.
        prices: instead, `Prices` made before, which keep what they compiled; needed for ``step_seconds``.
        quality: what shall be high, such as an accuracy that a predictor gives. By default capacity, the geometric mean
            of FLOPs and parameters relative to the full net: within a family of nets the larger one is the better, and
            this prefers those that spend a budget on both.
        among: dimensions that may vary (names, patterns, kinds); the others are full.
        measured: so many of the best within the budget are run here (forward, eval mode, the space's own example); the
            choice then is the best of those whose measured time keeps ``latency_seconds``. With such a bound the
            largest and the smallest are measured first, and predicted times pass through theirs. For this machine only.
        candidates: how many to look at where the space is too large to look at all.
        seed: of the search.

    Raises:
        ElasticError: a budget that nothing meets, with the nearest choice and what it would need; bounds that make no
            sense.
    """
    bounds = budget if isinstance(budget, Budget) else _budget(budget)
    prices = prices if prices is not None else Prices(space, machine)
    if machine is not None and prices.machine is not machine:
        raise ElasticError("machine: the prices are of another one; give either machine or prices")
    region = Region.of(space).only(among)
    if measured and bounds.latency_seconds is not None:  # what is searched is what is measured here
        ends = _latencies(space, [region.full, region.smallest])
        prices = prices.corrected("latency_seconds", {choice: found.seconds for choice, found in ends.items()})
    names = list(dict.fromkeys([*bounds.given, "flops", "parameters"]))
    worth = quality if quality is not None else _capacity(prices)

    def evaluate(choices: Sequence[Choice]) -> tuple[np.ndarray, np.ndarray]:
        table = prices.table(choices, list(bounds.given))
        load = np.max([table[name] / bound for name, bound in bounds.given.items()], axis=0)
        return load, np.asarray(worth(choices), dtype=np.float64)

    chosen, load, value = search(region, evaluate, candidates=candidates, seed=seed)
    table = prices.table(chosen, names)
    front = [
        Candidate(choice, {name: float(table[name][i]) for name in names}, float(value[i]))
        for i, choice in enumerate(chosen)
    ]
    within = [one for one, share in zip(front, load) if share <= 1]
    if not within:
        raise _unmet(bounds, front[0])
    if measured:
        within, front = _measured(space, within, front, measured, bounds)
    best = max(within, key=lambda one: one.quality)
    return Selection(best, tuple(front), bounds, region.size <= EXACT)


def _budget(bounds: Any) -> Budget:
    if not isinstance(bounds, Mapping) or not set(bounds) <= set(METRICS):
        raise ElasticError(f"budget: expected a Budget or bounds of some of {', '.join(METRICS)}, got {bounds!r}")
    return Budget(**bounds)


def _capacity(prices: Prices) -> Quality:
    """The geometric mean of FLOPs and parameters relative to the full net."""
    whole = prices.table([prices.space.full], ["flops", "parameters"])

    def capacity(choices: Sequence[Choice]) -> np.ndarray:
        table = prices.table(choices, ["flops", "parameters"])
        return np.sqrt((table["flops"] / whole["flops"]) * (table["parameters"] / whole["parameters"]))

    return capacity


def _unmet(budget: Budget, nearest: Candidate) -> ElasticError:
    needs = ", ".join(
        f"{name} of {nearest.prices[name]:,.6g} (budget {bound:,.6g})"
        for name, bound in budget.given.items()
        if nearest.prices[name] > bound
    )
    return ElasticError(f"budget: no subnet meets it; the nearest, {nearest.choice}, needs {needs}")


def _latencies(space: Space, choices: Sequence[Choice]) -> dict[Choice, Measurement]:
    """The measured forward pass of some subnets, as modules of their own in eval mode."""
    inputs = tensor_arguments(space.batch)
    with evaluating(space.model), torch.no_grad():
        nets = {choice: space.extract(choice).eval() for choice in choices}
        return measure({choice: partial(call_model, net, inputs) for choice, net in nets.items()})


def _measured(
    space: Space, within: list[Candidate], front: list[Candidate], count: int, budget: Budget
) -> tuple[list[Candidate], list[Candidate]]:
    """The best ``count`` candidates with their measured forward pass, those that keep its bound; and the front."""
    tried = sorted(within, key=lambda one: -one.quality)[:count]
    found = _latencies(space, [one.choice for one in tried])
    timed = {one.choice: Candidate(one.choice, one.prices, one.quality, found[one.choice]) for one in tried}
    bound = budget.latency_seconds
    kept = [one for one in timed.values() if bound is None or one.measured is None or one.measured.seconds <= bound]
    if not kept:
        fastest = min(timed.values(), key=lambda one: one.measured.seconds if one.measured else 0.0)
        assert fastest.measured is not None and bound is not None
        raise ElasticError(
            f"budget: none of the {len(timed)} that were measured keeps latency_seconds={bound:.6g}; the nearest, "
            f"{fastest.choice}, took {fastest.measured.seconds:.6g}. Measure more of them, or give a larger bound"
        )
    return kept, [timed.get(one.choice, one) for one in front]
