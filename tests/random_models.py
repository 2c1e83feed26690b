"""`cases`: hypothesis strategy of small random models, each with a freeze pattern, a dtype, a loss and an optimizer.

Sizes are small on purpose: what is drawn is which operators meet, not how large they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import reject
from hypothesis import strategies as st
from torch import nn

from tests.random_layers import Shape, layer


class RandomModel(nn.Module):
    """An embedding or not, layers, a head; beside the result the model may return others that the loss does not use."""

    def __init__(self, embedding: nn.Module | None, body: Sequence[nn.Module], head: nn.Module, extra: str):
        super().__init__()
        self.embedding, self.body, self.head, self.extra = embedding, nn.Sequential(*body), head, extra
        self.unused = nn.Linear(2, 2) if extra == "module" else None
        self.writes = any(getattr(m, "inplace", False) for m in self.modules())

    def forward(self, x):
        x = x.clone() if self.writes else x  # a step that writes into its batch is no graph
        hidden = self.body(x if self.embedding is None else self.embedding(x))
        out = self.head(hidden)
        if self.extra == "tuple":
            return out, hidden.mean()
        if self.extra == "dict":
            return {"out": out, "hidden": hidden, "number": 3}
        return out

    def extra_repr(self) -> str:
        return f"extra={self.extra!r}"


def _result(output: Any) -> torch.Tensor:
    if isinstance(output, dict):
        return output["out"]
    return output[0] if isinstance(output, tuple) else output


def squared_error(output: Any, target: torch.Tensor) -> torch.Tensor:
    """For targets in the shape of the output."""
    return F.mse_loss(_result(output), target)


def weighted_sum(output: Any, target: torch.Tensor) -> torch.Tensor:
    """A sum: its gradient does not know the batch size."""
    return (_result(output) * target).sum()


def classes(output: Any, target: torch.Tensor) -> torch.Tensor:
    """For targets that are the classes 0 to 2."""
    return F.cross_entropy(_result(output), target)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD with dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, foreach=False),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW, for each": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),  # runs outside the graph
    "two groups": lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "lr": 0.5}], lr=0.1),
}
"""Optimizers by name, each made from the parameters it shall own."""


@dataclass(frozen=True)
class Case:
    """A random model and how it is trained. ``frozen``: names of the parameters that do not require grad (set on the
    model already); ``owned``: names of those the optimizer has. Never trained itself: `instance` gives copies."""

    model: nn.Module
    shape: Shape
    tokens: bool
    out: Shape
    loss: Callable[[Any, torch.Tensor], torch.Tensor]
    dtype: torch.dtype
    frozen: tuple[str, ...]
    optimizer: str
    owned: tuple[str, ...]
    channels_last: bool = field(default=False)

    def instance(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A copy of the model with an optimizer of its own."""
        model = copy.deepcopy(self.model)
        parameters = dict(model.named_parameters())
        return model, OPTIMIZERS[self.optimizer]([parameters[name] for name in self.owned])

    def batch(self, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """A random batch (inputs, target)."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        x = torch.randint(7, (size, *self.shape), generator=generator) if self.tokens else normal(size, *self.shape)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.loss is classes:
            return x, torch.randint(3, (size,), generator=generator)
        return x, normal(size, *self.out)


DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHAPES: tuple[Shape, ...] = ((4,), (6,), (3, 6), (4, 8), (2, 6, 6), (4, 5, 7), (4, 8, 8))


@st.composite
def models(draw, shapes: Sequence[Shape]) -> tuple[Any, ...]:
    """A model with the shape of its input, whether that holds tokens, the shape of its output, and a loss."""
    tokens = shapes is SHAPES and draw(st.integers(0, 3)) == 0
    given: Shape = (draw(st.integers(2, 4)),) if tokens else draw(st.sampled_from(shapes))
    embedding, shape = None, given
    if tokens:
        features = draw(st.sampled_from([2, 4]))
        embedding = nn.Embedding(7, features, padding_idx=draw(st.sampled_from([None, 0])))
        shape = (*given, features)
    body = []
    for _ in range(draw(st.integers(1, 4))):
        module, shape = layer(draw, shape)
        body.append(module)
    loss = draw(st.sampled_from([squared_error, weighted_sum, classes]))
    head: nn.Module = nn.Linear(shape[-1], 2)
    if loss is classes:
        head = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 3))
    extra = draw(st.sampled_from(["nothing", "nothing", "tuple", "dict", "module"]))
    model = RandomModel(embedding, body, head, extra)
    return model, given, tokens, (*shape[:-1], 2), loss


@st.composite
def freeze_patterns(draw, names: Sequence[str]) -> tuple[str, ...]:
    """Names of frozen parameters: none, a prefix, all but the last two, any subset, or all."""
    kind = draw(st.sampled_from(["none", "prefix", "head only", "any", "any", "all"]))
    if kind == "prefix":
        return tuple(names[: draw(st.integers(0, len(names)))])
    if kind == "any":
        return tuple(name for name in names if draw(st.booleans()))
    return {"none": (), "head only": tuple(names[:-2]), "all": tuple(names)}[kind]


@st.composite
def cases(draw, dtypes: Sequence[torch.dtype] = DTYPES, shapes: Sequence[Shape] = SHAPES) -> Case:
    """A `Case`. Norms are in train or eval mode each for itself; a quarter of the models is in eval mode as a whole."""
    model, shape, tokens, out, loss = draw(models(shapes))
    for parameter in model.parameters():  # so that norms' weights are not all 1 and biases not 0
        torch.nn.init.normal_(parameter, 0.3, 0.5)
    if draw(st.integers(0, 3)) == 0:
        model.eval()
    dtype = draw(st.sampled_from(dtypes))
    model.to(dtype)
    names = [name for name, _ in model.named_parameters()]
    frozen = draw(freeze_patterns(names))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    owned = draw(st.sampled_from([names, names[-2:], [n for n in names if n not in frozen] or names]))
    # torch 2.13's group norm for channels-last crashes, in eager too, where it has to make no input gradient
    crashes = any(isinstance(module, nn.GroupNorm) for module in model.modules())
    channels_last = len(shape) == 3 and not crashes and draw(st.booleans())
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = draw(st.sampled_from(sorted(OPTIMIZERS)))
    return Case(model, shape, tokens, out, loss, dtype, frozen, optimizer, tuple(owned), channels_last)


# -- what eager makes of them -----------------------------------------------------------------------------------------


Result = dict[str, torch.Tensor | None]
"""What a step gives, by the text of the graph's output: ``loss loss``, ``gradient w``, ``new state w.exp_avg`` ..."""


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Result:
    """Parameters, buffers and optimizer state as the outputs of a step."""
    found = {f"new parameter {n}": p.detach() for n, p in model.named_parameters()}
    found |= {f"new buffer {n}": b for n, b in model.named_buffers()}
    for name, parameter in model.named_parameters():
        fields = optimizer.state.get(parameter, {}).items()
        found |= {f"new state {name}.{k}": v for k, v in fields if isinstance(v, torch.Tensor)}
    return {name: tensor.clone() for name, tensor in found.items()}


def eager_step(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Result:
    """One step as a user writes it. Rejects examples that torch itself cannot run."""
    *inputs, target = batch
    optimizer.zero_grad()
    try:
        loss = case.loss(model(*inputs), target)
        if loss.requires_grad:
            loss.backward()
        elif any(p.requires_grad for p in model.parameters()):
            reject()  # a user's backward() would fail
    except NotImplementedError:
        reject()
    except (RuntimeError, ValueError) as error:
        if any(words in str(error) for words in ("not implemented", "more than 1 ", "an inplace operation")):
            reject()
        raise
    gradients = {f"gradient {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    return {"loss loss": loss.detach(), **gradients, **state_of(model, optimizer)}
