"""One way to run one operator on several processors: its regime, and how its operands and results lie (`Strategy`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from graphopt.graph.sizes import Expr
from graphopt.passes._placement import Placement

Regime: TypeAlias = str | None
"""Name of an axis, ``sums of ...`` (see `is_sums`), or None: whole."""

BATCH = "batch"
SUMS = "sums of "


def is_sums(regime: Regime) -> bool:
    """Whether a regime is that of an operator on summands. Such a regime names no axis: `sums of self+other`."""
    return regime is not None and regime.startswith(SUMS)


@dataclass(frozen=True)
class Strategy:
    """One way to run one operator.

    ``operands``: how each tensor operand whose values are read must lie; one that is not here lends its shape only and
    costs nothing. ``results``: how the result lies, a tuple of several. ``inner``: bytes of each all-reduce inside of
    the operator (train-mode batch normalisation over the divided batch), expressions of free sizes.
    """

    regime: Regime
    operands: Mapping[fx.Node, Placement]
    results: Placement | tuple[Placement, ...]
    inner: tuple[Expr, ...] = ()

    def result(self, index: int | None) -> Placement:
        """How result ``index`` lies (None: the only one)."""
        if isinstance(self.results, tuple):
            assert index is not None, "an operator with several results: say which"
            return self.results[index]
        return self.results
