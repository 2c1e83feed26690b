"""The space of a model: what it finds and refuses, what a user may say of it, choices."""

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.elastic import Choice, Kind, options, space
from graphopt.elastic.region import Region
from graphopt.errors import ElasticError


class Grouped(nn.Module):
    """A stem, an attention with grouped queries, a gated MLP, a head: the parts of a decoder."""

    def __init__(self, width=24, groups=2, queries=3, size=4, hidden=32, layers=1):
        super().__init__()
        self.groups, self.queries, self.size = groups, queries, size
        self.stem = nn.Linear(5, width)
        self.layers = nn.ModuleList(nn.ModuleDict({
            "norm": nn.LayerNorm(width), "q": nn.Linear(width, groups * queries * size),
            "k": nn.Linear(width, groups * size), "v": nn.Linear(width, groups * size),
            "o": nn.Linear(groups * queries * size, width), "gate": nn.Linear(width, hidden),
            "up": nn.Linear(width, hidden), "down": nn.Linear(hidden, width),
        }) for _ in range(layers))  # fmt: skip
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            b, n, _ = x.shape
            y = layer["norm"](x)
            q = layer["q"](y).view(b, n, self.groups, self.queries, self.size).permute(0, 2, 3, 1, 4)
            k, v = (layer[w](y).view(b, n, self.groups, 1, self.size).permute(0, 2, 3, 1, 4) for w in "kv")
            y = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))
            x = x + layer["o"](y.permute(0, 3, 1, 2, 4).reshape(b, n, -1))
            x = x + layer["down"](F.silu(layer["gate"](x)) * layer["up"](x))
        return self.head(x)


def grouped(**options):
    """Its space without depth, which ``test_depths.py`` is about."""
    torch.manual_seed(0)
    return space(Grouped(), torch.randn(2, 4, 5), **{"fixed": Kind.DEPTH, **options})


@pytest.fixture(scope="module")
def found():
    return grouped()


def test_dimensions_of_a_decoder(found):
    assert {d.name: (d.kind, d.choices) for d in found.dimensions} == {
        "embed": (Kind.EMBEDDING, (12, 18, 24)),
        "layers.0.q.heads": (Kind.HEADS, (1, 2)),
        "layers.0.q.queries": (Kind.QUERIES, (1, 2, 3)),
        "layers.0.hidden": (Kind.WIDTH, (8, 16, 24, 32)),
    }
    assert found.dimension("layers.0.hidden").where == ("layers.0.gate", "layers.0.up", "layers.0.down")
    why = {r.name: r.why for r in found.refusals}
    assert why["layers.0.q.head_size"] == "it has one choice only"
    assert "output" in why["head.output"] and "input" in why["input"]


def test_grouped_queries_stay_valid(found):
    model, x = found.model, torch.randn(3, 6, 5)
    small = Grouped(groups=1, queries=2)
    choice = found.choice({Kind.HEADS: 1, Kind.QUERIES: 2})
    rows = list(range(2 * 4))  # the first two queries of the first group, each of size 4
    with torch.no_grad():
        for name, tensor in small.named_parameters():
            whole = dict(model.named_parameters())[name]
            kind = name.split(".")[2] if name.startswith("layers") else ""
            cut = {"q": whole[rows], "k": whole[:4], "v": whole[:4]} if kind in ("q", "k", "v") else {}
            tensor.copy_(whole[:, rows] if name.endswith("o.weight") else cut.get(kind, whole))
        with pytest.raises(graphopt.BatchError):
            found.run(choice, x[:, :, :4])
        x = torch.randn(3, 4, 5)
        assert torch.allclose(found.run(choice, x), small(x), atol=1e-6)


def test_choices_sizes_and_shares():
    found = grouped(choices={Kind.WIDTH: (4, 0.5), "*.queries": (0.5,), "layers.0.hidden": (7, 32), "embed": [6, 12]})
    assert found.dimension("layers.0.hidden").choices == (7, 32)
    assert found.dimension("layers.0.q.queries").choices == (2, 3)
    assert found.dimension("embed").choices == (6, 12, 24)


