"""Schemes by name: what `optimize` makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import GraphoptError
from graphopt.schemes import Hybrid
from graphopt.schemes.several_processors import threads_of_each
from graphopt.settings import as_schemes


@pytest.mark.parametrize("name", ["hybrid", "data parallel"])
def test_schemes_on_several_processors_get_what_was_asked_for(name: str) -> None:
    found = as_schemes(name, processors=4, batch_norm="local")
    assert found is not None
    (scheme,) = found
    assert (scheme.kind, scheme.processors, scheme.batch_norm) == (name, 4, "local")  # type: ignore[attr-defined]
    assert scheme.threads == threads_of_each(4)  # type: ignore[attr-defined]


def test_a_scheme_object_keeps_its_own_number() -> None:
    assert as_schemes([Hybrid(3)], processors=4) == (Hybrid(3),)


@pytest.mark.parametrize("processors", [None, 1])
@pytest.mark.parametrize("name", ["hybrid", "data parallel"])
def test_without_processors_they_are_refused(name: str, processors: int | None) -> None:
    net = nn.Linear(4, 2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(GraphoptError, match=f"processors: got {processors}, but schemes='{name}'"):
        graphopt.optimize(net, (8, 4), loss=F.cross_entropy, optimizer=sgd, schemes=name, processors=processors)
