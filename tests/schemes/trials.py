"""One claim, made of every scheme: 50 steps by it end where 50 steps of eager end. `assert_trains_like_eager`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.schemes import Scheme

Batch = tuple[torch.Tensor, ...]

FACTOR = 4.0
"""How many times eager's distance from float64 a scheme's may be: both are sums of roundings in some order."""


class Images(nn.Module):
    """Convolutions (one strided, one depthwise), group norm, a residual sum, pooling and a head."""

    def __init__(self, norm: Callable[[int], nn.Module] = lambda n: nn.GroupNorm(2, n)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = norm(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.norm(self.stem(x)))
        h = h + self.point(F.silu(self.depthwise(h)))
        return self.head(h.mean((2, 3)))


def images(size: int = 6) -> Batch:
    """A batch for `Images`."""
    return torch.randn(size, 3, 12, 12), torch.randint(5, (size,))


def mlp() -> nn.Module:
    """Two linear layers and layer norm."""
    return nn.Sequential(nn.Linear(7, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 5))


def rows(size: int = 8) -> Batch:
    """A batch for `mlp`."""
    return torch.randn(size, 7), torch.randint(5, (size,))


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
    "sgd momentum nesterov": lambda m: torch.optim.SGD(
        m.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "sgd dampening": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, dampening=0.5),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.003),
    "adam amsgrad maximize": lambda m: torch.optim.Adam(m.parameters(), lr=0.003, amsgrad=True, maximize=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.003),
    "adamw foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.003, foreach=True),
    "adamw tensor lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.003)),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.02, lr_decay=0.1),
    "two groups": lambda m: torch.optim.AdamW(
        [{"params": list(m.parameters())[:2], "lr": 0.01}, {"params": list(m.parameters())[2:]}], lr=0.003
    ),
    "two optimizers": lambda m: [
        torch.optim.SGD(list(m.parameters())[:2], lr=0.05, momentum=0.9),
        torch.optim.AdamW(list(m.parameters())[2:], lr=0.003),
    ],
}


def values_of(model: nn.Module, optimizers: Any, losses: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """All that training makes, by name: ``parameter ...``, ``buffer ...``, ``state ...``, ``loss <step>``."""
    found = {f"parameter {n}": p.detach() for n, p in model.named_parameters()}
    found |= {f"buffer {n}": b for n, b in model.named_buffers()}
    for i, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):
        for key, fields in optimizer.state_dict()["state"].items():
            found |= {f"state {i}.{key}.{f}": v for f, v in fields.items() if v is not None}
    return found | {f"loss {i}": loss for i, loss in enumerate(losses)}


def train(
    model: nn.Module, optimizers: Any, batches: Sequence[Batch], *, loss: Any = F.cross_entropy, clip: Any = None,
    accumulate: int = 1, scheme: Scheme | None = None, low: bool = False,
) -> list[torch.Tensor]:  # fmt: skip
    """Train ``model`` on ``batches`` by a scheme, or by a loop as users write it (``low``: under autocast to bf16)."""
    if scheme is not None:
        step = graphopt.optimize(
            model, batches[0], loss=loss, optimizer=optimizers, clip=clip, accumulate=accumulate, schemes=[scheme]
        )
        losses = [step(*batch) for batch in batches]
        assert step.plan.chosen == scheme.name, step.plan.explain()
        return losses
    losses = []
    for i, batch in enumerate(batches):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            value = loss(model(*batch[:-1]), batch[-1])
        (value / accumulate).backward()
        losses.append(value.detach())
        if (i + 1) % accumulate == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.step()
                optimizer.zero_grad()
    return losses


def assert_trains_like_eager(
    scheme: Scheme, model: nn.Module, make: Callable[[nn.Module], Any], batches: Sequence[Batch], *,
    bits: bool = False, low: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Train ``model`` by ``scheme``, by eager, and by eager in float64, on the same batches. The scheme's distance from
    float64 must be of the size of eager's own; with ``bits`` its results are eager's bit for bit."""
    ours, eager, exact = model, copy.deepcopy(model), copy.deepcopy(model).double()
    double = [tuple(t.double() if t.is_floating_point() else t for t in batch) for batch in batches]
    made = [make(m) for m in (ours, eager, exact)]
    seed = torch.random.initial_seed()
    found = []
    for one, optimizers, given, which in zip(
        (ours, eager, exact), made, (batches, batches, double), (scheme, None, None)
    ):
        torch.manual_seed(seed)
        losses = train(one, optimizers, given, scheme=which, low=low and one is eager, **options)
        found.append(values_of(one, optimizers, losses))
    assert found[0].keys() == found[1].keys() == found[2].keys()
    if bits:
        for name, value in found[1].items():
            assert torch.equal(found[0][name], value), f"{name} differs from eager's"
        return
    for kind in dict.fromkeys(name.split()[0] for name in found[1]):
        names = [n for n in found[1] if n.startswith(kind)]
        error, own = (max(_distance(values[n], found[2][n]) for n in names) for values in found[:2])
        assert error <= FACTOR * own + 1e-6, f"{kind}: off by {error:.3g}, eager by {own:.3g}"


def _distance(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert value.shape == truth.shape
    value, truth = value.double(), truth.double()
    return float((value - truth).abs().max() / truth.abs().max().clamp_min(1e-3)) if value.numel() else 0.0
