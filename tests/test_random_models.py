"""Random models: whatever passes and schemes do, loss, gradients, buffers, updates and random state stay eager's."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.errors import GraphoptWarning
from graphopt.graph.hyper_parameters import hyper_reader
from graphopt.graph.lowering import lower
from graphopt.graph.training_graph import InputKind, TrainingGraph
from graphopt.passes import FrozenFolding, GradientLiveness, Pass, Pipeline, SelectiveSaving
from graphopt.step import PASSES
from graphopt.verify import reference, run_graph
from tests.random_models import Case, Result, cases, eager_step, squared_error, state_of

EXAMPLES = settings.default.max_examples
EVERY_PASS = (*PASSES, GradientLiveness(), SelectiveSaving(pack_masks=True), Pipeline([GradientLiveness(), *PASSES]))


def run(graph: TrainingGraph, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Result:
    """One step by a graph, as a pure function: nothing is written."""
    parameters = dict(model.named_parameters())
    tensors = {**parameters, **dict(model.named_buffers())}
    hyper = iter(hyper_reader((optimizer,), graph.inputs, (), None)() or ())
    arguments: list[Any] = []
    for input_ in graph.inputs:
        if input_.kind is InputKind.BATCH:
            arguments.append(batch[int(input_.name)])
        elif input_.kind is InputKind.STATE:
            arguments.append(optimizer.state[parameters[input_.name]][input_.field])
        else:
            arguments.append(next(hyper) if input_.kind is InputKind.HYPER else tensors[input_.name].detach())
    lowered = lower(graph, in_place=False)
    with torch.no_grad():
        return dict(zip(map(str, lowered.outputs), lowered.run(*arguments), strict=True))


def assert_equal(ours: Result, eager: Result, what: str) -> None:
    """Every value that ours has is eager's, bit for bit; a gradient that eager does not have is None or zero."""
    for name, value in ours.items():
        expected = eager[name]
        if expected is None:
            assert value is None or not value.any(), f"{what}: {name} is {value}, eager has none"
            continue
        assert value is not None, f"{what}: {name} is missing"
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape), f"{what}: {name}"
        bits = [t.reshape(-1).view(torch.uint8) for t in (value, expected)]
        assert torch.equal(*bits), f"{what}: {name} is {value}, eager's {expected}"


def assert_pass(rewriter: Pass, graph: TrainingGraph) -> TrainingGraph:
    """Costs do not grow, and a second run of the pass finds nothing to do. Gives the rewritten graph."""
    after = rewriter(graph).graph
    assert after.flops() <= graph.flops() and after.bytes_kept() <= graph.bytes_kept(), rewriter.name
    if not isinstance(rewriter, Pipeline):  # where a later pass may give an earlier one something to do
        assert not rewriter(after).changed, f"a second {rewriter.name} finds something to do"
    return after


@settings(max_examples=5 * EXAMPLES)
@given(cases(), st.sampled_from([1, 1, 2, 3, 5]))
def test_every_pass_keeps_the_step(case: Case, size: int) -> None:
    batch = case.batch(size)
    torch.manual_seed(0)
    eager = eager_step(case, *case.instance(), batch)
    state = torch.get_rng_state()

    model, optimizer = case.instance()
    graph = graphopt.capture(model, batch, loss=case.loss, optimizer=optimizer)
    given = graph.hash()
    for rewriter in (None, *EVERY_PASS):
        what = rewriter.name if rewriter else "capture"
        after = assert_pass(rewriter, graph) if rewriter else graph
        torch.manual_seed(0)
        assert_equal(run(after, model, optimizer, batch), eager, what)
        assert torch.equal(torch.get_rng_state(), state), f"{what} changed what is drawn"
    assert graph.hash() == given, "a pass changed the graph it was given"


