"""Batch norm by the statistics of the rows of all ranks, for subnets that autograd differentiates.

What `torch.nn.SyncBatchNorm` computes on GPUs, written with operators that every device has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from graphopt.elastic.subnet import batch_norm


def synchronized_batch_norm(
    x: torch.Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float
) -> tuple[torch.Tensor, ...]:
    """As `batch_norm`, with the statistics of all ranks of the default group; called by all of them together.

    The variance is taken about the common mean, by a second sum: sums of squares alone lose digits.
    """
    if not training:
        return batch_norm(x, weight, bias, mean, variance, training, momentum, eps)
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    others = [d for d in range(x.dim()) if d != 1]
    given = x.to(mean.dtype)
    rows = given.new_full((1,), x.numel() // x.shape[1])
    first = _Sum.apply(torch.cat([given.sum(others), rows]))
    count = first[-1].detach()
    center = first[:-1] / count
    away = given - center.view(shape)
    spread = _Sum.apply(away.square().sum(others)) / count
    scale = (spread + eps).rsqrt()
    result = away * scale.view(shape)
    if weight is not None:
        result = result * weight.view(shape)
    if bias is not None:
        result = result + bias.view(shape)
    with torch.no_grad():
        new_mean = torch.lerp(mean, center, momentum)
        unbiased = spread * (count / (count - 1))
        new_variance = torch.lerp(variance, unbiased, momentum)
    return result.to(x.dtype), center.detach(), scale.detach(), new_mean, new_variance


class _Sum(torch.autograd.Function):
    """The sum over ranks; backward sums the gradients that ranks have of it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        summed = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return _Sum.apply(gradients[0])  # type: ignore[no-any-return]
