"""Exploration: many workers, one pool of history models, the best model under a budget.

`explore` runs a search; the rest are what it takes and gives. Names are imported when they are first asked for: a
generator needs few of them, and no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.exploration.context import Context, Pruned
    from graphopt.exploration.early_stopping import ASHA
    from graphopt.exploration.exploring import explore
    from graphopt.exploration.hyper_parameters import HyperParameter, choice, integer, linear, log
    from graphopt.exploration.predictor import CostModelPredictor, ElasticPredictor
    from graphopt.exploration.search_space import ModelFunction
    from graphopt.exploration.study import Study, open_study
    from graphopt.exploration.training import Training

__all__ = [
    "ASHA",
    "Context",
    "CostModelPredictor",
    "ElasticPredictor",
    "HyperParameter",
    "ModelFunction",
    "Pruned",
    "Study",
    "Training",
    "choice",
    "explore",
    "integer",
    "linear",
    "log",
    "open_study",
]

_HOMES = {
    "ASHA": "early_stopping",
    "Context": "context",
    "CostModelPredictor": "predictor",
    "ElasticPredictor": "predictor",
    "HyperParameter": "hyper_parameters",
    "ModelFunction": "search_space",
    "Pruned": "context",
    "Study": "study",
    "Training": "training",
    "choice": "hyper_parameters",
    "explore": "exploring",
    "integer": "hyper_parameters",
    "linear": "hyper_parameters",
    "log": "hyper_parameters",
    "open_study": "study",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
