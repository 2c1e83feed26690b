"""Calls of every operator that the table of operator rules knows: `SUBJECTS`, `calls`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.graph.axis_examples.attention import attention, recurrent
from tests.graph.axis_examples.gathers import gathers
from tests.graph.axis_examples.images import convolutions, pooling
from tests.graph.axis_examples.normalisation import losses, normalisation
from tests.graph.axis_examples.numbers import random
from tests.graph.axis_examples.pointwise import pointwise, reductions
from tests.graph.axis_examples.products import products
from tests.graph.axis_examples.views import views
from tests.graph.axis_rule_oracle import Call, recorded

SUBJECTS = {
    f.__name__: f
    for f in (
        products, convolutions, pooling, attention, recurrent, normalisation, losses, pointwise, reductions, random,
        gathers, views,
    )
}  # fmt: skip


@functools.cache
def calls(subject: str) -> tuple[Call, ...]:
    """The calls of a subject and what they run, forward and backward; of calls that differ in values only, one."""
    torch.manual_seed(0)
    found: dict[Any, Call] = {}
    for example in SUBJECTS[subject]():
        for call in (example, *recorded(example)):
            found.setdefault(call.key(), call)
    return tuple(found.values())
