"""Layers are left out of forward graphs, with all that belongs to them; what is no run is refused."""

import pytest
import torch
from torch import nn

from graphopt.errors import PassError
from graphopt.graph.capture import capture
from graphopt.graph.forward import capture_forward
from graphopt.graph.training_graph import InputKind, OutputKind
from graphopt.passes import Pipeline, SkipLayers
from tests.graph.test_depth import outputs


class Residual(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.norm, self.body, self.drop = nn.BatchNorm1d(width), nn.Linear(width, width), nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(self.body(self.norm(x)))


X = torch.randn(5, 6)


def net():
    torch.manual_seed(0)
    return nn.Sequential(Residual(), Residual(), nn.Linear(6, 3))


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_goes_with_its_draws_and_buffers(training):
    model = net().train(training)
    graph = capture_forward(model, X)
    result = SkipLayers(["0"])(graph)
    assert [(c.module, c.saving.flops) for c in result.changes] == [("0", 5 * 2 * 6 * 6)]
    assert result.graph.inputs == graph.inputs
    buffers = {o.name for o in result.graph.outputs if o.kind is OutputKind.BUFFER}
    assert buffers == (
        {f"1.norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")} if training else set()
    )
    unread = {n for n, node in result.graph.input_nodes(InputKind.PARAMETER).items() if not node.users}
    assert unread == {"0.norm.weight", "0.norm.bias", "0.body.weight", "0.body.bias"}
    torch.manual_seed(1)
    got = outputs(result.graph, model, (X,))[0]
    torch.manual_seed(1)
    assert torch.equal(got, model[2](model[1](X)))


def test_what_is_no_layer_is_refused():
    graph = capture_forward(net(), X)
    result = SkipLayers(["2", "1"])(graph)
    assert [(r.what, r.module) for r in result.refusals] == [("2", "2")]
    assert "there are 0, 1" in result.refusals[0].why
    assert SkipLayers(["2"])(graph).graph is graph


def test_joint_graphs_are_an_error():
    with pytest.raises(PassError, match="derive its backward anew"):
        SkipLayers(["0"])(capture(net(), X))


def test_in_a_pipeline():
    graph = capture_forward(net(), X)
    result = Pipeline([SkipLayers(["0"]), SkipLayers(["1"])])(graph)
    assert len(result.changes) == 2 and len(result.graph) == 1
