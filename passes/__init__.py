"""Rewrites of a training graph that keep its meaning: ``TrainingGraph -> PassResult``.

This folder is imported as ``graphopt.passes`` (``graphopt/passes`` is a link to it), so that a user's own
``passes.py`` and ours never shadow each other.
"""

if __name__ != "graphopt.passes":
    raise ImportError(
        f"this folder was imported as {__name__!r}, which would make a second copy of every class in it; "
        "use `import graphopt.passes` (with the repository installed or its root on sys.path)"
    )

from graphopt.passes._base import (
    Change,
    Pass,
    PassResult,
    Pipeline,
    Refusal,
    Saving,
    Tier,
    check,
)
from graphopt.passes._strategies import Strategies, Strategy
from graphopt.passes.common_subexpressions import CommonSubexpressions
from graphopt.passes.constant_folding import ConstantFolding
from graphopt.passes.dead_code import DeadCode
from graphopt.passes.divide_regions import DivideRegions
from graphopt.passes.frozen_folding import FrozenFolding
from graphopt.passes.gradient_liveness import GradientLiveness, LivenessResult
from graphopt.passes.layer_walk import COPIES, WEIGHTLESS, LayerDecision, walk_layers
from graphopt.passes.no_ops import NoOps
from graphopt.passes.scatter_gradients import ScatterGradients
from graphopt.passes.selective_saving import SelectiveSaving
from graphopt.passes.send_up_tree import SendUpTree
from graphopt.passes.shard_axes import ShardAxes
from graphopt.passes.specialise import specialise
from graphopt.passes.synchronise import BucketGradients, GatherAtOwner
from graphopt.passes.zero_tangents import ZeroTangents

__all__ = [
    "COPIES",
    "WEIGHTLESS",
    "BucketGradients",
    "Change",
    "CommonSubexpressions",
    "ConstantFolding",
    "DeadCode",
    "DivideRegions",
    "FrozenFolding",
    "GatherAtOwner",
    "GradientLiveness",
    "LayerDecision",
    "LivenessResult",
    "NoOps",
    "Pass",
    "PassResult",
    "Pipeline",
    "Refusal",
    "Saving",
    "ScatterGradients",
    "SelectiveSaving",
    "SendUpTree",
    "ShardAxes",
    "Strategies",
    "Strategy",
    "Tier",
    "ZeroTangents",
    "check",
    "specialise",
    "walk_layers",
]
