"""Modes of a model for a while: eval mode, or one of the two as a user would have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Whatever mode the modules are put into inside, afterwards each is in the one that it was in."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside; afterwards each as it was."""
    with keeping_modes(model):
        model.eval()
        yield


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in train or eval mode inside. If it is in that mode it stays as it is, with single modules in another
    one (frozen batch norms); else each module is what ``model.train()`` or ``model.eval()`` makes."""
    with keeping_modes(model):
        if model.training is not training:
            model.train(training)
        yield
