"""A model trained in eager mode and its copy through ``torch.compile``, side by side: `assert_like_eager`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from graphopt.integrations import Piece, backend, recording

Batch = tuple[torch.Tensor, ...]


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    """``model`` through our backend."""
    return torch.compile(model, backend=backend, **options)


def total(output: Any) -> torch.Tensor:
    """A loss of every output, with other gradients for each element."""
    tensors = [output] if isinstance(output, torch.Tensor) else list(output)
    return sum(((t * t.detach().cos()).sum() for t in tensors), torch.zeros(()))


def assert_like_eager(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Callable[[Any], torch.Tensor] = total,
    *,
    around: Callable[[], Any] | None = None,
    lr: float = 0.1,
    **options: Any,
) -> list[Piece]:
    """A step of SGD for each batch gives eager's bits: loss, gradients (None where eager's are), parameters, buffers.

    ``around``: a context manager in which forward runs. Gives the pieces that were compiled.
    """
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    ours = compiled(model, **options)
    sides = [(ours, model), (twin, twin)]
    optimizers = [torch.optim.SGD(m.parameters(), lr) for _, m in sides]
    with recording() as pieces:
        for seed, batch in enumerate(batches):
            values = []
            for (call, _), optimizer in zip(sides, optimizers, strict=True):
                torch.manual_seed(seed)
                optimizer.zero_grad()
                inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in batch]
                if around is None:
                    value = loss(call(*inputs))
                else:
                    with around():
                        value = loss(call(*inputs))
                value.backward()
                values.append((value.detach(), [t.grad for t in inputs], torch.get_rng_state()))
            assert torch.equal(values[0][0], values[1][0]), f"loss {seed}: {values[0][0]} and {values[1][0]} in eager"
            assert torch.equal(values[0][2], values[1][2]), "random numbers"
            _assert_same("gradient of input", list(enumerate(values[0][1])), list(enumerate(values[1][1])))
            for what, of in (("gradient", lambda m: [(n, p.grad) for n, p in m.named_parameters()]),
                             ("buffer", lambda m: list(m.named_buffers()))):  # fmt: skip
                _assert_same(what, of(model), of(twin))
            for optimizer in optimizers:
                optimizer.step()
            _assert_same("parameter", list(model.named_parameters()), list(twin.named_parameters()))
    return pieces


def _assert_same(what: str, ours: list[tuple[Any, Any]], eagers: list[tuple[Any, Any]]) -> None:
    for (name, mine), (_, theirs) in zip(ours, eagers, strict=True):
        assert (mine is None) == (theirs is None), f"{what} {name}: {mine} and {theirs} in eager"
        same = mine is None or torch.equal(mine, theirs)
        assert same, f"{what} {name} differs by {(mine - theirs).abs().max()}"


def bytes_saved(call: Callable[[], Any], without: Sequence[torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps for backward of ``call()``, each once, without those of ``without``."""
    known = {t.untyped_storage().data_ptr() for t in without}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(found.values())
