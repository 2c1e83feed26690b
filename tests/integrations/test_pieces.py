"""Passes on pieces: what fails is left out and said; options; what a piece tells."""

from __future__ import annotations

import logging
import tomllib
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.errors import GraphoptError
from graphopt.graph.training_graph import TrainingGraph
from graphopt.integrations import PIECE_PASSES, backend, recording, register
from graphopt.integrations.dynamo import Options
from graphopt.integrations.joint import path_of
from graphopt.passes import NoOps, Pass, PassResult, Tier
from tests.integrations.twins import assert_like_eager, compiled
from tests.training import mlp

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Raising(Pass):
    """Meets a graph that it was not made for."""

    name = "raising"
    tier = Tier.EXACT

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        raise KeyError("no rule for this")


@dataclass(frozen=True)
class Breaking(Pass):
    """Gives a graph in which an output has become another one."""

    name = "breaking"
    tier = Tier.EXACT

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        draft = graph.draft()
        results = draft.results
        results[0] = draft.add(torch.ops.aten.flatten.using_ints, results[0], like=results[0], after=results[0])
        draft.output.args = (tuple(results),)
        return PassResult(draft.finish())


@pytest.mark.parametrize(("failing", "cause"), [(Raising(), "no rule for this"), (Breaking(), "was")])
def test_a_pass_that_fails_is_left_out(failing: Pass, cause: str, caplog: pytest.LogCaptureFixture) -> None:
    batches = [(torch.randn(4, 4),)] * 2
    options = {"passes": (failing, *PIECE_PASSES)}
    with caplog.at_level(logging.WARNING, "graphopt"):
        (piece,) = assert_like_eager(mlp(), batches, options=options)
    assert piece.result.changed, "the others still run"
    assert len(piece.dropped) == 1 and failing.name in piece.dropped[0] and cause in piece.dropped[0]
    (record,) = caplog.records
    assert failing.name in record.getMessage() and cause in record.getMessage()
    assert failing.name in piece.explain()


def test_own_passes_are_the_ones_that_run() -> None:
    (piece,) = assert_like_eager(mlp(), [(torch.randn(4, 4),)], options={"passes": (NoOps(),)})
    assert {change.pass_name for change in piece.result.changes} == {"no_ops"}
    (piece,) = assert_like_eager(mlp(), [(torch.randn(4, 4),)], options={"passes": ()})
    assert not piece.result.changed


def test_a_piece_tells_where_it_is_from(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x)) * self.scale
            return x

    torch._dynamo.reset()
    with recording() as pieces:
        compiled(Named())(torch.randn(3, 4))
    (piece,) = pieces
    graph = piece.before
    kinds = {i.name: i.kind for i in graph.inputs if i.kind != "tangent"}
    assert kinds == {
        "layers.0.weight": "parameter", "layers.0.bias": "parameter", "layers.1.weight": "parameter",
        "layers.1.bias": "parameter", "scale": "buffer", "x": "batch",
    }  # fmt: skip
    for phase in ("forward", "backward"):
        places = {(n.meta["module"], n.meta["source"]) for n in graph.nodes if n.meta["phase"] == phase}
        assert {"layers.0", "layers.1"} <= {module for module, _ in places}
    assert "test_pieces.py:" in piece.name
    page = piece.show(tmp_path / "piece.html")
    assert "layers.1" in (tmp_path / "piece.html").read_text() and page


def test_recordings_end_with_their_block() -> None:
    torch._dynamo.reset()
    with recording() as outer:
        with recording() as inner:
            compiled(mlp())(torch.randn(3, 4))
        assert len(outer) == len(inner) == 1
        torch._dynamo.reset()
        compiled(mlp())(torch.randn(3, 4))
    assert (len(outer), len(inner)) == (2, 1)


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        ({"lowering": "eager"}, None, "'lowering' unknown"),
        ({"lower": "triton"}, None, "'triton'"),
        ({"passes": ["no_ops"]}, None, "graphopt.passes.Pass"),
        ({"inductor": {"max_autotune": True}}, None, "'lower': 'inductor'"),
        (None, "reduce-overhead", "'lower': 'inductor'"),
    ],
)
def test_wrong_options_are_named(options: dict | None, mode: str | None, message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        Options.parse(options, mode)


def test_keys_of_caches_tell_passes_apart() -> None:
    keys = [Options(passes=passes).key() for passes in (PIECE_PASSES, PIECE_PASSES[:1], ())]
    assert None not in keys and len(set(keys)) == 3
    assert Options(passes=(Raising(),)).key() is None


def test_the_entry_point_is_the_backend() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    ((name, value),) = declared["torch_dynamo_backends"].items()
    assert name == "graphopt"
    assert EntryPoint(name, value, "torch_dynamo_backends").load() is backend


def test_registered_by_name() -> None:
    register()
    register()
    assert "graphopt" in torch.compiler.list_backends()
    model, x = mlp(), torch.randn(3, 4)
    assert torch.equal(torch.compile(model, backend="graphopt")(x), model(x))


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['0']._parameters['weight']", "0.weight"),
        ("L['self']._modules['encoder']._buffers['mask']", "encoder.mask"),
        ("L['kwargs']['input_ids']", "kwargs.input_ids"),
        ("G['scale']", "scale"),
    ],
)
def test_paths_of_sources(source: str, path: str) -> None:
    assert path_of(source) == path
