"""`capture_forward` keeps operators whole and the model's bits; `with_backward` gives the graph of `capture`."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from graphopt import BatchError, CaptureError, LossError, TrainingGraph, capture
from graphopt.graph.batch import call_model, flatten, normalise
from graphopt.graph.differentiate import with_backward
from graphopt.graph.forward import capture_forward
from graphopt.graph.lowering import lower
from graphopt.graph.text import operator_text
from graphopt.graph.training_graph import InputKind, OutputKind, Phase
from graphopt.verify import run_graph
from tests.random_models import cases, eager_step
from tests.training import Net, assert_same, cross_entropy, images, mlp, rows, untouched

aten = torch.ops.aten


class Calls(nn.Module):
    """A function of x and of one linear layer's output h, with a buffer to write into."""

    def __init__(self, function, width=4):
        super().__init__()
        self.body = nn.Linear(width, width)
        self.register_buffer("seen", torch.zeros(width))
        self.function = function

    def forward(self, x):
        return self.function(self, x, self.body(x))


class Recurrent(nn.Module):
    """An LSTM of two layers with dropout between them."""

    def __init__(self):
        super().__init__()
        self.body = nn.LSTM(4, 6, 2, batch_first=True, dropout=0.3, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.body(x)[0]).mean(1)


class Attention(nn.Module):
    """A layer of a transformer, in which dropout stands in five places."""

    def __init__(self):
        super().__init__()
        self.body = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x)).mean(1)


class Tied(nn.Module):
    """An embedding whose weight is that of the last layer too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x)).mean(1)


def sequences(size=5):
    """Sequences of vectors and classes."""
    return torch.randn(size, 6, 4), torch.randint(3, (size,))


def tokens(size=5):
    """Sequences of token ids and classes."""
    return torch.randint(7, (size, 6)), torch.randint(3, (size,))


def without_gradient(model, x, h):
    """A scale and a running mean made without gradients; one value leaves the region, one is returned."""
    with torch.no_grad():
        scale = h.std() + 1
        model.seen.mul_(0.9).add_(h.mean((0, 1)), alpha=0.1)
        unused = h.abs()
    return (h / scale - model.seen).mean(1) + 0 * unused.sum()


def mixed_precision(model, x, h):
    """A region of autocast with one of full precision inside."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = torch.einsum("bij,bkj->bik", model.body(h), h) @ model.body(x)
        with torch.autocast("cpu", enabled=False):
            h = F.layer_norm(h.float(), (4,))
        return torch.cat([h, model.body(h)], 1).mean(1)


def follow(model, x, h):
    """The buffer takes a value with gradients switched on."""
    model.seen.copy_(h.detach()[0, 0])
    return h.mean(1)


def nested(model, x, h):
    """Gradients switched on again inside of a region without."""
    with torch.no_grad():
        a = h.exp()
        with torch.enable_grad():
            b = h.sin()
    return (a + b).mean(1)


MODELS = {
    "mlp": (mlp, rows),
    "batch norm and dropout": (lambda: Net(0.4), images),
    "shared batch norm": (lambda: nn.Sequential(norm := nn.BatchNorm1d(4), nn.Linear(4, 4), norm), rows),
    "tied weights": (Tied, tokens),
    "attention": (Attention, sequences),
    "lstm": (Recurrent, sequences),
    "a region without gradients": (lambda: Calls(without_gradient), sequences),
    "regions in regions": (lambda: Calls(nested), sequences),
    "a region of autocast": (lambda: Calls(mixed_precision), sequences),
    "detach": (lambda: Calls(lambda m, x, h: (h * h.detach() + m.seen.detach()).mean(1)), sequences),
    "writes in place": (lambda: Calls(lambda m, x, h: F.relu_(F.dropout(h, 0.2)).mul(2).add_(1).mean(1)), sequences),
    "constants": (
        lambda: Calls(lambda m, x, h: (h + torch.tensor([1.0, 2, 3, 4]) + torch.arange(4)).mean(1)),
        sequences,
    ),
    "a buffer from detached values": (lambda: Calls(follow), sequences),
    "upsampling": (lambda: Calls(lambda m, x, h: F.interpolate(h, scale_factor=2.0).mean(1)[:, :3]), sequences),
}
CASES = pytest.mark.parametrize("make, draw", MODELS.values(), ids=MODELS)


def operators(graph):
    """Names of the operators in order."""
    return [operator_text(n.target).removeprefix("aten.") for n in graph.nodes if n.op == "call_function"]


