"""Prices of a training graph: graph x machine x axis sizes -> seconds and bytes.

This folder is imported as ``graphopt.cost_model`` (``graphopt/cost_model`` is a link to it), so that a
user's own ``cost_model.py`` and ours never shadow each other.
"""

if __name__ != "graphopt.cost_model":
    raise ImportError(
        f"this folder was imported as {__name__!r}, which would make a second copy of every class in it; "
        "use `import graphopt.cost_model` (with the repository installed or its root on sys.path)"
    )

from graphopt.cost_model.analytical import estimate
from graphopt.cost_model.communication import Link
from graphopt.cost_model.estimate import Estimate
from graphopt.cost_model.machine import Machine

__all__ = ["Estimate", "Link", "Machine", "estimate"]
