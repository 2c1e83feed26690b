"""GradientLiveness: the walk over layers in the words of its source, and the gradients that nobody reads, by FLOPs."""

import copy
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import graphopt
from graphopt.errors import PassError
from graphopt.graph.batch import compute_loss
from graphopt.graph.training_graph import OutputKind, Phase
from graphopt.passes import GradientLiveness
from graphopt.passes.gradient_liveness import SKIPPED
from graphopt.passes.layer_walk import COPIES, WEIGHTLESS

REMOVED, DROPPED, KEPT = "removed", "input gradient dropped", "kept"


def everything(model, batch, loss=F.mse_loss):
    """The graph with the gradients of all parameters and float inputs."""
    return graphopt.capture(model, batch, loss=loss, gradients="all")


def decisions(result):
    """``(operator, decision)`` of each layer; what autograd itself adds (detach) is left out."""
    return [(layer.operator, layer.decision) for layer in result.layers if layer.operator != "detach"]


@cache
def of_kind(model, *shape):
    """`everything` of a kind of model, captured once for several freeze patterns; tokens where no shape is given."""
    x = torch.randn(3, *shape) if shape else torch.randint(7, (3, 3))
    with torch.no_grad():
        target = torch.randn_like(model()(x))
    return everything(model(), (x, target))


def assert_walk(graph, trainable, expected, **options):
    result = GradientLiveness(trainable=trainable, **options)(graph)
    assert decisions(result) == [*expected, ("mse_loss", KEPT)]
    return result


def products(graph):
    """How many matrix products backward makes."""
    return sum(str(n.target) == "aten.mm.default" for n in graph.nodes if n.meta["phase"] == Phase.BACKWARD)


def backward_flops(graph):
    return graph.flops(phase=Phase.BACKWARD)


def eager_backward_flops(model, batch, loss=F.mse_loss):
    """What ``loss.backward()`` costs in eager mode, by torch's own counter."""
    value = compute_loss(copy.deepcopy(model), batch, loss)
    with FlopCounterMode(display=False) as counter:
        value.backward()
    return counter.get_total_flops()


def linears(*widths):
    return nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)])


def rows(n=3, inputs=4, outputs=4):
    return torch.randn(n, inputs), torch.randn(n, outputs)


# -- the walk over layers --------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """reshape - convolution - ReLU - convolution"""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)

    def forward(self, x):
        return self.second(self.first(x.view(-1, 1, 8, 8)).relu())


CHAIN = ["view", "convolution", "relu", "convolution"]


@pytest.mark.parametrize(
    "trainable, expected",
    [
        (["second.weight"], [REMOVED, REMOVED, REMOVED, DROPPED]),
        (["second.bias"], [REMOVED, REMOVED, REMOVED, DROPPED]),
        (["first.weight"], [REMOVED, DROPPED, KEPT, KEPT]),
        (["first.weight", "second.weight"], [REMOVED, DROPPED, KEPT, KEPT]),
    ],
)
def test_reshape_conv_relu_conv(trainable, expected):
    result = assert_walk(of_kind(Chain, 64), trainable, list(zip(CHAIN, expected)))
    assert [o.name for o in result.graph.outputs if o.kind is OutputKind.GRADIENT] == trainable


def test_the_border_keeps_its_weight_gradient_and_loses_its_input_gradient():
    graph = GradientLiveness(trainable=["second.weight"])(of_kind(Chain, 64)).graph
    (node,) = [n for n in graph.nodes if "convolution_backward" in str(n.target)]
    assert node.args[-1] == [False, True, False]
    assert backward_flops(graph) == 2 * 3 * (2 * 2 * 3 * 3) * (4 * 4)