def places(graph):
    """Operators with their module paths and source lines, in no order."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    return sorted((str(n.target), n.meta["module"], n.meta["source"]) for n in nodes)


def results(graph, model, batch, seed=0):
    """By output: what the lowered graph gives on the model's tensors, in the present grad mode as eager (an LSTM and
    the fast path of attention ask for it)."""
    tensors, layout, _ = flatten(batch)
    given = dict(model.named_parameters()) | dict(model.named_buffers()) | dict(zip(layout.names, tensors))
    torch.manual_seed(seed)
    values = lower(graph, in_place=False).run(*(given[i.name] for i in graph.inputs))
    return dict(zip(map(str, graph.outputs), values))


def assert_models_bits(graph, model, batch, seed=0):
    """The lowered graph gives the model's own outputs and buffers."""
    ours = results(graph, model, batch, seed)
    eager = copy.deepcopy(model)
    torch.manual_seed(seed)
    assert_same(ours.pop("output 0"), call_model(eager, normalise(batch)), "output")
    buffers = dict(eager.named_buffers())
    for name, value in ours.items():
        assert_same(value, buffers[name.removeprefix("new buffer ")], name)


# -- whole operators ------------------------------------------------------------------------------------------------


class Several(nn.Module):
    """One call of each operator that autograd or dispatch would take apart."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.group = nn.GroupNorm(2, 4)

    def forward(self, x):
        h = F.layer_norm(self.embed(x), (4,))
        h = self.attention(h, h, h, need_weights=False)[0]
        h = self.group(self.conv(h.transpose(1, 2))).transpose(1, 2)
        h = torch.einsum("bij,bkj->bik", h, h) @ h
        return F.silu(F.dropout(h, 0.1)).mean(1)


def test_operators_stay_whole():
    names = operators(capture_forward(Several(), tokens(), loss=cross_entropy))
    assert {"embedding", "layer_norm", "linear", "scaled_dot_product_attention", "conv1d", "group_norm"} < set(names)
    assert {"einsum", "matmul", "dropout", "silu", "cross_entropy_loss"} < set(names)
    assert not {"addmm", "bmm", "convolution", "native_layer_norm", "native_dropout", "nll_loss_forward"} & set(names)


def test_an_lstm_is_one_operator():
    assert operators(capture_forward(nn.LSTM(4, 6, 2), torch.randn(5, 3, 4))).count("lstm.input") == 1


def test_dropout_that_drops_nothing_is_no_operator():
    model = Calls(lambda m, x, h: F.dropout(h, 0.5, m.training) + F.dropout(h, 0.0))
    assert operators(capture_forward(model.eval(), sequences()[0])) == ["linear", "add.Tensor"]


def test_a_write_into_dropout_that_drops_nothing_reaches_its_operand():
    model = Calls(lambda m, x, h: F.dropout(h, 0.5, m.training).add_(1) * h)
    for mode in (True, False):
        x = sequences()[0]
        assert_models_bits(capture_forward(model.train(mode), x), model, x)


def test_the_graph_is_forward_alone_with_places():
    graph = capture_forward(Net(), images(), loss=cross_entropy)
    assert {n.meta["phase"] for n in graph.nodes} == {Phase.INPUT, Phase.FORWARD, Phase.OUTPUT}
    (linear,) = [place for place in places(graph) if place[0] == "aten.linear.default"]
    assert linear[1] == "head" and linear[2].startswith("tests/training.py:")
    assert [str(o) for o in graph.outputs][:2] == ["loss loss", "new buffer norm.running_mean"]


# -- values ---------------------------------------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_lowered_graph_gives_the_models_bits(make, draw, training):
    model, (x, _) = make().train(training), draw()
    with untouched(model):
        graph = capture_forward(model, x)
    assert_models_bits(graph, model, x, seed=1)
    assert_models_bits(graph, model, draw(9)[0], seed=2)  # the batch size is free
    if make is not Attention:
        with torch.no_grad():
            assert_models_bits(graph, model, x, seed=3)


@CASES
def test_a_file_keeps_the_graph(make, draw, tmp_path):
    graph = capture_forward(make(), draw(), loss=cross_entropy)
    graph.save(tmp_path / "forward.graph")
    loaded = TrainingGraph.load(tmp_path / "forward.graph")
    assert loaded.text() == graph.text() and loaded.signature.tree == graph.signature.tree
    assert with_backward(loaded).hash() == with_backward(graph).hash()


def test_a_loss_is_eagers():
    model, batch = Net(0.4), images()
    graph = capture_forward(model, batch, loss=cross_entropy)
    torch.manual_seed(3)
    expected = cross_entropy(copy.deepcopy(model)(batch[0]), batch[1])
    assert_same(results(graph, model, batch, seed=3)["loss loss"], expected, "loss")


def test_autocast_active_at_capture_is_in_the_graph():
    model, x = mlp(), rows()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph, expected = capture_forward(model, x), model(x)
    assert operators(graph).count("_to_copy") >= 3 and operators(graph).count("linear") == 2
    assert_same(results(graph, model, x)["output 0"], expected, "output")


def test_what_autocast_does_inside_of_an_operator_takes_it_apart():
    model = Calls(lambda m, x, h: torch.einsum("bij,bkj->bik", h, x))
    x = sequences()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph, expected = capture_forward(model, x), model(x)
    assert "einsum" not in operators(graph) and "bmm" in operators(graph)
    assert_same(results(graph, model, x)["output 0"], expected, "output")


def test_only_what_leaves_a_region_without_gradients_is_detached():
    graph = capture_forward(Calls(without_gradient), sequences()[0])
    assert operators(graph).count("detach") == 3  # scale, seen and unused; not the new value of the buffer
    plain = Calls(lambda m, x, h: h + torch.no_grad()(lambda: m.seen * 2)())
    assert "detach" not in operators(capture_forward(plain, sequences()[0]))  # no gradient reaches it anyway


# -- sizes ----------------------------------------------------------------------------------------------------------


def test_batch_size_one_is_static():
    graph = capture_forward(mlp(), rows(1), loss=cross_entropy)
    assert not graph.symbols.symbols and graph.symbols.hints == {"batch": 1}
    assert with_backward(graph).hash() == capture(mlp(), rows(1), loss=cross_entropy).hash()


def test_guards_are_the_range_of_validity_and_are_handed_on():
    model = Calls(lambda m, x, h: h if x.shape[0] > 3 else -h)
    graph = capture_forward(model, rows()[0])
    for found in (graph, with_backward(graph), capture(model, rows()[0])):
        assert found.symbols.admits({"batch": 4}) and not found.symbols.admits({"batch": 3})
        assert found.symbols.guards == tuple(dict.fromkeys(found.symbols.guards)) != ()


# -- with_backward --------------------------------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize("loss", [cross_entropy, None], ids=["loss", "tangents"])
def test_with_backward_is_what_capture_gives(make, draw, loss):
    model, batch = make(), draw()
    batch = batch if loss else batch[0]
    found, expected = with_backward(capture_forward(model, batch, loss=loss)), capture(model, batch, loss=loss)
    assert found.hash() == expected.hash()
    assert found.signature.inputs == expected.signature.inputs
    assert found.signature.outputs == expected.signature.outputs
    assert found.signature.tree == expected.signature.tree
    assert places(found) == places(expected)


def test_with_backward_gives_eagers_gradients():
    model, batch = Net(0.4), images()
    graph = with_backward(capture_forward(model, batch, loss=cross_entropy))
    torch.manual_seed(5)
    eager = copy.deepcopy(model)
    cross_entropy(eager(batch[0]), batch[1]).backward()
    got = run_graph(graph, model, batch, seed=5).values
    for name, parameter in eager.named_parameters():
        assert_same(got[f"gradient {name}"], parameter.grad, name)


def test_gradients_are_of_what_required_grad_at_capture_or_is_asked_for():
    model = mlp()
    model[0].weight.requires_grad_(False)
    graph = capture_forward(model, rows(), loss=cross_entropy)

    def wanted(gradients):
        return set(with_backward(graph, gradients=gradients).output_nodes(OutputKind.GRADIENT))

    assert wanted("wanted") == {"0.bias", "2.weight", "2.bias"}
    assert wanted("all") == {"0.weight", "0.bias", "2.weight", "2.bias", "0"}
    assert wanted(["0.weight"]) == {"0.weight"}
    for gradients in ("none", ["nothing"]):
        with pytest.raises(CaptureError, match="gradients: "):
            with_backward(graph, gradients=gradients)


def test_gradients_of_batch_tensors_that_require_grad():
    batch = (torch.randn(5, 4, requires_grad=True), torch.randint(3, (5,)))
    found, expected = (
        with_backward(capture_forward(mlp(), batch, loss=cross_entropy)),
        capture(mlp(), batch, loss=cross_entropy),
    )
    assert "0" in found.output_nodes(OutputKind.GRADIENT) and found.hash() == expected.hash()


def test_a_rewritten_graph_is_differentiated():
    net, batch = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3)), rows()
    draft = capture_forward(net, batch, loss=cross_entropy).draft()
    (gelu,) = draft.graph.find_nodes(op="call_function", target=aten.gelu.default)
    draft.replace(gelu, draft.add(aten.relu.default, gelu.args[0], like=gelu))
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    assert with_backward(draft.finish()).hash() == capture(other, batch, loss=cross_entropy).hash()


@settings(max_examples=2 * settings.default.max_examples)
@given(cases(), st.sampled_from([1, 2, 5]))
def test_random_models_have_the_values_of_capture(case, size):
    batch = case.batch(size)
    eager_step(case, *case.instance(), batch)  # rejects what eager cannot run
    model, _ = case.instance()
    found = with_backward(capture_forward(model, batch, loss=case.loss))
    expected = run_graph(capture(model, batch, loss=case.loss), model, batch).values
    got = run_graph(found, model, batch).values
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert_same(value, expected[name], name)


# -- refusals -------------------------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Twice x, with a backward of its own."""

    @staticmethod
    def forward(context, x):
        return 2 * x

    @staticmethod
    def backward(context, gradient):
        return 3 * gradient


