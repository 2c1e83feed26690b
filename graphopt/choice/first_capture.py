"""The first capture of a step, weighed like any other start: where steps are few, eager may be over before it pays."""

from __future__ import annotations

from torch import nn

from graphopt.choice.payback import GUESS

SHORTEST = 1e-3
"""Seconds of a step below which hardly any lies: whoever runs so many that even then a capture pays need not weigh."""

FIXED_SECONDS, SECONDS_A_LAYER = 0.25, 0.03
"""What a capture with its passes takes: at all, and for each module with parameters besides. Measured on one core:
0.3 s for two layers, 0.5 s for five, 1.0 to 1.6 s for forty (4.6 s for six of `torch.nn.TransformerEncoderLayer`)."""


def capture_seconds(model: nn.Module) -> float:
    """Seconds that the first capture of a model's step should take, by its number of layers."""
    layers = sum(1 for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
    return FIXED_SECONDS + SECONDS_A_LAYER * layers


def has_to_pay(model: nn.Module, steps: float) -> bool:
    """Whether so few steps are to come that the capture of a fast one might never pay back: then a step of eager is
    measured before.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> has_to_pay(net, steps=5), has_to_pay(net, steps=10_000)
    (True, False)
    """
    return GUESS * SHORTEST * steps < capture_seconds(model)
