"""Selective saving: backward operators keep only what their live results need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.ancestry import ancestors
from graphopt.graph.draft import Draft
from graphopt.graph.mask_ops import pack_mask, unpack_mask
from graphopt.graph.op_rules import is_pure, masked_form, operand, operand_names, operand_nodes, reads, set_operand
from graphopt.graph.sizes import Expr, expression, numel
from graphopt.graph.storages import Storage, is_view, kept_for_backward, storage_root, viewed
from graphopt.graph.training_graph import InputKind, Phase, TrainingGraph
from graphopt.passes._base import Change, Pass, PassResult, Refusal, Saving, Tier, place
from graphopt.passes._storage import geometry


@dataclass(frozen=True)
class _Use:
    """One operand through which a backward operator reads a kept storage. ``by``: what could stand in its place."""

    reader: fx.Node
    operand: str
    value: fx.Node
    by: str  # "shape", "mask" or "" (its values are needed)


@dataclass(frozen=True)
class SelectiveSaving(Pass):
    """Give up storages kept for backward that backward can do without.

    A storage is given up only if *every* backward operator that reads it can do with less, and what it needs instead is
    smaller. Three rules, all exact (the same bits), each from the table of operator rules:

    1. *Shape only.* The operator does not read the values (a frozen convolution's input, pytorch#133566; the input of
       an eval-mode batch norm whose weight is frozen; max-pool's input beside its indices): another tensor of the same
       size and strides stands in, one at hand or an uninitialised one.
    2. *Mask.* ReLU-like operators need only where their operand exceeded the threshold: a boolean mask made in forward
       (8 bits an element; 1 bit with ``pack_masks``). Where the operand is NaN, relu6 and its like have no one answer
       in torch (`MaskedForm.exact_for_nan`).
    3. *Compute early.* A backward operator that reads nothing but forward values (the comparisons of clamp) runs in
       forward where its result is smaller than what it alone keeps alive.

    ``pack_masks``: masks are kept as one bit an element. Costs two passes over the mask.

    >>> import torch, graphopt
    >>> from graphopt.passes import SelectiveSaving
    >>> net = torch.nn.Sequential(
    ...     *[
    ...         layer
    ...         for _ in range(4)
    ...         for layer in (torch.nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False), torch.nn.ReLU())
    ...     ]
    ... )
    >>> first = net[0].requires_grad_(True)
    >>> graph = graphopt.capture(
    ...     net, (torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)), loss=lambda out, target: (out * target).sum()
    ... )
    >>> graph.bytes_kept(), SelectiveSaving()(graph).graph.bytes_kept()
    (8192, 2048)
    """

    name: ClassVar[str] = "selective_saving"
    tier: ClassVar[Tier] = Tier.EXACT

    pack_masks: bool = False

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class."""
        work = _Work(self.name, graph, self.pack_masks)
        work.look_through_copies()
        work.compute_early()
        work.give_up_storages()
        if self.pack_masks:
            work.pack_kept_masks()
        return work.finish()


