"""Oracles of the axis analysis: what a graph's axes claim, checked by execution.

*Permutation*: with the indices of free axes permuted in every parameter, buffer and constant that carries them, every
value in the graph is what it was, permuted as `Axes.of` says of its node. So is every result: the loss and the outputs
stay, gradients and new values come out permuted. *Sensitivity*: with one place left out, some result differs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.graph.axes import Axes, Axis, Dim, Place
from graphopt.graph.batch import flatten
from graphopt.graph.lowering import binding
from graphopt.graph.op_rules.queries import is_random
from graphopt.graph.training_graph import InputKind
from tests.structures import rescaled, tensors

__all__ = ["PermutationOracle", "agrees", "cast", "permuted", "shuffles", "wide"]

TOLERANCE = 1e-6
"""Of the largest value of a tensor, in float64: what another order of summation may change in a deep model."""

NOISE = 1e-11
"""Of the largest value that an operator read: what is left where values cancel, such as the gradient of a bias before
a batch norm."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def shuffles(groups: Iterable[Axis], seed: int = 0) -> dict[Axis, Tensor]:
    """A random permutation, not the identity, for each group."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for group in groups:
        assert isinstance(group.size, int), f"{group}: a free axis of a free size"
        order = torch.arange(group.size)
        while group.size > 1 and order.equal(torch.arange(group.size)):
            order = torch.randperm(group.size, generator=generator)
        chosen[group] = order
    return chosen


def taken(
    value: Tensor,
    dims: Sequence[Dim],
    orders: Mapping[Axis, Tensor],
    but: int | None = None,
    sizes: Mapping[Axis, int] | None = None,
) -> Tensor:
    """``value`` with the indices of each dimension in their new order, but in one. ``sizes``: those of free ones."""
    for d, dim in enumerate(dims):
        if d != but and any(axis in orders for axis in dim.axes()):
            value = value.index_select(d, dim.indices(orders, sizes or {}))
    return value


def permuted(
    axes: Axes, values: Mapping[str, Tensor], orders: Mapping[Axis, Tensor], but: Place | None = None
) -> dict[str, Tensor]:
    """Parameters, buffers and constants by name, permuted in all places but one."""
    carriers = axes.carriers()
    return {
        name: taken(value, axes.of(carriers[name]), orders, but.dim if but and but.name == name else None)
        if name in carriers
        else value
        for name, value in values.items()
    }


def wide(model: nn.Module, seed: int = 1) -> nn.Module:
    """A copy in float64 with parameters so spread that attention is far from uniform; see `tests.structures`.

    Gains of one number a channel are smaller: deep models without norms would outgrow what a sigmoid tells apart.
    """
    model = rescaled(copy.deepcopy(model).double(), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter[0].numel() == 1:
                parameter.mul_(0.4)
    return model


def cast(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Tensors of floats in another type."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().to(dtype if t.is_floating_point() else t.dtype), value)


class PermutationOracle:
    """A graph with axes, and the values that all its nodes have on one batch, in float64.

    Args:
        axes: of a forward or joint graph.
        model: whose parameters and buffers to take; spread them first (`wide`).
        batch: as given to the capture, of any size that the graph admits.
        dtype: another type for floats, where a kernel has no float64.
    """

    def __init__(self, axes: Axes, model: nn.Module, batch: Any, *, dtype: torch.dtype = torch.float64):
        self.axes, self.graph, self.dtype = axes, axes.graph, dtype
        self.values: dict[str, Tensor] = cast({**tensors(model), **self.graph.constants}, dtype)
        given, layout, size = flatten(batch)
        self._batch = dict(zip(layout.names, cast(given, dtype), strict=True))
        self._sizes = {"batch": size} if "batch" in self.graph.symbols.symbols else {}
        self.before = self._run(self.values, {})

    def wrong(self, orders: Mapping[Axis, Tensor], but: Place | None = None) -> str | None:
        """The first value that is not what it was, permuted as its axes say, in words; None where all are.

        ``but``: a place that is left out, which must be wrong.
        """
        try:
            self._run(permuted(self.axes, self.values, orders, but), orders, compare=True)
        except Differs as difference:
            return str(difference)
        return None

    def violations(self, groups: Sequence[Axis], seed: int = 0) -> dict[str, str]:
        """All groups permuted at once; where that is wrong, the groups whose own permutation is, and by what."""
        together = self.wrong(shuffles(groups, seed))
        if together is None:
            return {}
        alone = {g.name: self.wrong(shuffles([g], seed)) for g in groups}
        return {name: what for name, what in alone.items() if what} or {"all together": together}

    def changes(self, group: Axis, but: Place, seed: int = 0) -> bool:
        """Whether a result of the graph differs when a group is permuted in all places but one."""
        orders = shuffles([group], seed)
        after = self._run(permuted(self.axes, self.values, orders, but), orders)
        results = [node for node in self.graph.results if node is not None]
        return any(not agrees(after[n], self._expected(n, orders), self._tolerance * 1e-4) for n in results)

    def insensitive(self, groups: Iterable[Axis]) -> list[tuple[str, Place]]:
        """The groups and places that may be left out of a permutation without any effect, though the numbers there have
        one. (The bias of keys, for one, has none: softmax does not see it.)"""
        return [
            (g.name, place)
            for g in groups
            if len(g.places) > 1
            for place in g.places
            if place.name in self.values and not self.changes(g, place) and self._has_effect(g, place)
        ]

    def _has_effect(self, group: Axis, place: Place) -> bool:
        """Whether results change with the numbers of a tensor where it carries the group, and they differ there."""
        name, value = place.name, self.values[place.name]
        dim = self.axes.of(self.axes.carriers()[name])[place.dim]
        if value.index_select(place.dim, dim.indices(shuffles([group]))).equal(value):
            return False
        if not value.is_floating_point():
            return True
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=value.dtype)
        noise = noise.index_fill(place.dim, dim.indices({group: torch.empty(0, dtype=torch.int64)}), 0)
        after = self._run({**self.values, name: value + noise}, {})
        results = [node for node in self.graph.results if node is not None]
        return any(not agrees(after[n], self.before[n], self._tolerance * 1e-4) for n in results)

    @property
    def _tolerance(self) -> float:
        return TOLERANCE if self.dtype is torch.float64 else 1e-3

    def _expected(self, node: fx.Node, orders: Mapping[Axis, Tensor]) -> Any:
        return self._each(self.before[node], self.axes.of(node), orders)

    def _each(self, value: Any, dims: Any, orders: Mapping[Axis, Tensor]) -> Any:
        if isinstance(value, Tensor):
            return taken(value, dims, orders, sizes=self._free_sizes(dims))
        if isinstance(value, (list, tuple)):
            return [self._each(v, d, orders) for v, d in zip(value, dims, strict=True)]
        return value

    def _free_sizes(self, dims: Sequence[Dim]) -> dict[Axis, int]:
        axes = (axis for dim in dims for axis in dim.axes() if not isinstance(axis.size, int))
        return {axis: self.graph.symbols.evaluate(axis.size, self._sizes) for axis in axes}

    def _run(
        self, values: Mapping[str, Tensor], orders: Mapping[Axis, Tensor], *, compare: bool = False
    ) -> dict[fx.Node, Any]:
        """The value of every node. Under permutations, random numbers are those drawn before, permuted."""
        env: dict[fx.Node, Any] = {}
        self._differences: dict[fx.Node, float] = {}  # where values cancelled, and what they are handed to
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            for given, node in zip(self.graph.inputs, self.graph.placeholders, strict=True):
                env[node] = self._input(given.kind, given.name, values, node)
            for node in self.graph.graph.nodes:
                if node.op == "get_attr":
                    env[node] = values[str(node.target)]
                elif node.op == "call_function":
                    env[node] = self._value(node, env, orders)
                    if compare and not self._as_claimed(node, env, orders):
                        dims = ", ".join(map(str, self.axes.of(node)))
                        raise Differs(f"{node.name} = {node.target} in {node.meta.get('module', '')}: [{dims}]")
        return env

    def _value(self, node: fx.Node, env: dict[fx.Node, Any], orders: Mapping[Axis, Tensor]) -> Any:
        chance = _dropout(node)
        if orders and chance is None and (is_random(node) or "empty" in str(node.target)):
            return self._expected(node, orders)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        args, kwargs = _in_dtype((args, kwargs), self.dtype)
        return binding(node.target)(*(0.0 if i == chance else a for i, a in enumerate(args)), **kwargs)

    def _as_claimed(self, node: fx.Node, env: dict[fx.Node, Any], orders: Mapping[Axis, Tensor]) -> bool:
        expected, got = self._expected(node, orders), env[node]
        if node.target is _RECURRENT:
            expected, got = expected[:3], got[:3]
        if node.target is getitem and node.args[0].target is _RECURRENT and node.args[1] == 3:  # type: ignore[union-attr]
            return True
        if agrees(got, expected, self._tolerance):
            return True
        read = sorted((_largest(env[n]) for n in node.all_input_nodes), reverse=True)
        rounding = NOISE * max(prod(read[:2]), *read) if read else 0.0
        came = 10 * max((self._differences.get(n, 0.0) for n in node.all_input_nodes), default=0.0)
        self._differences[node] = _difference(got, expected)
        return agrees(got, expected, self._tolerance, max(rounding, came))

    def _input(self, kind: InputKind, name: str, values: Mapping[str, Tensor], node: fx.Node) -> Any:
        if kind in (InputKind.PARAMETER, InputKind.BUFFER):
            return values[name]
        if kind is InputKind.BATCH:
            return self._batch[name]
        assert kind is InputKind.TANGENT, kind
        value = node.meta["val"]
        shape, stride = (
            [self.graph.symbols.evaluate(n, self._sizes) for n in s] for s in (value.shape, value.stride())
        )
        generator = torch.Generator().manual_seed(len(name))
        return torch.empty_strided(shape, stride, dtype=self.dtype).normal_(generator=generator)


class Differs(Exception):
    """A value is not what the axes claim."""


_RECURRENT = torch.ops.aten.mkldnn_rnn_layer.default
"""Its last result is the kernel's own notes for backward."""