def test_tied_named_fixed():
    class Three(nn.Sequential):
        def forward(self, x):
            return self[3](self[2](self[1](self[0](x).relu()).relu()).relu())

    net = Three(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 2))
    names = [d.name for d in space(net, torch.randn(2, 3)).dimensions]
    assert len(names) == 3
    found = space(net, torch.randn(2, 3), tied={"both": names[:2]}, names={names[2]: "last"}, fixed=[names[2]])
    assert [(d.name, d.choices) for d in found.dimensions] == [("both", (2, 4, 6, 8))]
    slices = found.subnet({"both": 4}).slices
    assert repr(slices["1.weight"]) == "Slice[0:4, 0:4]" and "3.weight" not in slices
    assert [r.why for r in found.refusals if r.name == "last"] == ["fixed by the user"]
    found = space(net, torch.randn(2, 3), tied=[names[:2]], names={names[2]: "last"})
    assert [d.name for d in found.dimensions] == [names[0], "last"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fixed": "nothing.*"}, "fixed: no dimension matches 'nothing"),
        ({"choices": {"*.hidden": (0.5, 33)}}, "can have sizes"),
        ({"choices": {"*.hidden": (1.5,)}}, "can have sizes"),
        ({"choices": {"*.hidden": 8}}, "expected a sequence"),
        ({"choices": [8]}, "expected a mapping"),
        ({"choices": {3: (8,)}}, "expected a Kind or a pattern"),
        ({"tied": [["embed", "layers.0.hidden"]]}, "differ in kind or size"),
        ({"names": {"layers.0.*": "h"}}, r"means \d dimensions"),
        ({"names": {"embed": "layers.0.hidden"}}, "two dimensions are called"),
        (
            {"fixed": tuple(Kind(k) for k in ("width", "heads", "queries", "embedding", "head size", "depth"))},
            "nothing in it is",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ElasticError, match=message):
        grouped(**options)


def test_choices(found):
    assert found.choice() == found.full and found.full["embed"] == 24
    assert set(found.smallest.values()) == {12, 1, 8}
    choice = found.choice({"*": 0.5, "embed": 18, "*.heads": 1.0})
    assert [choice[d.name] for d in found.dimensions] == [18, 2, 1, 16]
    assert found.choice(json.loads(json.dumps(choice.to_dict()))) == choice
    assert pickle.loads(pickle.dumps(choice)) == choice and len({choice, found.choice(choice)}) == 1
    assert choice.key() != found.full.key()
    for wrong, message in [({"embed": 13}, "it can be 12, 18, 24"), ({"nothing": 3}, "no dimension matches"),
                           ({"embed": True}, "cannot be True"), ({"embed": (1, 2)}, "cannot be"),
                           ({"embed": 1.5}, "cannot be 1.5")]:  # fmt: skip
        with pytest.raises(ElasticError, match=message):
            found.choice(wrong)
    with pytest.raises(ElasticError, match="it can be"):
        found.run(Choice({**found.full, "embed": 13}), torch.randn(2, 4, 5))


def test_samples(found):
    drawn = [found.sample(seed=seed) for seed in range(30)]
    assert drawn == [found.sample(seed=seed) for seed in range(30)]
    assert all({c[d.name] for c in drawn} == set(d.choices) for d in found.dimensions)
    assert {found.sample(seed=s, where={Kind.WIDTH: 8})["layers.0.hidden"] for s in range(5)} == {8}
    assert found.sample(seed=0, where=lambda c: c["embed"] == 12)["embed"] == 12
    with pytest.raises(ElasticError, match="none of 1000"):
        found.sample(where=lambda c: False)


def test_a_tied_weight_in_two_incompatible_places():
    """An embedding whose transpose maps to words: its rows are named by data, its columns are the stream."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.square = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return F.linear(self.square(x).relu(), self.square.weight)

    with pytest.raises(ElasticError, match=r"nothing in it is elastic .*dimension 1 of the"):
        space(Tied(), torch.randn(3, 6))


def test_other_errors():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sign()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Binary(nn.Sequential):
        def forward(self, x):
            return self[1](Own.apply(self[0](x)))

    with pytest.raises(ElasticError, match="own backward"):
        space(Binary(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(3, 4))
    with pytest.raises(graphopt.CaptureError, match="expected a torch"):
        space(lambda x: x, torch.randn(3, 4))
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with pytest.raises(graphopt.BatchError):
        space(net, torch.randn(3, 5))
    with pytest.raises(graphopt.BatchError):
        found = space(net, torch.randn(3, 4))
        found.run(found.smallest, torch.randn(3, 5))


def test_what_varies_in_one_mode_only_is_refused():
    """In train mode the features are summed over, in eval mode they are compared with positions."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x)
            return self.b(x if self.training else x * torch.arange(8.0))

    with pytest.raises(ElasticError, match="nothing in it is elastic"):
        space(Odd(), torch.randn(3, 4))


def test_the_name_of_a_dimension_means_it_alone():
    """The name that the user gave to one is the path of a module around another one too."""
    net = nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
        nn.Linear(8, 2),
    )  # fmt: skip
    x = torch.randn(3, 4)
    first, *others = space(net, x).dimensions
    path = others[0].where[0]
    found = space(net, x, names={first.name: path})
    assert Region.of(found).only([path]).open == (path,)
    assert [d.name for d in found.dimensions if found.choice({path: 0.5})[d.name] != d.full] == [path]
    handles = list(found.primary.found.handles)
    assert options.chosen("fixed", first.name, handles) == [h for h in handles if h.name == first.name]
