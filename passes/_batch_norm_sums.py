"""Train-mode batch normalisation as sums over the batch, so that parts of it give the statistics of the whole.

Forward needs two sums a channel: of the input, and of the squares of its distance to the mean (not of the squares
themselves, which cancel). Normalising by known statistics is the operator's evaluation mode. Backward needs two sums,
of the gradient and of its product with the normalised input, which are also the gradients of bias and weight::

    dx = w invstd (dy - sum(dy) / N - x' sum(dy x') / N),   x' = (x - mean) invstd

Source: Ioffe and Szegedy 2015; ``aten/src/ATen/native/Normalization.cpp``.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.draft import Draft
from graphopt.graph.op_rules import operand, operand_names
from graphopt.graph.sizes import Expr, expression, product
from graphopt.passes._axis_flow import AxisFlow
from graphopt.passes._places import Numbers
from graphopt.passes._whole_sums import replace_results

aten = torch.ops.aten

_FORWARD = {aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit.no_stats}
_BACKWARD = {aten.native_batch_norm_backward.default}


def trains_batch_norm(node: fx.Node) -> bool:
    """Whether the node normalises by the statistics of its batch, or is the backward of one that does."""
    if node.op != "call_function" or "batch_norm" not in str(node.target):
        return False
    given = next((n for n in ("training", "train", "update") if n in operand_names(node)), None)
    return given is not None and bool(operand(node, given))


def can_be_sums(node: fx.Node) -> bool:
    """Whether an operator that `trains_batch_norm` can be written as sums."""
    return node.target in _FORWARD | _BACKWARD


class BatchNormSums:
    """Rewrites the batch normalisations of one draft. ``done``: what was rewritten, by node of the original."""

    def __init__(
        self, draft: Draft, found: AxisFlow, places: Numbers, chosen: Callable[[fx.Node], bool] = lambda node: True
    ):
        """``chosen``: which of them to rewrite."""
        self.draft, self.found, self.places, self.chosen = draft, found, places, chosen
        self.done: dict[fx.Node, str] = {}

    def rewrite(self) -> None:
        """See the module. Raises PassError for an operator of another kind (cuDNN's, one that writes in place)."""
        for node in self.found.graph.nodes:
            apart = trains_batch_norm(node) and set(self.found.where(node.args[0])) <= {1}  # type: ignore[arg-type]
            if apart or not trains_batch_norm(node) or not self.chosen(node):
                continue  # instance normalisation has the batch among the channels: no statistic is over it
            if node.target in _FORWARD:
                self._forward(node)
            elif node.target in _BACKWARD:
                self._backward(node)
            else:
                raise PassError(f"{node.target} ({node.name}): its statistics over the batch cannot be taken apart")

    def _count(self, node: fx.Node) -> Expr:
        """The values of a channel in the whole batch."""
        shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
        return self.places.whole(product(size for d, size in enumerate(shape) if d != 1))

    def _forward(self, node: fx.Node) -> None:
        copy = self.draft.node(node)
        given = {name: operand(copy, name) for name in operand_names(copy)}
        x, statistics = given["input"], node.meta["val"][1]
        rank, count = x.meta["val"].dim(), self._count(node)
        add = self._adding(copy)
        mean = self._divided(copy, self._sum(copy, x, statistics.dtype), count)
        centred = add(aten.sub.Tensor, x, self._broadcast(copy, mean, rank))
        squares = self._sum(copy, add(aten.mul.Tensor, centred, centred), statistics.dtype)
        variance = self._divided(copy, squares, count)
        invstd = add(aten.rsqrt.default, add(aten.add.Scalar, variance, given["eps"]))
        normal = add(
            aten._native_batch_norm_legit_no_training.default,
            x, given["weight"], given["bias"], mean, variance, given["momentum"], given["eps"],
        )  # fmt: skip
        results = {0: self._item(copy, normal, 0), 1: mean, 2: invstd}
        if "running_mean" in given:
            total = add(
                aten.mul.Scalar, variance, self.places.number(count)
            )  # of the squares: one collective serves both
            unbiased = self._divided(copy, total, expression(count) - 1)
            for at, name, value in ((3, "running_mean", mean), (4, "running_var", unbiased)):
                results[at] = self._moved(copy, given[name], value, given["momentum"])
        replace_results(self.draft, copy, results)
        self.done[node] = "batch normalisation by sums over the whole batch"

    def _moved(self, like: fx.Node, running: fx.Node, value: fx.Node, momentum: float) -> fx.Node:
        """The running statistic after this batch."""
        add = self._adding(like)
        kept = add(aten.mul.Scalar, running, 1.0 - momentum)
        moved = add(aten.add.Tensor, kept, add(aten.mul.Scalar, value, momentum))
        return self._as(like, moved, running.meta["val"].dtype)

    def _backward(self, node: fx.Node) -> None:
        copy = self.draft.node(node)
        given = {name: operand(copy, name) for name in operand_names(copy)}
        x, grad, weight, mean, invstd = (given[n] for n in ("input", "grad_out", "weight", "save_mean", "save_invstd"))
        add, rank, count = self._adding(copy), x.meta["val"].dim(), self._count(node)
        sums = add(copy.target, *copy.args[:9], [False, True, True])
        like = mean.meta["val"]
        sums.meta["val"] = (None, like.new_empty(like.shape), like.new_empty(like.shape))
        results = {i: self._item(copy, sums, i) for i in (1, 2)}
        if operand(node, "output_mask")[0]:
            slope = self._divided(copy, add(aten.mul.Tensor, results[1], invstd), count)
            scale = invstd if weight is None else add(aten.mul.Tensor, invstd, weight)
            shift = add(aten.neg.default, add(aten.mul.Tensor, self._divided(copy, results[2], count), scale))
            slope, scale, shift, mean = (self._broadcast(copy, v, rank) for v in (slope, scale, shift, mean))
            inner = add(aten.addcmul.default, grad, add(aten.sub.Tensor, x, mean), slope, value=-1)
            results[0] = self._as(copy, add(aten.addcmul.default, shift, inner, scale), x.meta["val"].dtype)
        replace_results(self.draft, copy, results)
        self.done[node] = "backward of batch normalisation by sums over the whole batch"

    # -- parts ------------------------------------------------------------------------------------------------------

    def _adding(self, like: fx.Node) -> Any:
        return lambda op, *args, **kwargs: self.draft.add(op, *args, like=like, **kwargs)

    def _item(self, like: fx.Node, several: fx.Node, index: int) -> fx.Node:
        return self.draft.add(getitem, several, index, like=like)

    def _sum(self, like: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        dims = [d for d in range(value.meta["val"].dim()) if d != 1]
        return self.draft.add(aten.sum.dim_IntList, value, dims, like=like, dtype=dtype)

    def _divided(self, like: fx.Node, value: fx.Node, count: Expr) -> fx.Node:
        return self.draft.add(aten.div.Scalar, value, self.places.number(count), like=like)

    def _broadcast(self, like: fx.Node, value: fx.Node, rank: int) -> fx.Node:
        """A vector over channels as a tensor that meets one of this rank."""
        channels = value.meta["val"].shape[0]
        return self.draft.add(aten.view.default, value, [channels] + [1] * (rank - 2), like=like) if rank > 2 else value

    def _as(self, like: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        if value.meta["val"].dtype is dtype:
            return value
        return self.draft.add(aten._to_copy.default, value, like=like, dtype=dtype)
