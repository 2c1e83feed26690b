"""Steps on two processes: what they compute, and what they leave as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from graphopt.schemes.workers import Pool
from tests.schemes.summed import captured, gradients, loss_of, sum_loss, values


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, timeout=120) as made:
        yield made


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def test_gradients_are_those_of_the_whole_batch(pool: Pool) -> None:
    model = network()
    job = pool.load(captured(model, (4, 6), (4, 3)))
    for first, second in ((4, 3), (2, 7), (5, 2)):
        x, y = torch.randn(first + second, 6).double(), torch.randn(first + second, 3).double()
        results = job(values(job, model), [(x[:first], y[:first]), (x[first:], y[first:])])
        expected = sum_loss(model(x), y)
        torch.testing.assert_close(loss_of(job, results), expected.detach(), rtol=1e-12, atol=0)
        wanted = torch.autograd.grad(expected, list(model.parameters()))
        for gradient, (name, _) in zip(wanted, model.named_parameters(), strict=True):
            torch.testing.assert_close(gradients(job, results)[name], gradient, rtol=1e-12, atol=1e-12)
