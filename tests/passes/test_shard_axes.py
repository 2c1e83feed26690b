"""Graphs divided along the batch, run by processes on parts of it, against the graphs as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.graph.op_rules import operand_names
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import _parts
from graphopt.passes._placements import Placements
from graphopt.passes._places import Places
from graphopt.passes._whole_sums import WholeSums
from tests.passes.shards import Team, assert_equals_whole, divided, shard, team

EVEN_AND_ODD = [(4, 3), (4, 2, 1)]


@pytest.fixture(scope="module")
def three() -> Iterator[Team]:
    with team(3) as started:
        yield started


def captured(model: nn.Module, batch: tuple[torch.Tensor, ...], loss: Any = F.cross_entropy, **options: Any) -> Any:
    """The graph of a step in float64, and the values of its inputs."""
    model = model.double()
    graph = graphopt.capture(model, batch, loss=loss, **options)
    return graph, values_of(graph, model, batch)


def values_of(graph: TrainingGraph, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> list[Any]:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    given = {str(i): tensor for i, tensor in enumerate(batch)}
    found = [(given if i.kind == "batch" else state).get(i.name) for i in graph.inputs]
    return [v.detach().clone() if v is not None else None for v in found]


def rows(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


@pytest.mark.parametrize("sizes", EVEN_AND_ODD)
@pytest.mark.parametrize("ignored", [(), (0, 5), (4, 5, 6)])
def test_mlp_with_batch_norm_dropout_and_ignored_targets(three: Team, sizes: Any, ignored: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))
    target = torch.randint(3, (7,))
    target[list(ignored)] = -100
    graph, values = captured(model, (rows(7, 5), target))
    assert_equals_whole(three, graph, values, sizes)


class Residual(nn.Module):
    """A small residual network of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.first = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.second = nn.BatchNorm2d(8, affine=False)
        self.down = nn.Conv2d(8, 12, 1, stride=2)
        self.last = nn.GroupNorm(3, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.pool(torch.relu(self.norm(self.stem(x))))
        h = h + F.dropout(torch.relu(self.second(self.first(h))), 0.2)
        h = F.silu(self.last(self.down(h)))
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


class Transformer(nn.Module):
    """Embedding, positions, attention with a causal mask, layer norm; tied weights."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16, padding_idx=0)
        self.place = nn.Embedding(6, 16)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.drop = nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        b, t = ids.shape
        h = self.drop(self.embed(ids) + self.place(torch.arange(t)))
        q, k, v = (x.view(b, t, 4, 4).transpose(1, 2) for x in self.qkv(self.norm(h)).split(16, 2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attended.transpose(1, 2).reshape(b, t, 16))
        h = h + self.drop(self.mlp(h))
        return h @ self.embed.weight.t()


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=0)


def weighted(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target, weight=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), ignore_index=1)


def standardised(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    normal = (logits - logits.mean(0)) / (logits.std(0) + 1)
    return (normal * target).pow(2).sum() / target.shape[0] + logits.var((0, 1)) + logits.exp().mean()


def picked(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Rows by number, and the numbers themselves: of the whole batch there."""
    place = torch.arange(logits.shape[0])
    chosen = logits.log_softmax(1)[place, target]
    return -(chosen * (1 + place)).mean() + logits[place[:, None], torch.arange(2)].pow(2).mean()


def of_sums(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What is not linear in a sum over rows, though each of its operands is, and numbers that are added to one."""
    total = (logits * target).sum(0)
    return (total * total).sum() + (total + 5).sum() * target.shape[0] + (2 - total).sum()


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.cell = kind(3, 5, **options)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])


def classes(n: int = 7) -> torch.Tensor:
    return torch.randint(3, (n,))


MODELS = {
    "residual": lambda: (Residual(), (rows(7, 3, 8, 8), classes()), F.cross_entropy),
    "transformer": lambda: (Transformer(), (torch.randint(11, (7, 6)), torch.randint(11, (7, 6))), token_loss),
    "segmentation": lambda: (nn.Conv2d(2, 3, 1), (rows(7, 2, 4, 4), torch.randint(3, (7, 4, 4))), F.cross_entropy),
    "instance norm": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, affine=True), nn.Flatten(), nn.Linear(48, 3)),
        (rows(7, 2, 6, 6), classes()), F.cross_entropy,
    ),
    "weighted": lambda: (nn.Linear(4, 3), (rows(7, 4), classes()), weighted),
    "lstm": lambda: (
        Recurrent(nn.LSTM, batch_first=True, num_layers=2, dropout=0.3), (rows(7, 4, 3), classes()), F.cross_entropy,
    ),
    "gru": lambda: (Recurrent(nn.GRU, batch_first=True), (rows(7, 4, 3), classes()), F.cross_entropy),
    "own rows": lambda: (nn.Linear(4, 3), (rows(7, 4), classes()), picked),
    "of sums": lambda: (nn.Linear(4, 3), (rows(7, 4), rows(7, 3)), of_sums),
    "standardised": lambda: (nn.Linear(4, 3), (rows(7, 4), rows(7, 3)), standardised),
    **{
        name: lambda loss=loss: (
            nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()), (rows(7, 4), torch.rand(7, 3).double()), loss,
        )
        for name, loss in {
            "mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss, "huber": F.huber_loss,
            "bce": F.binary_cross_entropy, "bce_logits": F.binary_cross_entropy_with_logits,
            "soft_margin": F.soft_margin_loss, "kl": lambda a, b: F.kl_div(a, b, reduction="batchmean"),
            "poisson": F.poisson_nll_loss,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_architectures_and_losses(three: Team, name: str) -> None:
    torch.manual_seed(1)
    model, batch, loss = MODELS[name]()
    graph, values = captured(model, batch, loss)
    for sizes in EVEN_AND_ODD:
        assert_equals_whole(three, graph, values, sizes)


def peak(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((logits - logits.amax(0)) * target).exp().sum() + logits.amin((0, 1))


def test_fused_recurrent_layers(three: Team) -> None:
    """oneDNN's layer runs in float32 only."""
    model, x, y = Recurrent(nn.LSTM, batch_first=True), torch.randn(7, 4, 3), classes()
    graph = graphopt.capture(model, (x, y), loss=F.cross_entropy)
    assert any("mkldnn_rnn_layer" in str(n.target) for n in graph.nodes)
    assert_equals_whole(three, graph, values_of(graph, model, (x, y)), (4, 3), tolerance=1e-5)


def test_maxima_over_the_batch(three: Team) -> None:
    graph, values = captured(nn.Linear(4, 3), (rows(7, 4), rows(7, 3)), peak)
    divided = assert_equals_whole(three, graph, values, (4, 2, 1))
    assert {n.args[1] for n in divided.nodes if "all_reduce" in str(n.target)} == {"sum", "max", "min"}


def test_outputs_and_gradients_of_the_batch_stay_in_parts(three: Team) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()).double()
    graph = graphopt.capture(model, (rows(7, 4),), gradients="all")
    values = [
        rows(7, 3) if i.kind == "tangent" else v for i, v in zip(graph.inputs, values_of(graph, model, (rows(7, 4),)))
    ]
    assert_equals_whole(three, graph, values, (4, 3))


def test_a_step_with_accumulation_clipping_and_an_optimizer(three: Team) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    graph = graphopt.capture(model, (rows(7, 4), classes()), loss=F.cross_entropy, optimizer=optimizer, clip=0.1)
    values = [
        0.1 if i.kind == "hyper-parameter" else rows(*n.meta["val"].shape) if i.kind == "state" else v
        for i, n, v in zip(graph.inputs, graph.placeholders, values_of(graph, model, (rows(7, 4), classes())))
    ]
    assert_equals_whole(three, graph, values, (4, 2, 1))


def test_local_batch_norm_is_that_of_each_part(three: Team) -> None:
    """As DDP: each part normalises by itself, gradients are those of the mean loss over all rows."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = rows(7, 4), rows(7, 3)
    graph = graphopt.capture(model, (x, y), loss=F.mse_loss)
    divided_graph = shard(graph, 2, batch_norm="local").graph
    answers = three.run(divided_graph, divided(divided_graph, values_of(graph, model, (x, y)), (4, 3)))
    twins = [copy.deepcopy(model) for _ in range(2)]
    losses = [F.mse_loss(twin(p), q) * len(p) / 7 for twin, p, q in zip(twins, x.split((4, 3)), y.split((4, 3)))]
    for loss in losses:
        loss.backward()
    for rank, (outputs, _) in enumerate(answers):
        for output, got in zip(graph.outputs, outputs, strict=True):
            if output.kind == "loss":
                expected = sum(losses)
            elif output.kind == "gradient":
                expected = sum(twin.get_parameter(output.name).grad for twin in twins)
            else:
                expected = twins[rank].get_buffer(output.name)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    words = dict(zip(map(str, graph.outputs), divided_graph.signature.tree["placements"]["outputs"]))
    assert words["new buffer 1.running_mean"] == words["new buffer 1.running_var"] == "own"
    assert words["new buffer 1.num_batches_tracked"] == "replicated"


def _local_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Places, "twin", lambda self, node: node)


def _no_sums_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WholeSums, "_count", lambda self, node, places: 7)


def _first_rows_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Places, "begin", lambda self, times=1: 0)


def _reduced_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placements, "_whole", lambda self, node: None)


def _linear_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parts, "linear_sets", lambda node: (frozenset(operand_names(node)),))
    monkeypatch.setattr(Placements, "_sums", lambda self, source: True)


@pytest.mark.parametrize(
    "broken", [_local_counts, _no_sums_of_means, _first_rows_for_all, _reduced_never, _linear_in_all]
)
def test_a_broken_rule_is_noticed(three: Team, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (logits - logits.mean(0)).pow(2).mean(0).exp().sum() + (logits * target).sum() / target.shape[0]

    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Tanh())
    graph, values = captured(model, (rows(8, 4), rows(8, 3)), loss)
    assert_equals_whole(three, graph, values, (4, 2, 2))
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        assert_equals_whole(three, graph, values, (4, 2, 2))