def test_a_backward_of_its_own_is_in_no_forward_graph():
    model = Calls(lambda m, x, h: Doubled.apply(h))
    graph = capture_forward(model, rows()[0])
    assert_models_bits(graph, model, rows()[0])
    with pytest.raises(CaptureError, match=r"Doubled, whose own backward"):
        with_backward(graph)


def test_checkpointing_has_no_backward_of_its_own():
    def recomputed(model, x, h):
        return torch.utils.checkpoint.checkpoint(torch.tanh, h, use_reentrant=False)

    graph = capture_forward(Calls(recomputed), rows(), loss=cross_entropy)
    assert "gradient body.weight" in [*map(str, with_backward(graph).outputs)]


def test_bad_input_says_what_came():
    with pytest.raises(CaptureError, match=r"model: expected a torch.nn.Module, got function"):
        capture_forward(lambda x: x, rows())
    with pytest.raises(CaptureError, match="loss: expected a callable"):
        capture_forward(mlp(), rows(), loss=3)
    with pytest.raises(BatchError, match="the model rejects it"):
        capture_forward(mlp(), torch.randn(5, 7))
    with pytest.raises(LossError, match="expected a scalar"):
        capture_forward(mlp(), rows(), loss=lambda output, target: output)
    with pytest.raises(LossError, match="does not depend on any parameter"):
        capture_forward(mlp(), rows(), loss=lambda output, target: cross_entropy(output, target).detach())
    with pytest.raises(CaptureError, match=r"at .*test_forward.py:\d+"):
        capture_forward(Calls(lambda m, x, h: h if h.sum() > 0 else -h), rows()[0])
    with pytest.raises(CaptureError, match=r"at .*: transforms of torch.func"):
        capture_forward(Calls(lambda m, x, h: torch.vmap(torch.sin)(h)), rows()[0])
    with pytest.raises(CaptureError, match="expected a TrainingGraph, got Sequential"):
        with_backward(mlp())
    with pytest.raises(CaptureError, match="has a backward"):
        with_backward(capture(mlp(), rows(), loss=cross_entropy))


