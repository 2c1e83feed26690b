"""Each pass and rule broken on purpose: the checks that guard them must notice.

One row of `MUTATIONS` a way to break the library. Its check passes on the library as it is and fails once it is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import graphopt
from graphopt.errors import PassError
from graphopt.graph import in_place, lowering
from graphopt.graph.lowering import lower
from graphopt.graph.op_rules import RULES, masked_forms
from graphopt.graph.training_graph import InputKind, Output, OutputKind, TrainingGraph
from graphopt.passes import (
    CommonSubexpressions,
    ConstantFolding,
    DeadCode,
    FrozenFolding,
    GradientLiveness,
    NoOps,
    Pass,
    SelectiveSaving,
    _storage,
    common_subexpressions,
    constant_folding,
    dead_code,
    frozen_folding,
    gradient_liveness,
    no_ops,
    selective_saving,
)
from graphopt.verify import check_graph
from tests.helpers import assert_keeps_meaning, assert_same_bits, traced

aten = torch.ops.aten
Breaks = Callable[[pytest.MonkeyPatch], None]


# -- checks ----------------------------------------------------------------------------------------------------------


def capture(model: nn.Module) -> tuple[TrainingGraph, tuple[torch.Tensor, torch.Tensor]]:
    """A training step of images, with the gradients of frozen parameters too where a pass is to drop them."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 6, 6)
    with torch.no_grad():
        target = torch.randn_like(model(x))
    gradients = "all" if isinstance(model, Body) else "wanted"
    return graphopt.capture(model, (x, target), loss=F.mse_loss, gradients=gradients), (x, target)


def step_of(make: Callable[[], nn.Module], rewriter: Pass | None = None) -> Callable[[], None]:
    """The check that `optimize(verify=True)` makes: values against eager and float64, and every gradient is there."""

    def check() -> None:
        model = make()
        graph, batch = capture(model)
        after = rewriter(graph).graph if rewriter else graph
        assert rewriter is None or after is not graph, "the pass does nothing here"
        found = check_graph(after, model, batch, F.mse_loss)
        assert found is None, found
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {o.name for o in after.outputs if o.kind is OutputKind.GRADIENT} == trained

    return check


def graph_of(function: Callable[..., Any], rewriter: Pass, *shapes: tuple[int, ...]) -> Callable[[], None]:
    """The check that every test of a pass makes: the same bits, draws, types and aliases, NaN and infinities too."""
    return lambda: assert_keeps_meaning(rewriter, traced(function, *shapes)) and None


def in_place_of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[[], None]:
    """Running with writes in place gives what running without gives. The first input is overwritten."""

    def check() -> None:
        kinds = [InputKind.PARAMETER, *[InputKind.BATCH] * (len(shapes) - 1)]
        graph = traced(function, *shapes, kinds=kinds)
        rest = graph.outputs[1:]
        outputs = (Output(OutputKind.PARAMETER, graph.inputs[0].name), *rest)
        graph = TrainingGraph(graph.graph, replace(graph.signature, outputs=outputs))
        values = [torch.randn(shape) for shape in shapes]
        expected = lower(graph, in_place=False).run(*[v.clone() for v in values])
        got = lower(graph).run(*values)
        assert_same_bits([values[0], *got], expected)

    return check


def counted_flops() -> None:
    """FLOPs are those of torch's own counter."""
    model = linear()
    graph, (x, target) = capture(model)
    with FlopCounterMode(display=False) as counter:
        F.mse_loss(model(x), target).backward()
    assert graph.flops() == counter.get_total_flops()


# -- models and graphs -----------------------------------------------------------------------------------------------


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.ReLU(), nn.Linear(4, 4))


def square() -> nn.Module:
    """A frozen square weight, whose transpose has the same shape."""
    model = linear()
    model[3].requires_grad_(False)
    return model


