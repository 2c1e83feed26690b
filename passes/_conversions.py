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

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, mul
from typing import Any

import torch
from torch import fx

from graphopt.graph.draft import Draft
from graphopt.graph.sizes import Expr, expression, nbytes, product
from graphopt.graph.torch_internals import fake_mode_of, without_guards
from graphopt.graph.training_graph import Input, InputKind
from graphopt.passes._collectives import all_reduced, waited
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


class Conversions:
    """The conversions in one draft. ``done``: what was made, in words, and for which node."""

    def __init__(self, draft: Draft, numbers: Numbers, processors: int, group: str):
        self.draft, self.numbers, self.processors, self.group = draft, numbers, processors, group
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
        offset: Expr = 0
        found = []
        for outer, inner in wanted.pieces:
            piece, length = value, outer * whole * inner
            if len(wanted.pieces) > 1:
                piece = self._slice(value, dim, offset, offset + length, length, reader)
            if outer == 1:
                begin = self.begin(wanted, inner)
                end = self.numbers.call(add, begin, self.numbers.number(count * inner))
                found.append(self._slice(piece, dim, begin, end, count * inner, reader))
            else:
                sizes = list(map(expression, value.meta["val"].shape))
                apart = self._shaped(piece, [*sizes[:dim], outer, whole * inner, *sizes[dim + 1 :]], reader)
                begin = self.begin(wanted, inner)
                end = self.numbers.call(add, begin, self.numbers.number(count * inner))
                mine = self._slice(apart, dim + 1, begin, end, count * inner, reader)
                found.append(self._shaped(mine, [*sizes[:dim], outer * count * inner, *sizes[dim + 1 :]], reader))
            offset = offset + length
        return found[0] if len(found) == 1 else self._cat(found, dim, reader)

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
            self._fake(value, [self.processors * count, row]), value, behind,
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
            self._fake(value, [count, row]), value, behind,
        )  # fmt: skip
        return self._of_rows(mine, value, wanted, count, behind)

    def _rows(self, value: fx.Node, lies: Lies, count: Expr, before: fx.Node) -> fx.Node:
        """A value as a matrix: a row for each of ``count`` indices of the axis, contiguous."""
        assert isinstance(lies.placement, Sharded)
        dim, sizes = lies.placement.dim, list(map(expression, value.meta["val"].shape))
        lead, trail = product(sizes[:dim]), product(sizes[dim + 1 :])
        offset: Expr = 0
        found = []
        for outer, inner in lies.pieces:
            piece, length = value, outer * count * inner
            if len(lies.pieces) > 1:
                piece = self._slice(value, dim, offset, offset + length, length, before)
            if lead != 1 or outer != 1:
                apart = self._shaped(piece, [lead, outer, count, inner * trail], before)
                piece = self._permuted(apart, [2, 0, 1, 3], before)
            found.append(self._shaped(piece, [count, lead * outer * inner * trail], before))
            offset = offset + length
        rows = found[0] if len(found) == 1 else self._cat(found, 1, before)
        return self._contiguous(rows, before)

    def _of_rows(self, rows: fx.Node, like: fx.Node, lies: Lies, count: Expr, before: fx.Node) -> fx.Node:
        """The reverse of `_rows`: a value shaped like ``like`` but with ``count`` indices of the axis."""
        assert isinstance(lies.placement, Sharded)
        dim, sizes = lies.placement.dim, list(map(expression, like.meta["val"].shape))
        lead, trail = product(sizes[:dim]), product(sizes[dim + 1 :])
        offset: Expr = 0
        found = []
        for outer, inner in lies.pieces:
            piece, width = rows, lead * outer * inner * trail
            if len(lies.pieces) > 1:
                piece = self._slice(rows, 1, offset, offset + width, width, before)
            if lead != 1 or outer != 1:
                apart = self._shaped(piece, [count, lead, outer, inner * trail], before)
                piece = self._permuted(apart, [1, 2, 0, 3], before)
            found.append(self._shaped(piece, [*sizes[:dim], outer * count * inner, *sizes[dim + 1 :]], before))
            offset = offset + width
        return self._contiguous(found[0], before) if len(found) == 1 else self._cat(found, dim, before)

    # -- parts of unequal size --------------------------------------------------------------------------------------

    def _filled(self, rows: fx.Node, sizes: Sequence[Expr], before: fx.Node) -> fx.Node:
        """As many rows as the largest part has. Shapes are those of the largest part, so nothing changes in them."""
        assert isinstance(self.numbers, Places)
        missing = self.numbers.call(add, self.numbers.most(), self._times(self.numbers.number(sizes[0]), -1))
        pad = [0, 0, 0, missing]
        return self._call(aten.constant_pad_nd.default, (rows, pad), self._fake(rows, sizes), rows, before)

    def _without_filling(self, gathered: fx.Node, row: Expr, before: fx.Node) -> fx.Node:
        """The rows of all parts without what filled them up: the last row of the parts that are one row shorter, which
        are the last ones (`rows_of_parts` of `graphopt.schemes.divided_step`)."""
        assert isinstance(self.numbers, Places)
        call, most, total = self.numbers.call, self.numbers.most(), self.numbers.total
        everything = self._times(most, self.processors)
        full = call(add, call(add, self.numbers.number(total), self._times(everything, -1)), self.processors)
        border = call(mul, full, most)
        short = call(add, self._times(full, -1), self.processors)
        one_less = call(add, most, -1)
        width = self.numbers.number(row)
        first = self._call(
            aten.slice.Tensor, (gathered, 0, 0, border), self._fake(gathered, [total, row]), gathered, before
        )
        nothing = self._fake(gathered, [0, row])
        rest = self._call(aten.slice.Tensor, (gathered, 0, border, everything), nothing, gathered, before)
        empty = self._fake(gathered, [0, 1, row])
        rest = self._call(aten.view.default, (rest, [short, most, width]), empty, gathered, before)
        rest = self._call(aten.slice.Tensor, (rest, 1, 0, one_less), empty, gathered, before)
        rest = self._call(aten.reshape.default, (rest, [call(mul, short, one_less), width]), nothing, gathered, before)
        whole = self._fake(gathered, [total, row])
        return self._call(aten.cat.default, ([first, rest],), whole, gathered, before)

    def _times(self, number: int | fx.Node, times: int) -> int | fx.Node:
        return self.numbers.call(mul, number, times)

    # -- operators --------------------------------------------------------------------------------------------------

    def _fake(self, like: fx.Node, sizes: Sequence[Expr], strides: Sequence[Any] | None = None) -> torch.Tensor:
        """A fake tensor of this shape, contiguous unless strides are given."""
        fake = like.meta["val"]
        shape = [self.size(size) for size in sizes]
        mode = fake_mode_of(fake)
        assert mode is not None
        with mode, without_guards(mode):
            found = fake.new_empty(shape) if strides is None else fake.new_empty_strided(shape, strides)
        return found  # type: ignore[no-any-return]

    def size(self, expr: Expr) -> Any:
        """A size as metadata have it: an int or a ``torch.SymInt``."""
        made = self.numbers.number(expr)
        return made.meta["val"] if isinstance(made, fx.Node) else made

    def _call(self, op: Any, args: tuple[Any, ...], val: torch.Tensor, like: fx.Node, before: fx.Node) -> fx.Node:
        """An operator with known metadata: what differs between processors cannot be inferred."""
        with self.draft.graph.inserting_before(before):
            node = self.draft.graph.call_function(op, args)
        node.meta["val"] = val
        node.meta.update({key: like.meta.get(key, "") for key in ("phase", "module", "source")})
        if like.op != "call_function":
            node.meta["phase"] = before.meta["phase"]
        return node

    def _slice(self, value: fx.Node, dim: int, begin: Any, end: Any, length: Expr, before: fx.Node) -> fx.Node:
        begin, end = (each if isinstance(each, fx.Node) else self.numbers.number(each) for each in (begin, end))
        fake = value.meta["val"]
        sizes = [length if d == dim else expression(s) for d, s in enumerate(fake.shape)]
        val = self._fake(value, sizes, fake.stride())
        return self._call(aten.slice.Tensor, (value, dim, begin, end), val, value, before)

    def _shaped(self, value: fx.Node, sizes: Sequence[Expr], before: fx.Node) -> fx.Node:
        if list(map(expression, value.meta["val"].shape)) == list(sizes):
            return value
        numbers = [self.numbers.number(size) for size in sizes]
        return self._call(
            aten.view.default, (self._contiguous(value, before), numbers), self._fake(value, sizes), value, before
        )

    def _contiguous(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """The value in contiguous memory: kernels trust the strides that metadata promise."""
        fake, expected = value.meta["val"], 1
        for size, stride in reversed(
            list(zip(map(expression, fake.shape), map(expression, fake.stride()), strict=True))
        ):
            if size != 1 and expression(stride - expected) != 0:
                return self.draft.add(
                    aten.clone.default, value, like=value, before=before, memory_format=torch.contiguous_format
                )
            expected = expected * size
        return value

    def _permuted(self, value: fx.Node, order: list[int], before: fx.Node) -> fx.Node:
        fake = value.meta["val"]
        sizes, strides = list(map(expression, fake.shape)), fake.stride()
        val = self._fake(value, [sizes[d] for d in order], [strides[d] for d in order])
        return self._call(aten.permute.default, (value, order), val, value, before)

    def _cat(self, parts: list[fx.Node], dim: int, before: fx.Node) -> fx.Node:
        shapes = [list(map(expression, part.meta["val"].shape)) for part in parts]
        sizes = [sum(s[d] for s in shapes) if d == dim else size for d, size in enumerate(shapes[0])]
        return self._call(aten.cat.default, (parts, dim), self._fake(parts[0], sizes), parts[0], before)
