"""The truth about the structures is true: checked by running the modules, without any analysis of graphs."""

import copy
import functools
import itertools

import pytest
import torch
from torch import nn

from tests.structures import STRUCTURES, Place, Structure, load, rescaled, structure, taken, tensors

each = pytest.mark.parametrize("known", STRUCTURES, ids=lambda s: s.name)


def outputs(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        result = model(*batch)
    return [result] if isinstance(result, torch.Tensor) else list(result)


@functools.cache
def prepared(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], list[torch.Tensor]]:
    """The module in float64, in eval mode and with spread parameters, a batch for it, and the outputs."""
    known = structure(name)
    model = rescaled(known.build().double().eval(), seed=1)
    batch = tuple(t.double() if t.is_floating_point() else t for t in known.batch)
    return model, batch, outputs(model, batch)


def shuffle(size: int) -> torch.Tensor:
    """A permutation that is not the identity."""
    generator = torch.Generator().manual_seed(size)
    while (order := torch.randperm(size, generator=generator)).equal(torch.arange(size)):
        pass
    return order


def same(known: Structure, label: str, order: torch.Tensor, but: Place | None = None) -> bool:
    """Whether the outputs stay when a group is permuted in all places but one."""
    model, batch, before = prepared(known.name)
    permuted = load(copy.deepcopy(model), taken(known, model, {label: order}, but))
    return all(torch.allclose(a, b, 1e-9, 1e-9) for a, b in zip(outputs(permuted, batch), before))


def test_names():
    assert len({s.name for s in STRUCTURES}) == len(STRUCTURES) >= 55
    assert structure("plain mlp").free["hidden"] == (7, {("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)})
    assert structure("plain mlp").frozen == {
        ("fc1.weight", 1): "input",
        ("fc2.weight", 0): "output",
        ("fc2.bias", 0): "output",
    }


@each
def test_runs(known):
    """In both modes, backward too, the same numbers each time, and on tensors without values."""
    for mode in (True, False):
        got, again = (outputs(known.build().train(mode), known.batch) for _ in range(2))
        assert all(map(torch.equal, got, again)) and all(t.isfinite().all() for t in got)
    model = known.build()
    result = model(*known.batch)
    sum(r.sum() for r in ([result] if isinstance(result, torch.Tensor) else result)).backward()
    outputs(model.to("meta"), tuple(t.to("meta") for t in known.batch))


@each
def test_permuting_a_free_group_changes_nothing(known):
    for label, (size, _) in known.free.items():
        assert same(known, label, shuffle(size)), label


@each
def test_permuting_a_free_group_in_all_places_but_one_changes_the_outputs(known):
    for label, (size, places) in known.free.items():
        for place in places if len(places) > 1 else ():
            assert not same(known, label, shuffle(size), place), (label, place)


@each
def test_a_free_group_can_shrink(known):
    """A module built with one index less takes the parameters without it, and runs."""
    if not known.rebuilds:
        pytest.skip("the class ties sizes that are apart in the graph")
    model, batch, before = prepared(known.name)
    for label in known.free:
        together = next((group for group in known.same_size if label in group), {label})
        kept = {name: torch.arange(1, known.sizes[name]) for name in together}
        smaller = known.build(**{name: len(rest) for name, rest in kept.items()}).double().eval()
        numbers = taken(known, model, kept)
        assert {n: t.shape for n, t in tensors(smaller).items()} == {n: t.shape for n, t in numbers.items()}, label
        got = outputs(load(smaller, numbers), batch)
        assert [t.shape for t in got] == [t.shape for t in before], label


@each
def test_a_dimension_that_is_not_free_has_an_effect(known):
    """No place is frozen because nothing reads it."""
    model, batch, before = prepared(known.name)
    for name, dim in known.frozen:
        changed = copy.deepcopy(model)
        tensor = tensors(changed)[name]
        load(changed, {**tensors(model), name: tensor.detach().index_select(dim, shuffle(tensor.shape[dim]))})
        assert not all(map(torch.allclose, outputs(changed, batch), before)), (name, dim)


@each
def test_frozen_for_softmax_can_be_permuted(known):
    for label in {known.layout[place] for place, word in known.frozen.items() if word == "softmax"}:
        assert same(known, label, shuffle(known.sizes[label])), label


@each
def test_blocks_can_be_left_out(known):
    for paths in itertools.chain.from_iterable(
        itertools.combinations(known.depth, many) for many in range(1, len(known.depth) + 1)
    ):
        model = known.build().eval()
        shapes = [t.shape for t in outputs(model, known.batch)]
        for path in paths:
            model.set_submodule(path, nn.Identity())
        assert [t.shape for t in outputs(model, known.batch)] == shapes


def test_rescaled_is_a_copy_with_other_numbers():
    model = structure("bottleneck").build()
    first, again, other = rescaled(model, 0), rescaled(model, 0), rescaled(model, 1)
    assert tensors(model)["bn.running_var"].eq(1).all() and tensors(first)["bn.running_var"].gt(0).all()
    for name, tensor in tensors(first).items():
        assert tensor.equal(tensors(again)[name])
        if tensor.dim():
            assert tensor.unique().numel() > 1 and not tensor.equal(tensors(other)[name]), name
