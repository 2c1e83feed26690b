"""`Handle`: what a dimension is in one captured forward graph. Each kind of dimension brings its own.

A space holds several graphs of its model (train mode, eval mode, with a loss). Each kind has a finder that looks for
its dimensions in a graph: ``find(axes) -> Found``. A dimension is the same one in two graphs if it has the same name
there (axes, whose names depend on the graph, are matched by the parameters that carry them, see `axis_sizes`).

A subnet is made on one `Draft` of the graph. First runs of layers are left out, then axes shrink, all of them at once,
then the handles of the other kinds rewrite what is left. So a handle works with nodes of the original graph:
``draft.node(n)`` is the copy, and a copy that is erased was left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from graphopt.elastic.dimension import Kind, Refused, Value
from graphopt.errors import ElasticError
from graphopt.graph.axes import Axes, Axis

if TYPE_CHECKING:
    from graphopt.graph.draft import Draft

Cut = tuple[int, int] | torch.Tensor
"""What remains of one dimension of a tensor: from where to where, or which indices (int64)."""


class Handle(ABC):
    """One dimension in one graph.

    ``name``: as `Dimension.name`, without the renaming of the user. ``full``: its value in the graph as captured.
    ``where``: paths of the modules that it reaches. ``first``: whether it rewrites before axes shrink (depth does), so
    that nothing is done for layers that are left out.
    """

    kind: Kind
    name: str
    full: Value
    where: tuple[str, ...]
    first: ClassVar[bool] = False

    @abstractmethod
    def choices(self, wanted: Sequence[int | float] | None) -> tuple[Value, ...]:
        """What it can be, ascending, the full value last.

        Args:
            wanted: sizes (int) and shares of the full size (float up to 1); None: the defaults of the kind.

        Raises:
            ElasticError: a size that it cannot have.
        """

    @abstractmethod
    def readers(self) -> frozenset[fx.Node]:
        """The operators that depend on it. Where all of them are left out the dimension is inactive."""

    def dead(self, value: Value) -> frozenset[fx.Node]:
        """The operators that are not computed at ``value``."""
        return frozenset()

    def axes(self, value: Value) -> Mapping[Axis, torch.Tensor]:
        """The axes that shrink, and which indices of them remain."""
        return {}

    def cuts(self, value: Value) -> Mapping[str, Mapping[int, Cut]]:
        """What remains of parameters and buffers beside what `axes` says: by name and dimension."""
        return {}

    def sizes(self, value: Value, axes: Axes) -> dict[Axis, int]:
        """The size of each axis at ``value``, for prices: of those that shrink, and of the weights that are cut
        (kernels, whose places mean something and are no axes to shrink).

        Raises ElasticError where sizes of axes do not tell what a subnet at ``value`` costs.
        """
        return {axis: len(kept) for axis, kept in self.axes(value).items()} | sizes_of_cuts(self.cuts(value), axes)

    def rewrite(self, draft: Draft, value: Value) -> None:  # noqa: B027  (axes have nothing to rewrite)
        """Apply ``value`` to a draft of the graph: operators, their arguments, and the metadata of what changes, that
        of the inputs in `cuts` among it. Axes have their new sizes already, unless this handle is one that comes
        `first`.
        Not called for the full value."""

    def parameters(self, value: Value) -> Mapping[str, torch.nn.Parameter]:
        """Parameters of its own that a subnet at ``value`` has beside those of the model (a transformation), by the
        name of the input that `rewrite` added for them. They are kept with the space."""
        return {}

    def own_cuts(self, value: Value, cuts: Mapping[str, Mapping[int, Cut]]) -> Mapping[str, Mapping[int, Cut]]:
        """What remains of those `parameters` that are cut like a parameter of the model, where ``cuts`` are of the
        model's."""
        return {}

    def counterpart(self, others: Iterable[Handle]) -> Handle:
        """The same dimension among the handles of another graph: that of the same name.

        Raises ElasticError if there is none.
        """
        found = next((other for other in others if other.name == self.name), None)
        if found is None:
            raise ElasticError(f"{self.name}: it was not found in this graph")
        return found


