"""What examples are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.graph.axis_rule_oracle import Call

aten = torch.ops.aten


def floats(*shape: int) -> torch.Tensor:
    """Random numbers; float64, so that rounding hides nothing."""
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> torch.Tensor:
    """Random numbers between 0.1 and 0.9."""
    return torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1


def below(limit: int, *shape: int) -> torch.Tensor:
    """Random indices."""
    return torch.randint(limit, shape)


def call(name: str, *args: Any, **kwargs: Any) -> Call:
    """An ATen operator by name (``sum.dim_IntList``; without an overload the default one)."""
    packet, _, overload = name.partition(".")
    return Call(getattr(getattr(aten, packet), overload or "default"), args, kwargs)


def stand_in(name: str, kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
    """A call of an operator that has no kernel here; ``kernel`` computes the same."""
    made = call(name, *args, **kwargs)
    return Call(made.operator, made.args, made.kwargs, kernel)
