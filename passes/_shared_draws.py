"""Values that depend on which rows of the batch they belong to: random numbers and positions.

Every processor draws the random numbers of the whole batch and keeps those of its part. So the generators of all
processors stay in step, and the numbers are those of a step that is not divided: dropout hits the same elements. What
is drawn must not depend on values of rows that another processor has.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import add, getitem
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.axes.factors import Factor
from graphopt.graph.draft import Draft, infer
from graphopt.graph.op_rules import is_random, operand, operand_names, reads, set_operand
from graphopt.graph.sizes import Expr, expression
from graphopt.graph.torch_internals import fake_mode_of, without_guards
from graphopt.passes._axis_flow import ARANGES, AxisFlow
from graphopt.passes._places import Numbers, Places

aten = torch.ops.aten

POSITIONS = {aten.linspace, aten.logspace, aten.eye, aten.tril_indices, aten.triu_indices}


class SharedDraws:
    """Rewrites random operators and positions of one draft. ``done``: what was rewritten, by node of the original;
    ``parts``: the nodes that cut a part out of the whole; ``rows``: those that count the rows of a part."""

    def __init__(self, draft: Draft, found: AxisFlow, places: Places):
        self.draft, self.found, self.places = draft, found, places
        self.done: dict[fx.Node, str] = {}
        self.parts: set[fx.Node] = set()
        self.rows: set[fx.Node] = set()

    def rewrite(self) -> None:
        """See the module. Raises PassError for what cannot be drawn whole."""
        for node in self.found.graph.nodes:
            if node.op != "call_function":
                continue
            self._look_up(node)
            value = node.meta["val"]
            touched = any(map(self.found.sized, value if isinstance(value, (list, tuple)) else [value]))
            if not touched:
                if is_random(node) and any(self.found.where(n) for n in node.all_input_nodes):
                    raise PassError(f"{node.target} ({node.name}) draws by values of the whole batch")
            elif is_random(node):
                self._draw(node)
            elif node.target in ARANGES:
                self._arange(node)
            elif getattr(node.target, "overloadpacket", None) in POSITIONS:
                raise PassError(f"{node.target} ({node.name}) gives positions in the whole batch")

    def _look_up(self, node: fx.Node) -> None:
        """Indices that name rows of the whole batch name those of the part instead, where rows are looked up."""
        copy = self.draft.node(node)
        for index in self.found.row_indices(node):
            at = list(node.args[1]).index(index)  # type: ignore[arg-type]
            indices: list[Any] = list(copy.args[1])  # type: ignore[arg-type]
            local = self.draft.add(aten.sub.Scalar, indices[at], self.places.begin(), like=copy)
            indices[at] = local
            copy.update_arg(1, indices)
            self.rows.add(local)
            self.done[node] = f"{node.target} looks up rows of the part"

    def _draw(self, node: fx.Node) -> None:
        copy, value = self.draft.node(node), node.meta["val"]
        if node.target is aten.native_dropout.default:
            dims = self.found.dims_of(node, 1)
            dropout_apart(self.draft, self.places, copy, lambda mask: self._part(mask, value[1], dims, copy))
        elif isinstance(value, torch.Tensor) and "size" in operand_names(node):
            set_operand(copy, "size", [self.places.number(self.places.whole(s)) for s in value.shape])
            self._cut(copy, value, self.found.dims_of(node))
        elif isinstance(value, torch.Tensor) and "self" in operand_names(node) and not reads(node):
            source = operand(copy, "self")
            set_operand(copy, "self", whole_shape(self.draft, self.places, source, copy))
            self._cut(copy, value, self.found.dims_of(node))
        else:
            raise PassError(f"{node.target} ({node.name}) draws random numbers inside, by rows that others have")
        self.done[node] = f"{node.target}: drawn for the whole batch, of which this part is kept"

    def _cut(self, copy: fx.Node, value: torch.Tensor, dims: tuple[Factor, ...]) -> None:
        """Let readers of a draw for the whole batch read the part of it that looks like ``value``."""
        readers = list(copy.users)
        copy.meta["val"] = infer(copy)
        part = self._part(copy, value, dims, copy, before=copy.next)
        for reader in readers:
            reader.replace_input_with(copy, part)

    def _part(
        self,
        whole: fx.Node,
        value: torch.Tensor,
        dims: tuple[Factor, ...],
        like: fx.Node,
        before: fx.Node | None = None,
    ) -> fx.Node:
        """The part of a tensor of the whole batch that looks like ``value``, whose dimensions are ``dims``."""
        at = [d for d in range(len(dims)) if self.found.carries(dims[d])]
        around = self.found.around(dims[at[0]]) if len(at) == 1 else None
        if around is None:
            raise PassError(f"{like.name} ({like.target}): which of its elements belong to a part is not known")
        (dim,), (outer, inner) = at, around
        if outer == 1:
            return self._sliced(whole, dim, value.shape[dim], inner, value, like, before)
        sizes = [self.places.whole(s) for s in value.shape]
        apart = [*sizes[:dim], outer, self.places.total * inner, *sizes[dim + 1 :]]
        apart_node = self.draft.add(
            aten.view.default, whole, [self.places.number(s) for s in apart], like=like, before=before
        )
        mine = self._sliced(apart_node, dim + 1, value.shape[dim] // self._int(outer), inner, None, like, before)
        joined = [self.places.number(s) for s in value.shape]
        return self.draft.add(aten.view.default, mine, joined, like=like, before=before)

    def _int(self, size: Expr) -> int:
        found = expression(size)
        if not isinstance(found, int):
            raise PassError(f"the batch stands inside of a dimension of free size {size}")
        return found

    def _sliced(
        self, whole: fx.Node, dim: int, size: Any, inner: Expr, value: torch.Tensor | None, like: fx.Node,
        before: fx.Node | None,
    ) -> fx.Node:  # fmt: skip
        """``size`` indices of a dimension of the whole from the part's first row on, laid out as ``value``."""
        begin = self.places.begin(inner)
        end = self.draft.add(add, begin, self.places.number(size), like=like, before=before)
        with self.draft.graph.inserting_before(before or like):
            node = self.draft.graph.call_function(aten.slice.Tensor, (whole, dim, begin, end))
        fake = whole.meta["val"]
        sizes = [size if d == dim else s for d, s in enumerate(fake.shape)]
        mode = fake_mode_of(fake)
        assert mode is not None
        with mode, without_guards(mode):
            node.meta["val"] = fake.new_empty_strided(sizes, fake.stride())
        node.meta.update({key: like.meta.get(key, "") for key in ("phase", "module", "source")})
        self.parts.add(node)
        if dim == 0 and value is not None:
            return node
        return self.draft.add(aten.clone.default, node, like=like, before=before, memory_format=torch.contiguous_format)

    def _arange(self, node: fx.Node) -> None:
        """``arange`` over the batch, or over the batch times a size: the numbers of the part."""
        copy, value = self.draft.node(node), node.meta["val"]
        names = operand_names(node)
        start, step = (operand(node, n) if n in names else default for n, default in (("start", 0), ("step", 1)))
        around = self.found.around(self.found.dims_of(node)[0])
        if around is None or around[0] != 1 or step != 1 or not isinstance(start, int):
            raise PassError(f"{node.target} ({node.name}) counts over more than the rows of the batch")
        begin = self.places.begin(around[1])
        begin = begin if start == 0 else self.places.call(add, begin, start)
        end = self.draft.add(add, begin, self.places.number(value.shape[0]), like=copy)
        with self.draft.graph.inserting_before(copy):
            made = self.draft.graph.call_function(aten.arange.start_step, (begin, end, 1), dict(copy.kwargs))
        made.meta = dict(copy.meta)
        self.draft.replace(copy, made)
        self.parts.add(made)
        self.done[node] = f"{node.target} counts from the part's first row"


