"""Means over the batch written as sums: what a part must know of the whole before placements flow.

A mean over a part is no part of the mean, and with parts of unequal size no mean of means either. A sum is: parts add
up. So means, mean losses and variances over the batch become sums, divided by the number of rows of the *whole* batch
(`Places.number`) or by what the data count (`ignore_index`, class weights: a sum as well). Numbers that are computed
with (``div.Scalar`` by the batch size) are those of the whole batch; sizes stay those of the part.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.draft import Draft
from graphopt.graph.literals.roles import Role
from graphopt.graph.op_rules import Reduction, operand, operand_names, reductions, rule, set_operand
from graphopt.graph.sizes import expression, product
from graphopt.graph.text import operator_text
from graphopt.passes._axis_flow import AxisFlow
from graphopt.passes._places import Numbers, computed_numbers

aten = torch.ops.aten

MEAN, SUM = 1, 2
"""Values of the argument ``reduction`` of losses."""

_NLL = {aten.nll_loss_forward.default, aten.nll_loss2d_forward.default}
_MEANS = {aten.mean.default, aten.mean.dim}
_SPREADS = {aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction}


class WholeSums:
    """Rewrites the means over the batch in one draft. ``done`` says what was rewritten, by node of the original."""

    def __init__(self, draft: Draft, found: AxisFlow, places: Numbers):
        self.draft, self.found, self.places = draft, found, places
        self.done: dict[fx.Node, str] = {}

    def rewrite(self) -> None:
        """See the class. Raises PassError for a number of which it is not known what it says."""
        for node in self.found.graph.nodes:
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            self._values(node)
            over = averaged_over(self.found, node)
            if node.target in _NLL and operand(node, "reduction") == MEAN and self._any(node):
                self._negative_log_likelihood(node)
            elif node.target in _MEANS and over:
                self._mean(node, over[0])
            elif node.target in _SPREADS and over:
                self._spread(node, over[0])
            elif "reduction" in operand_names(node) and operand(node, "reduction") == MEAN:
                self._loss(node, over)

    def _any(self, node: fx.Node) -> bool:
        return any(self.found.where(n) for n in node.all_input_nodes)

    def _values(self, node: fx.Node) -> None:
        """Numbers that are computed with are those of the whole."""
        copy = self.draft.node(node)
        for name, _, role, value in computed_numbers(node):
            if not self.found.follows(value.meta["val"]):
                continue
            if role is Role.VALUE:
                set_operand(copy, name, self.places.twin(self.draft.node(value)))
                self.done[node] = f"{operator_text(node.target)} computes with the size of the whole batch"
            elif role in (Role.UNKNOWN, Role.EDGE, Role.POSITION) and name not in ("size", "stride"):
                if not (role is Role.POSITION and name in ("start", "end")):
                    raise PassError(f"cannot tell what the argument {name} of {node.target} ({node.name}) says")

    def _count(self, node: fx.Node, places: tuple[tuple[str, int], ...]) -> Any:
        """The number of indices of these dimensions of operands, in the whole batch."""
        first = places[0][0]
        shape = operand(node, first).meta["val"].shape
        return self.places.whole(product(shape[d] for name, d in places if name == first))

    def _divided(self, value: fx.Node, count: Any, like: fx.Node) -> fx.Node:
        return self.draft.add(aten.div.Scalar, value, self.places.number(count), like=like)

    # -- means and variances ----------------------------------------------------------------------------------------

    def _mean(self, node: fx.Node, reduction: Reduction) -> None:
        copy = self.draft.node(node)
        value = node.meta["val"]
        dims = [d for _, d in reduction.places]
        keep = "keepdim" in operand_names(node) and bool(operand(node, "keepdim"))
        total = self._sum(copy.args[0], dims, keep, value.dtype, copy)  # type: ignore[arg-type]
        self.draft.replace(copy, self._divided(total, self._count(node, reduction.places), copy))
        self.done[node] = f"{operator_text(node.target)} over the batch is a sum, divided by the size of the whole"

    def _sum(self, value: fx.Node, dims: list[int], keep: bool, dtype: torch.dtype, like: fx.Node) -> fx.Node:
        return self.draft.add(aten.sum.dim_IntList, value, dims, keep, like=like, dtype=dtype)

    def _spread(self, node: fx.Node, reduction: Reduction) -> None:
        """Variance or standard deviation, and the mean where that is a result too."""
        copy = self.draft.node(node)
        several = isinstance(node.meta["val"], (list, tuple))
        dtype = (node.meta["val"][0] if several else node.meta["val"]).dtype
        dims, keep, add = [d for _, d in reduction.places], bool(operand(node, "keepdim")), self.draft.add
        correction = operand(node, "correction")
        correction = 1 if correction is None else correction
        if int(correction) != correction:
            raise PassError(f"{node.name}: a correction of {correction} is no whole number")
        count = self._count(node, reduction.places)
        mean = self._divided(self._sum(copy.args[0], dims, True, dtype, copy), count, copy)  # type: ignore[arg-type]
        centred = add(aten.sub.Tensor, copy.args[0], mean, like=copy)
        squares = self._sum(add(aten.mul.Tensor, centred, centred, like=copy), dims, keep, dtype, copy)
        spread = self._divided(squares, expression(count) - int(correction), copy)
        if "std" in str(node.target):
            spread = add(aten.sqrt.default, spread, like=copy)
        if several:
            mean = mean if keep else add(aten.squeeze.dims, mean, dims, like=copy)
            replace_results(self.draft, copy, {0: spread, 1: mean})
        else:
            self.draft.replace(copy, spread)
        self.done[node] = f"{operator_text(node.target)} over the batch is made of sums"

    # -- losses -----------------------------------------------------------------------------------------------------

    def _negative_log_likelihood(self, node: fx.Node) -> None:
        """The sum over targets that are not ignored, divided by the sum of their weights, which is a result too and
        what backward divides by: an ignored part adds zero to both, where its own mean would be 0 / 0."""
        copy = self.draft.node(node)
        set_operand(copy, "reduction", SUM)
        behind = copy.next
        total, weight = (self.draft.add(getitem, copy, i, like=copy, before=behind) for i in (0, 1))
        mean = self.draft.add(aten.div.Tensor, total, weight, like=copy, before=behind)
        for user in list(copy.users):
            if user.target is getitem and user not in (total, weight):
                self.draft.replace(user, mean if user.args[1] == 0 else weight)
        self.done[node] = f"{operator_text(node.target)}: the sum, and the sum of the targets' weights"

    def _loss(self, node: fx.Node, over: tuple[Reduction, ...]) -> None:
        """A pointwise loss as a sum; the gradient of its mean as that of its sum, of a gradient that is divided."""
        found, copy = rule(node), self.draft.node(node)
        name = str(node.target)
        if found is None or found.family != "loss" or "nll_loss" in name or not self._any(node):
            return
        source = "self" if "self" in operand_names(node) else operand_names(node)[0]
        shapes = {tuple(map(expression, operand(node, n).meta["val"].shape)) for n in (source, "target")}
        if len(shapes) != 1:
            raise PassError(f"{node.name} ({node.target}): a mean over shapes {shapes} that differ")
        count = self.places.whole(product(next(iter(shapes))))
        set_operand(copy, "reduction", SUM)
        if "backward" in name:
            gradient = self._divided(operand(copy, "grad_output"), count, copy)
            set_operand(copy, "grad_output", gradient)
        elif over:
            mean = self.draft.add(aten.div.Scalar, copy, self.places.number(count), like=copy, after=copy)
            copy.replace_all_uses_with(mean, delete_user_cb=lambda user: user is not mean)
        self.done[node] = f"{operator_text(node.target)} takes the sum, divided by the size of the whole batch"


def averaged_over(found: AxisFlow, node: fx.Node) -> tuple[Reduction, ...]:
    """The means and variances over the axis that the operator's results are."""
    return tuple(
        r
        for r in reductions(node) or ()
        if r.kind in ("mean", "variance")
        and not r.kept
        and any(d in found.where(n) for name, d in r.places if isinstance(n := operand(node, name), fx.Node))
    )


def replace_results(draft: Draft, old: fx.Node, new: dict[int, fx.Node]) -> None:
    """Let readers of the results of ``old``, an operator with several, read these nodes; ``old`` is erased."""
    for user in list(old.users):
        assert user.target is getitem, f"{user} reads all results of {old} at once"
        draft.replace(user, new[user.args[1]])  # type: ignore[index]
    draft.graph.erase_node(old)
