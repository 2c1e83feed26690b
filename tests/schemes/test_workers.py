"""Steps on two processes: what they compute, what they draw, and what they leave as it was."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import GraphoptError, GraphoptWarning, WorkerError
from graphopt.graph.draft import Draft
from graphopt.graph.training_graph import Input, InputKind, OutputKind, TrainingGraph
from graphopt.schemes.workers import Job, Pool
from tests.helpers import traced
from tests.schemes.summed import captured, collectives, gradients, loss_of, sum_loss, summed, values


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, timeout=120) as made:
        yield made


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def gathered(pool: Pool, operators: Any, *examples: Any) -> Job:
    """A job that gives what ``operators(step, *inputs)`` computes on each processor, one behind the other."""

    def function(step: Any, *inputs: Any) -> Any:
        whole = collectives.all_gather_into_tensor.default(operators(step, *inputs), 2, "any")
        return collectives.wait_tensor.default(whole)

    function.__signature__ = inspect.signature(operators)  # type: ignore[attr-defined]
    return pool.load(traced(function, *examples))


def assert_gradients_of_whole_batch(job: Job, model: nn.Module, parts: Sequence[Any]) -> None:
    """Loss and gradients of a step are those of eager on the whole batch."""
    results = job(values(job, model), parts)
    expected = sum_loss(model(torch.cat([p[0] for p in parts])), torch.cat([p[1] for p in parts]))
    torch.testing.assert_close(loss_of(job, results), expected.detach(), rtol=1e-12, atol=0)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for (name, _), wanted in zip(named.items(), torch.autograd.grad(expected, list(named.values())), strict=True):
        torch.testing.assert_close(gradients(job, results)[name], wanted, rtol=1e-12, atol=1e-12)


def parts_of(*rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(n, 6).double(), torch.randn(n, 3).double()) for n in rows]


def test_gradients_are_those_of_the_whole_batch(pool: Pool) -> None:
    model = network()
    job = pool.load(captured(model, (4, 6), (4, 3)))
    for rows in ((4, 3), (2, 7), (500, 2), (2, 800)):
        assert_gradients_of_whole_batch(job, model, parts_of(*rows))


def test_training_is_that_of_eager(pool: Pool) -> None:
    model, twin = network(), network()
    twin.load_state_dict(model.state_dict())
    job = pool.load(captured(model, (4, 6), (4, 3)))
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin)]
    for _ in range(50):
        parts = parts_of(3, 4)

        def commit(results: tuple[Any, ...]) -> None:
            for name, gradient in gradients(job, results).items():
                model.get_parameter(name).grad = gradient
            optimizers[0].step()

        job(values(job, model), parts, commit)
        optimizers[1].zero_grad()
        sum_loss(twin(torch.cat([p[0] for p in parts])), torch.cat([p[1] for p in parts])).backward()
        optimizers[1].step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", ["in place", "data", "data anew", "another object", "another layout"])
def test_workers_read_the_parameters_of_now(pool: Pool, change: str) -> None:
    class Frozen(nn.Module):  # its big weight is not trained, so it is copied only when it changed
        def __init__(self) -> None:
            super().__init__()
            self.big = nn.Parameter(torch.randn(6, 2000).double(), requires_grad=False)
            self.last = nn.Linear(2000, 3).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(x @ self.big)

    model = Frozen()
    job = pool.load(captured(model, (4, 6), (4, 3)))
    assert_gradients_of_whole_batch(job, model, parts_of(2, 2))
    with torch.no_grad():
        if change == "in place":
            model.big[3, 7] += 1
        elif change == "data":
            model.big.data.mul_(1.5)  # torch does not count this
        elif change == "data anew":
            model.big.data = model.big.data * 2
        elif change == "another object":
            model.big = nn.Parameter(model.big * 2, requires_grad=False)
        else:
            model.big.data = (model.big.data * 2).t().contiguous().t()
    for _ in range(2):
        assert_gradients_of_whole_batch(job, model, parts_of(2, 2))


def test_two_jobs_share_the_copies_of_a_model(pool: Pool) -> None:
    model = network()
    first, second = (pool.load(captured(model, (4, 6), (4, 3))) for _ in range(2))
    for job in (first, second, first):
        assert_gradients_of_whole_batch(job, model, parts_of(2, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    assert first._shelf.homes == second._shelf.homes


def test_every_processor_draws_the_numbers_of_main(pool: Pool) -> None:
    job = gathered(pool, lambda step, x: torch.ops.aten.native_dropout.default(x, 0.5, True)[0], (3, 5))
    x = torch.ones(3, 5)
    torch.manual_seed(7)
    for _ in range(2):
        state = torch.get_rng_state()
        expected = torch.native_dropout(x, 0.5, True)[0]
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        (drawn,) = job([], [(x,), (x,)])
        assert torch.equal(drawn, torch.cat([expected, expected]))
        assert torch.equal(torch.get_rng_state(), after)


def test_buffers_change_when_the_step_is_committed_only(pool: Pool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3)).double()
    before = {name: b.clone() for name, b in model.named_buffers()}
    x, y = torch.randn(4, 2, 4, 4).double(), torch.randn(4, 3).double()
    job = pool.load(summed(graphopt.capture(model, (x, y), loss=sum_loss)))
    parts = [(x[:2], y[:2]), (x[2:].to(memory_format=torch.channels_last), y[2:])]
    results = job(values(job, model), parts)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    model(x[:2])
    new = {o.name: r for o, r in zip(job.outputs, results, strict=True) if o.kind is OutputKind.BUFFER}
    assert new.keys() == before.keys()
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(new[name], buffer)


def numbers(graph: TrainingGraph) -> TrainingGraph:
    """``graph`` with its input ``n`` a hyper-parameter."""
    draft = Draft(graph)
    inputs = tuple(Input(InputKind.HYPER, i.name) if i.name == "n" else i for i in graph.inputs)
    draft.signature = replace(draft.signature, inputs=inputs)
    return draft.finish()


@pytest.mark.parametrize("kind", ["common", "own"])
def test_numbers_are_inputs_too(pool: Pool, kind: str) -> None:
    def scaled(step: Any, x: Any, n: Any) -> Any:
        whole = collectives.all_gather_into_tensor.default(torch.ops.aten.mul.Tensor(x, n), 2, "any")
        return collectives.wait_tensor.default(whole)

    graph = numbers(traced(scaled, (2,), 3.0))
    x = torch.ones(2)
    if kind == "common":
        job = pool.load(graph)
        for n in (2.0, 0.1, float("inf"), 0.1):
            assert job([n], [(x,), (x,)])[0].tolist() == pytest.approx([n] * 4)
    else:
        job = pool.load(graph, own=graph.inputs)
        for first, second in ((1.0, 2.0), (3.0, 2.0)):
            assert job([], [(x, first), (x, second)])[0].tolist() == [first] * 2 + [second] * 2


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.arange(24.0).reshape(4, 6)[:, 1:3],
        torch.ones(1, 3).expand(4, 3),
        torch.arange(6).reshape(2, 3),
        torch.tensor([[True], [False]]),
        torch.randn(2, 3).to(torch.bfloat16),
        torch.randn(2, 3, dtype=torch.complex64),
        torch.ones(2, 0),
    ],
    ids=lambda t: f"{t.dtype}-{list(t.shape)}-{t.stride()}",
)
def test_tensors_of_any_form_arrive(pool: Pool, tensor: torch.Tensor) -> None:
    job = gathered(pool, lambda step, x: torch.ops.aten.clone.default(x, memory_format=torch.contiguous_format), tensor)
    for shift in range(2):
        other = tensor.clone() if tensor.dtype == torch.bool else tensor + shift
        (both,) = job([], [(tensor,), (other,)])
        assert torch.equal(both, torch.cat([tensor, other]))


def test_threads_and_settings_are_those_of_main_and_for_the_step_only() -> None:
    with pytest.warns(GraphoptWarning, match="take turns on"):
        pool = Pool(2, threads=64)
    with pool:
        seen = []
        job = gathered(pool, lambda step, x: torch.ops.aten.clone.default(x), (2,))
        job([], [(torch.ones(2),), (torch.ones(2),)], commit=lambda results: seen.append(torch.get_num_threads()))
        run = job.run

        def noting(*arguments: Any) -> Any:
            seen.append(torch.get_num_threads())
            return run(*arguments)

        job.run = noting  # type: ignore[method-assign]
        job([], [(torch.ones(2),), (torch.ones(2),)])
    assert seen == [1, 64] and torch.get_num_threads() == 1


def test_deterministic_algorithms_are_asked_of_workers_too(pool: Pool) -> None:
    job = gathered(pool, lambda step, x: torch.ops.aten.empty_like.default(x), (1000,))
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        (filled,) = job([], [(torch.ones(1000),), (torch.ones(1000),)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(filled.isnan().all())


def test_a_graph_that_workers_cannot_load(pool: Pool) -> None:
    @torch.library.custom_op("graphopt_tests::of_the_user", mutates_args=())
    def of_the_user(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    of_the_user.register_fake(lambda x: torch.empty_like(x))
    pids = pool.processes
    with pytest.raises(WorkerError, match=r"processor 1 .* refuses: .*graphopt_tests.of_the_user.default is not"):
        pool.load(traced(lambda step, x: torch.ops.graphopt_tests.of_the_user.default(x), (2,)))
    assert pool.processes == pids


def test_values_are_counted_before_anything_happens(pool: Pool) -> None:
    model = network()
    job = pool.load(captured(model, (4, 6), (4, 3)))
    with pytest.raises(GraphoptError, match=r"got 0 and \[2, 2\] values; expected 4 .* and 2 for each"):
        job([], parts_of(2, 2))
    with pytest.raises(GraphoptError, match="parts: got 3, expected one for each of 2 processors"):
        job(values(job, model), parts_of(2, 2, 2))


def test_a_step_in_another_thread(pool: Pool) -> None:
    model = network()
    job = pool.load(captured(model, (4, 6), (4, 3)))
    threads = [
        threading.Thread(target=assert_gradients_of_whole_batch, args=(job, model, parts_of(2, 3))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_gradients_of_whole_batch(job, model, parts_of(2, 3))


def test_all_collectives_run(pool: Pool) -> None:
    def exchanged(step: Any, x: Any) -> Any:
        wait = collectives.wait_tensor.default
        whole = wait(collectives.all_gather_into_tensor.default(x, 2, "a"))
        part = wait(collectives.reduce_scatter_tensor.default(whole, "sum", 2, "b"))
        first = wait(collectives.broadcast.default(x, 0, "c"))
        both = collectives.all_reduce_coalesced.default([x, first], "sum", "d")
        return wait(step.item(both, 0)), part, first, wait(step.item(both, 1))

    job = pool.load(traced(exchanged, (3,)))
    mine, other = torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30])
    total, part, first, twice = job([], [(mine,), (other,)])
    assert torch.equal(total, mine + other)
    assert torch.equal(part, 2 * mine)
    assert torch.equal(first, mine)
    assert torch.equal(twice, 2 * mine)


def test_a_classifier_with_mean_loss_shares_its_batch(pool: Pool) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double()
    x, y = torch.randn(8, 6).double(), torch.randint(5, (8,))
    job = pool.load(summed(graphopt.capture(model, (x, y), loss=F.cross_entropy)))
    results = job(values(job, model), [(x[:4], y[:4]), (x[4:], y[4:])])
    expected = F.cross_entropy(model(x), y)
    torch.testing.assert_close(loss_of(job, results) / 2, expected.detach())
