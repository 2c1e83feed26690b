"""Batches: any nesting of tensors as a flat list, and how a batch is given to a model and a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.errors import BatchError, LossError

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
"""Keys under which a dict batch holds what the loss compares with, in the order tried."""

ModelLoss = "model"
"""``loss="model"``: the model returns its own loss (Hugging Face style)."""


@dataclass(frozen=True)
class BatchLayout:
    """What a batch looks like: nesting, names, constants, and each tensor's dtype, device, shape and strides.

    Hashable: two batches with equal layouts and equal batch sizes run by the same graph. The batch size is the
    leading size of the first tensor; every tensor with that leading size shares it (``batched``).
    """

    spec: Any
    names: tuple[str, ...]
    constants: tuple[tuple[int, Any], ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]
    shapes: tuple[tuple[int | None, ...], ...]  # None: the batch size
    strides: tuple[tuple[int, ...], ...]
    requires_grad: tuple[bool, ...]

    @property
    def batched(self) -> tuple[bool, ...]:
        """For each tensor whether its first dimension is the batch."""
        return tuple(bool(shape) and shape[0] is None for shape in self.shapes)

    def restore(self, tensors: list[torch.Tensor]) -> Any:
        """The batch with these tensors in the places of its own."""
        leaves: list[Any] = list(tensors)
        for position, value in self.constants:
            leaves.insert(position, value)
        return pytree.tree_unflatten(leaves, self.spec)

    def example(self, size: int) -> list[torch.Tensor]:
        """Tensors of zeros that look like those of a batch of ``size``: enough for a capture, which looks at no values.

        Their dimensions have the order in memory that those of the batch have; gaps and overlaps are left out.
        """
        made = []
        for shape, stride, dtype, device, flag in zip(
            self.shapes, self.strides, self.dtypes, self.devices, self.requires_grad, strict=True
        ):
            order = sorted(range(len(shape)), key=lambda d: -stride[d])
            sizes = [size if s is None else s for s in shape]
            tensor = torch.zeros([sizes[d] for d in order], dtype=dtype, device=device)
            made.append(tensor.permute([order.index(d) for d in range(len(order))]).requires_grad_(flag))
        return made


def flatten(batch: Any) -> tuple[list[torch.Tensor], BatchLayout, int]:
    """The tensors of ``batch``, its layout and its batch size.

    A tensor alone counts as the tuple ``(tensor,)``. Leaves that are not tensors are constants of the graph.
    Raises BatchError for a batch without tensors, of size 0, or with leaves that are neither tensors nor hashable.
    """
    batch = normalise(batch)
    with_paths, spec = pytree.tree_flatten_with_path(batch)
    tensors: list[torch.Tensor] = []
    names: list[str] = []
    constants: list[tuple[int, Any]] = []
    for position, (path, leaf) in enumerate(with_paths):
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
            names.append(leaf_name(path))
        else:
            constants.append((position, _hashable(leaf, path)))
    if not tensors:
        raise BatchError("batch: found no tensor in it; give tensors, or a tuple, list or dict that holds some")
    size = next((int(t.shape[0]) for t in tensors if t.dim()), 0)
    if size == 0:
        given = [tuple(t.shape) for t in tensors]
        raise BatchError(f"batch: its size is 0 (shapes {given}); expected a leading dimension of at least 1")
    shapes = tuple(tuple(None if i == 0 and s == size else int(s) for i, s in enumerate(t.shape)) for t in tensors)
    layout = BatchLayout(
        spec=spec,
        names=tuple(names),
        constants=tuple(constants),
        dtypes=tuple(t.dtype for t in tensors),
        devices=tuple(t.device for t in tensors),
        shapes=shapes,
        strides=tuple(t.stride() for t in tensors),
        requires_grad=tuple(t.requires_grad for t in tensors),
    )
    return tensors, layout, size


def normalise(batch: Any) -> tuple[Any, ...] | dict[str, Any]:
    """A batch as a tuple of positional or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch)
    return (batch,)