class Body(nn.Sequential):
    """A frozen layer before two trained ones of the same shape."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(72, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        self[1].requires_grad_(False)


def frozen_convolutions() -> nn.Module:
    model = nn.Sequential(*(layer for _ in range(2) for layer in (nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())))
    model[2].requires_grad_(False)
    return model


def trained_and_frozen() -> nn.Module:
    """The first and the last convolution are trained, the ReLU's output is read by both backward operators."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1))
    model[1].requires_grad_(False)
    return model


def normalised() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    model[2].requires_grad_(False)
    return model


def folded() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    for tensor in model[1].state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0)
    model[:2].eval().requires_grad_(False)
    return model


class Differences(nn.Module):
    """Subtraction: the order of its operands matters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin() - self.weight


class Dropouts(nn.Module):
    """Two masks on the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return F.dropout(y) + F.dropout(y) + (y.exp() + y.exp())


def two_dropouts(step, x):
    first, second = (aten.native_dropout.default(x, 0.5, True) for _ in range(2))
    return aten.add.Tensor(step.item(first, 0), step.item(second, 0))


def an_unread_draw(step, x):
    aten.rand_like.default(x)
    return aten.mul.Tensor(x, aten.rand_like.default(x))


def transposed(step, x):
    return aten.mm.default(aten.t.default(aten.exp.default(x)), x)


def an_alias(step, x):
    return aten.clone.default(x), aten.exp.default(aten.detach.default(x))


def two_scales(step, x):
    return aten.add.Tensor(aten.mul.Tensor(x, 2.0), aten.mul.Tensor(x, 3.0))


def times_zero(step, x):
    return aten.add.Tensor(aten.mul.Tensor(x, 0.0), aten.mul.Tensor(aten.exp.default(x), 1.0))


def an_old_value_read_late(step, w):
    view = aten.t.default(w)
    new = aten.add.Tensor(w, 1.0)
    return new, aten.mul.Tensor(view, 2.0)


# -- ways to break ---------------------------------------------------------------------------------------------------


def rule(operator: Any, **changed: Any) -> Breaks:
    """Another entry in the table of operator rules."""
    return lambda patch: patch.setitem(RULES, operator, replace(RULES[operator], **changed))


def never_read(operator: Any, *names: str) -> Breaks:
    """The table says that these operands are never read."""
    return lambda patch: rule(operator, reads={**RULES[operator].reads, **dict.fromkeys(names, lambda a: False)})(patch)


def put(module: Any, name: str, value: Any) -> Breaks:
    """Another function in a module."""
    return lambda patch: patch.setattr(module, name, value)


def loose_threshold(patch: pytest.MonkeyPatch) -> None:
    """A mask with ``<`` for ``<=``."""
    form = replace(
        masked_forms.THRESHOLD,
        mask=lambda add, n: add(aten.logical_not.default, add(aten.lt.Scalar, n.args[1], n.args[2])),
    )
    rule(aten.threshold_backward, masked=form)(patch)


def swapped(patch: pytest.MonkeyPatch) -> None:
    """Lowered subtraction takes its operands the other way round."""
    original = lowering.binding
    sub = {aten.sub.Tensor: lambda a, b: torch.sub(b, a)}
    patch.setattr(lowering, "binding", lambda target: sub.get(target) or original(target))


def numbers_by_nothing(patch: pytest.MonkeyPatch) -> None:
    """Common subexpressions look at tensors only."""
    patch.setattr(
        common_subexpressions, "_key", lambda n, same: (n.target, tuple(same.get(a, a) for a in n.all_input_nodes))
    )


def zero_as_one(patch: pytest.MonkeyPatch) -> None:
    """A product with zero counts as one with one."""
    original = constant_folding._uniform
    patch.setattr(constant_folding, "_uniform", lambda v, known: {0: 1}.get(original(v, known), original(v, known)))


def lost_gradient(patch: pytest.MonkeyPatch) -> None:
    """The last gradient that is asked for goes."""
    original = GradientLiveness._live_outputs

    def live_outputs(self: GradientLiveness, graph: TrainingGraph) -> list[bool]:
        flags = original(self, graph)
        flags[len(flags) - 1 - flags[::-1].index(True)] = False
        return flags

    patch.setattr(GradientLiveness, "_live_outputs", live_outputs)


