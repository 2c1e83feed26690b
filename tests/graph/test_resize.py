"""Resized forward graphs are the modules that were built at that size: outputs, gradients, shapes; errors."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphopt.errors import AxisError
from graphopt.graph.axes import analyse
from graphopt.graph.forward import capture_forward
from graphopt.graph.resize import indices, resize, take
from tests.axes_oracles_resize import (
    against_module,
    backward_agrees,
    check_resizing,
    double,
    far,
    kept,
    maskable,
    masked,
    run,
)
from tests.structures import STRUCTURES, rescaled, structure, taken, tensors

each = pytest.mark.parametrize("known", STRUCTURES, ids=lambda s: s.name)
TIED = {"fused qkv by equal split, causal", "interleaved qkv by chunk", "chunk, append, cat"}
"""The module ties sizes that are apart in the graph."""
SCALED = {
    ("attention by matmul and softmax", "qk"),
    ("multi-query attention", "qk"),
    ("attention windows", "size"),
}
"""The module computes ``1 / math.sqrt(size)``; a number that the user wrote stays as it is in the graph."""


@functools.cache
def prepared(name):
    """Forward graph in float64, its axes, the numbers, the batch, and the axis of each label of the structure."""
    known = structure(name)
    model = rescaled(known.build().double().eval(), seed=1)
    batch = double(known.batch)
    graph = capture_forward(model, batch)
    axes = analyse(graph)
    numbers = {n: t.detach() for n, t in tensors(model).items()}
    labelled = {}
    for axis in axes.groups():
        if axis.free and axis.size > 1:
            keep = {axis: kept(axis, axis.size - 1)}
            mine = take(numbers, indices(axes, keep=keep))
            for label, (size, _) in known.free.items():
                if size != axis.size or label in labelled:
                    continue
                theirs = taken(known, model, {label: keep[axis]})
                if all(mine[n].shape == t.shape and mine[n].equal(t) for n, t in theirs.items()):
                    labelled[label] = axis
                    break
            else:
                labelled[f"? {axis.name}"] = axis
    return graph, axes, numbers, batch, labelled


def shrunk(known, sizes):
    """The problem with a structure whose labels have other sizes; empty if the graph is the module built so."""
    graph, axes, numbers, batch, labelled = prepared(known.name)
    keep = {labelled[label]: kept(labelled[label], size) for label, size in sizes.items()}
    small = resize(graph, axes, keep=keep)
    module = known.build(**sizes).double().eval()
    return against_module(small, take(numbers, indices(axes, keep=keep)), module, batch)


def labels(known):
    """The labels of the groups of a structure that can be compared with a module of another size, and their axes."""
    *_, labelled = prepared(known.name)
    buildable = known.rebuilds and known.name not in TIED
    return {n: axis for n, axis in labelled.items() if buildable and (known.name, n) not in SCALED}


def tied(known, label):
    """The labels that the module can only change together with this one."""
    return next((group for group in known.same_size if label in group), {label})


@each
def test_a_group_shrinks_to_the_module_of_that_size(known):
    *_, labelled = prepared(known.name)
    assert labelled.keys() <= known.free.keys()
    for label, axis in labels(known).items():
        for size in {axis.size - 1, axis.size // 2} - {0}:
            assert not shrunk(known, dict.fromkeys(tied(known, label), size)), (label, size)


@each
def test_all_groups_shrink_at_once_and_the_backward_derived_is_right(known):
    graph, axes, numbers, batch, labelled = prepared(known.name)
    keep = {axis: kept(axis, max(2, axis.size // 2)) for axis in labelled.values()}
    small = resize(graph, axes, keep=keep)
    assert not backward_agrees(small, take(numbers, indices(axes, keep=keep)), batch)
    assert not shrunk(known, {label: len(keep[axis]) for label, axis in labels(known).items()})


@each
def test_zeros_are_absence(known):
    graph, axes, numbers, batch, labelled = prepared(known.name)
    for label, axis in labelled.items():
        if maskable(axes, axis) or (known.name, label) in SCALED:
            keep = {axis: kept(axis, axis.size // 2)}
            ours = run(resize(graph, axes, keep=keep), take(numbers, indices(axes, keep=keep)), batch)
            zeroed = run(graph, masked(axes, numbers, keep), batch)
            assert not any(far(n, ours[n], zeroed[n]) for n in ours), label


@given(data=st.data())
def test_subsets_of_groups_at_any_size(data):
    known = data.draw(st.sampled_from(STRUCTURES))
    free = labels(known)
    chosen = data.draw(st.sets(st.sampled_from(sorted(free)))) if free else set()
    sizes = {}
    for label in sorted(chosen):
        size = data.draw(st.integers(1, free[label].size))
        sizes.update(dict.fromkeys(tied(known, label), size))
    assert not shrunk(known, sizes)


class Net(nn.Module):
    """Two layers with a norm between them; ``function`` of their hidden features in front of the second."""

    def __init__(self, function=lambda h: h, width=8):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 3)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.norm(self.first(x))))


def analysed(model):
    graph = capture_forward(model, torch.randn(5, 4))
    return graph, analyse(graph)


def test_errors():
    graph, axes = analysed(Net())
    with pytest.raises(AxisError, match=r"no axis 'first[.]width'"):
        resize(graph, axes, {"first.width": 4})
    with pytest.raises(AxisError, match="is not free: dimension 1 of the output"):
        resize(graph, axes, {next(a for a in axes.groups() if a.size == 3): 2})
    for size in (0, 9, -1, 2.0, True):
        with pytest.raises(AxisError, match="from 1 to 8"):
            resize(graph, axes, {"first.hidden": size})
    for indices_ in (torch.tensor([8]), torch.tensor([-1]), torch.tensor([0.5]), torch.zeros(0).long(), [1]):
        with pytest.raises(AxisError, match="int64 indices from 0 to 8"):
            resize(graph, axes, keep={"first.hidden": indices_})
    with pytest.raises(AxisError, match="one of both"):
        resize(graph, axes, {"first.hidden": 4}, keep={"first.hidden": torch.arange(4)})
    other, its_axes = analysed(Net())
    with pytest.raises(AxisError, match="none of the groups"):
        resize(graph, axes, {its_axes.group("first.hidden"): 4})
    with pytest.raises(AxisError, match="another graph"):
        resize(other, axes, {})


def test_a_number_that_may_be_a_size_is_refused():
    graph, axes = analysed(Net(lambda h: h / h.shape[1]))
    with pytest.raises(AxisError, match=r"other = 8: a number that may be a size"):
        resize(graph, axes, {"first.hidden": 4})
    (divided,) = [n.name for n in graph.nodes if n.target is torch.ops.aten.div.Tensor]
    assert resize(graph, axes, {"first.hidden": 4}, stay=[divided]).placeholders[0].meta["val"].shape == (4, 4)


def test_what_was_given_stays_as_it_was_and_the_batch_stays_free():
    graph, axes = analysed(Net())
    before = graph.text()
    small = resize(graph, axes, {"first.hidden": 4})
    assert graph.text() == before and resize(graph, axes, {"first.hidden": 8}) is graph
    assert small.hash() == analysed(Net(width=4))[0].hash()
    assert "batch" in small.symbols.symbols and "f32[batch, 4]" in small.text()


def test_indices_may_repeat_and_axes_grow():
    graph, axes = analysed(Net())
    keep = {"first.hidden": torch.arange(12) % 8}
    assert resize(graph, axes, keep=keep).hash() == analysed(Net(width=12))[0].hash()
    numbers = tensors(Net())
    grown = take(numbers, indices(axes, keep=keep))
    assert grown["last.weight"].shape == (3, 12) and grown["last.bias"] is numbers["last.bias"]


def test_a_constant_is_indexed():
    table = torch.arange(8.0)
    graph, axes = analysed(Net(lambda h: h * table))
    small = resize(graph, axes, keep={"first.hidden": torch.tensor([1, 5])})
    assert [c.tolist() for c in small.constants.values()] == [[1.0, 5.0]]


def test_memory_order_is_kept():
    weight = torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    (small,) = take({"w": weight}, {"w": (torch.tensor([0, 3]), None, None, None)}).values()
    assert small.equal(weight[[0, 3]]) and small.is_contiguous(memory_format=torch.channels_last)


def test_pieces_that_are_no_longer_equal_are_written_out():
    model = Net(lambda h: torch.cat([part.relu() for part in h.chunk(2, 1)], 1))
    model.norm = nn.Identity()
    graph, axes = analysed(model)
    first, second = (a for a in axes.groups() if a.free)
    assert "split_with_sizes(%linear, [3, 4], 1)" in resize(graph, axes, {first: 3}).text()
    assert "aten.split.Tensor(%linear, 3, 1)" in resize(graph, axes, {first: 3, second: 3}).text()


def test_the_check_for_any_model():
    report = check_resizing(Net(), torch.randn(5, 4))
    assert (report.tried, report.resized, report.backward) == (1, 1, 1) and not report.wrong and not report.refused
