"""How one value lies on processors when an axis is divided: `Placement`.

Every processor runs the same operators on its part. A value is then

- `Replicated`: whole, the same on all processors;
- `Sharded`: each has a part, along the dimension that carries the axis;
- `Partial`: as large as the whole, and the whole is the sum (or maximum, minimum) over all processors;
- `Own`: each has one of its own, made from its part alone (statistics that are not synchronised).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from graphopt.errors import PassError


@dataclass(frozen=True)
class Replicated:
    """The whole, the same on all processors."""

    def __str__(self) -> str:
        return "replicated"


@dataclass(frozen=True)
class Sharded:
    """A part along dimension ``dim``."""

    dim: int

    def __str__(self) -> str:
        return f"sharded {self.dim}"


@dataclass(frozen=True)
class Partial:
    """The whole is what ``how`` (sum, max, min) makes of all processors' values."""

    how: str = "sum"

    def __str__(self) -> str:
        return f"partial {self.how}"


@dataclass(frozen=True)
class Own:
    """Each processor's own value, of its part alone."""

    def __str__(self) -> str:
        return "own"


Placement: TypeAlias = Replicated | Sharded | Partial | Own


class Misplaced(PassError):
    """An operator that cannot run on parts; ``node`` is the one."""

    def __init__(self, node: fx.Node, why: str):
        super().__init__(f"{node.name} ({node.target}): {why}")
        self.node, self.why = node, why
