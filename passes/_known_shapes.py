"""Operators in a draft whose metadata are told, not inferred: what differs between processors cannot be inferred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.graph.draft import Draft
from graphopt.graph.sizes import Expr, expression
from graphopt.graph.torch_internals import fake_mode_of, without_guards
from graphopt.passes._places import Numbers

aten = torch.ops.aten


class KnownShapes:
    """Adds such operators to one draft, each before a given node. Sizes are expressions of those in the draft."""

    def __init__(self, draft: Draft, numbers: Numbers):
        self.draft, self.numbers = draft, numbers

    def fake(self, like: fx.Node, sizes: Sequence[Expr], strides: Sequence[Any] | None = None) -> torch.Tensor:
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

    def call(self, op: Any, args: tuple[Any, ...], val: torch.Tensor, like: fx.Node, before: fx.Node) -> fx.Node:
        """An operator with known metadata: what differs between processors cannot be inferred."""
        with self.draft.graph.inserting_before(before):
            node = self.draft.graph.call_function(op, args)
        node.meta["val"] = val
        node.meta.update({key: like.meta.get(key, "") for key in ("phase", "module", "source")})
        if like.op != "call_function":
            node.meta["phase"] = before.meta["phase"]
        return node

    def slice(self, value: fx.Node, dim: int, begin: Any, end: Any, length: Expr, before: fx.Node) -> fx.Node:
        """``length`` indices of a dimension, a view; ``begin`` and ``end`` may be nodes."""
        begin, end = (each if isinstance(each, fx.Node) else self.numbers.number(each) for each in (begin, end))
        fake = value.meta["val"]
        sizes = [length if d == dim else expression(s) for d, s in enumerate(fake.shape)]
        val = self.fake(value, sizes, fake.stride())
        return self.call(aten.slice.Tensor, (value, dim, begin, end), val, value, before)

    def shaped(self, value: fx.Node, sizes: Sequence[Expr], before: fx.Node) -> fx.Node:
        """The value in another shape, contiguous unless it has that shape already."""
        if list(map(expression, value.meta["val"].shape)) == list(sizes):
            return value
        numbers = [self.numbers.number(size) for size in sizes]
        return self.call(
            aten.view.default, (self.contiguous(value, before), numbers), self.fake(value, sizes), value, before
        )

    def contiguous(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """The value in contiguous memory: kernels trust the strides that metadata promise."""
        fake, expected = value.meta["val"], 1
        for size, stride in reversed(
            list(zip(map(expression, fake.shape), map(expression, fake.stride()), strict=True))
        ):
            if size != 1 and expression(stride - expected) != 0:
                like = value if value.op == "call_function" else before
                return self.draft.add(
                    aten.clone.default, value, like=like, before=before, memory_format=torch.contiguous_format
                )
            expected = expected * size
        return value

    def permuted(self, value: fx.Node, order: list[int], before: fx.Node) -> fx.Node:
        """The dimensions in another order, a view."""
        fake = value.meta["val"]
        sizes, strides = list(map(expression, fake.shape)), fake.stride()
        val = self.fake(value, [sizes[d] for d in order], [strides[d] for d in order])
        return self.call(aten.permute.default, (value, order), val, value, before)

    def cat(self, parts: list[fx.Node], dim: int, before: fx.Node) -> fx.Node:
        """Values one behind the other."""
        shapes = [list(map(expression, part.meta["val"].shape)) for part in parts]
        sizes = [sum(s[d] for s in shapes) if d == dim else size for d, size in enumerate(shapes[0])]
        return self.call(aten.cat.default, (parts, dim), self.fake(parts[0], sizes), parts[0], before)