def _dropout(node: fx.Node) -> int | None:
    """The position of the chance with which an operator drops elements: dropout, attention, recurrent layers."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    names = [argument.name for argument in node.target._schema.arguments]
    wanted = ("dropout_p", "dropout", *(["p"] if "train" in names else []))
    return next((i for i, name in enumerate(names) if name in wanted), None)


def _in_dtype(arguments: Any, dtype: torch.dtype) -> Any:
    """Casts and factories of floats give this type."""
    if isinstance(arguments, torch.dtype):
        return dtype if arguments in _FLOATS else arguments
    if isinstance(arguments, (list, tuple)):
        return tuple(_in_dtype(a, dtype) for a in arguments)
    if isinstance(arguments, dict):
        return {key: _in_dtype(value, dtype) for key, value in arguments.items()}
    return arguments


def _largest(value: Any) -> float:
    if isinstance(value, (list, tuple)):
        return max(map(_largest, value), default=0.0)
    if not isinstance(value, Tensor) or not value.numel() or not value.is_floating_point():
        return 0.0
    return float(value.abs().nan_to_num(0.0, 0.0).max())


def _difference(a: Any, b: Any) -> float:
    if isinstance(a, (list, tuple)):
        return max((_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    return _largest(a - b) if isinstance(a, Tensor) and a.shape == b.shape and a.is_floating_point() else 0.0


def agrees(got: Any, expected: Any, tolerance: float = TOLERANCE, noise: float = 0.0) -> bool:
    """Whether values are equal up to rounding: of tensors, relative to the largest element, or up to ``noise``."""
    if isinstance(got, (list, tuple)):
        return all(agrees(a, b, tolerance, noise) for a, b in zip(got, expected, strict=True))
    if not isinstance(got, Tensor):
        return bool(got == expected) or got != got
    if got.shape != expected.shape:
        return False
    if not got.numel() or torch.equal(got, expected):
        return True
    if not (got.is_floating_point() or got.is_complex()) or not torch.equal(got.isfinite(), expected.isfinite()):
        return False
    a, b = (torch.where(t.isfinite(), t, 0.0) for t in (got, expected))
    return float((a - b).abs().max()) <= max(tolerance * float(b.abs().max()), noise)
