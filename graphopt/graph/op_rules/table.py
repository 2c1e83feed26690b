"""The table of operator rules: `RULES`, and `NAMED` for operators that are not ATen's. ``entries`` holds the entries.

Conditions see the node's arguments by name: ``lambda a: a.output_mask[1]``. Sources: torch's ``derivatives.yaml``
and the kernels in ``aten/src/ATen/native`` (CPU and CUDA). Each condition under ``reads`` is tested by poisoning the
operand; where no kernel was at hand to test, there is no condition.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from graphopt.graph.op_rules.entries import (
    attention,
    communication,
    gather,
    images,
    losses,
    normalisation,
    pointwise,
    products,
    random_and_factories,
    views,
)
from graphopt.graph.op_rules.op_rule import Entry, OpRule

_SUBJECTS = (
    products, images, attention, normalisation, losses, pointwise, random_and_factories, gather, views, communication,
)  # fmt: skip


def _entered(
    entries: Iterable[Entry],
) -> tuple[dict[torch._ops.OpOverloadPacket | torch._ops.OpOverload, OpRule], dict[str, OpRule]]:
    """Rules by ATen operator, without those that this torch does not have, and by name for all other namespaces."""
    rules: dict[torch._ops.OpOverloadPacket | torch._ops.OpOverload, OpRule] = {}
    named: dict[str, OpRule] = {}
    for names, rule in entries:
        for name in names.split():
            if "::" in name:
                assert name not in named, f"{name} has two entries"
                named[name] = rule
                continue
            packet, _, overload = name.partition(".")
            operator = getattr(torch.ops.aten, packet, None)
            if operator is not None and overload:
                operator = getattr(operator, overload, None)
            if operator is not None:
                assert operator not in rules, f"{name} has two entries"
                rules[operator] = rule
    return rules, named


RULES, NAMED = _entered(e for subject in _SUBJECTS for e in subject.ENTRIES)
"""Rules by operator (an overload that differs from the others of its operator, ``div.Tensor_mode``, has its own); and
by name (``_c10d_functional::all_reduce``) for other namespaces, whose operators may be registered later than this."""
