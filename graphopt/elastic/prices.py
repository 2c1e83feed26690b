"""`Prices`: what the subnets of a space cost, thousands of them a second, before any of them exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from graphopt.cost_model.machine import Machine
from graphopt.cost_model.work import Mode
from graphopt.elastic.counted import CountedGraph
from graphopt.elastic.space import Space
from graphopt.errors import ElasticError

METRICS = ("flops", "parameters", "peak_bytes", "latency_seconds", "step_seconds")


@dataclass(frozen=True)
class Priced:
    """Prices of choices, each an array ``(count,)`` or None where it was not asked for.

    ``flops``: of a forward pass of the whole batch, a multiply-add counts two. ``parameters``: numbers they hold.
    ``peak_bytes``: of a forward pass in eval mode, parameters included. ``latency_seconds``: of that forward pass.
    ``step_seconds``: of forward and backward.
    """

    flops: np.ndarray
    parameters: np.ndarray
    peak_bytes: np.ndarray | None = None
    latency_seconds: np.ndarray | None = None
    step_seconds: np.ndarray | None = None

    def of(self, metric: str) -> np.ndarray:
        """The array of a metric (`METRICS`). Raises ElasticError for one that was not asked for."""
        found = getattr(self, metric) if metric in METRICS else None
        if found is None:
            raise ElasticError(f"metric: {metric!r} was not priced; expected one of {', '.join(METRICS)}")
        return np.asarray(found)
