"""Free sizes beside the batch: a sequence of any length in one graph."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt import BatchError, capture
from graphopt.graph.forward import capture_forward
from graphopt.verify import run_graph


class Tokens(nn.Module):
    """A small language model whose sequence may have any length."""

    def __init__(self):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, tokens):
        x = self.table(tokens)
        x = x + F.scaled_dot_product_attention(self.body(x), x, x, is_causal=True)
        return self.head(x).flatten(0, 1)


def tokens(size, length):
    return torch.randint(9, (size, length)), torch.randint(9, (size, length))


def flat_loss(logits, target):
    return F.cross_entropy(logits, target.flatten())


FREE = {"seq": {"0": 1, "1": 1}}


@pytest.mark.parametrize("trace", [capture, capture_forward])
def test_another_size_stays_free(trace):
    model = Tokens()
    graph = trace(model, tokens(4, 4), loss=flat_loss, free=FREE)  # equal sizes are not the same size
    assert set(graph.symbols.symbols) == {"batch", "seq"} and graph.symbols.hints == {"batch": 4, "seq": 4}
    batch = tokens(3, 7)
    other = trace(model, batch, loss=flat_loss)
    assert graph.flops({"batch": 3, "seq": 7}) == other.flops()
    expected, got = (run_graph(g, model, batch).values for g in (other, graph))
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
    assert [str(g.kind) for g in graph.axes.groups() if g.name in graph.symbols.symbols] == ["batch", "sequence"]


def test_a_size_that_the_model_needs_as_a_number_is_fixed():
    class Fixed(Tokens):
        def forward(self, tokens):
            return super().forward(tokens) * float(math.sqrt(tokens.shape[1]))

    graph = capture(Fixed(), tokens(3, 5), loss=flat_loss, free=FREE)
    assert not graph.symbols.admits({"seq": 6}) and graph.symbols.admits({"batch": 6})


@pytest.mark.parametrize(
    ("free", "message"),
    [
        ({"seq": {"x": 1}}, "names dimension 1 of 'x'"),
        ({"seq": {"0": 2}}, "names dimension 2 of '0'"),
        ({"seq": {"0": 0}}, "names dimension 0 of '0'"),
        ({"seq": {"0": 1, "1": 1}}, "is 4, but dimension 1 of '1' is 5"),
    ],
)
def test_free_sizes_that_the_batch_does_not_have(free, message):
    with pytest.raises(BatchError, match=message):
        capture(Tokens(), (torch.randint(9, (3, 4)), torch.randint(9, (3, 5))), loss=flat_loss, free=free)
