"""Small modules, one structure each, and the truth about their axes, written by hand: `STRUCTURES`, `structure`.

`Structure` says what the truth consists of; ``tests/test_structures.py`` checks it by execution, without any analysis.
"""

from . import (
    attention,
    channel_groups,
    convolutions,
    dense,
    fused_attention,
    indexing,
    reductions,
    sequences,
    weights,
)
from .truth import Place, Structure, load, rescaled, taken, tensors

__all__ = ["STRUCTURES", "Place", "Structure", "load", "rescaled", "structure", "taken", "tensors"]

_SUBJECTS = (
    dense,
    weights,
    reductions,
    indexing,
    convolutions,
    channel_groups,
    sequences,
    attention,
    fused_attention,
)

STRUCTURES: tuple[Structure, ...] = tuple(
    value for module in _SUBJECTS for value in vars(module).values() if isinstance(value, Structure)
)


def structure(name: str) -> Structure:
    """The structure of that name. KeyError without one."""
    return {s.name: s for s in STRUCTURES}[name]