def one_batch(batch: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """The batch of ``step(x, y)``, ``step((x, y))``, ``step(mapping)`` or ``step(**mapping)``."""
    if keywords:
        if batch:
            raise BatchError("batch: give it by position or by keyword, not both")
        return dict(keywords)
    if len(batch) == 1 and isinstance(batch[0], (tuple, list, Mapping)):
        return normalise(batch[0])
    return batch


def call_model(model: nn.Module, batch: tuple[Any, ...] | dict[str, Any]) -> Any:
    """The model on a whole batch: positional arguments from a tuple, keyword arguments from a dict."""
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def compute_loss(
    model: nn.Module, batch: tuple[Any, ...] | dict[str, Any], loss: Callable[..., Any] | str
) -> torch.Tensor:
    """Forward and loss, as a user writes it.

    With a callable: ``loss(model(*batch[:-1]), batch[-1])`` for a tuple; for a dict the target is taken from the
    first of `TARGET_KEYS` it holds and the rest goes to the model. With ``"model"``: the loss that the model returns.
    """
    if isinstance(loss, str):
        return own_loss(call_model(model, batch))
    if isinstance(batch, dict):
        key = next((k for k in TARGET_KEYS if k in batch), None)
        if key is None:
            raise BatchError(
                f"batch: a dict with keys {sorted(batch)} has no target for the loss; expected one of "
                f"{list(TARGET_KEYS)}, or a model that returns its own loss and loss=None"
            )
        return _applied(loss, model(**{k: v for k, v in batch.items() if k != key}), batch[key])
    if len(batch) < 2:
        raise BatchError("batch: a loss needs inputs and a target, got one tensor; give a tuple (inputs..., target)")
    return _applied(loss, model(*batch[:-1]), batch[-1])


def _applied(loss: Callable[..., Any], output: Any, target: Any) -> Any:
    """``loss(output, target)``. Raises LossError where it does not take what the model returns."""
    try:
        return loss(output, target)
    except TypeError as error:
        if isinstance(output, torch.Tensor):
            raise
        raise LossError(
            f"loss: it does not take the {type(output).__name__} that the model returns ({error}); give one that does, "
            "as loss=lambda output, target: cross_entropy(output.logits, target), or none if the model returns its own"
        ) from error


def own_loss(output: Any) -> torch.Tensor:
    """The loss in a model's output: its ``loss`` attribute or key, a scalar, or the scalar that comes first."""
    found: Any = None
    if isinstance(output, torch.Tensor):
        found = output
    elif isinstance(output, Mapping):
        found = output.get("loss")
    elif hasattr(output, "loss"):
        found = output.loss
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, torch.Tensor) or found.numel() != 1:
        what = f"a tensor of shape {_sizes(output)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise LossError(
            f"loss: none was given and the model's output ({what}) holds no scalar loss; "
            "give loss=..., or call the model with what it needs to compute its own (Hugging Face: labels)"
        )
    return found


def check_loss(loss: Any) -> torch.Tensor:
    """``loss`` itself if backward can start from it (whether it depends on a parameter is not looked at), else raise
    LossError."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        what = f"shape {_sizes(loss)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise LossError(f"loss: expected a scalar tensor, got {what}; reduce it with .mean() or .sum()")
    if not (loss.is_floating_point() or loss.is_complex()):
        raise LossError(f"loss: expected a floating-point scalar, got {loss.dtype}")
    return loss


def _sizes(tensor: torch.Tensor) -> str:
    """Its shape; a size that is a symbol while a step is captured is the batch."""
    return f"[{', '.join(str(s) if isinstance(s, int) else 'batch' for s in tensor.shape)}]"


def leaf_name(path: Any) -> str:
    """The place of a leaf in a nesting: ``inputs.0``, empty for a leaf alone."""
    return ".".join(
        str(next(getattr(k, a) for a in ("key", "idx", "name", "__class__") if hasattr(k, a))) for k in path
    )


def _hashable(leaf: Any, path: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        raise BatchError(
            f"batch: {leaf_name(path)} is a {type(leaf).__name__}; expected tensors and plain values"
        ) from None
    return leaf
