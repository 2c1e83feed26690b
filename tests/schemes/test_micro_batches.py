"""Micro-batches: parts make up the whole where they say so, and say why where they do not."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import GraphoptError
from graphopt.schemes import Eager, Flat, MicroBatches, Prepared
from graphopt.schemes.micro_batches import part_sizes
from tests.schemes.trials import OPTIMIZERS, Images, assert_trains_like_eager, images, mlp, rows
from tests.training import untouched


class Reader(nn.Module):
    """Embedding, attention, layer norm; logits of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(h)


def next_token(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of a language model: each token is the target of the one before; some are ignored."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=3)


def texts(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch for `Reader`."""
    tokens = torch.randint(11, (size, 5))
    return tokens, tokens


def numbers(size: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch for a regression by `mlp`."""
    return torch.randn(size, 7), torch.randn(size, 5)


def own_mean(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A mean as one writes it by hand: a sum, divided by the number of samples."""
    return (output - target).square().sum() / (2 * output.shape[0])


def with_decay(model: nn.Module) -> Any:
    """A mean plus what no sample has a part in."""
    weight = next(iter(model.parameters()))
    return lambda output, target: F.mse_loss(output, target) + 0.01 * weight.square().sum()


CASES: dict[str, Any] = {
    "cross entropy of images": (Images, images, F.cross_entropy),
    "cross entropy of rows": (mlp, lambda: rows(7), F.cross_entropy),
    "tokens, some ignored": (Reader, texts, next_token),
    "mean square": (mlp, numbers, F.mse_loss),
    "sum of squares": (mlp, numbers, lambda o, t: F.mse_loss(o, t, reduction="sum")),
    "mean by hand": (mlp, numbers, own_mean),
    "two means": (mlp, numbers, lambda o, t: F.mse_loss(o, t) + 0.5 * F.l1_loss(o, t)),
    "batch norm in eval mode": (lambda: Images(nn.BatchNorm2d).eval(), images, F.cross_entropy),
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_end_where_eager_ends(name: str, count: int) -> None:
    build, draw, loss = CASES[name]
    assert_trains_like_eager(MicroBatches(count), build(), OPTIMIZERS["adamw"], [draw() for _ in range(50)], loss=loss)


@pytest.mark.parametrize("optimizer", ["sgd momentum nesterov", "two optimizers", "adagrad"])
@pytest.mark.parametrize("options", [{}, {"clip": 0.3}], ids=["", "clipping"])
@pytest.mark.parametrize("scheme", [MicroBatches(3), MicroBatches(2, fused=True)], ids=lambda s: s.name)
def test_with_other_updates(scheme: MicroBatches, optimizer: str, options: Any) -> None:
    batches = [rows(8 if i % 2 else 7) for i in range(50)]
    assert_trains_like_eager(scheme, mlp(), OPTIMIZERS[optimizer], batches, **options)


# -- exact or refused -------------------------------------------------------------------------------------------------


def one_step(scheme: Any, model: nn.Module, loss: Any, batch: Any) -> tuple[dict[str, torch.Tensor], str | None]:
    """Parameters and loss behind one step of SGD in float64, and why the scheme was left out, if it was."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = graphopt.optimize(model, batch, loss=loss, optimizer=optimizer, schemes=[scheme, Eager()])
    value = step(*batch)
    return {"loss": value, **dict(model.named_parameters())}, step.plan.candidates[0].why_not


class Function(nn.Module):
    """A linear layer, and any function of its output."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(7, 5), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x))


SAME = lambda h: h
WEIGHTS = torch.rand(5).double()

REFUSED: dict[str, tuple[Any, Any, str]] = {
    "dropout": (nn.Dropout(0.5), F.cross_entropy, "draws random numbers"),
    "batch norm": (nn.BatchNorm1d(5), F.cross_entropy, "statistics of the whole batch"),
    "batch norm without running statistics": (
        nn.BatchNorm1d(5, track_running_stats=False),
        F.cross_entropy,
        "statistics of the whole batch",
    ),
    "centred on the batch": (lambda h: h - h.mean(0), F.cross_entropy, "meet a value of the whole batch"),
    "flipped": (lambda h: h + h.flip(0), F.cross_entropy, "means something"),
    "rolled": (lambda h: h - h.roll(1, 0), F.cross_entropy, "means something"),
    "summed up": (lambda h: h.cumsum(0), F.cross_entropy, "means something"),
    "sorted": (lambda h: h.sort(0)[0], F.cross_entropy, "means something"),
    "first sample": (lambda h: h + h[0], F.cross_entropy, "picks samples|means something|cut"),
    "halves": (lambda h: torch.cat([h[: h.shape[0] // 2] * 2, h[h.shape[0] // 2 :]]), F.cross_entropy, "cut|means"),
    "numbered": (lambda h: h * torch.arange(h.shape[0])[:, None], F.cross_entropy, "gives positions"),
    "attention among samples": (lambda h: torch.softmax(h @ h.T, 1) @ h, F.cross_entropy, ""),
    "pairs of samples": (SAME, lambda o, t: (o[:, None] - o[None]).square().mean(), "samples meet each other"),
    "twice": (SAME, lambda o, t: torch.cat([o, o]).square().mean(), "samples meet each other"),
    "scrambled": (lambda h: h.T.reshape(h.shape), F.cross_entropy, ""),
    "two samples in a row": (lambda h: h.reshape(-1, 10)[:, :5].repeat(2, 1), F.cross_entropy, ""),
    "indexed by data": (lambda h: h[h.argmax(1)], F.cross_entropy, ""),
    "best samples": (SAME, lambda o, t: o.topk(2, 0)[0].mean(), ""),
    "shifted targets": (SAME, lambda o, t: F.cross_entropy(o[1:], t[:-1]), ""),
    "convolved over the batch": (
        lambda h: F.conv1d(h.T[None], torch.ones(5, 5, 3).double(), padding=1)[0].T,
        F.cross_entropy,
        "",
    ),
    "softmax over samples": (lambda h: torch.softmax(h, 0), F.cross_entropy, "statistics of the whole batch"),
    "times the size": (lambda h: h * h.shape[0], F.cross_entropy, "depends on the size of the batch"),
    "class weights": (SAME, lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS), "class weights"),
    "root of a mean": (SAME, lambda o, t: F.cross_entropy(o, t).sqrt(), "not linear in a mean"),
    "maximum": (SAME, lambda o, t: F.cross_entropy(o, t, reduction="none").max(), "statistics of the whole batch"),
    "product of means": (SAME, lambda o, t: F.cross_entropy(o, t) * o.mean(), "different numbers"),
    "square of a mean": (SAME, lambda o, t: o.mean() * o.mean(), "not linear"),
    "mean of targets and mean of samples": (SAME, lambda o, t: F.cross_entropy(o, t) + o.mean(), "different numbers"),
    "sum and what is no sum": (
        SAME,
        lambda o, t: F.cross_entropy(o, t, reduction="sum") + F.cross_entropy(o, t),
        "different numbers",
    ),
    "sum and a number": (
        SAME,
        lambda o, t: F.cross_entropy(o, t, reduction="sum") + WEIGHTS.sum(),
        "what does not depend on it",
    ),
    "mean, times the size": (SAME, lambda o, t: F.cross_entropy(o, t) * o.shape[0], "depends on the size of the batch"),
    "a buffer that counts": (None, F.cross_entropy, "changes buffers"),
}


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return h


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_with_the_reason(name: str) -> None:
    function, loss, reason = REFUSED[name]
    model = Function(Counting() if function is None else function).double()
    batch = torch.randn(8, 7).double(), torch.randint(5, (8,))
    _, why_not = one_step(MicroBatches(2), model, loss, batch)
    assert why_not is not None and re.search(reason, why_not), why_not


EXACT: dict[str, tuple[Any, Any]] = {
    "layer norm": (nn.LayerNorm(5), F.cross_entropy),
    "softmax over features": (lambda h: torch.softmax(h, 1), F.cross_entropy),
    "label smoothing, or refused": (SAME, lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1)),
    "mean of a mean": (SAME, lambda o, t: o.square().mean(1).mean()),
    "weighted sum of means": (SAME, lambda o, t: 0.3 * o.square().mean() - o.mean() / 3),
    "mean by the number of elements": (SAME, lambda o, t: o.square().sum() / o.numel()),
    "products over samples": (SAME, lambda o, t: (o.T @ o).sum()),
    "masked by the size": (lambda h: h * torch.ones(h.shape[0], 1, dtype=h.dtype), F.cross_entropy),
    "mean of all features": (SAME, lambda o, t: o.mean((0, 1)) + o.abs().mean(0).sum()),
    "soft targets": (SAME, lambda o, t: F.cross_entropy(o, F.one_hot(t, 5).to(o.dtype))),
    "log likelihood": (SAME, lambda o, t: F.nll_loss(torch.log_softmax(o, -1), t, reduction="sum")),
    "huber": (SAME, lambda o, t: F.huber_loss(o, F.one_hot(t, 5).to(o.dtype))),
    "scaled by a parameter": (SAME, lambda o, t: F.cross_entropy(o, t) * WEIGHTS[0]),
}


@pytest.mark.parametrize("count, size", [(2, 8), (3, 8), (3, 7)])
@pytest.mark.parametrize("name", EXACT)
def test_what_is_accepted_is_exact(name: str, count: int, size: int) -> None:
    """Judged in float64, where the parts and the whole differ by rounding of 1e-16 only."""
    function, loss = EXACT[name]
    model = Function(function).double()
    twin = copy.deepcopy(model)
    batch = torch.randn(size, 7).double(), torch.randint(5, (size,))
    ours, why_not = one_step(MicroBatches(count), model, loss, batch)
    eager, _ = one_step(Eager(), twin, loss, batch)
    assert why_not is None or "or refused" in name, why_not
    for key, value in eager.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-12, atol=1e-13)


def test_parts_of_which_one_is_ignored_altogether() -> None:
    model = mlp()
    x, y = rows(8)
    for ignored in (slice(0, 4), slice(4, 8), slice(1, 2)):
        targets = y.clone()
        targets[ignored] = -100
        ours, eager = copy.deepcopy(model).double(), copy.deepcopy(model).double()
        found, why_not = one_step(MicroBatches(2), ours, F.cross_entropy, (x.double(), targets))
        wanted, _ = one_step(Eager(), eager, F.cross_entropy, (x.double(), targets))
        assert why_not is None
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-13)


def test_a_batch_that_is_ignored_altogether_is_what_it_is_in_eager() -> None:
    model = mlp()
    x, y = rows(8)
    twin = copy.deepcopy(model)
    batch = x, torch.full_like(y, -100)
    found, _ = one_step(MicroBatches(2), model, F.cross_entropy, batch)
    wanted, _ = one_step(Eager(), twin, F.cross_entropy, batch)
    for key, value in wanted.items():
        assert torch.equal(found[key].isnan(), value.isnan())


# -- sizes, memory, faults --------------------------------------------------------------------------------------------


@given(size=st.integers(2, 300), count=st.integers(2, 20))
def test_parts_are_as_equal_as_can_be(size: int, count: int) -> None:
    parts = part_sizes(size, count)
    assert sum(parts) == size and len(parts) == count and parts[0] - parts[-1] <= 1
    assert parts == sorted(parts, reverse=True)  # the largest, which decides memory, comes first


def test_parts_of_one_sample_are_refused() -> None:
    _, why_not = one_step(MicroBatches(4), mlp(), F.cross_entropy, rows(7))
    assert "parts of 1 and 2" in (why_not or "")


def test_parts_keep_less_for_backward() -> None:
    """Live bytes of activations by the graph itself: exact figures, not a clock."""
    from graphopt.cost_model import Machine

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphopt.optimize(model, rows(64), loss=F.cross_entropy, optimizer=optimizer, schemes=["flat"])
    step(*rows(64))
    ((situation),) = step._situations.values()
    prepared = Prepared(step.task, situation.layout, situation.steps[0])
    machine = replace(Machine.named("H100"), device="cpu")
    machines = lambda threads: machine
    whole = Flat().estimate(prepared, 64, machines)
    parts = {count: MicroBatches(count).estimate(prepared, 64, machines) for count in (2, 4)}
    assert whole is not None and all(parts.values())
    samples = {count: price.bytes_kept - 4 for count, price in parts.items()}  # and the number of targets, in float32
    assert 4 * samples[4] == 2 * samples[2] == whole.bytes_kept - 4
    assert parts[4].peak_bytes < parts[2].peak_bytes < whole.peak_bytes
    assert parts[4].seconds > parts[2].seconds > whole.seconds
    assert parts[4].sizes == {"batch": 64}
    assert parts[4].terms.keys() == whole.terms.keys()
    assert sum(parts[4].terms.values()) == pytest.approx(parts[4].seconds)
    assert parts[4].flops == whole.flops


def test_a_fault_in_one_part_changes_nothing() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step = graphopt.optimize(model, rows(8), loss=F.cross_entropy, optimizer=optimizer, schemes=[MicroBatches(2)])
    step(*rows(8))
    x, y = rows(8)
    y[6] = 1000  # no such class, in the second part
    with untouched(model, optimizer), pytest.raises(IndexError):
        step(x, y)


def test_kept_gradients_are_those_of_the_whole_batch() -> None:
    model, batch = mlp(), rows(8)
    twin = copy.deepcopy(model)
    step = graphopt.optimize(
        model, batch, loss=F.cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), clip=0.01,
        keep_grads=True, schemes=[MicroBatches(2)],
    )  # fmt: skip
    step(*batch)
    F.cross_entropy(twin(batch[0]), batch[1]).backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("count", [0, 1, True, 2.0])
def test_what_is_no_number_of_parts(count: Any) -> None:
    with pytest.raises(GraphoptError, match="count: expected an integer of at least 2"):
        MicroBatches(count)
