"""FrozenFolding: the folded graph follows its parameters, and what somebody else reads is not folded."""

import pytest
import torch
from torch import nn

from graphopt.graph.capture import capture
from graphopt.graph.training_graph import InputKind, Phase
from graphopt.passes import FrozenFolding
from tests.helpers import assert_rewrite, body, run, traced

aten = torch.ops.aten
NORM = aten._native_batch_norm_legit_no_training.default


def net(convolution=None, **options):
    """A frozen convolution with batch norm whose parameters and statistics are all different."""
    torch.manual_seed(1)
    model = nn.Sequential(convolution or nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6, **options), nn.ReLU())
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    return model.eval().requires_grad_(False)


def values(graph, model, x):
    state = model.state_dict()
    return [x if i.kind is InputKind.BATCH else state[i.name] for i in graph.inputs]


def assert_folds(model, x):
    graph = capture(model, x, backward=False)
    result = FrozenFolding()(graph)
    assert len(result.changes) == 1 and not result.refusals
    assert not FrozenFolding()(result.graph).changed
    assert "batch_norm" not in body(result.graph)
    assert result.saving.bytes_moved > 0
    exact = model.double()(x.double())
    ours, theirs = (run(g, values(graph, model.float(), x))[0] for g in (result.graph, graph))
    assert (ours - exact).abs().max() <= 4 * (theirs - exact).abs().max()
    return result.graph


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"groups": 2}])
def test_folds(affine, bias, options):
    model = net(nn.Conv2d(4, 6, 3, bias=bias, **options), affine=affine)
    assert_folds(model, torch.randn(2, 4, 12, 12))


def test_structure():
    graph = capture(net(nn.Conv2d(4, 6, 1, bias=False)), torch.randn(2, 4, 8, 8), backward=False)
    expected = """
    %add_tensor = aten.add.Tensor(%_1_running_var, 1e-05)
    %rsqrt_default = aten.rsqrt(%add_tensor)
    %mul_tensor = aten.mul.Tensor(%rsqrt_default, %_1_weight)
    %view_default = aten.view(%mul_tensor, [6, 1, 1, 1])
    %mul_tensor_1 = aten.mul.Tensor(%_0_weight, %view_default)
    %neg_default = aten.neg(%_1_running_mean)
    %mul_tensor_2 = aten.mul.Tensor(%neg_default, %mul_tensor)
    %add_tensor_1 = aten.add.Tensor(%mul_tensor_2, %_1_bias)
    %convolution_default = aten.convolution(%batch_0, %mul_tensor_1, %add_tensor_1,
        [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    %relu = aten.relu(%convolution_default)
    return %relu
    """
    result = FrozenFolding()(graph)
    assert body(result.graph).split() == expected.split()


def test_follows_a_later_load_state_dict():
    x = torch.randn(2, 4, 12, 12)
    model = net()
    folded = assert_folds(model, x)
    model.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    torch.testing.assert_close(run(folded, values(folded, model, x))[0], model(x))


def refusal(model, x=None, **options):
    result = FrozenFolding()(capture(model, torch.randn(2, 4, 12, 12) if x is None else x, **options))
    assert not result.changed
    return "; ".join(r.why for r in result.refusals)


def test_refuses_what_is_trained():
    model = net()
    model[1].bias.requires_grad_(True)
    assert "its bias is trained" in refusal(model)


def test_refuses_what_backward_reads():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), net())
    assert "native_batch_norm_backward reads %convolution" in refusal(model)


def test_refuses_a_weight_larger_than_the_activation():
    assert "more bytes" in refusal(net(), torch.randn(2, 4, 3, 3), backward=False)


def test_refuses_a_transposed_convolution():
    assert "transposed" in refusal(net(nn.ConvTranspose2d(4, 6, 3)), backward=False)


def test_leaves_batch_statistics_alone():
    assert refusal(net().train(), backward=False) == ""


def test_refuses_parameters_that_are_computed():
    def computed(step, x, w, gamma, beta, mean, var):
        y = aten.convolution.default(x, aten.exp.default(w), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        return step.item(step.call(NORM, y, gamma, beta, mean, var, 0.1, 1e-5), 0)

    kinds = [InputKind.BATCH, *[InputKind.PARAMETER] * 5]
    graph = traced(computed, (2, 3, 8, 8), (4, 3, 1, 1), (4,), (4,), (4,), (4,), kinds=kinds)
    result = assert_rewrite(FrozenFolding(), graph, refused="is not a parameter or buffer")
    assert all(n.meta["phase"] in (Phase.INPUT, Phase.FORWARD) for n in result.graph.nodes if n.op != "output")
