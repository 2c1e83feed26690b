"""What launches cost the host: in chains of one tiny operator, and in steps so small that launches are nearly all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import nn
from torch.nn import functional as F

from graphopt.cost_model.analytical import kernel_seconds, launch_kind
from graphopt.cost_model.calibration_steps import TINY, Case, flat_step, synthetic_inputs
from graphopt.cost_model.machine import LAUNCHES, Machine
from graphopt.cost_model.work import Work, compiled
from graphopt.graph.capture import capture
from graphopt.graph.lowering import lower
from graphopt.graph.training_graph import Phase

_HOLD = 0.1
"""Weight of the times of chains: a launch that is off by its own size counts as a phase that is off by a tenth."""


def time_of(call: Callable[[], Any], budget: float = 0.015, before: Callable[[], Any] = lambda: None) -> float:
    """Seconds of a call: the lower quartile of what fits into ``budget`` seconds, at least three, after one.
    ``before`` runs before each."""
    call()
    taken: list[float] = []
    end = perf_counter() + budget
    while len(taken) < 3 or (perf_counter() < end and len(taken) < 200):
        before()
        start = perf_counter()
        call()
        taken.append(perf_counter() - start)
    return float(np.quantile(taken, 0.25))


def chains() -> dict[str, float]:
    """Seconds of the host by kind of launch (`LAUNCHES`), from chains of tiny operators."""
    n, x = 64, torch.randn(4, 4)
    leaf = torch.randn(4, 4, requires_grad=True)

    def chain(step: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
        """Forward and backward seconds of one of ``n`` operators under autograd."""

        def forward() -> torch.Tensor:
            y = leaf
            for _ in range(n):
                y = step(y)
            return y

        def both() -> None:
            leaf.grad = None
            forward().backward(x)

        first = time_of(forward)
        return first / n, max(time_of(both) - first, 0.0) / n

    forward, backward = chain(nn.ReLU())
    view, view_backward = chain(lambda t: t.transpose(0, 1))
    parameters = [nn.Parameter(torch.randn(4, 4)) for _ in range(16)]
    for parameter in parameters:
        parameter.grad = torch.randn(4, 4)
    adam = torch.optim.AdamW(parameters, foreach=False)
    update = time_of(adam.step) / (16 * 11)  # 11 operators a parameter
    with torch.no_grad():
        flat = time_of(lambda: [torch.mul(x, x) for _ in range(n)]) / n
        looked = time_of(lambda: [torch.reshape(x, (16,)) for _ in range(n)]) / n
        lists = [torch.randn(4) for _ in range(n)]
        item = time_of(lambda: torch._foreach_add(lists, 1.0)) / n
    seconds = (forward, view, backward, view_backward, update, looked, flat, looked, flat, item)
    return dict(zip(LAUNCHES, seconds, strict=True))


_LEAST = 0.8
"""Of what a launch costs in a chain of one operator, the least that it costs in a step."""


def in_steps(machine: Machine) -> dict[str, float]:
    """Seconds of each kind of launch, from the phases of steps that are nearly all launches.

    In a chain of one operator all that is needed lies in the nearest caches; in a step it does not. The times of chains
    (``machine.launch``) are the priors.
    """
    prior = np.array([machine.launch[kind] for kind in LAUNCHES])
    rows, seconds = [], []
    for case in TINY:
        for work, phase, taken in _phases(case):
            of = [i for i in range(len(work.kernels)) if phase is None or work.phase(i) == phase]
            kernel = float(kernel_seconds(work, machine)[of].sum())
            row = np.zeros(len(LAUNCHES))
            for i in of:
                row[LAUNCHES.index(launch_kind(work, i))] += 1
            rows.append(row)
            seconds.append(max(taken - kernel, taken / 5))
    target, hold = np.array(seconds), _HOLD * np.eye(len(prior))
    matrix = np.vstack([np.array(rows) * prior / target[:, None], hold])
    least = [0.1 if "view" in kind else _LEAST for kind in LAUNCHES]  # many views of a graph are none under autograd
    found = lsq_linear(matrix, np.concatenate([np.ones(len(target)), hold.sum(axis=0)]), bounds=(least, 20.0))
    return dict(zip(LAUNCHES, (prior * found.x).tolist()))


def _phases(case: Case) -> Iterator[tuple[Work, Phase | None, float]]:
    """The work of a step with the seconds of each phase under autograd, and of all phases as straight-line code."""
    torch.manual_seed(0)
    model = case.build()
    optimizer = case.optimizer(model.parameters())
    (size,) = case.sizes
    x, y = case.batch(size)
    graph = capture(model, (x, y), loss=F.cross_entropy, optimizer=optimizer)
    flat, inputs = lower(graph), synthetic_inputs(graph, size)
    losses: list[torch.Tensor] = []

    def forward() -> None:
        losses.append(F.cross_entropy(model(x), y))

    def backward() -> None:
        optimizer.zero_grad()
        losses.pop().backward()

    order: list[Callable[[], Any]] = [forward, backward, optimizer.step, lambda: flat_step(flat, inputs)]
    taken = np.empty((60, len(order)))
    for turn in taken:
        for i, part in enumerate(order):
            start = perf_counter()
            part()
            turn[i] = perf_counter() - start
    threads = torch.get_num_threads()
    medians = np.quantile(taken, 0.25, axis=0).tolist()
    eager, straight = compiled(graph, "eager", (), threads), compiled(graph, "flat", (), threads)
    for phase, seconds in zip((Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE), medians):
        yield eager, phase, seconds
    yield straight, None, medians[-1]
