"""Channels-last images: convolutions compute in that memory format, all that stays keeps its own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.graph.training_graph import OutputKind
from graphopt.schemes import Eager, Flat, Scheme
from graphopt.schemes.channels_last import convolutions
from tests.schemes.trials import OPTIMIZERS, Images, assert_trains_like_eager, images, mlp, rows, train

BOTH = [Flat(channels_last=True), Eager(channels_last=True), Flat(channels_last=True, fused=True)]
by_name = lambda scheme: scheme.name


def stepped(model: nn.Module, schemes: list[Scheme], batch: Any, steps: int = 1, **options: Any) -> Any:
    """A training step by `schemes`, run some times."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    step = graphopt.optimize(
        model, batch, loss=F.cross_entropy, optimizer=optimizer, schemes=schemes, keep_grads=True, **options
    )
    for _ in range(steps):
        step(*batch)
    return step


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda n: nn.GroupNorm(2, n)], ids=["batch norm", "group norm"])
def test_fifty_steps_end_where_eager_ends(scheme: Scheme, norm: Any) -> None:
    batches = [images(6 if i % 3 else 4) for i in range(50)]  # two sizes
    assert_trains_like_eager(scheme, Images(norm), OPTIMIZERS["adamw"], batches)


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
def test_with_clipping_and_accumulation(scheme: Scheme) -> None:
    batches = [images() for _ in range(12)]
    assert_trains_like_eager(scheme, Images(), OPTIMIZERS["sgd momentum nesterov"], batches, clip=0.5, accumulate=3)


def test_convolutions_hand_on_the_format() -> None:
    model = Images()
    step = stepped(model, [Flat(channels_last=True)], images())
    ((captured,),) = (s.steps for s in step._situations.values())
    (variant,) = captured.variants.values()
    for graph, strided in ((captured.before, False), (variant.before, True)):
        found = convolutions(graph, {"0"})
        assert len(found) == 3
        assert all((n.meta["val"].stride(1) == 1) is strided for n in found)


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
def test_what_stays_keeps_its_layout(scheme: Scheme) -> None:
    model = Images()
    batch = images()
    before = batch[0].clone(), batch[0].stride()
    step = stepped(model, [scheme], batch, steps=2)
    assert torch.equal(batch[0], before[0]) and batch[0].stride() == before[1]
    state = step.task.optimizers[0].state
    for p in model.parameters():
        assert p.is_contiguous() and p.grad is not None and p.grad.is_contiguous()
        assert all(v.is_contiguous() for v in state[p].values())


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
def test_kernels_get_what_is_channels_last(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from inside of the step: the first convolution's input."""
    model = Images()
    step = stepped(model, [scheme], images())
    with torch.profiler.profile(record_shapes=True) as profile:
        step(*images())
    copies = [e for e in profile.events() if e.name == "aten::contiguous" or e.name == "aten::clone"]
    assert any(e.input_shapes and e.input_shapes[0] == [6, 3, 12, 12] for e in copies)


class Viewing(nn.Module):
    """Takes for granted that features lie in memory as they are indexed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 10 * 10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x)
        return self.head(h.view(h.shape[0], -1))


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
def test_a_model_that_rejects_the_format_drops_the_scheme(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.situation.MOMENTS", float("inf"))  # tried at once, however busy the machine is
    model = Viewing()
    twin = copy.deepcopy(model)
    with pytest.warns(graphopt.GraphoptWarning, match="is left out"):
        step = stepped(model, [scheme, Flat()], images())
    assert step.plan.chosen == "flat"
    assert "reject" in (step.plan.candidate(scheme.name).why_not or "")
    assert all(float(s["step"]) == 1 for s in step.task.optimizers[0].state.values())  # one step, by the other one
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(twin, [Flat()], images())


@pytest.mark.parametrize(
    "model, batch, reason",
    [
        (mlp, rows, "no images"),
        (Images, lambda: (images()[0].contiguous(memory_format=torch.channels_last), images()[1]), "no images"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 5)), images, "no 2-D convolution"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(400, 5)),
            lambda: (torch.randn(6, 1, 12, 12), images()[1]),
            "no images",
        ),
    ],
)
def test_why_not(model: Any, batch: Any, reason: str) -> None:
    step = stepped(model(), [*BOTH, Eager()], batch())
    for scheme in BOTH:
        assert reason in (step.plan.candidate(scheme.name).why_not or "")
    assert step.plan.chosen == "eager"


def test_the_form_is_captured_once_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.schemes import captured_step

    captures = []
    original = captured_step.capture_step
    monkeypatch.setattr(captured_step, "capture_step", lambda *a, **k: captures.append(1) or original(*a, **k))
    model = Images()
    step = stepped(model, [Flat(channels_last=True)], images(6), steps=12)
    for _ in range(12):
        step(*images(4))
    assert len(captures) == 2
    gradients = step._situations and next(iter(step._situations.values())).steps[0].joint.output_nodes(
        OutputKind.GRADIENT
    )
    assert len(gradients) == 9


def test_plain_eager_goes_on_from_it() -> None:
    model, batches = Images(), [images() for _ in range(6)]
    twin = copy.deepcopy(model)
    for one, scheme in ((model, Flat(channels_last=True)), (twin, None)):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.003)
        train(one, optimizer, batches[:3], scheme=scheme)
        train(one, optimizer, batches[3:])
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