def dropout_apart(
    draft: Draft, numbers: Numbers, copy: fx.Node, part: Callable[[fx.Node], fx.Node] = lambda mask: mask
) -> None:
    """Write a dropout as its mask, drawn for the whole batch, and products with ``part`` of it.

    The mask is drawn by the same operator from an empty tensor, so that it takes the same numbers of the generator.
    """
    source, p = operand(copy, "input"), operand(copy, "p")
    drawn = draft.add(copy.target, whole_shape(draft, numbers, source, copy), *copy.args[1:], like=copy)  # type: ignore[arg-type]
    mask = part(draft.add(getitem, drawn, 1, like=copy))
    kept = draft.add(aten.mul.Tensor, source, mask, like=copy)
    scaled = draft.add(aten.mul.Scalar, kept, 0.0 if p == 1 else 1 / (1 - p), like=copy)
    for user in list(copy.users):
        draft.replace(user, scaled if user.args[1] == 0 else mask)
    draft.graph.erase_node(copy)


def whole_shape(draft: Draft, numbers: Numbers, source: fx.Node, like: fx.Node) -> fx.Node:
    """A tensor with the shape and strides that ``source`` has in the whole batch; its values are never read."""
    value = source.meta["val"]
    sizes, strides = ([numbers.number(numbers.whole(s)) for s in each] for each in (value.shape, value.stride()))
    if 0 in strides:
        return draft.add(aten.new_empty.default, source, sizes, like=like)
    return draft.add(aten.new_empty_strided.default, source, sizes, strides, like=like)
