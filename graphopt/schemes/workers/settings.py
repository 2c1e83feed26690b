"""Settings of torch that change what an operator computes: the workers take those of main."""

from __future__ import annotations

from typing import Any

import torch


def settings() -> list[Any]:
    """Those of this process, as JSON can hold them."""
    return [
        str(torch.get_default_dtype()).removeprefix("torch."),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        bool(torch.backends.mkldnn.enabled),
    ]


def apply(given: list[Any]) -> None:
    """Take over the settings of another process."""
    dtype, precision, deterministic, warn_only, mkldnn = given
    torch.set_default_dtype(getattr(torch, dtype))
    if precision != torch.get_float32_matmul_precision():  # even the same one, set, is another key in Inductor's cache
        torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.backends.mkldnn.enabled = mkldnn
