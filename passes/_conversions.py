"""Conversions: a value that lies in one way on processors, given to a reader that needs it in another way.

==============  =====================================================================================================
partial, whole  all-reduce
partial, part   reduce-scatter; for parts of unequal size (the batch) all-reduce, of which the part is kept
part, whole     all-gather; parts of unequal size are filled up to the largest
whole, part     a view
whole, partial  divided by the number of processors
part, part      of another axis, or partial: by way of the whole
==============  =====================================================================================================

Each conversion is made once for all readers. Collectives stand right behind the value, so that they start as early as
can be. A part of a dimension need not be one run of indices (heads in a fused projection ``3 x heads x size``): for a
collective a value is laid out as rows of the axis, each with all that belongs to one index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import add, mul

import torch
from torch import fx

from graphopt.graph.draft import Draft
from graphopt.graph.sizes import Expr, expression, nbytes, product
from graphopt.graph.training_graph import Input, InputKind
from graphopt.passes._collectives import all_reduced, waited
from graphopt.passes._known_shapes import KnownShapes
from graphopt.passes._placement import Partial, Placement, Replicated, Sharded
from graphopt.passes._places import Numbers, Places

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

Pieces = tuple[tuple[Expr, Expr], ...]
"""See `AxisFlow.pieces`."""

PROCESSOR, INDEX = "processor", "index"
"""The input that says which processor runs the graph, from 0 on."""

_WHOLE = Replicated()


@dataclass(frozen=True)
class Lies:
    """How a value lies; for `Sharded` along which axis, and how that stands in the dimension. An axis of free size is
    the batch, ``size`` is None then; else it is the axis' number of indices in the whole."""

    placement: Placement = _WHOLE
    axis: str = ""
    pieces: Pieces = ()
    size: int | None = None

    @property
    def word(self) -> str:
        """As text: ``sharded 0``, or with the pieces where a part is not one run: ``sharded 0 as 3x12``."""
        if not isinstance(self.placement, Sharded) or (len(self.pieces) == 1 and self.pieces[0][0] == 1):
            return str(self.placement)
        return f"{self.placement} as {'+'.join(f'{outer}x{inner}' for outer, inner in self.pieces)}"


WHOLE = Lies()


