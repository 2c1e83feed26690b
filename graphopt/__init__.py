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

from graphopt import elastic  # noqa: E402
from graphopt.errors import (  # noqa: E402  (the check above must come before any import of ours)
    AxisError,
    BatchError,
    CaptureError,
    CostModelError,
    ElasticError,
    GraphoptError,
    GraphoptWarning,
    LoadError,
    LossError,
    OptimizerError,
    PassError,
    StaleGraphError,
    VerificationError,
    WorkerError,
)
from graphopt.graph.capture import capture  # noqa: E402
from graphopt.graph.differentiate import with_backward  # noqa: E402
from graphopt.graph.forward import capture_forward  # noqa: E402
from graphopt.graph.hyper_parameters import ClipNorm, ClipValue  # noqa: E402
from graphopt.graph.training_graph import TrainingGraph  # noqa: E402
from graphopt.plan import Plan  # noqa: E402
from graphopt.schedule import BatchSizeSchedule  # noqa: E402
from graphopt.step import TrainingStep, optimize  # noqa: E402

__all__ = [
    "AxisError",
    "BatchError",
    "BatchSizeSchedule",
    "CaptureError",
    "ClipNorm",
    "ClipValue",
    "CostModelError",
    "ElasticError",
    "GraphoptError",
    "GraphoptWarning",
    "LoadError",
    "LossError",
    "OptimizerError",
    "PassError",
    "Plan",
    "StaleGraphError",
    "TrainingGraph",
    "TrainingStep",
    "VerificationError",
    "WorkerError",
    "__version__",
    "capture",
    "capture_forward",
    "elastic",
    "optimize",
    "with_backward",
]
