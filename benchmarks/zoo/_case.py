"""One architecture of the zoo, and the ways its example batches are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Case", "image_batch", "token_batch", "waveform_batch"]

CLASSES = 10
"""How many classes every classifier of the zoo tells apart."""


@dataclass(frozen=True)
class Case:
    """A small model with random weights, a batch for it and a loss: all that one training step needs.

    Attributes:
        name: unique in the zoo.
        family: the package that the architecture comes from: torchvision, timm, transformers, or torch for
            those written here.
        modality: image, text, audio, tabular or sequence.
        build: makes the model, in train mode. The weights follow ``torch.manual_seed``.
        batch: batch size -> random valid batch, a tuple or a dict of tensors whose first axis is the batch.
        loss: for a tuple batch, ``loss(model(*batch[:-1]), batch[-1])``. None for a dict batch: the model is
            called by keyword, finds its labels there and returns its own loss as ``.loss``.
        captures: False where the forward pass depends on the values in the batch, so that no graph holds it
            and eager runs instead.
        note: what a reader of a table of results should know, such as why it does not capture.
    """

    name: str
    family: str
    modality: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, ...] | dict[str, Tensor]]
    loss: Callable[[Any, Tensor], Tensor] | None
    captures: bool = True
    note: str = ""

    def compute_loss(self, model: nn.Module, batch: tuple[Tensor, ...] | dict[str, Tensor]) -> Tensor:
        """The scalar loss of `model` on `batch`, by the convention of the two kinds of batch."""
        if isinstance(batch, dict):
            return model(**batch).loss
        assert self.loss is not None, f"{self.name}: a tuple batch needs a loss"
        return self.loss(model(*batch[:-1]), batch[-1])


def image_batch(size: int, *, channels: int = 3, classes: int = CLASSES) -> Callable[[int], tuple[Tensor, ...]]:
    """Batches of images, float32 ``(n, channels, size, size)``, and one class each, int64 ``(n,)``."""
    return partial(_images, size=size, channels=channels, classes=classes)


def token_batch(length: int, *, vocabulary: int, classes: int = CLASSES) -> Callable[[int], tuple[Tensor, ...]]:
    """Batches of token sequences, int64 ``(n, length)``, and one class each, int64 ``(n,)``."""
    return partial(_tokens, length=length, vocabulary=vocabulary, classes=classes)


def waveform_batch(samples: int, *, classes: int = CLASSES) -> Callable[[int], tuple[Tensor, ...]]:
    """Batches of one-channel sound, float32 ``(n, 1, samples)``, and one class each, int64 ``(n,)``."""
    return partial(_waveforms, samples=samples, classes=classes)


def _images(n: int, *, size: int, channels: int, classes: int) -> tuple[Tensor, ...]:
    return torch.randn(n, channels, size, size), torch.randint(classes, (n,))


def _tokens(n: int, *, length: int, vocabulary: int, classes: int) -> tuple[Tensor, ...]:
    return torch.randint(vocabulary, (n, length)), torch.randint(classes, (n,))


def _waveforms(n: int, *, samples: int, classes: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 1, samples), torch.randint(classes, (n,))
