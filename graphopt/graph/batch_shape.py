"""What `optimize` is told of a batch before it sees one: a shape, a nested structure of shapes, or an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphopt.errors import BatchError
from graphopt.graph.batch import TARGET_KEYS, BatchLayout


def dimensions(batch_shape: Any) -> list[int] | dict[str, list[int]]:
    """Numbers of dimensions of the tensors that ``batch_shape`` describes: in order, or by key."""
    if isinstance(batch_shape, torch.Tensor):
        return [batch_shape.dim()]
    if isinstance(batch_shape, Mapping):
        return {str(key): _in_order(value) for key, value in batch_shape.items()}
    if isinstance(batch_shape, (tuple, list, torch.Size)) and len(batch_shape):
        if all(isinstance(s, int) and not isinstance(s, bool) for s in batch_shape):
            if any(s < 1 for s in batch_shape):
                raise BatchError(f"batch_shape: {tuple(batch_shape)} has a size below 1; expected positive sizes")
            return [len(batch_shape)]
        return [d for value in batch_shape for d in _in_order(value)]
    raise BatchError(
        f"batch_shape: expected a tuple of ints, a nested structure of them or an example batch, got {batch_shape!r}"
    )


def _in_order(batch_shape: Any) -> list[int]:
    found = dimensions(batch_shape)
    return [d for values in found.values() for d in values] if isinstance(found, dict) else found


def check_dimensions(told_of: list[int] | dict[str, list[int]], layout: BatchLayout) -> None:
    """Raise BatchError where a batch has other numbers of dimensions than `optimize` was told."""
    pairs = list(zip(layout.names, layout.shapes, strict=True))
    if isinstance(told_of, dict):
        of_key = {key: [p for p in pairs if p[0].partition(".")[0] == key] for key in told_of}
        told = [(d, *pair) for key, many in told_of.items() for d, pair in zip(many, of_key[key], strict=False)]
    else:
        if len(told_of) < len(pairs):  # told of the inputs only, while the batch has a target too
            pairs = [(name, shape) for name, shape in pairs if name not in TARGET_KEYS]
        told = [(d, *pair) for d, pair in zip(told_of, pairs, strict=False)]
    for expected, name, shape in told:
        if len(shape) != expected:
            raise BatchError(
                f"batch: {name} has {len(shape)} dimensions, batch_shape said {expected}; expected batches that differ "
                "in sizes only (call optimize() again for another kind of batch)"
            )
