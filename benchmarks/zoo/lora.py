"""Low-rank adapters (Hu et al., "LoRA", 2021), as small as they can be.

A linear layer's weight W stays as it is, and a product B A of two thin matrices is learned beside it:
``y = W x + b + (alpha / rank) B A x``. Only A and B have gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LoRALinear", "add_lora"]


class LoRALinear(nn.Module):
    """`base` with a trainable low-rank product beside it: ``(..., in_features) -> (..., out_features)``."""

    def __init__(self, base: nn.Module, in_features: int, out_features: int, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(out_features, rank))  # B A = 0: starts as `base`
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def add_lora(
    model: nn.Module, layers: Iterable[str], *, rank: int = 4, alpha: float = 8.0, trained: Iterable[str] = ()
) -> nn.Module:
    """Freezes `model` in place and puts an adapter on every linear layer whose own name is in `layers`.

    Args:
        model: holds ``nn.Linear`` layers, or GPT-2's ``Conv1D``, a linear layer with its weight transposed.
        layers: last parts of module names, such as ``"qkv"``.
        rank: rows of A, columns of B.
        alpha: the adapter's output is multiplied by ``alpha / rank``.
        trained: last parts of the names of modules that stay trainable as a whole, such as a new head.

    Raises:
        ValueError: no layer of `model` has one of these names.
    """
    wanted, kept = set(layers), set(trained)
    model.requires_grad_(False)
    found = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in wanted]
    if not found:
        raise ValueError(f"add_lora: no module of {type(model).__name__} is named any of {sorted(wanted)}")
    for path in found:
        parent, _, name = path.rpartition(".")
        base = model.get_submodule(path)
        features_in, features_out = (
            (base.in_features, base.out_features) if isinstance(base, nn.Linear) else tuple(base.weight.shape)
        )
        adapted = LoRALinear(base, features_in, features_out, rank=rank, alpha=alpha)
        setattr(model.get_submodule(parent), name, adapted)
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in kept:
            module.requires_grad_(True)
    return model