class Conversions(KnownShapes):
    """The conversions in one draft. ``done``: what was made, in words, and for which node."""

    def __init__(self, draft: Draft, numbers: Numbers, processors: int, group: str):
        super().__init__(draft, numbers)
        self.processors, self.group = processors, group
        self.done: list[tuple[str, fx.Node]] = []
        self._made: dict[tuple[fx.Node, Lies], fx.Node] = {}
        self._behind: dict[fx.Node, fx.Node] = {}
        self._index: fx.Node | None = None

    def known(self, value: fx.Node, wanted: Lies) -> fx.Node | None:
        """The value as wanted, if that was made already."""
        return self._made.get((value, wanted))

    def convert(self, value: fx.Node, lies: Lies, wanted: Lies, reader: fx.Node) -> fx.Node:
        """``value``, a node of the draft that lies so, as ``wanted``, for a reader behind it."""
        if lies == wanted:
            return value
        found = self._made.get((value, wanted))
        if found is None:
            found = self._made[value, wanted] = self._converted(value, lies, wanted, reader)
        return found

    def _converted(self, value: fx.Node, lies: Lies, wanted: Lies, reader: fx.Node) -> fx.Node:
        source, target = lies.placement, wanted.placement
        behind = self._behind.setdefault(value, self._after(value))
        if isinstance(source, Replicated):
            if isinstance(target, Sharded):
                return self.cut(value, wanted, reader)
            assert target == Partial(), f"the whole cannot become {target}"
            return self.draft.add(aten.div.Scalar, value, self.processors, like=reader)
        if isinstance(target, Replicated):
            if isinstance(source, Partial):
                self._say("all-reduce", value)
                return all_reduced(self.draft, value, source.how, self.group, behind)
            self._say("all-gather", value)
            return self._gather(value, lies, behind)
        if source == Partial() and isinstance(target, Sharded) and wanted.size is not None:
            self._say("reduce-scatter", value)
            return self._scatter(value, wanted, behind)
        whole = self.convert(value, lies, WHOLE, reader)
        return self.convert(whole, WHOLE, wanted, reader)

    def _say(self, what: str, value: fx.Node) -> None:
        size = self.draft.signature.symbols.rename(nbytes(value.meta["val"]))
        self.done.append((f"{what} of {size} bytes", value))

    def _after(self, value: fx.Node) -> fx.Node:
        """The operator in front of which things made of a value may stand."""
        node = value.next
        while node.op in ("placeholder", "get_attr"):
            node = node.next
        return node

    # -- parts ------------------------------------------------------------------------------------------------------

    def begin(self, lies: Lies, times: Expr) -> int | fx.Node:
        """The first index of this processor's part, times a size."""
        if lies.size is None:
            assert isinstance(self.numbers, Places)
            return self.numbers.begin(times)
        if self._index is None:
            self._index = self.draft.add_input(Input(InputKind.PLACE, PROCESSOR, INDEX), 0)
        step = self.numbers.number(times * (lies.size // self.processors))
        return self.numbers.call(mul, self._index, step)

    def count(self, lies: Lies) -> Expr:
        """The number of indices of a part."""
        if lies.size is not None:
            return lies.size // self.processors
        assert isinstance(self.numbers, Places)
        return self.numbers.symbol

    def whole_count(self, lies: Lies) -> Expr:
        """The number of indices of all parts."""
        if lies.size is not None:
            return lies.size
        assert isinstance(self.numbers, Places)
        return self.numbers.total

    def cut(self, value: fx.Node, wanted: Lies, reader: fx.Node) -> fx.Node:
        """The processor's part of something whole, before a reader."""
        assert isinstance(wanted.placement, Sharded)
        dim, count, whole = wanted.placement.dim, self.count(wanted), self.whole_count(wanted)
        sizes = list(map(expression, value.meta["val"].shape))
        found = []
        for piece, outer, inner in self._pieces(value, wanted, dim, whole, reader):
            begin = self.begin(wanted, inner)
            end = self.numbers.call(add, begin, self.numbers.number(count * inner))
            if outer == 1:
                found.append(self.slice(piece, dim, begin, end, count * inner, reader))
            else:
                apart = self.shaped(piece, [*sizes[:dim], outer, whole * inner, *sizes[dim + 1 :]], reader)
                mine = self.slice(apart, dim + 1, begin, end, count * inner, reader)
                found.append(self.shaped(mine, [*sizes[:dim], outer * count * inner, *sizes[dim + 1 :]], reader))
        return self._joined(found, dim, reader)

    def _pieces(
        self, value: fx.Node, lies: Lies, dim: int, each: Expr, before: fx.Node
    ) -> Iterator[tuple[fx.Node, Expr, Expr]]:
        """The pieces of ``value`` along ``dim``, where a piece is ``outer x inner`` times ``each`` long, with these."""
        offset: Expr = 0
        for outer, inner in lies.pieces:
            length = outer * inner * each
            one = len(lies.pieces) == 1
            yield value if one else self.slice(value, dim, offset, offset + length, length, before), outer, inner
            offset = offset + length

    def _joined(self, pieces: list[fx.Node], dim: int, before: fx.Node) -> fx.Node:
        return pieces[0] if len(pieces) == 1 else self.cat(pieces, dim, before)

    # -- collectives on parts ---------------------------------------------------------------------------------------

    def _gather(self, value: fx.Node, lies: Lies, behind: fx.Node) -> fx.Node:
        """The whole of parts of an axis, those of all processors one behind the other."""
        rows = self._rows(value, lies, self.count(lies), behind)
        row = expression(rows.meta["val"].shape[1])
        count, whole = self.count(lies), self.whole_count(lies)
        if lies.size is None:
            rows = self._filled(rows, [count, row], behind)
        gathered = waited(
            self.draft, c10d.all_gather_into_tensor.default, (rows, self.processors, self.group),
            self.fake(value, [self.processors * count, row]), value, behind,
        )  # fmt: skip
        if lies.size is None:
            gathered = self._without_filling(gathered, row, behind)
        return self._of_rows(gathered, value, lies, whole, behind)

    def _scatter(self, value: fx.Node, wanted: Lies, behind: fx.Node) -> fx.Node:
        """The processor's part of a sum over processors."""
        rows = self._rows(value, wanted, self.whole_count(wanted), behind)
        row = expression(rows.meta["val"].shape[1])
        count = self.count(wanted)
        mine = waited(
            self.draft, c10d.reduce_scatter_tensor.default, (rows, "sum", self.processors, self.group),
            self.fake(value, [count, row]), value, behind,
        )  # fmt: skip
        return self._of_rows(mine, value, wanted, count, behind)

    def _rows(self, value: fx.Node, lies: Lies, count: Expr, before: fx.Node) -> fx.Node:
        """A value as a matrix: a row for each of ``count`` indices of the axis, contiguous."""
        assert isinstance(lies.placement, Sharded)
        dim, sizes = lies.placement.dim, list(map(expression, value.meta["val"].shape))
        lead, trail = product(sizes[:dim]), product(sizes[dim + 1 :])
        found = []
        for piece, outer, inner in self._pieces(value, lies, dim, count, before):
            if lead != 1 or outer != 1:
                apart = self.shaped(piece, [lead, outer, count, inner * trail], before)
                piece = self.permuted(apart, [2, 0, 1, 3], before)
            found.append(self.shaped(piece, [count, lead * outer * inner * trail], before))
        return self.contiguous(self._joined(found, 1, before), before)

    def _of_rows(self, rows: fx.Node, like: fx.Node, lies: Lies, count: Expr, before: fx.Node) -> fx.Node:
        """The reverse of `_rows`: a value shaped like ``like`` but with ``count`` indices of the axis."""
        assert isinstance(lies.placement, Sharded)
        dim, sizes = lies.placement.dim, list(map(expression, like.meta["val"].shape))
        lead, trail = product(sizes[:dim]), product(sizes[dim + 1 :])
        found = []
        for piece, outer, inner in self._pieces(rows, lies, 1, lead * trail, before):
            if lead != 1 or outer != 1:
                apart = self.shaped(piece, [count, lead, outer, inner * trail], before)
                piece = self.permuted(apart, [1, 2, 0, 3], before)
            found.append(self.shaped(piece, [*sizes[:dim], outer * count * inner, *sizes[dim + 1 :]], before))
        return self.contiguous(found[0], before) if len(found) == 1 else self.cat(found, dim, before)

    # -- parts of unequal size --------------------------------------------------------------------------------------

    def _filled(self, rows: fx.Node, sizes: Sequence[Expr], before: fx.Node) -> fx.Node:
        """As many rows as the largest part has. Shapes are those of the largest part, so nothing changes in them."""
        assert isinstance(self.numbers, Places)
        missing = self.numbers.call(add, self.numbers.most(), self._times(self.numbers.number(sizes[0]), -1))
        pad = [0, 0, 0, missing]
        return self.call(aten.constant_pad_nd.default, (rows, pad), self.fake(rows, sizes), rows, before)

    def _without_filling(self, gathered: fx.Node, row: Expr, before: fx.Node) -> fx.Node:
        """The rows of all parts without what filled them up: the last row of the parts that are one row shorter, which
        are the last ones (`graphopt.schemes.pieces.rows_of_parts`)."""
        assert isinstance(self.numbers, Places)
        call, most, total = self.numbers.call, self.numbers.most(), self.numbers.total
        everything = self._times(most, self.processors)
        full = call(add, call(add, self.numbers.number(total), self._times(everything, -1)), self.processors)
        border = call(mul, full, most)
        short = call(add, self._times(full, -1), self.processors)
        one_less = call(add, most, -1)
        width = self.numbers.number(row)
        first = self.call(
            aten.slice.Tensor, (gathered, 0, 0, border), self.fake(gathered, [total, row]), gathered, before
        )
        nothing = self.fake(gathered, [0, row])
        rest = self.call(aten.slice.Tensor, (gathered, 0, border, everything), nothing, gathered, before)
        empty = self.fake(gathered, [0, 1, row])
        rest = self.call(aten.view.default, (rest, [short, most, width]), empty, gathered, before)
        rest = self.call(aten.slice.Tensor, (rest, 1, 0, one_less), empty, gathered, before)
        rest = self.call(aten.reshape.default, (rest, [call(mul, short, one_less), width]), nothing, gathered, before)
        whole = self.fake(gathered, [total, row])
        return self.call(aten.cat.default, ([first, rest],), whole, gathered, before)

    def _times(self, number: int | fx.Node, times: int) -> int | fx.Node:
        return self.numbers.call(mul, number, times)