@settings(max_examples=2 * EXAMPLES)
@given(cases(), st.sampled_from([(1, 1, 1), (2, 5, 3), (4, 2, 4), (3, 1, 2)]))
def test_optimize_trains_as_eager(case: Case, sizes: tuple[int, int, int]) -> None:
    model, optimizer = case.instance()
    ours, our_optimizer = case.instance()
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraphoptWarning)  # a fall-back to eager would prove nothing
        step = graphopt.optimize(ours, case.batch(1), loss=case.loss, optimizer=our_optimizer, schemes="flat")
        for seed, size in enumerate(sizes):
            batch = case.batch(size, seed)
            torch.manual_seed(seed)
            eager = eager_step(case, model, optimizer, batch)
            state = torch.get_rng_state()
            torch.manual_seed(seed)
            loss = step(*batch)
            assert torch.equal(torch.get_rng_state(), state), "other random numbers were drawn"
            assert_equal({"loss loss": loss, **state_of(ours, our_optimizer)}, eager, f"step {seed}")
            assert state_of(ours, our_optimizer).keys() == state_of(model, optimizer).keys()
            assert all(p.grad is None for p in ours.parameters())


def contiguous(case: Case) -> Case:
    """For comparisons with `torch.func`, whose dropout draws in contiguous order, unlike eager's."""
    return replace(case, model=case.model.to(memory_format=torch.contiguous_format), channels_last=False)


@settings(max_examples=EXAMPLES)
@given(cases(dtypes=[torch.float64]), st.sampled_from([1, 2]))
def test_gradients_are_those_of_torch_func(case: Case, size: int) -> None:
    """An independent reference: `torch.func` in float64, where only the last bits may differ."""
    case = contiguous(case)
    batch = case.batch(size)
    eager_step(case, *case.instance(), batch)  # rejects what eager cannot run
    model, _ = case.instance()
    after = EVERY_PASS[-1](graphopt.capture(model, batch, loss=case.loss)).graph
    expected = reference(model, batch, case.loss, dtype=torch.float64).values
    for name, value in run_graph(after, model, batch).values.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-9, atol=1e-9, msg=f"{name} is {value}, not {expected[name]}"
        )


@settings(max_examples=EXAMPLES)
@given(cases(dtypes=[torch.float32], shapes=[(3, 8, 8)]), st.sampled_from([1, 3]), st.booleans())
def test_frozen_folding_rounds_as_well_as_eager(case: Case, size: int, bias: bool) -> None:
    """A frozen convolution with an eval-mode batch norm before a random model; float64 is the judge."""
    front = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=bias), nn.BatchNorm2d(3), nn.ReLU())
    nn.init.uniform_(front[1].running_var, 0.5, 2.0)
    model = nn.Sequential(front.eval().requires_grad_(False), case.model)
    case = contiguous(replace(case, model=model, owned=("0.0.weight",)))
    batch = case.batch(size)
    eager_step(case, *case.instance(), batch)
    model, _ = case.instance()
    result = FrozenFolding()(graphopt.capture(model, batch, loss=case.loss))
    assert result.changed and not FrozenFolding()(result.graph).changed
    eager, exact = (reference(model, batch, case.loss, dtype=dtype).values for dtype in (None, torch.float64))
    largest = max([1.0, *(float(value.abs().max()) for value in exact.values() if value.numel())])
    for name, value in run_graph(result.graph, model, batch).values.items():
        error, own = (float((of.double() - exact[name].double()).abs().max()) for of in (value, eager[name]))
        # the floor is for values that are truly 0, such as the gradient of a bias before a norm
        assert error <= 4 * own + 1e-5 * largest, (
            f"{name} is off by {error}, eager by {own}, values are up to {largest}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dropout_rounds_as_eager(dtype: torch.dtype, channels_last: bool) -> None:
    """Eager multiplies by noise in the tensor's dtype and layout; torch's own traces scale in float32."""
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 6)).to(dtype)
    names = [n for n, _ in model.named_parameters()]
    case = Case(model, (2, 4, 6), False, (2, 4, 6), squared_error, dtype, (), "SGD", tuple(names), channels_last)
    batch = case.batch(4)
    torch.manual_seed(0)
    eager = eager_step(case, *case.instance(), batch)
    model, optimizer = case.instance()
    graph = graphopt.capture(model, batch, loss=case.loss, optimizer=optimizer)
    torch.manual_seed(0)
    assert_equal(run(graph, model, optimizer, batch), eager, "capture")
