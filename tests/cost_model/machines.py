"""A small made-up machine whose prices can be counted by hand."""

from graphopt.cost_model.curves import Curve
from graphopt.cost_model.kernels import LOOPS, Family
from graphopt.cost_model.machine import LAUNCHES, Machine

RATE, BANDWIDTH, LAUNCH = 1e9, 1e8, 1e-6
"""flop/s, bytes/s, seconds."""


def simple(**changes) -> Machine:
    """Products run at `RATE`, bytes move at `BANDWIDTH`, a launch takes `LAUNCH`; nothing else costs."""
    points = ((1.0, 1.0 / BANDWIDTH), (1e9, 1e9 / BANDWIDTH))
    rates = dict.fromkeys(("fp64", "fp32", "tf32"), RATE) | {"bf16": 4 * RATE, "fp16": 4 * RATE}
    curves = {
        family: Curve(rates if family in LOOPS else {}, points=points)
        for family in Family
        if family not in (Family.NONE, Family.COMMUNICATION)
    }
    given = {
        "name": "simple", "device": "cpu", "curves": curves, "launch": dict.fromkeys(LAUNCHES, LAUNCH),
        "memory_bytes": 2**34, "spread": 0.1,
    }  # fmt: skip
    return Machine(**given | changes)
