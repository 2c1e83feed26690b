"""Training by eager and by `optimize` side by side: `Twins`, small models, and `everything`, a snapshot to compare."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import capturing
from graphopt.graph.hyper_parameters import ClipNorm, ClipValue

Batch = tuple[torch.Tensor, ...]


class Net(nn.Module):
    """Convolution, batch norm, dropout and a head: a little of everything, quick to capture."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.drop(h))


class Branching(nn.Module):
    """Control flow that depends on the data: no graph holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x)
        if h.sum() > 0:  # the line that a message must name
            h = -h
        return self.head(h)


def mlp() -> nn.Module:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def images(size: int = 4) -> Batch:
    """A batch for `Net`."""
    return torch.randn(size, 2, 6, 6), torch.randint(3, (size,))


def rows(size: int = 5) -> Batch:
    """A batch for `mlp` and `Branching`."""
    return torch.randn(size, 4), torch.randint(3, (size,))


cross_entropy = F.cross_entropy


class Twins:
    """One model trained twice from the same start: ``eager`` by a loop as users write it, ``ours`` by `optimize`.

    ``make``: the optimizers of a model. `step` trains both on one batch under the same random seed and compares loss,
    parameters, buffers, optimizer state and the random state afterwards, bit for bit.
    """

    def __init__(
        self,
        model: nn.Module,
        make: Callable[[nn.Module], Any],
        *,
        loss: Any = cross_entropy,
        shape: Any = None,
        clip: Any = None,
        accumulate: int = 1,
        keep_grads: bool = False,
        **options: Any,
    ):
        self.eager, self.ours = model, copy.deepcopy(model)
        self.made = tuple(_listed(make(m)) for m in (self.eager, self.ours))
        self.loss, self.clip, self.accumulate, self.keep_grads = loss, clip, accumulate, keep_grads
        given = {"schemes": "flat", **options}
        shape = ((1,) * 4, (1,)) if shape is None else shape
        self.run = graphopt.optimize(
            self.ours, shape, loss=loss, optimizer=self.made[1], clip=clip, accumulate=accumulate,
            keep_grads=keep_grads, **given,
        )  # fmt: skip
        self.batches = 0

    def each(self, change: Callable[[nn.Module, list[torch.optim.Optimizer]], Any]) -> list[Any]:
        """Do something to both models and their optimizers."""
        return [change(m, o) for m, o in zip((self.eager, self.ours), self.made, strict=True)]

    def step(self, *batch: Any) -> torch.Tensor:
        """One batch for both; compares everything and gives the loss."""
        seed = torch.random.initial_seed() + self.batches
        torch.manual_seed(seed)
        expected = self.eager_step(*batch)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        got = self.run(*batch)
        assert torch.equal(torch.get_rng_state(), state), "other random numbers were drawn"
        assert_same(got, expected, "loss")
        self.compare()
        return got

    def steps(self, draw: Callable[..., Batch], number: int = 5) -> None:
        """Several steps on fresh batches."""
        for _ in range(number):
            self.step(*draw())

    def eager_step(self, *batch: Any) -> torch.Tensor:
        """Forward, backward, clipping and update as a user writes them."""
        optimizers = self.made[0]
        if self.batches % self.accumulate == 0:
            for p in self.eager.parameters():
                p.grad = None
        loss = self.loss(self.eager(*batch[:-1]), batch[-1])
        with _no_autocast():
            (loss if self.accumulate == 1 else loss / self.accumulate).backward()
        self.batches += 1
        if self.batches % self.accumulate == 0:
            if isinstance(self.clip, (float, ClipNorm)):
                bound = self.clip if isinstance(self.clip, float) else self.clip.max_norm
                torch.nn.utils.clip_grad_norm_(self.eager.parameters(), bound)
            elif isinstance(self.clip, ClipValue):
                torch.nn.utils.clip_grad_value_(self.eager.parameters(), self.clip.value)
            for optimizer in optimizers:
                optimizer.step()
            if not self.keep_grads:
                for p in self.eager.parameters():
                    p.grad = None
        return loss.detach()

    def compare(self) -> None:
        """Parameters, gradients, buffers and optimizer state of both are equal bit for bit."""
        theirs, mine = (everything(m, o, random=False) for m, o in zip((self.eager, self.ours), self.made, strict=True))
        if self.batches < self.accumulate:  # the state that the first update would make is there already
            mine = {name: value for name, value in mine.items() if not name.startswith("state ")}
        assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
        for name in theirs:
            assert_same(mine[name], theirs[name], name)


def _listed(optimizers: Any) -> list[torch.optim.Optimizer]:
    return list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]


@contextmanager
def _no_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False):
        yield


def everything(model: nn.Module, optimizers: Any = (), *, random: bool = True) -> dict[str, Any]:
    """All that a call must not change: tensors, gradients, flags, hooks, attributes, optimizers, random state."""
    found: dict[str, Any] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = p.detach().clone()
        found[f"gradient {name}"] = None if p.grad is None else p.grad.clone()
        found[f"requires_grad {name}"] = p.requires_grad
    for name, b in model.named_buffers(remove_duplicate=False):
        found[f"buffer {name}"] = b.clone()
    for name, m in model.named_modules():
        found[f"attributes {name}"] = sorted(k for k in m.__dict__)
        found[f"training {name}"] = m.training
        found[f"hooks {name}"] = len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
    for i, optimizer in enumerate(_listed(optimizers)):
        saved = optimizer.state_dict()
        for key, fields in saved["state"].items():
            for field, value in fields.items():
                found[f"state {i}.{key}.{field}"] = value.clone() if isinstance(value, torch.Tensor) else value
        found[f"groups {i}"] = copy.deepcopy(saved["param_groups"])
    if random:
        found["random state"] = torch.get_rng_state()
    return found


def assert_same(got: Any, expected: Any, what: str) -> None:
    """Equal bit for bit if tensors, else equal."""
    if not isinstance(expected, torch.Tensor):
        assert type(got) is type(expected) and got == expected, f"{what}: {got} is not {expected}"
        return
    assert isinstance(got, torch.Tensor) and type(got) is type(expected), f"{what}: {type(got)}"
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), what
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (got, expected)]
    if not torch.equal(*bits):
        raise AssertionError(f"{what} differs: {got} and {expected}")


@contextmanager
def untouched(model: nn.Module, optimizers: Any = ()) -> Iterator[None]:
    """Nothing of model, optimizers and the random state may change within."""
    before = everything(model, optimizers)
    yield
    after = everything(model, optimizers)
    assert after.keys() == before.keys(), after.keys() ^ before.keys()
    for name in before:
        assert_same(after[name], before[name], name)


@contextmanager
def counted_captures() -> Iterator[list[int]]:
    """The batch sizes at which steps are captured within."""
    sizes: list[int] = []
    original = capturing.capture_task

    def counting(task: Any, batch: Any, passes: Any) -> Any:
        made = original(task, batch, passes)
        sizes.append(made.graph.symbols.hints["batch"])
        return made

    capturing.capture_task = counting
    try:
        yield sizes
    finally:
        capturing.capture_task = original


@contextmanager
def one_warning(match: str) -> Iterator[None]:
    """Exactly one GraphoptWarning is given within, and it says ``match``."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        yield
    ours = [str(w.message) for w in given if issubclass(w.category, graphopt.GraphoptWarning)]
    assert len(ours) == 1 and match in ours[0], ours


@contextmanager
def no_warning() -> Iterator[None]:
    """No warning at all within."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
