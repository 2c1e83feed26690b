"""`ShrinkAxes`: the rewritten text, and that it is the subnet on slices, with gradients of the whole."""

import torch
import torch.nn.functional as F
from torch import nn

from graphopt import capture_forward, with_backward
from graphopt.graph.training_graph import InputKind, OutputKind
from graphopt.passes import ShrinkAxes
from tests.helpers import body, run


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 2))


def values(graph, model, *batch):
    rest, given = iter(batch), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [next(rest) if i.kind is InputKind.BATCH else given[i.name].detach() for i in graph.inputs]


def test_text():
    graph = capture_forward(nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)), torch.randn(5, 4))
    result = ShrinkAxes((("0.hidden", 6),))(graph)
    assert body(result.graph) == (
        "%slice_tensor = aten.slice.Tensor(%_0_weight, 0, 0, 6)\n"
        "%slice_tensor_1 = aten.slice.Tensor(%_1_weight, 1, 0, 6)\n"
        "%linear = aten.linear(%batch_0, %slice_tensor)\n"
        "%linear_1 = aten.linear(%linear, %slice_tensor_1)\n"
        "return %linear_1"
    )
    (change,) = result.changes
    assert change.what == "0.hidden from 8 to 6" and change.saving.flops == 2 * 5 * 2 * (4 + 2)


def test_outputs_buffers_and_gradients():
    model = net()
    batch = (torch.randn(5, 4), torch.randint(2, (5,)))
    forward = capture_forward(model, batch, loss=F.cross_entropy)
    result = ShrinkAxes((("0.hidden", 5),))(forward)
    assert not result.refusals and result.changed
    small = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 2))
    whole = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in small.named_parameters():
            p.copy_(whole[name][:, :5] if name == "3.weight" else whole[name][:5] if p.shape[0] == 5 else whole[name])
    loss = F.cross_entropy(small(batch[0]), batch[1])
    loss.backward()
    joint = with_backward(result.graph)
    got = {str(o): v for o, v in zip(joint.outputs, run(joint, values(joint, model, *batch)), strict=True)}
    assert torch.allclose(got["loss loss"], loss)
    for name, p in small.named_parameters():
        gradient = got[f"gradient {name}"]
        part = gradient[:, :5] if name == "3.weight" else gradient[: len(p)]
        assert torch.allclose(part, p.grad, atol=1e-6), name
        assert gradient.shape == whole[name].shape
        assert abs(float(gradient.abs().sum() - part.abs().sum())) < 1e-6
    mean = got["new buffer 1.running_mean"]
    assert torch.allclose(mean[:5], small[1].running_mean) and torch.equal(mean[5:], model[1].running_mean[5:])
    assert joint.output_nodes(OutputKind.BUFFER).keys() == forward.output_nodes(OutputKind.BUFFER).keys()


def test_fused_parts_are_indexed():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(6, 2)

        def forward(self, x):
            gate, up = self.a(x).chunk(2, -1)
            return self.b(F.silu(gate) * up)

    model, x = Fused(), torch.randn(3, 4)
    graph = capture_forward(model, x)
    (axis,) = [g for g in graph.axes.groups() if g.free]
    small = ShrinkAxes(((axis.name, 4),))(graph).graph
    (got,) = run(small, values(small, model, x))
    rows = [0, 1, 2, 3, 6, 7, 8, 9]
    gate, up = F.linear(x, model.a.weight[rows], model.a.bias[rows]).chunk(2, -1)
    assert torch.allclose(got, F.linear(F.silu(gate) * up, model.b.weight[:, :4], model.b.bias), atol=1e-6)


def test_refusals():
    graph = capture_forward(net(), torch.randn(5, 4))
    result = ShrinkAxes((("nothing", 2), ("input", 2), ("0.hidden", 9), ("0.hidden", 8)))(graph)
    assert result.graph is graph and not result.changed
    why = [r.why for r in result.refusals]
    assert "no axis 'nothing'" in why[0] and "must keep its size 4" in why[1] and "from 1 to 8" in why[2]
