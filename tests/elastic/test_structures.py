"""Every hand-made structure as a supernet: subnets are the modules built at that size, the full choice the model."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.elastic import Kind, Space, axis_sizes, space
from graphopt.errors import ElasticError
from tests.elastic.oracles import assert_is_module, assert_is_slice, outputs
from tests.graph.test_resize import SCALED, TIED
from tests.structures import STRUCTURES, Structure, rescaled, structure

RIGID = {s.name for s in STRUCTURES if not s.free}
"""Structures in which nothing is free."""

each = pytest.mark.parametrize("known", [s for s in STRUCTURES if s.name not in RIGID], ids=lambda s: s.name)


@functools.cache
def found(name: str) -> Space:
    """The space of a structure in float64, in eval mode, with spread parameters. Head sizes may vary too.

    Captured in eval mode only, to save time: no structure behaves differently in train mode.
    """
    known = structure(name)
    model = rescaled(known.build().double().eval(), seed=1)
    sizes = mock.patch.dict(axis_sizes.SHARES, {Kind.HEAD_SIZE: (0.5, 1.0)})
    with sizes, mock.patch.object(Space, "_in_the_other_mode", return_value=[]):
        return space(model, batch_of(known))


def batch_of(known: Structure) -> tuple[torch.Tensor, ...]:
    return tuple(t.double() if t.is_floating_point() else t for t in known.batch)


def labels(known: Structure) -> dict[str, str]:
    """The label that each dimension of the space has in the structure's own table: the one with the same places."""
    result = {}
    supergraph = found(known.name).primary
    constants = supergraph.graph.constants
    for dimension in found(known.name).dimensions:
        for axis in supergraph.handles[dimension.name].axes(dimension.full):
            places = {(p.name, p.dim) for p in axis.places if p.name not in constants}
            same = [n for n, (size, where) in known.free.items() if size == axis.size and where == places]
            if len(same) == 1:
                result[dimension.name] = same[0]
    return result


@each
def test_the_full_choice_is_the_model(known):
    it = found(known.name)
    batch = batch_of(known)
    with torch.no_grad():
        got, right = outputs(it.run(it.full, *batch)), outputs(it.model(*batch))
    assert all(torch.allclose(a, b, 1e-9, 1e-9) for a, b in zip(got, right, strict=True))
    assert not it.subnet(it.full).slices


@each
def test_the_smallest_subnet_is_the_slice(known):
    it = found(known.name)
    assert_is_slice(it, it.smallest, batch_of(known))


@each
def test_subnets_are_the_modules_of_that_size(known):
    """Against the module built by hand, in which no analysis takes part."""
    if not known.rebuilds or known.name in TIED:
        pytest.skip("the class ties sizes that are apart in the graph")
    it, by_label = found(known.name), labels(known)
    for dimension in it.dimensions:
        label = by_label.get(dimension.name)
        if label is None or (known.name, label) in SCALED:
            continue
        size = dimension.smallest
        choice = it.choice({dimension.name: size})
        keep = {label: torch.arange(size)}
        small = known.build(**{label: size}).double().eval()
        slices = {name: functools.partial(_part, known, keep, name) for name in known_names(known)}
        assert_is_module(it, choice, batch_of(known), small, slices)


def known_names(known: Structure) -> set[str]:
    return {name for name, _ in known.layout}


def _part(known: Structure, keep, name: str, tensor: torch.Tensor) -> torch.Tensor:
    from tests.structures.truth import labels as words
    from tests.structures.truth import positions

    for dim in range(tensor.dim()):
        expression = known.layout[name, dim]
        if not keep.keys().isdisjoint(words(expression)):
            tensor = tensor.index_select(dim, positions(expression, known.sizes, keep)[0])
    return tensor


@settings(max_examples=30)
@given(data=st.data())
def test_any_choice_is_the_slice(data):
    known = data.draw(st.sampled_from([s for s in STRUCTURES if s.name not in RIGID]))
    it = found(known.name)
    choice = it.choice({d.name: data.draw(st.sampled_from(d.choices)) for d in it.dimensions})
    assert_is_slice(it, choice, batch_of(known))


def test_most_structures_are_elastic_and_labels_are_found():
    named = sum(len(labels(s)) for s in STRUCTURES if s.name not in RIGID)
    everything = sum(len(found(s.name).dimensions) for s in STRUCTURES if s.name not in RIGID)
    assert named >= 0.7 * everything, (named, everything)


@pytest.mark.parametrize("name", sorted(RIGID))
def test_a_structure_in_which_nothing_is_free_is_refused(name):
    known = structure(name)
    with pytest.raises(ElasticError, match="nothing in it is elastic"):
        space(known.build().eval(), known.batch)