class Branches(nn.Module):
    """Two layers on the same input, added; then a third."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last((self.left(x).sigmoid() + self.right(x).tanh()).relu())


BRANCHES = ["addmm", "sigmoid", "addmm", "tanh", "add.Tensor", "relu", "addmm"]


@pytest.mark.parametrize(
    "trainable, expected",
    [
        (["last.weight"], [REMOVED] * 6 + [DROPPED]),
        (["right.weight"], [REMOVED, REMOVED, DROPPED, KEPT, KEPT, KEPT, KEPT]),  # the sum has a trained ancestor
        (["left.bias"], [DROPPED, KEPT, REMOVED, REMOVED, KEPT, KEPT, KEPT]),
    ],
)
def test_two_branches(trainable, expected):
    assert_walk(of_kind(Branches, 4), trainable, list(zip(BRANCHES, expected)))


class Tokens(nn.Module):
    """embedding - reshape - linear"""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 4), nn.Linear(12, 4)

    def forward(self, x):
        return self.out(self.embedding(x).flatten(1))


def test_a_trained_embedding():
    graph = of_kind(Tokens)
    layers = ["embedding", "view", "addmm"]
    both = ["embedding.weight", "out.weight"]
    assert_walk(graph, both, list(zip(layers, [DROPPED, KEPT, KEPT])))
    frozen = assert_walk(graph, ["out.weight"], list(zip(layers, [REMOVED, REMOVED, DROPPED])))
    assert "embedding_dense_backward" not in frozen.graph.text()


@torch.library.custom_op("graphopt_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """An operator that the library does not know."""
    return x * 2


twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, gradient: twice(gradient))


class Custom(nn.Module):
    """linear - an unknown operator - linear"""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(twice(self.first(x)))


def test_a_custom_operator_is_a_target_once_it_is_in_the_set():
    name, operator = "graphopt_tests.twice", torch.ops.graphopt_tests.twice
    graph, trainable = of_kind(Custom, 4), ["second.weight"]
    assert_walk(graph, trainable, [("addmm", REMOVED), (name, KEPT), ("addmm", DROPPED)])
    for option in ({"weightless": WEIGHTLESS | {operator}}, {"copies": COPIES | {operator.default}}):
        assert_walk(graph, trainable, [("addmm", REMOVED), (name, REMOVED), ("addmm", DROPPED)], **option)


def test_every_layer_has_a_reason_and_a_place():
    result = GradientLiveness(trainable=["1.weight"])(everything(linears(4, 4, 4), rows()))
    assert [layer.module for layer in result.layers[:2]] == ["0", "1"]
    assert all(layer.why for layer in result.layers)


# -- what autograd does by itself is no gain -------------------------------------------------------------------------


def test_a_frozen_prefix_is_already_skipped_by_autograd():
    model = linears(4, 4, 4)
    model[0].requires_grad_(False)
    result = GradientLiveness(trainable=["1.weight", "1.bias"])(everything(model, rows()))
    assert result.changes and all(change.what.startswith(SKIPPED) for change in result.changes)
    assert result.saving.flops == 0
    assert backward_flops(result.graph) == eager_backward_flops(model, rows())


def test_unfrozen_parameters_that_nobody_trains_are_a_gain():
    model, batch = linears(4, 4, 4), rows()
    result = GradientLiveness(trainable=["1.weight"])(everything(model, batch))
    gains = [change for change in result.changes if not change.what.startswith(SKIPPED)]
    assert result.saving.flops == sum(change.saving.flops for change in gains)
    assert result.saving.flops == eager_backward_flops(model, batch) - backward_flops(result.graph)


# -- gradients that nobody reads -------------------------------------------------------------------------------------


def update(model, batch, optimizer, loss=F.mse_loss):
    """The step with its update before and after the pass."""
    before = graphopt.capture(model, batch, loss=loss, optimizer=optimizer)
    return before, GradientLiveness()(before).graph


def test_head_only_optimizer_over_an_unfrozen_resnet18():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=10)
    batch = torch.randn(1, 3, 64, 64), torch.randint(10, (1,))
    before, after = update(model, batch, torch.optim.SGD(model.fc.parameters(), lr=0.1), F.cross_entropy)
    stem = 2 * (64 * 3 * 7 * 7) * 32 * 32  # eager makes no gradient of the batch
    assert backward_flops(before) == 2 * before.flops(phase=Phase.FORWARD) - stem
    assert backward_flops(after) == 2 * 512 * 10
    assert after.flops(phase=Phase.FORWARD) == before.flops(phase=Phase.FORWARD)


def test_generator_step_through_an_unfrozen_discriminator():
    generator, discriminator = linears(4, 8, 4), linears(4, 8, 1)
    model = nn.Sequential(generator, discriminator)
    batch = rows(outputs=1)
    before, after = update(model, batch, torch.optim.Adam(generator.parameters()))
    weights = 4 * 8 + 8 * 1  # of the discriminator: their gradients are waste
    assert backward_flops(before) - backward_flops(after) == 2 * 3 * weights
    assert products(before) == 7 and products(after) == 5
    assert backward_flops(before) == eager_backward_flops(model, batch)


def test_the_other_half_of_the_gan_step_from_the_same_graph():
    full = everything(nn.Sequential(linears(4, 8, 4), linears(4, 8, 1)), rows(outputs=1))
    halves = [GradientLiveness(trainable=[f"{i}.{j}.weight" for j in (0, 1)])(full).graph for i in (0, 1)]
    assert [products(half) for half in halves] == [5, 3]


def test_input_gradients_asked_for_by_a_hook_on_a_frozen_body():
    """As transformers' ``enable_input_require_grads``: eager makes five products, four of which nobody reads."""
    model, batch = linears(4, 4, 4, 4, 4), rows()
    model[:3].requires_grad_(False)
    model[0].register_forward_pre_hook(lambda module, given: given[0].detach().requires_grad_(True))
    _, after = update(model, batch, torch.optim.SGD(model[3:].parameters(), lr=0.1))
    product = 2 * 3 * 4 * 4
    assert eager_backward_flops(model, batch) == 5 * product
    assert backward_flops(after) == product


