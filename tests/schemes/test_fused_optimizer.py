"""Fused updates: the same training, and an optimizer that is afterwards as its owner made it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.schemes import Eager, Flat, Scheme
from tests.schemes.trials import OPTIMIZERS, Images, assert_trains_like_eager, images, mlp, rows, train, values_of

BOTH = [Flat(fused=True), Eager(fused=True)]
by_name = lambda scheme: scheme.name


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fifty_steps_end_where_eager_ends(scheme: Scheme, optimizer: str) -> None:
    assert_trains_like_eager(scheme, mlp(), OPTIMIZERS[optimizer], [rows() for _ in range(50)])


def kernels_called(step: Any, *batch: torch.Tensor) -> list[str]:
    """The fused kernels that one step calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(*batch)
    return [e.name for e in profile.events() if e.name.startswith("aten::_fused_") and e.name.endswith("_")]


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
@pytest.mark.parametrize("name, calls", [("adamw", 1), ("two groups", 2), ("two optimizers", 2), ("sgd dampening", 1)])
def test_one_kernel_call_a_group(scheme: Scheme, name: str, calls: int) -> None:
    model = mlp()
    step = graphopt.optimize(model, rows(), loss=F.cross_entropy, optimizer=OPTIMIZERS[name](model), schemes=[scheme])
    assert all(len(kernels_called(step, *rows())) == calls for _ in range(3))


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
@pytest.mark.parametrize("name", ["adamw", "adamw foreach", "sgd momentum nesterov", "two optimizers"])
def test_optimizer_is_as_its_owner_made_it(scheme: Scheme, name: str) -> None:
    model = mlp()
    plain, twin = (OPTIMIZERS[name](m) for m in (model, copy.deepcopy(model)))
    train(model, plain, [rows(), rows()], scheme=scheme)
    for one, other in zip(*(o if isinstance(o, list) else [o] for o in (plain, twin))):
        assert [set(g) for g in one.param_groups] == [set(g) for g in other.param_groups]
        for group, untouched in zip(one.param_groups, other.param_groups):
            assert (group["fused"], group["foreach"]) == (untouched["fused"], untouched["foreach"])
        assert set(one.__dict__) - {"_opt_called"} == set(other.__dict__)
        counts = [s["step"] for s in one.state.values() if "step" in s]
        assert all(c.dtype is torch.float32 and c.device.type == "cpu" and float(c) == 2 for c in counts)


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
def test_eager_takes_over_at_any_moment(scheme: Scheme) -> None:
    """Its checkpoint is one of plain eager: which goes on from it as from its own."""
    model, batches = mlp(), [rows() for _ in range(8)]
    twin = copy.deepcopy(model)
    one, other = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin))
    train(model, one, batches[:4], scheme=scheme)
    train(twin, other, batches[:4])
    fresh = copy.deepcopy(model)
    resumed = torch.optim.AdamW(fresh.parameters(), lr=0.01)
    resumed.load_state_dict(copy.deepcopy(one.state_dict()))
    for m, o in ((model, one), (fresh, resumed), (twin, other)):
        train(m, o, batches[4:])
    ours, again, eager = (values_of(m, o, []) for m, o in ((model, one), (fresh, resumed), (twin, other)))
    for name in eager:
        assert torch.equal(ours[name], again[name])
        torch.testing.assert_close(ours[name], eager[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
def test_state_in_another_layout_is_brought_into_the_parameters(scheme: Scheme) -> None:
    """Fused kernels on a CPU look at no strides: state of a channels-last checkpoint would be read in a wrong order."""
    model = Images()
    source, batches = copy.deepcopy(model).to(memory_format=torch.channels_last), [images() for _ in range(6)]
    first = torch.optim.AdamW(source.parameters(), lr=0.01)
    train(source, first, batches[:2])
    ended = []
    for which in (scheme, None):
        one = copy.deepcopy(model)
        one.load_state_dict(source.state_dict())
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
        train(one, optimizer, batches[2:4], scheme=which)
        saved = copy.deepcopy(first.state_dict())
        optimizer.load_state_dict(saved)  # in the middle, too
        assert any(v.dim() == 4 and not v.is_contiguous() for s in optimizer.state.values() for v in s.values())
        train(one, optimizer, batches[4:], scheme=which)
        ended.append(values_of(one, optimizer, []))
    for name, value in ended[1].items():
        torch.testing.assert_close(ended[0][name], value, rtol=1e-4, atol=1e-6)


class _Fault(Exception):
    pass


def test_options_are_put_back_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = graphopt.optimize(model, rows(), loss=F.cross_entropy, optimizer=optimizer, schemes=[Eager(fused=True)])
    step(*rows())

    def fail(*args: object, **keywords: object) -> None:
        raise _Fault

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_fused_adamw_", fail)
        with pytest.raises(_Fault):
            step(*rows())
    assert optimizer.param_groups[0]["fused"] is None and optimizer.param_groups[0]["foreach"] is None
    step(*rows())


def test_counts_in_float64_stay_float64_and_leave_the_graph_out() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model, batch = mlp(), (torch.randn(8, 7), torch.randint(5, (8,)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        step = graphopt.optimize(model, batch, loss=F.cross_entropy, optimizer=optimizer, schemes=BOTH)
        for _ in range(3):
            step(*batch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert "counts steps" in (step.plan.candidate("flat, fused optimizer").why_not or "")
    assert step.plan.chosen == "eager, fused optimizer"
    assert {(s["step"].dtype, float(s["step"])) for s in optimizer.state.values()} == {(torch.float64, 3.0)}


class Sometimes(nn.Module):
    """The second layer takes part when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.both = nn.Linear(7, 5), nn.Linear(5, 5), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.second(h) if self.both else h


@pytest.mark.parametrize("scheme", BOTH, ids=by_name)
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_a_momentum_that_begins_later(scheme: Scheme, dampening: float) -> None:
    """The kernel makes the first step of all parameters of a group or of none: else the plain update is made."""
    ended = []
    start, batches = Sometimes(), [rows() for _ in range(4)]
    for which in (scheme, None):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=dampening)
        train(model, optimizer, batches[:2], scheme=which)
        model.both = True
        given = [scheme, Eager()] if which else [Eager()]
        step = graphopt.optimize(model, rows(), loss=F.cross_entropy, optimizer=optimizer, schemes=given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", graphopt.GraphoptWarning)
            for batch in batches[2:]:
                step(*batch)
        ended.append(values_of(model, optimizer, []))
    for name, value in ended[1].items():
        torch.testing.assert_close(ended[0][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda m: torch.optim.RMSprop(m.parameters()), "no fused kernel for RMSprop"),
        (lambda m: torch.optim.AdamW(m.parameters(), fused=True), "fused by its own options"),
        (lambda m: torch.optim.NAdam(m.parameters()), "no fused kernel for NAdam"),
        (lambda m: _hooked(torch.optim.Adam(m.parameters())), "hooks are registered"),
    ],
)
def test_why_not(make: Any, reason: str) -> None:
    model = mlp()
    step = graphopt.optimize(model, rows(), loss=F.cross_entropy, optimizer=make(model), schemes=[*BOTH, Eager()])
    step(*rows())
    for scheme in BOTH:
        assert reason in (step.plan.candidate(scheme.name).why_not or "")
    assert step.plan.chosen == "eager"


def _hooked(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def test_a_fused_form_takes_no_second_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.schemes import captured_step

    captures = []
    original = captured_step.capture_step
    monkeypatch.setattr(captured_step, "capture_step", lambda *a, **k: captures.append(1) or original(*a, **k))
    model = mlp()
    train(model, torch.optim.AdamW(model.parameters()), [rows(), rows()], scheme=Flat(fused=True))
    assert len(captures) == 1
