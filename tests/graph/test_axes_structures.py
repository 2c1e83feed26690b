"""The axes of small structures are the hand-written truth, in forward and joint graphs; permutations prove them."""

import functools

import pytest
import torch

import graphopt
from graphopt.graph.axes import Axes, Axis, Kind, analyse
from graphopt.graph.forward import capture_forward
from tests.axes_oracles import PermutationOracle, shuffles, wide
from tests.axes_oracles_models import groups_of, same_model, wrong_at
from tests.structures import STRUCTURES, Structure, structure

GRAPHS = {"forward": capture_forward, "joint": graphopt.capture}

each = pytest.mark.parametrize("known", STRUCTURES, ids=lambda s: s.name)
each_graph = pytest.mark.parametrize("kind", GRAPHS)

HEADS = ("heads", "groups", "repeats")
SIZES = ("qk", "value", "half", "rest", "size")


@functools.cache
def axes_of(name: str, kind: str) -> Axes:
    """The axes of a structure in train mode."""
    known = structure(name)
    return analyse(GRAPHS[kind](known.build().train(), known.batch))


@functools.cache
def oracle(name: str, kind: str) -> PermutationOracle:
    """The graph with its values."""
    known, axes = structure(name), axes_of(name, kind)
    single = any("mkldnn_rnn" in str(n.target) for n in axes.graph.nodes)  # has no float64
    dtype = torch.float32 if single else torch.float64
    return PermutationOracle(axes, wide(known.build().train()), known.batch, dtype=dtype)


def free(axes: Axes) -> list[Axis]:
    """The free groups."""
    return [g for g in axes.groups() if g.free]


def by_places(axes: Axes) -> dict[tuple[object, frozenset[tuple[str, int]]], Axis]:
    """The groups by what the truth says of them: size, and places in parameters and buffers."""
    of_graph = set(axes.graph.constants)
    return {(g.size, frozenset(tuple(p) for p in g.places if p.name not in of_graph)): g for g in axes.groups()}


@each_graph
@each
def test_free_groups_are_the_truth(known: Structure, kind):
    found = {key for key, group in by_places(axes_of(known.name, kind)).items() if group.free}
    assert found == set(known.free.values())


@each_graph
@each
def test_what_is_not_free_says_why(known: Structure, kind):
    axes = axes_of(known.name, kind)
    for (name, dim), word in known.frozen.items():
        found = list(axes.of(axes.carriers()[name])[dim].axes())
        assert not any(axis.free for axis in found), (name, dim)
        assert all(axis.reason for axis in found), (name, dim)
        assert not found or any(word in axis.reason for axis in found), (name, dim, word, [a.reason for a in found])


@each_graph
@each
def test_nothing_contradicts_and_only_the_custom_operator_is_unknown(known: Structure, kind):
    axes = axes_of(known.name, kind)
    assert axes.contradictions == ()
    assert {u.operator for u in axes.unknown} == ({"structures.mystery.default"} & _operators(axes))


def _operators(axes: Axes) -> set[str]:
    return {str(n.target) for n in axes.graph.nodes}


@each_graph
@each
def test_permuted_axes_permute_every_value(known: Structure, kind):
    checked = oracle(known.name, kind)
    for group in free(checked.axes):
        assert checked.wrong(shuffles([group])) is None, group.name
    assert checked.violations(free(checked.axes), seed=1) == {}


@each
def test_a_place_left_out_changes_a_result(known: Structure):
    checked = oracle(known.name, "forward")
    assert checked.insensitive(free(checked.axes)) == []


@each
def test_the_model_itself_is_unchanged(known: Structure):
    axes = axes_of(known.name, "forward")
    of_graph = set(axes.graph.constants)
    orders = shuffles(g for g in free(axes) if of_graph.isdisjoint(p.name for p in g.places))
    assert same_model(axes, wide(known.build()), known.batch, orders)


@each
def test_forward_and_joint_graph_have_the_same_groups(known: Structure):
    forward, joint = (groups_of(axes_of(known.name, kind)) for kind in GRAPHS)
    assert forward == joint


@each_graph
@pytest.mark.parametrize("known", [s for s in STRUCTURES if {"heads", "repeats"} & s.free.keys()], ids=lambda s: s.name)
def test_heads_and_their_sizes_are_told_apart(known: Structure, kind):
    axes = by_places(axes_of(known.name, kind))
    kinds = {label: axes[key].kind for label, key in known.free.items()}
    assert {kinds[label] for label in HEADS if label in kinds} == {Kind.HEADS}
    assert {kinds[label] for label in SIZES if label in kinds} == {Kind.HEAD_SIZE}


@pytest.mark.parametrize("name", ["residual add", "bottleneck", "tied embedding", "nn.MultiheadAttention"])
def test_the_residual_stream_is_one_group(name):
    axes = axes_of(name, "forward")
    assert [(g.name, g.places) for g in axes.groups() if g.kind is Kind.EMBEDDING] == [
        ("embed", axes.group("embed").places)
    ]
    assert len(axes.group("embed").places) >= 4


@each_graph
@pytest.mark.parametrize("name", ["bottleneck", "attention windows", "learned queries", "patch merging"])
def test_a_graph_holds_for_other_batches(name, kind):
    known = structure(name)
    model = known.build().train()
    whole = (*known.batch, known.batch[0])
    graph = GRAPHS[kind](model, whole, loss=_loss)
    for size in (2, 3):
        batch = tuple(t[:size] for t in whole)
        assert wrong_at(graph, GRAPHS[kind](model, batch, loss=_loss), model, batch) is None


def _loss(output, target):
    return output.square().mean() + target.sum()


def test_the_oracle_says_where_a_group_is_wrong():
    checked = oracle("three residual blocks", "joint")
    stream = checked.axes.group("embed")
    assert checked.wrong(shuffles([stream])) is None
    for place in stream.places:
        assert "aten." in checked.wrong(shuffles([stream]), but=place)