class Tied(Handle):
    """Several dimensions of one kind and size that the user wants to have one value."""

    def __init__(self, name: str, parts: Sequence[Handle]):
        self.name, self.parts = name, tuple(parts)
        self.kind, self.full = parts[0].kind, parts[0].full
        self.where = tuple(dict.fromkeys(w for part in parts for w in part.where))
        self.first = parts[0].first  # type: ignore[misc]
        if odd := next((p for p in parts if (p.kind, p.full) != (self.kind, self.full)), None):
            raise ElasticError(
                f"tied: {parts[0].name} ({self.kind}, {self.full}) and {odd.name} ({odd.kind}, {odd.full}) cannot have "
                "one value: they differ in kind or size"
            )

    def choices(self, wanted: Sequence[int | float] | None) -> tuple[Value, ...]:
        first, *rest = (part.choices(wanted) for part in self.parts)
        return tuple(value for value in first if all(value in other for other in rest))

    def readers(self) -> frozenset[fx.Node]:
        return frozenset().union(*(part.readers() for part in self.parts))

    def dead(self, value: Value) -> frozenset[fx.Node]:
        return frozenset().union(*(part.dead(value) for part in self.parts))

    def axes(self, value: Value) -> Mapping[Axis, torch.Tensor]:
        return {axis: indices for part in self.parts for axis, indices in part.axes(value).items()}

    def cuts(self, value: Value) -> Mapping[str, Mapping[int, Cut]]:
        return merged(part.cuts(value) for part in self.parts)

    def sizes(self, value: Value, axes: Axes) -> dict[Axis, int]:
        return {axis: size for part in self.parts for axis, size in part.sizes(value, axes).items()}

    def rewrite(self, draft: Draft, value: Value) -> None:
        for part in self.parts:
            part.rewrite(draft, value)

    def parameters(self, value: Value) -> Mapping[str, torch.nn.Parameter]:
        return {name: p for part in self.parts for name, p in part.parameters(value).items()}

    def own_cuts(self, value: Value, cuts: Mapping[str, Mapping[int, Cut]]) -> Mapping[str, Mapping[int, Cut]]:
        return {name: found for part in self.parts for name, found in part.own_cuts(value, cuts).items()}


def sizes_of_cuts(cuts: Mapping[str, Mapping[int, Cut]], axes: Axes) -> dict[Axis, int]:
    """The sizes that cuts of parameters leave of the axes that they carry."""
    found = {}
    carriers = axes.carriers() if cuts else {}
    for name, dims in cuts.items():
        for dim, cut in dims.items():
            axis = axes.of(carriers[name])[dim].axis
            if axis is not None:
                found[axis] = len(cut) if isinstance(cut, torch.Tensor) else cut[1] - cut[0]
    return found


def merged(cuts: Iterable[Mapping[str, Mapping[int, Cut]]]) -> dict[str, dict[int, Cut]]:
    """Cuts of several handles together. Raises ElasticError where two cut the same dimension."""
    found: dict[str, dict[int, Cut]] = {}
    for one in cuts:
        for name, dims in one.items():
            if twice := found.setdefault(name, {}).keys() & dims.keys():
                raise ElasticError(f"two dimensions of the space cut dimension {min(twice)} of {name}")
            found[name].update(dims)
    return found


@dataclass(frozen=True)
class Found:
    """What a finder found in a graph: handles in the order of the graph, and what it looked at and left alone."""

    handles: tuple[Handle, ...] = ()
    refused: tuple[Refused, ...] = ()

    def __add__(self, other: Found) -> Found:
        return Found(self.handles + other.handles, self.refused + other.refused)


def sizes_of(size: int, wanted: Sequence[Any], unit: int = 1) -> tuple[int, ...]:
    """Sizes and shares of ``size`` as sizes, ascending, ``size`` itself last; shares are rounded to multiples of
    ``unit``, at least 1. Sizes out of range are left out.

    >>> sizes_of(100, (0.25, 0.5, 30, 1.0), unit=8)
    (24, 30, 48, 100)
    """
    found = {size}
    for one in wanted:
        if isinstance(one, float):
            one = size if one >= 1 else max(unit, round(one * size / unit) * unit)
        if 1 <= one <= size:
            found.add(int(one))
    return tuple(sorted(found))
