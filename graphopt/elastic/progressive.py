"""Stages of training: all dimensions at once (`joint_mode`), or opened one after the other (`progressive_mode`).

Progressive mode is that of Cai et al., "Once-for-All: Train One Network and Specialize it for Efficient Deployment",
ICLR 2020: the full net first, then each stage opens one more dimension, from the weights of the stage before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from graphopt.elastic.dimension import Kind
from graphopt.elastic.distillation import InPlaceDistillation
from graphopt.elastic.region import Pattern, matching
from graphopt.elastic.sampling import SANDWICH, DepthSamples, Empty, Strategy
from graphopt.elastic.space import Space
from graphopt.elastic.step import Combine
from graphopt.errors import ElasticError

MOST_DIMENSIONS = 5
"""Stages that open dimensions."""

ORDER = (Kind.KERNEL, Kind.EMBEDDING, Kind.HEADS, Kind.WIDTH, Kind.DEPTH)
"""How progressive mode opens all dimensions. Depth comes last: its stage shares the sizes that a step draws."""


@dataclass(frozen=True)
class Convergence:
    """When a stage ends before its last step. The loss is smoothed (exponentially, over about 50 steps).

    Args:
        below: the loss is at most this.
        patience: so many steps without a loss that is lower, by the share ``improvement``, than the lowest so far.
        improvement: what counts as lower.

    Raises:
        ElasticError: neither a threshold nor a patience, or numbers that make no sense.
    """

    below: float | None = None
    patience: int | None = None
    improvement: float = 0.001

    def __post_init__(self) -> None:
        if self.below is None and self.patience is None:
            raise ElasticError("Convergence: expected a threshold (below), a patience, or both")
        if (self.patience is not None and self.patience < 1) or not 0 <= self.improvement < 1:
            raise ElasticError(
                f"Convergence: expected a patience of at least 1 step and an improvement from 0 to 1, got {self}"
            )


@dataclass
class Watch:
    """Follows the loss of a stage. ``state_dict`` and back through its fields."""

    smooth: float = inf
    lowest: float = inf
    waited: int = 0
    steps: int = 0

    def add(self, loss: float, rule: Convergence | None) -> bool:
        """One more step; returns whether the stage has converged by ``rule``."""
        self.steps += 1
        weight = max(_SMOOTHING, 1 / self.steps)  # the plain mean while there are few
        self.smooth = loss if self.steps == 1 else (1 - weight) * self.smooth + weight * loss
        if rule is None or not isfinite(self.smooth):
            return False
        if self.smooth < self.lowest * (1 - rule.improvement) or self.lowest == inf:
            self.lowest, self.waited = self.smooth, 0
        else:
            self.waited += 1
        settled = self.steps >= _SETTLED
        below = rule.below is not None and settled and self.smooth <= rule.below
        return below or (rule.patience is not None and self.waited >= rule.patience)


_SMOOTHING = 0.02
_SETTLED = 10
"""Steps before a low loss is believed."""


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Args:
        name: of the stage, and of its checkpoint.
        dimensions: names, patterns on names or kinds of the dimensions that are open in it; all others are full.
        steps: how many at most.
        strategy: which subnets a step trains.
        subnets: how many.
        combine: ``"mean"`` of gradients or ``"sum"`` of losses.
        until: ends it before its last step.
        distillation: from the largest net of a step; steps count from the beginning of the stage.
        any_runs: where a depth of k layers is drawn, any k of them may remain, not the first k alone.
    """

    name: str
    dimensions: tuple[Pattern, ...]
    steps: int
    strategy: Strategy = SANDWICH
    subnets: int = 4
    combine: Combine = "mean"
    until: Convergence | None = None
    distillation: InPlaceDistillation | None = None
    any_runs: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ElasticError(f"steps: stage {self.name!r} expected a positive number of steps, got {self.steps!r}")