def test_an_impossible_backward_names_the_place():
    draft = capture_forward(mlp(), rows(), loss=cross_entropy).draft()
    linear = draft.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    linear.args = (linear.args[0], *draft.placeholders[2:4])  # a weight of another shape
    with pytest.raises(CaptureError, match=r"no backward for the graph at linear \(aten.linear.default\)"):
        with_backward(draft.finish())


def test_inputs_are_named_as_in_a_joint_graph():
    graph = capture_forward(Net(), images(), loss=cross_entropy)
    assert [i.kind for i in graph.inputs] == [InputKind.PARAMETER] * 6 + [InputKind.BUFFER] * 3 + [InputKind.BATCH] * 2


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), (4, 8, 8)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 9)),
        (nn.MultiheadAttention(12, 3, batch_first=True), (7, 12)),
        (nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True), (7, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whole_operators_cost_what_their_parts_do(model, shape):
    """FLOPs of the forward graph are those of the forward half of the joint graph."""

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            result = self.model(x, x, x) if isinstance(self.model, nn.MultiheadAttention) else self.model(x)
            return result[0] if isinstance(result, tuple) else result

    batch = torch.randn(5, *shape)
    whole, joint = capture_forward(Called(), batch), capture(Called(), batch)
    assert whole.flops() == joint.flops(phase=Phase.FORWARD) > 0
    assert whole.flops({"batch": 9}) == joint.flops({"batch": 9}, phase=Phase.FORWARD)