class Extra(nn.Module):
    """A second output, differentiable, from a layer of its own."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.body(x).relu()
        return self.head(hidden), self.other(hidden)


def test_an_output_that_the_loss_does_not_use_costs_no_backward():
    def loss(outputs, target):
        return F.mse_loss(outputs[0], target)

    model = Extra()
    _, after = update(model, rows(), torch.optim.SGD(model.parameters(), lr=0.1), loss)
    assert products(after) == 3


def test_an_output_whose_tangent_nobody_gives():
    """Without a loss every output has a tangent; parameters that only unwanted outputs reach need none of them."""
    full = graphopt.capture(Extra(), torch.randn(3, 4))
    assert products(full) == 2 + 2 + 1
    assert products(GradientLiveness(trainable=["head.weight"])(full).graph) == 1


def test_an_input_that_needs_grad_by_accident():
    model, (x, target) = linears(4, 8, 4), rows()
    batch = x.requires_grad_(), target
    before, after = update(model, batch, torch.optim.SGD(model.parameters(), lr=0.1))
    assert backward_flops(before) == eager_backward_flops(model, batch)
    assert backward_flops(before) - backward_flops(after) == 2 * 3 * 4 * 8


def test_a_gradient_that_is_asked_for_stays():
    model, (x, target) = linears(4, 8, 4), rows()
    graph = graphopt.capture(
        model, (x.requires_grad_(), target), loss=F.mse_loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    result = GradientLiveness(keep=["0", "1.bias"])(graph)
    assert {o.name for o in result.graph.outputs if o.kind is OutputKind.GRADIENT} == {"0", "1.bias"}
    assert backward_flops(result.graph) == backward_flops(graph)


# -- what stays, and bad input ---------------------------------------------------------------------------------------


def test_random_operators_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    graph = GradientLiveness(trainable=[])(everything(model, rows())).graph
    assert "native_dropout" in graph.text() and backward_flops(graph) == 0


def test_nothing_to_do_gives_the_same_graph():
    graph = graphopt.capture(linears(4, 4), rows(), loss=F.mse_loss)
    result = GradientLiveness()(graph)
    assert result.graph is graph and not result.changed


def test_a_parameter_that_takes_no_part_has_no_gradient():
    model = linears(4, 4)
    model.unused = nn.Linear(4, 4)
    model.forward = lambda x: model[0](x)
    graph = GradientLiveness(trainable=["0.weight", "unused.weight"])(everything(model, rows())).graph
    assert [o.name for o in graph.outputs if o.kind is OutputKind.GRADIENT] == ["0.weight"]


def test_unknown_and_missing_names():
    graph = graphopt.capture(linears(4, 4), rows(), loss=F.mse_loss)
    with pytest.raises(PassError, match="neither parameters nor batch tensors"):
        GradientLiveness(trainable=["1.weight"])(graph)
    frozen = graphopt.capture(linears(4, 4).requires_grad_(False), rows(), loss=F.mse_loss)
    with pytest.raises(PassError, match='capture it with gradients="all"'):
        GradientLiveness(trainable=["0.weight"])(frozen)
