"""Models that are stepped by eager and by another scheme, side by side."""

from __future__ import annotations

import copy
import os
import time

import torch
from torch import nn
from torch.nn import functional as F

import graphopt


class Tokens(nn.Module):
    """Embedding, attention, layer norm: a loss over the vocabulary at each place."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(11, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 11)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = self.norm(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.head(x).transpose(1, 2)


def perceptron():
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, 5))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def tokens(n):
    targets = torch.randint(11, (n, 7))
    targets[0] = -100  # ignored, all of them
    return torch.randint(11, (n, 7)), targets


CASES = {
    "perceptron": (perceptron, lambda n: (torch.randn(n, 6).double(), torch.randint(5, (n,)))),
    "convolutions": (convolutions, lambda n: (torch.randn(n, 3, 6, 6).double(), torch.randint(5, (n,)))),
    "tokens": (Tokens, tokens),
}


def pair(case, *, optimizer=torch.optim.SGD, schemes, **options):
    """The same model twice, one stepped by eager, one by ``schemes``; both steps and both models."""
    make, batch = CASES[case]
    torch.manual_seed(0)
    models = [make().double()]
    models.append(copy.deepcopy(models[0]))
    steps = []
    for model, which, more in zip(models, ("eager", schemes), ({}, options), strict=True):
        one = optimizer(model.parameters(), lr=1e-2)
        steps.append(graphopt.optimize(model, batch(4), loss=F.cross_entropy, optimizer=one, schemes=which, **more))
    return *steps, *models, batch


def advance(steps, data, seed):
    losses = []
    for step in steps:
        torch.manual_seed(seed)
        losses.append((step(*data), torch.rand(1)))
    (a, after), (b, again) = losses
    assert torch.equal(after, again), "the random state after the step"
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def assert_equal_state(one, other):
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-7, atol=1e-10, msg=name)


def gone(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            return True
        time.sleep(0.02)
    return False


def workers(step):
    return [pid for pool in step.task.pools._pools.values() for pid in pool.processes]
