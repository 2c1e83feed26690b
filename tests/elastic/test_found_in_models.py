"""Structures that hindered real architectures: sizes computed from sizes, cells, aliases, weights nothing reads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt.elastic as elastic
from graphopt.elastic import Kind
from graphopt.elastic.importance import sort_by_importance
from graphopt.elastic.report import rigid
from graphopt.errors import ElasticError
from tests.axes_oracles import cast, wide
from tests.elastic.oracles import assert_is_slice


def checked(model, *batch):
    """The space of a model: its smallest subnet is the slice, and a permutation leaves the output."""
    torch.manual_seed(0)
    model, batch = wide(model.eval()), cast(batch)
    space = elastic.space(model, batch)
    assert_is_slice(space, space.smallest, batch)
    before = model(*batch).detach()
    assert sort_by_importance(space)
    assert torch.allclose(model(*batch), before, rtol=1e-6, atol=1e-9)
    return space


def kinds(space):
    return {d.kind for d in space.dimensions}


class Positions(nn.Module):
    """Heads are joined to the batch, and keys of positions repeated ``size(0) // heads`` times (DeBERTa)."""

    heads = 4

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 16) for _ in range(3))
        self.positions, self.out = nn.Parameter(torch.randn(1, 5, 8)), nn.Linear(16, 3)

    def split(self, x):
        x = x.view(*x.shape[:-1], self.heads, -1).permute(0, 2, 1, 3)
        return x.contiguous().view(-1, x.size(2), x.size(3))

    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        keys = self.split(self.k(self.positions)).repeat(q.size(0) // self.heads, 1, 1)
        scores = torch.bmm(q, k.mT) + torch.bmm(q, keys.mT)
        y = torch.bmm(scores.softmax(-1), v).view(-1, self.heads, x.size(1), 4).permute(0, 2, 1, 3)
        return self.out(y.reshape(x.size(0), x.size(1), -1))


def test_a_number_computed_from_sizes_follows_them():
    space = checked(Positions(), torch.randn(3, 5, 8))
    assert Kind.HEADS in kinds(space)


class Steps(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.out = cell(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


def test_recurrent_cells_are_as_wide_as_their_states():
    for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        space = checked(Steps(cell), torch.randn(2, 3, 3))
        assert kinds(space) == {Kind.WIDTH} and list(space.smallest.values()) == [2]


class Aliases(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out, self.unread = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(16, 2), nn.Linear(50, 50)

    def forward(self, x):
        a, b = torch.multiply(self.a(x), 2.0), torch.subtract(self.b(x), 1.0)
        return self.out(torch.hstack([torch.absolute(a), torch.divide(b, F.softplus(a))]))


def test_aliases_are_known_and_weights_that_nothing_reads_are_not_rigid():
    space = checked(Aliases(), torch.randn(3, 4))
    assert kinds(space) == {Kind.WIDTH} and not space.primary.axes.unknown
    assert rigid(space) < 0.1
    assert not any("unread" in path for d in (*space.dimensions, *space.refusals) for path in d.where)


class Lazy(nn.Module):
    """Makes its table of positions in the first forward pass (ConViT)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ramp", torch.zeros(1), persistent=False)
        self.norm, self.a, self.b = nn.BatchNorm1d(5), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        if len(self.ramp) != x.shape[1]:
            self.ramp = torch.arange(x.shape[1], dtype=x.dtype)
        return self.b(self.a(self.norm(x)).relu() * self.ramp[:, None])


def test_a_buffer_made_by_the_first_forward_pass_is_made():
    model = Lazy().train()
    space = elastic.space(model, torch.randn(3, 5, 4))
    assert model.ramp.shape == (5,) and int(model.norm.num_batches_tracked) == 0
    assert space.run(space.smallest, torch.randn(3, 5, 4)).shape == (3, 5, 2)
    assert len(space._states) == 1 and [len(several) for several in space._states.values()] == [
        2
    ]  # nothing captured anew


class Squared(torch.autograd.Function):
    """With a backward that is its derivative, times ``factor``."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient * ctx.factor, None


class Own(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.a, self.b, self.factor = nn.Linear(4, 8), nn.Linear(8, 2), factor

    def forward(self, x):
        return self.b(Squared.apply(self.a(x), self.factor) if self.training else self.a(x) ** 2)


def test_a_backward_of_its_own_that_is_the_derivative_is_taken():
    """In train mode; the joint graph is derived of it too."""
    space = elastic.space(Own(1.0).eval(), torch.randn(3, 4))
    space.model.train()
    x = torch.randn(3, 4)
    theirs = torch.autograd.grad(space.model(x).sum(), list(space.model.parameters()))
    ours = torch.autograd.grad(space.run(space.full, x).sum(), list(space.model.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
    graph = space.graph(space.smallest, loss=F.mse_loss, batch=(x, torch.randn(3, 2)), backward=True)
    assert any(o.kind == "gradient" for o in graph.outputs)
    with pytest.raises(ElasticError, match="backward is not known to be the derivative"):
        elastic.space(Own(0.5).eval(), torch.randn(3, 4))