@dataclass
class _Work:
    name: str
    graph: TrainingGraph
    pack: bool
    draft: Draft = field(init=False)
    changes: list[Change] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    _masks: dict[Any, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.draft = self.graph.draft()

    def bytes_of(self, size: Expr) -> int:
        return self.graph.symbols.evaluate(size)

    def finish(self) -> PassResult:
        if not self.changes:
            return PassResult(self.graph, (), tuple(self.refusals))
        for node in reversed(self.draft.graph.nodes):
            if node.op == "call_function" and not node.users and is_pure(node):
                self.draft.graph.erase_node(node)
        return PassResult(self.draft.finish(), tuple(self.changes), tuple(self.refusals))

    # -- preparation: `detach` in backward is the value itself -----------------------------------------------------

    def look_through_copies(self) -> None:
        """Let backward operators read a forward value itself where they read an identical view of it."""
        for node in self.draft.graph.nodes:
            if node.meta.get("phase") == Phase.BACKWARD and is_view(node) and geometry(node) is not None:
                source = viewed(node)
                if isinstance(source.meta.get("val"), torch.Tensor) and geometry(source) == geometry(node):
                    node.replace_all_uses_with(source, delete_user_cb=lambda user: user.op != "output")

    # -- rule 3 ----------------------------------------------------------------------------------------------------

    def compute_early(self) -> None:
        """Move backward operators that depend on forward values alone into forward where that keeps less."""
        kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.BATCH)
        known = {n for i, n in zip(self.graph.inputs, self.draft.placeholders, strict=True) if i.kind in kinds}
        independent: set[fx.Node] = set()
        for node in self.draft.graph.nodes:
            if node.meta.get("phase") == Phase.FORWARD:
                known.add(node)
            elif node.meta.get("phase") == Phase.BACKWARD and node.all_input_nodes and is_pure(node):
                if known.issuperset(node.all_input_nodes):
                    known.add(node)
                    independent.add(node)
        for leaf in [n for n in independent if not is_view(n) and isinstance(n.meta.get("val"), torch.Tensor)]:
            cone = ancestors([leaf], independent.__contains__)
            if any(user in independent for user in leaf.users) or leaf.meta["phase"] != Phase.BACKWARD:
                continue
            freed = [s for s in kept_for_backward(self.draft.graph) if _backward_readers(s) <= cone]
            gain = self.bytes_of(sum(s.nbytes for s in freed)) - self.bytes_of(_tensor_bytes(leaf))
            if gain > 0:
                self._move_to_forward(sorted(cone, key=list(self.draft.graph.nodes).index))
                self._record(leaf, f"{_word(leaf)} is computed in forward from what it alone kept alive", gain)

    def _move_to_forward(self, cone: list[fx.Node]) -> None:
        order = {n: i for i, n in enumerate(self.draft.graph.nodes)}
        last_input = self.draft.placeholders[-1]
        for node in cone:
            after = max([*node.all_input_nodes, last_input], key=lambda n: order[n])
            after.append(node)
            node.meta["phase"] = Phase.FORWARD
            order = {n: i for i, n in enumerate(self.draft.graph.nodes)}

    # -- rules 1 and 2 ---------------------------------------------------------------------------------------------

    def give_up_storages(self) -> None:
        for storage in kept_for_backward(self.draft.graph):
            size = self.bytes_of(storage.nbytes)
            uses = list(_uses(storage))
            needed = [u for u in uses if not u.by]
            convertible = [u for u in uses if u.by]
            if not size or not convertible:
                continue
            if needed:
                readers = ", ".join(sorted({_word(u.reader) for u in needed}))
                self._refuse(storage.root, f"%{storage.root.name} stays", f"{readers} reads its values")
                continue
            masks = {self._mask_key(u): u for u in uses if u.by == "mask"}
            cost = sum(self._mask_bytes(u) for key, u in masks.items() if key not in self._masks)
            if cost >= size:
                self._refuse(storage.root, f"%{storage.root.name} stays", "a mask would not be smaller")
                continue
            try:
                for use in uses:
                    self._stand_in(use) if use.by == "shape" else self._use_mask(use)
            except PassError as error:
                self._refuse(storage.root, f"%{storage.root.name} stays", str(error))
                continue
            instead = "a mask" if masks else "nothing"
            readers = ", ".join(sorted({_word(u.reader) for u in uses}))
            self._record(storage.root, f"{readers} keeps {instead} in place of {_word(storage.root)}", size - cost)

    def _stand_in(self, use: _Use) -> None:
        """Put a tensor of the same size and strides in the operand's place."""
        value = use.value.meta["val"]
        others = [n for n in use.reader.all_input_nodes if n is not use.value and geometry(n) == geometry(use.value)]
        free = [n for n in others if n.op == "placeholder" or storage_root(n).meta.get("phase") == Phase.BACKWARD]
        if free:
            dummy = free[0]
        else:
            add = partial(self.draft.add, like=use.reader)
            size = [self.draft.size(s, use.reader) for s in value.shape]
            stride = [self.draft.size(s, use.reader) for s in value.stride()]
            dummy = add(torch.ops.aten.empty_strided.default, size, stride, dtype=value.dtype, device=value.device)
        set_operand(use.reader, use.operand, dummy)

    def _use_mask(self, use: _Use) -> None:
        form = masked_form(use.reader)
        assert form is not None
        key = self._mask_key(use)
        order = self._order(use.value) if self.pack else None
        if key not in self._masks:
            mask = form.mask(self._adder_behind(use.value), use.reader)
            self._masks[key] = mask if order is None else self._packed(mask, order)
        mask = self._masks[key]
        if order is not None:
            like = _same_shape(use.reader, use.value)
            assert like is not None  # the gradient
            mask = self._unpacked(mask, order, like, use.reader)
        made = form.apply(partial(self.draft.add, like=use.reader), use.reader, mask)
        self.draft.replace(use.reader, made)

    def _adder_behind(self, value: fx.Node) -> Callable[..., fx.Node]:
        """Adds operators of the forward one behind the other, the first right behind ``value``."""
        last = value

        def add(op: Callable[..., Any], *args: Any) -> fx.Node:
            nonlocal last
            last = self.draft.add(op, *args, like=value, after=last, phase=Phase.FORWARD)
            return last

        return add

    def _mask_key(self, use: _Use) -> Any:
        """Uses with equal keys share a mask."""
        scalars = tuple(a for a in use.reader.args if not isinstance(a, fx.Node))
        return use.value, use.reader.target, scalars

    def _mask_bytes(self, use: _Use) -> int:
        elements = self.bytes_of(numel(use.value.meta["val"]))
        return (elements + 7) // 8 if self.pack and self._order(use.value) is not None else elements

    # -- packing ---------------------------------------------------------------------------------------------------

    def pack_kept_masks(self) -> None:
        """Keep boolean storages that are kept anyway (dropout's mask) as bits."""
        for storage in kept_for_backward(self.draft.graph):
            value = storage.root.meta["val"]
            uses = list(_uses(storage))
            if value.dtype != torch.bool or any(u.value is not storage.root for u in uses):
                continue
            likes = [_same_shape(u.reader, storage.root) for u in uses]
            order = self._order(storage.root)
            if not all(likes) or not uses or order is None:
                continue
            packed = self._packed(storage.root, order)
            for use, like in zip(uses, likes, strict=True):
                assert like is not None
                set_operand(use.reader, use.operand, self._unpacked(packed, order, like, use.reader))
            size = self.bytes_of(numel(value))
            self._record(storage.root, f"the mask of {_word(storage.root)} is kept as bits", size - (size + 7) // 8)

    def _packed(self, mask: fx.Node, order: list[int]) -> fx.Node:
        """The bits of a mask in the order of its memory."""
        if order != sorted(order):
            mask = self.draft.add(torch.ops.aten.permute.default, mask, order, like=mask, after=mask)
        return self.draft.add(pack_mask, mask, like=mask, after=mask, phase=Phase.FORWARD)

    def _unpacked(self, packed: fx.Node, order: list[int], like: fx.Node, reader: fx.Node) -> fx.Node:
        """The mask in the strides it had: those decide the strides of results, and so in which order sums are made."""
        add = partial(self.draft.add, like=reader)
        if order == sorted(order):
            return add(unpack_mask, packed, like)
        mask = add(unpack_mask, packed, add(torch.ops.aten.permute.default, like, order))
        return add(torch.ops.aten.permute.default, mask, [order.index(d) for d in range(len(order))])

    def _order(self, node: fx.Node) -> list[int] | None:
        """The dimensions from the outermost in memory to the innermost; None if the tensor has gaps."""
        value = node.meta["val"]
        sizes, strides = ([expression(n) for n in numbers] for numbers in (value.shape, value.stride()))
        order = sorted(range(value.dim()), key=lambda d: (-self.bytes_of(strides[d]), d))
        inner: Expr = 1
        for d in reversed(order):
            if strides[d] != inner:
                return None
            inner = inner * sizes[d]
        return order

    # -- records ---------------------------------------------------------------------------------------------------

    def _record(self, node: fx.Node, what: str, saved: int) -> None:
        self.changes.append(Change(self.name, what, *place(node), saving=Saving(bytes_kept=saved)))

    def _refuse(self, node: fx.Node, what: str, why: str) -> None:
        self.refusals.append(Refusal(self.name, what, *place(node), why=why))


def _uses(storage: Storage) -> Iterator[_Use]:
    """All operands through which backward reads a storage, through views that backward takes of it."""
    values = list(storage.values)
    seen = set(values)
    for value in values:
        for reader in value.users:
            if reader.meta.get("phase") != Phase.BACKWARD:
                continue
            if is_view(reader):
                if reader not in seen:
                    seen.add(reader)
                    values.append(reader)
                continue
            for name in operand_names(reader):
                if value in operand_nodes(reader, name):
                    yield _Use(reader, name, value, _replaceable(reader, name, value))


def _replaceable(reader: fx.Node, name: str, value: fx.Node) -> str:
    whole = operand(reader, name) is value
    if whole and name not in reads(reader):
        return "shape"
    form = masked_form(reader)
    in_forward = value.meta.get("phase") == Phase.FORWARD
    return "mask" if whole and in_forward and form is not None and form.operand == name else ""


def _backward_readers(storage: Storage) -> set[fx.Node]:
    return {u for v in storage.values for u in v.users if u.meta.get("phase") == Phase.BACKWARD}


def _same_shape(reader: fx.Node, value: fx.Node) -> fx.Node | None:
    """Another operand of ``reader`` in the shape of ``value``."""
    for other in reader.all_input_nodes:
        shape = getattr(other.meta.get("val"), "shape", None)
        if other is not value and shape is not None and list(shape) == list(value.meta["val"].shape):
            return other
    return None


def _tensor_bytes(node: fx.Node) -> Expr:
    return numel(node.meta["val"]) * node.meta["val"].element_size()


def _word(node: fx.Node) -> str:
    target = node.all_input_nodes[0].target if getattr(node.target, "__name__", "") == "getitem" else node.target
    return str(target).removeprefix("aten.").removesuffix(".default")