def exchanged_gradients(patch: pytest.MonkeyPatch) -> None:
    """The gradients of two layers of the same shape change places."""
    original = gradient_liveness._shrink

    def shrink(draft: Any) -> None:
        loss, *gradients = draft.results
        draft.output.args = ((loss, *gradients[2:], *gradients[:2]),)
        original(draft)

    patch.setattr(gradient_liveness, "_shrink", shrink)


class _Renamed:
    """`torch.ops.aten` with an operator in the place of another."""

    def __init__(self, **others: str):
        self._others = others

    def __getattr__(self, name: str) -> Any:
        return getattr(aten, self._others.get(name, name))


def by_size(node: Any) -> Any:
    """Where a value lies, without its strides."""
    value = node.meta.get("val")
    return (value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor) else None


@dataclass(frozen=True)
class Mutation:
    """A way to break the library, and the check that has to notice."""

    what: str
    breaks: Breaks
    check: Callable[[], None]


SAVING, LIVENESS = SelectiveSaving(), GradientLiveness(trainable=["2.weight", "2.bias", "3.weight", "3.bias"])
MUTATIONS = [
    Mutation("a convolution's weight gradient reads no input",
             never_read(aten.convolution_backward, "input"), step_of(trained_and_frozen, SAVING)),
    Mutation("batch norm in training reads no statistics",
             never_read(aten.native_batch_norm_backward, "save_mean", "save_invstd"), step_of(normalised, SAVING)),
    Mutation("a mask with < for <=", loose_threshold, step_of(frozen_convolutions, SAVING)),
    Mutation("a mask that is always true",
             rule(aten.threshold_backward, masked=replace(masked_forms.THRESHOLD, apply=lambda add, n, kept: add(
                 aten.mul.Tensor, n.args[0], 1.0))), step_of(frozen_convolutions, SAVING)),
    Mutation("saving looks through views that move elements",
             put(selective_saving, "geometry", by_size), step_of(square, SAVING)),
    Mutation("dropout draws nothing, and two are merged",
             rule(aten.native_dropout, draws=lambda a: False), step_of(Dropouts, CommonSubexpressions())),
    Mutation("two dropouts of a small graph are merged",
             rule(aten.native_dropout, draws=lambda a: False), graph_of(two_dropouts, CommonSubexpressions(), (4, 4))),
    Mutation("an unread draw is dead", put(dead_code, "is_pure", lambda node: True),
             graph_of(an_unread_draw, DeadCode(), (3,))),
    Mutation("subexpressions are compared without numbers", numbers_by_nothing,
             graph_of(two_scales, CommonSubexpressions(), (3,))),
    Mutation("a transpose changes nothing", put(no_ops, "geometry", by_size), graph_of(transposed, NoOps(), (3, 3))),
    Mutation("an output may be the input itself", put(_storage.Storages, "why_not", lambda self, old, new: ""),
             graph_of(an_alias, NoOps(), (3,))),
    Mutation("x * 0 is x", zero_as_one, graph_of(times_zero, ConstantFolding(), (9,))),
    Mutation("a batch norm folds by its variance", put(frozen_folding, "aten", _Renamed(rsqrt="sqrt")),
             step_of(folded, FrozenFolding())),
    Mutation("a live gradient is dropped", lost_gradient, step_of(Body, LIVENESS)),
    Mutation("gradients change places", exchanged_gradients, step_of(Body, LIVENESS)),
    Mutation("an operator's operands are swapped", swapped, step_of(Differences)),
    Mutation("a value is overwritten that a view still shows", put(in_place, "storage_root", lambda node: node),
             in_place_of(an_old_value_read_late, (3, 3))),
    Mutation("a product costs half", rule(aten.mm, flops=lambda node: 1), counted_flops),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """So that what an operator should not have read is never there by luck."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_the_checks_notice(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation.check()
    mutation.breaks(monkeypatch)
    with pytest.raises((AssertionError, PassError)) as noticed:
        mutation.check()
    assert "does nothing" not in str(noticed.value)