def joint_mode(
    steps: int,
    *,
    strategy: Strategy = SANDWICH,
    subnets: int = 4,
    combine: Combine = "mean",
    until: Convergence | None = None,
    distillation: InPlaceDistillation | None = None,
    any_runs: bool = False,
) -> tuple[Stage, ...]:
    """All dimensions at once: one stage. Arguments as `Stage`."""
    return (Stage("joint", ("*",), steps, strategy, subnets, combine, until, distillation, any_runs),)


def progressive_mode(
    space: Space,
    order: Sequence[Pattern] | None,
    steps: int | Sequence[int],
    *,
    full: int | None = None,
    until: Convergence | None = None,
    strategies: Mapping[Pattern, Strategy] | None = None,
    subnets: int = 4,
    combine: Combine = "mean",
    distillation: InPlaceDistillation | None = None,
    any_runs: bool = False,
) -> tuple[Stage, ...]:
    """The full net first, then one dimension after the other; each stage starts from the weights of the one before.

    In a stage of depth, sizes are drawn once a step and shared by all its subnets, which differ in depth alone; the
    shallowest and the deepest are always among them (`DepthSamples`). In other stages it is a `Sandwich`.

    Args:
        order: one to five dimensions (names, patterns, or kinds such as ``"width"``, ``"depth"``) in the order in which
            they are opened. Dimensions that are not named stay full. None: all kinds that the space has, in the order
            of `ORDER`.
        steps: of each stage, or of all of them.
        full: steps of the full net at the beginning; None where the model is trained already.
        until: ends the full net's stage before its last step (convergence or a threshold).
        strategies: instead, for some of the dimensions in ``order``; the key ``"full"`` for the first stage.
        subnets, combine, distillation, any_runs: as `Stage`; distillation in the stages that open dimensions.

    Raises:
        ElasticError: no dimensions or more than five, a pattern that means none or one that an earlier pattern meant
            already, numbers of steps that do not fit.
    """
    if order is None:
        there = {d.kind for d in space.dimensions}
        order = [str(kind) for kind in dict.fromkeys((*ORDER, *Kind)) if kind in there]
    if not 1 <= len(order) <= MOST_DIMENSIONS:
        raise ElasticError(f"order: expected one to {MOST_DIMENSIONS} dimensions, got {len(order)}: {list(order)}")
    each = [steps] * len(order) if isinstance(steps, int) else list(steps)
    if len(each) != len(order):
        raise ElasticError(f"steps: got {len(each)} numbers for {len(order)} dimensions")
    given = dict(strategies or {})
    if unknown := set(given) - {*order, "full"}:
        raise ElasticError(f"strategies: {sorted(unknown)} are not in the order {list(order)}")
    if until is not None and full is None:
        raise ElasticError("until: it is for the stage of the full net; give its steps (full)")
    stages = []
    if full is not None:
        stages.append(Stage("full", (), full, given.get("full", Empty()), 1, combine, until))
    kinds = {d.name: d.kind for d in space.dimensions}
    opened: set[str] = set()
    for index, (pattern, count) in enumerate(zip(order, each)):
        mine = set(matching(space.dimensions, [pattern]))
        if mine & opened:
            raise ElasticError(f"order: {pattern!r} means {sorted(mine & opened)}, which an earlier stage opens")
        opened |= mine
        depth = all(kinds[name] is Kind.DEPTH for name in mine)
        usual: Strategy = DepthSamples() if depth else SANDWICH
        stages.append(
            Stage(
                pattern, tuple(order[: index + 1]), count, given.get(pattern, usual), subnets, combine,
                distillation=distillation, any_runs=any_runs,
            )
        )  # fmt: skip
    return tuple(stages)


def plan_of(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What a checkpoint must agree with to be gone on from: names and dimensions of the stages, as plain data."""
    return [{"name": s.name, "dimensions": list(s.dimensions), "subnets": s.subnets} for s in stages]
