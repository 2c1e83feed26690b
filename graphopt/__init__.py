"""graphopt: compiler-style graph optimization for PyTorch training.

A training step (forward, loss, backward and update) is captured once as one graph, rewritten by passes
that keep its meaning, and run by the scheme that is fastest for the batch at hand.
"""

import os as _os

__version__ = "0.1.0"

# `passes` and `cost_model` are symbolic links in a checkout and real folders in an installed wheel. Where
# git could not make links (Windows without developer mode, some archives) each is a small text file, and
# importing it would only say "No module named 'graphopt.passes'". Two file-system look-ups tell the user.
for _name in ("passes", "cost_model"):
    if _os.path.isfile(_os.path.join(_os.path.dirname(__file__), _name)):
        raise ImportError(
            f"graphopt/{_name} is a text file, but should be a symbolic link to ../{_name}: this checkout "
            "was made without symbolic links. In the repository run\n"
            "    git config core.symlinks true\n"
            "    git checkout -- graphopt/passes graphopt/cost_model\n"
            "(on Windows with developer mode switched on), or install a wheel, which needs no links."
        )
del _name

from typing import TYPE_CHECKING as _TYPE_CHECKING  # noqa: E402
from typing import Any as _Any  # noqa: E402

if _TYPE_CHECKING:
    from graphopt.bisection.bisecting import bisect
    from graphopt.errors import (
        AxisError,
        BatchError,
        BudgetTooTight,
        CaptureError,
        CostModelError,
        ElasticError,
        ExplorationError,
        GraphoptError,
        GraphoptWarning,
        LoadError,
        LossError,
        OptimizerError,
        PassError,
        RankError,
        StaleGraphError,
        StoreError,
        VerificationError,
        WorkerError,
    )
    from graphopt.exploration.exploring import explore
    from graphopt.graph.capture import capture
    from graphopt.graph.differentiate import with_backward
    from graphopt.graph.forward import capture_forward
    from graphopt.graph.hyper_parameters import ClipNorm, ClipValue
    from graphopt.graph.training_graph import TrainingGraph
    from graphopt.plan import Plan
    from graphopt.schedule import BatchSizeSchedule
    from graphopt.step import TrainingStep, optimize
    from graphopt.visualize.show import show

# What is public is imported when it is first asked for: the generators of an exploration are processes that need a
# search space and no torch, and start in a tenth of the time.
_HOMES = {
    "BatchSizeSchedule": "schedule",
    "ClipNorm": "graph.hyper_parameters",
    "ClipValue": "graph.hyper_parameters",
    "Plan": "plan",
    "TrainingGraph": "graph.training_graph",
    "TrainingStep": "step",
    "bisect": "bisection.bisecting",
    "capture": "graph.capture",
    "capture_forward": "graph.forward",
    "explore": "exploration.exploring",
    "optimize": "step",
    "show": "visualize.show",
    "with_backward": "graph.differentiate",
}


def __getattr__(name: str) -> _Any:
    import importlib

    if name in __all__:
        home = importlib.import_module(f"graphopt.{_HOMES.get(name, 'errors')}")
        globals()[name] = found = getattr(home, name)
        return found
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"graphopt.{name}")  # the floors: graphopt.passes, graphopt.cost_model ...
        except ModuleNotFoundError as error:
            if error.name != f"graphopt.{name}":
                raise
    raise AttributeError(f"module 'graphopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AxisError",
    "BatchError",
    "BatchSizeSchedule",
    "BudgetTooTight",
    "CaptureError",
    "ClipNorm",
    "ClipValue",
    "CostModelError",
    "ElasticError",
    "ExplorationError",
    "GraphoptError",
    "GraphoptWarning",
    "LoadError",
    "LossError",
    "OptimizerError",
    "PassError",
    "Plan",
    "RankError",
    "StaleGraphError",
    "StoreError",
    "TrainingGraph",
    "TrainingStep",
    "VerificationError",
    "WorkerError",
    "__version__",
    "bisect",
    "capture",
    "capture_forward",
    "explore",
    "optimize",
    "show",
    "with_backward",
]
