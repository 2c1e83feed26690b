"""Literals are expressions over axes, or constant, or refused; stale ones are caught by gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.graph.axes import analyse
from graphopt.graph.differentiate import with_backward
from graphopt.graph.forward import capture_forward
from graphopt.graph.literals import Role, literals
from graphopt.graph.op_rules.arguments import set_operand
from graphopt.graph.resize import indices, resize, take
from graphopt.graph.scalar_literals import scalar_literals
from graphopt.graph.training_graph import OutputKind
from graphopt.verify import run_graph
from tests.structures import tensors

aten = torch.ops.aten


class Calls(nn.Module):
    """A function of a layer's output, and a layer behind it."""

    def __init__(self, function, hidden=12, after=12, layer=nn.Linear):
        super().__init__()
        self.body, self.head = layer(6, hidden), nn.Linear(after, 3)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self.body(x)))


def of(function, after=12, **sizes):
    """The literals that some axis decides, and those that are refused, as text."""
    graph = capture_forward(Calls(function, after=after, **sizes), torch.randn(5, 6))
    return [str(found) for found in literals(graph, analyse(graph)) if not found.constant]


def heads(h):
    return h.view(-1, 3, 4).transpose(1, 2).reshape(h.shape[0], 12)


@pytest.mark.parametrize(
    ("function", "after", "expected"),
    [
        (lambda h: F.layer_norm(h, (12,)), 12, ["layer_norm.normalized_shape[0] = 12: body.hidden"]),
        (lambda h: h.view(-1, 3, 4).amax(2), 3, ["view.size[1] = 3: body.hidden", "view.size[2] = 4: body.hidden.2"]),
        (lambda h: h[:, 5:], 7, ["slice_2.start = 5: body.hidden"]),
        (lambda h: h[:, -5:], 5, ["slice_2.start = -5: -body.hidden.2"]),
        (lambda h: h[:, :5], 5, ["slice_2.end = 5: body.hidden"]),
        (lambda h: h[:, 5].unsqueeze(1), 1, ["select.index = 5: body.hidden"]),
        (lambda h: h.repeat(1, 2), 24, ["repeat.repeats[1] = 2: head.hidden"]),
        (lambda h: h.repeat_interleave(2, 1), 24, None),
        (lambda h: F.pad(h, (1, -4)), 9, ["pad.pad[1] = -4: -body.hidden.2"]),
        (lambda h: F.group_norm(h, 3), 12, ["group_norm.num_groups = 3: body.hidden"]),
        (lambda h: torch.cat(h.split([5, 7], 1), 1), 12, None),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_expressions(function, after, expected):
    found = of(function, after)
    assert found and not any(" is not the " in text or "no role" in text for text in found)
    if expected is not None:
        assert [text for text in found if "body" in text or "head" in text] == expected, found


def test_constants_are_known_by_their_argument():
    graph = capture_forward(Calls(lambda h: h.softmax(1).transpose(0, 1).transpose(0, 1)), torch.randn(5, 6))
    found = literals(graph, analyse(graph))
    assert found and all(literal.constant for literal in found)
    assert {literal.role for literal in found} == {Role.CONSTANT}


def test_copies_for_each_sample_are_counted_by_the_batch():
    found = of(lambda h: h + h[:1].repeat(h.shape[0], 1))
    assert any(text.startswith("repeat.repeats[0] = s") and "is not" not in text for text in found), found


def test_what_is_not_known_is_refused():
    assert of(lambda h: h.as_strided((5, 12), (12, 1)))
    assert of(lambda h: h / 12) == ["div.other = 12: a number that may be a size"]
    assert of(lambda h: h.sum(1, keepdim=True) / 12 + h) == ["div.other = 12: a number that may be a size"]
    assert of(lambda h: h / 13) == []


# -- scalars of the backward ---------------------------------------------------------------------------------------


def rms_norm(h):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


CASES = {
    "rms norm": (rms_norm, ["div.other = 12: body.hidden"]),
    "mean over channels": (lambda h: h - h.tanh().mean(1, keepdim=True), ["div.other = 12: body.hidden"]),
    "standard deviation": (
        lambda h: h / h.std(1, keepdim=True),
        ["mul.other = 0.18181818181818182: 2 * (body.hidden - 1)**-1"],
    ),
    "mean over all": (lambda h: h * h.exp().mean(), None),
}


def joint_of(function, width=12, loss=None):
    torch.manual_seed(width)
    model = Calls(function, width, width).double()
    batch = (torch.randn(5, 6).double(), torch.randn(5, 3).double())
    forward = capture_forward(model, batch, loss=loss or nn.MSELoss())
    return model, batch, forward, with_backward(forward)


@pytest.mark.parametrize("case", CASES)
def test_scalars_of_the_backward(case):
    function, expected = CASES[case]
    *_, forward, joint = joint_of(function)
    axes = analyse(forward)
    found = scalar_literals(forward, joint, axes)
    assert found and not any(s.refusal for s in found)
    if expected is not None:
        texts = [str(s).replace(s.node.name, s.node.name.rstrip("_0123456789"), 1) for s in found]
        assert set(expected) <= set(texts), texts
    (axis,) = {a for s in found for a in s.dim.axes()}
    small = with_backward(resize(forward, axes, {axis: 5}))  # a size that it was not fitted to
    place = {node: i for i, node in enumerate(joint.nodes)}
    for scalar in found:
        twin = small.nodes[place[scalar.node]]
        right = [a for a in twin.args if type(a) in (int, float)]
        assert any(abs(scalar.at({axis: 5}) - value) < 1e-12 for value in right), (str(scalar), right)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_a_resized_graph_are_those_of_eager_and_a_stale_scalar_is_caught(case):
    function, _ = CASES[case]
    model, batch, forward, joint = joint_of(function)
    axes = analyse(forward)
    (axis,) = (a for a in axes.groups() if a.free)
    small = with_backward(resize(forward, axes, {axis: 5}))
    eager = Calls(function, 5, 5).double()
    with torch.no_grad():
        for name, value in take(tensors(model), indices(axes, {axis: 5})).items():
            tensors(eager)[name].copy_(value)
    nn.functional.mse_loss(eager(batch[0]), batch[1]).backward()

    def worst(graph):
        got = run_graph(graph, eager, batch).values
        names = graph.output_nodes(OutputKind.GRADIENT)
        return max(float((got[f"gradient {n}"] - dict(eager.named_parameters())[n].grad).abs().max()) for n in names)

    assert worst(small) < 1e-12
    draft, stale = small.draft(), {s.node.name: s for s in scalar_literals(forward, joint, axes)}
    place = {node.name: i for i, node in enumerate(joint.nodes)}
    name, scalar = next(iter(stale.items()))
    copy = draft.node(small.nodes[place[name]])
    if isinstance(copy.target, torch._ops.OpOverload):
        set_operand(copy, scalar.argument, scalar.value)
    else:
        copy.args = tuple(scalar.value if type(a) is int else a for a in copy.args)
    wrong = draft.finish()
    before, after = (run_graph(g, eager, batch).values["loss"] for g in (small, wrong))
    assert before.equal(after), "the loss does not show it"
    assert worst(wrong) > 1e-4


class Lstm(nn.Module):
    def __init__(self, hidden=12):
        super().__init__()
        self.body, self.head = nn.LSTM(6, hidden, batch_first=True), nn.Linear(hidden, 3)

    def forward(self, x):
        return self.head(self.body(x)[0])


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (lambda h: Lstm(h), torch.randn(5, 7, 6)),
        (lambda h: Calls(rms_norm, h, h), torch.randn(5, 6)),
        (lambda h: Calls(lambda x: x.view(-1, 3, x.shape[1] // 3).softmax(1).flatten(1), h, h), torch.randn(5, 6)),
    ],
    ids=["lstm", "rms norm", "softmax over heads"],
)
def test_sizes_in_a_joint_graph_are_those_of_a_backward_derived_at_that_size(model, batch):
    """Zeros of an LSTM's state, expanded gradients and the like."""
    target = torch.randn(*batch.shape[:-1], 3)
    forward, small = (capture_forward(model(h), (batch, target), loss=nn.MSELoss()) for h in (12, 6))
    joint, other = with_backward(forward), with_backward(small)
    axes = analyse(joint)
    axis = next(a for a in axes.groups() if a.free and "hidden" in a.name)
    place = {node: i for i, node in enumerate(joint.nodes)}
    right = {(place_, s.argument, s.index): s.value for place_, s in by_place(other)}
    checked = 0
    for literal in literals(joint, axes):
        if literal.dim is not None and axis in literal.axes:
            new = literal.at({axis: axis.size // 2})
            assert new == right[place[literal.node], literal.argument, literal.index], str(literal)
            checked += 1
    assert checked


def by_place(graph):
    place = {node: i for i, node in enumerate(graph.nodes)}
    return [(place[s.node], s) for s in literals(graph, analyse(graph))]
