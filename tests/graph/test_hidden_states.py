"""Which outputs are hidden states: what the model attends to further. Their dimensions are not frozen."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt.elastic as elastic
from graphopt.elastic import Kind
from graphopt.elastic.importance import sort_by_importance
from graphopt.graph.ancestry import ancestors
from graphopt.graph.axes import analyse
from graphopt.graph.forward import capture_forward
from tests.elastic.subnets import check_extraction


class Layer(nn.Module):
    """Attention to other states, and an MLP."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def keys_and_values(self, states):
        return self.kv(states).unflatten(-1, (2, self.heads, self.size)).permute(2, 0, 3, 1, 4)

    def forward(self, x, states):
        q = self.q(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k, v = self.keys_and_values(states)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class EncoderDecoder(nn.Module):
    """``returned``: what stands beside the logits."""

    def __init__(self, returned):
        super().__init__()
        self.words, self.encoder, self.decoder, self.head = nn.Embedding(20, 16), Layer(), Layer(), nn.Linear(16, 5)
        self.pooler, self.returned = nn.Linear(16, 16), returned

    def forward(self, ids):
        x = self.words(ids)
        encoded = self.encoder(x, x)
        decoded = self.decoder(x, encoded)
        beside = {
            "encoded": encoded,
            "decoded": decoded,
            "keys": self.decoder.keys_and_values(encoded)[0],
            "pooled": torch.tanh(self.pooler(decoded[:, 0])),
        }
        return {"logits": self.head(decoded), **{name: beside[name] for name in self.returned}}


IDS = torch.arange(12).reshape(3, 4)


@pytest.mark.parametrize(
    ("returned", "hidden"), [((), set()), (("encoded",), {"encoded"}), (("encoded", "decoded"), {"encoded"})]
)
def test_what_the_model_attends_to_further_is_hidden(returned, hidden):
    """The states of the decoder lead to the logits by one layer: a result, like those below a pooler."""
    axes = analyse(capture_forward(EncoderDecoder(returned), IDS))
    assert axes.hidden_states.keys() == hidden
    results = dict(zip((o.name for o in axes.graph.outputs), axes.graph.results, strict=True))
    assert axes.hidden_states == {name: results[name] for name in hidden}


def test_hidden_states_follow_the_embedding_and_results_keep_it():
    torch.manual_seed(0)
    space = elastic.space(EncoderDecoder(("encoded",)).eval(), IDS)
    assert any(d.kind is Kind.EMBEDDING for d in space.dimensions)
    small = space.run({"embed": 8}, IDS)
    assert small["encoded"].shape == (3, 4, 8) and small["logits"].shape == (3, 4, 5)
    assert any("encoded" in note for note in space.notes)
    check_extraction(space, space.smallest, (IDS,), training=False)
    kept = elastic.space(EncoderDecoder(("encoded", "decoded")).eval(), IDS)
    assert not any(d.kind is Kind.EMBEDDING for d in kept.dimensions) and not kept.notes
    assert any("output decoded" in r.why for r in kept.refusals)


def test_sorting_leaves_the_order_of_returned_states():
    torch.manual_seed(0)
    space = elastic.space(EncoderDecoder(("encoded",)).eval(), IDS)
    before = {name: value.detach() for name, value in space.model(IDS).items()}
    orders = sort_by_importance(space)
    assert orders and "embed" not in orders
    for name, value in space.model(IDS).items():
        assert torch.allclose(value, before[name], atol=1e-5), name


class Cache:
    """What no nesting of tensors is."""

    def __init__(self, keys):
        self.keys = keys


class Caching(EncoderDecoder):
    def forward(self, ids):
        found = super().forward(ids)
        return {"logits": found["logits"], "cache": Cache(found["keys"])}


def test_a_cache_among_the_outputs_is_left_out():
    torch.manual_seed(0)
    model = Caching(("keys",)).eval()
    space = elastic.space(model, IDS)
    assert any("cache is a Cache" in note for note in space.notes)
    found = space.run(space.full, IDS)
    assert found["cache"] is None and torch.allclose(found["logits"], model(IDS)["logits"], atol=1e-6)
    assert any(d.kind is Kind.HEADS for d in space.dimensions)


def test_ancestors_are_what_nodes_are_computed_from():
    graph = capture_forward(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3))
    *_, relu, last = [n for n in graph.nodes if n.op == "call_function"]
    assert ancestors([last]) == {n for n in graph.nodes if n.op != "output"}
    assert ancestors([last], lambda n: n.op == "call_function" and n is not relu) == {last}
    assert ancestors([]) == set()
