"""Verification of channels-last, low-precision and fused forms: good ones run, wrong ones are dropped and said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt import GraphoptWarning, optimize
from graphopt.graph.training_graph import OutputKind, TrainingGraph
from graphopt.schemes import Eager, Flat, Scheme, fused_optimizer, variants
from graphopt.schemes.captured_step import CapturedStep
from graphopt.verify import Values
from graphopt.verify_forms import differs
from tests.schemes.trials import Images, images
from tests.training import no_warning


@pytest.fixture(autouse=True)
def every_candidate_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another capture is no reason to wait here; passes have tests of their own."""
    monkeypatch.setattr("graphopt.step.PASSES", ())
    monkeypatch.setattr("graphopt.situation.MOMENTS", float("inf"))


def stepped(scheme: Scheme, model: nn.Module, batch: Any, *, steps: int = 2, accumulate: int = 1, **lr: Any) -> Any:
    torch.manual_seed(0)
    adam = torch.optim.AdamW(model.parameters(), **lr)
    step = optimize(
        model, batch, loss=F.cross_entropy, optimizer=adam, schemes=[scheme, "flat"], verify=True, accumulate=accumulate
    )
    for _ in range(steps):
        step(*batch)
    return step


class Dropped(nn.Sequential):
    """A bias in front of batch normalisation, whose gradient is nothing but rounding, and dropout."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2),
            nn.Conv2d(8, 4, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
        )  # fmt: skip


FORMS = {
    "flat": (Flat(channels_last=True, precision="bf16", fused=True), Dropped),
    "eager": (Eager(channels_last=True, fused=True), Dropped),
}


@pytest.mark.parametrize("name", FORMS)
def test_right_forms_run(name: str) -> None:
    scheme, make = FORMS[name]
    torch.manual_seed(0)
    with no_warning():
        step = stepped(scheme, make(), images(4))
    assert step.plan.candidate(scheme.name).start_seconds is not None, step.plan.explain()
    assert all(c.why_not is None for c in step.plan.candidates), step.plan.explain()


def test_gradients_of_accumulated_batches_are_their_shares() -> None:
    with no_warning():
        step = stepped(Flat(channels_last=True), Images(), images(4), accumulate=2, steps=4)
    assert all(c.why_not is None for c in step.plan.candidates), step.plan.explain()


def scaled(graph: TrainingGraph, kind: OutputKind, factor: float) -> TrainingGraph:
    """The graph with one of its outputs off by a factor."""
    draft = graph.draft()
    results = draft.results
    k, value = next((k, r) for k, (o, r) in enumerate(zip(graph.outputs, results)) if o.kind is kind and r is not None)
    results[k] = draft.add(
        torch.ops.aten.mul.Tensor, value, factor, like=value, before=draft.output, phase=value.meta["phase"]
    )
    draft.output.args = (tuple(results),)
    return draft.finish()


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[CapturedStep], CapturedStep]) -> None:
    """Let what makes forms make wrong ones."""
    made = getattr(variants, name)
    monkeypatch.setattr(variants, name, lambda *args, **options: change(made(*args, **options)))


WRONG = {
    "a gradient": (
        "capture_task",
        lambda s: replace(s, joint=scaled(s.joint, OutputKind.GRADIENT, FACTOR)),
        "gradient",
    ),
    "a pass": (
        "capture_task",
        lambda s: replace(s, whole=replace(s.whole, graph=scaled(s.graph, OutputKind.PARAMETER, FACTOR))),
        "its passes: new parameter",
    ),
    "an update": (
        "finish_step",
        lambda s: replace(s, whole=replace(s.whole, graph=scaled(s.graph, OutputKind.PARAMETER, FACTOR))),
        "its fused update: new parameter",
    ),
}  # fmt: skip
FACTOR = 1.0 + 1e-4


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_form_is_dropped_and_the_plan_says_why(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change, why = WRONG[what]
    spoil(monkeypatch, name, change)
    scheme = Flat(fused=True) if name == "finish_step" else Flat(channels_last=True)
    with pytest.warns(GraphoptWarning, match="is left out: verification: "):
        step = stepped(scheme, Images(), images(4))
    assert step.plan.chosen == "flat"
    assert f"verification: {why}" in str(step.plan.candidate(scheme.name).why_not)


def test_wrong_fused_kernels_are_dropped_in_eager_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(optimizer: torch.optim.Optimizer) -> Any:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.5
        return fused_optimizer.fused(optimizer)

    monkeypatch.setattr("graphopt.verify_forms.fused", doubled)
    with pytest.warns(GraphoptWarning, match="its fused update: new parameter"):
        step = stepped(Eager(fused=True), Images(), images(4), lr=0.1)
    assert step.plan.chosen == "flat"


def test_a_model_that_reads_the_memory_format_is_dropped_in_eager() -> None:
    class Reading(Images):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (2.0 if x.stride(1) == 1 else 1.0)

    with pytest.warns(GraphoptWarning, match="verification: loss is off by"):
        step = stepped(Eager(channels_last=True), Reading(), images(4))
    assert step.plan.chosen == "flat"


def test_bf16_is_judged_as_bf16() -> None:
    exact = Values({"loss": torch.tensor(1.0, dtype=torch.float64), "gradient w": torch.ones(3, dtype=torch.float64)})
    eager = Values({"loss": torch.tensor(1.001), "gradient w": torch.tensor([1.0, 1.002, 1.0])})
    near = Values({"loss": torch.tensor(1.004), "gradient w": torch.tensor([1.0, 0.996, 1.01])})
    far = Values({"loss": torch.tensor(1.0), "gradient w": torch.tensor([1.0, 1.1, 1.0])})
    assert differs(near, eager, exact, "bf16") is None
    assert "gradient w is off by 0.1" in str(differs(far, eager, exact, "bf16"))
    fine = Values({"loss": torch.tensor(1.0), "gradient w": torch.ones(3)})
    assert "loss is off" in str(differs(near, fine, exact, None))


def test_a_gradient_of_rounding_alone_is_judged_by_the_largest_one() -> None:
    exact = Values(
        {"gradient w": torch.ones(3, dtype=torch.float64), "gradient b": torch.zeros(2, dtype=torch.float64)}
    )
    ours = Values({"gradient w": torch.ones(3), "gradient b": torch.tensor([1e-7, -2e-7])})
    eager = Values({"gradient w": torch.ones(3), "gradient b": torch.zeros(2)})
    assert differs(ours, eager, exact, None) is None
    ours.values["gradient b"][0] = 1e-5
    assert "gradient b" in str(differs(ours, eager, exact, None))
