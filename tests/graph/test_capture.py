"""`capture`: one graph of a training step, with eager's bits, that leaves no trace on the model."""

import copy
import gc
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import zoo
from graphopt import BatchError, CaptureError, TrainingGraph, capture
from graphopt.graph.batch import flatten
from graphopt.graph.forward import capture_forward
from graphopt.graph.lowering import lower
from graphopt.graph.torch_internals import FakeTensor
from graphopt.graph.training_graph import InputKind, OutputKind, Phase
from graphopt.verify import run_graph
from tests.training import Branching, Net, assert_same, cross_entropy, images, mlp, rows, untouched

mse = F.mse_loss


def eager_values(model, batch, loss, seed=0):
    """Loss, gradients and new buffers by autograd, on a copy."""
    model = copy.deepcopy(model)
    model.zero_grad()
    torch.manual_seed(seed)
    value = loss(model, batch)
    with torch.autocast("cpu", enabled=False):
        value.backward()
    found = {"loss": value.detach()}
    found |= {f"gradient {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {f"new buffer {n}": b for n, b in model.named_buffers()}


def assert_eagers_bits(model, batch, loss=None, *, call=None, **options):
    """The captured step gives eager's loss, gradients and new buffers bit for bit; the model is left alone."""
    call = call or (lambda m, b: loss(m(*b[:-1]), b[-1]))
    with untouched(model):
        graph = capture(model, batch, loss=loss or "model", **options)
    expected = eager_values(model, batch, call)
    got = run_graph(graph, model, batch, seed=0).values
    gradients = {n for n in expected if n.startswith("gradient")}
    assert gradients == {n for n in got if n.startswith("gradient")}
    for name, value in got.items():
        assert_same(value, expected[name], name)
    return graph


def forward(graph, model, batch):
    """The outputs of a graph of parameters, buffers and batch tensors only."""
    tensors, layout, _ = flatten(batch)
    given = {**dict(model.named_parameters()), **dict(model.named_buffers()), **dict(zip(layout.names, tensors))}
    with torch.no_grad():
        return lower(graph, in_place=False).run(*(given[i.name] for i in graph.inputs))


# -- batches --------------------------------------------------------------------------------------------------------


class Pick(nn.Module):
    """A linear layer on a tensor found in some nesting; ``scale`` is a constant of the batch."""

    def __init__(self, get):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.get = get

    def forward(self, *args, scale=1.0, **keywords):
        return self.body(self.get(*args, **keywords)) * scale


X, Y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
Pair = namedtuple("Pair", "left right")
BATCHES = {
    "a tuple": ((X, Y), lambda x: x, ["0", "1"]),
    "a list": ([X, Y], lambda x: x, ["0", "1"]),
    "two inputs": ((X, 2 * X, Y), lambda a, b: a + b, ["0", "1", "2"]),
    "nested": (({"a": X, "b": [X, 3]}, Y), lambda d: d["a"] * d["b"][1] + d["b"][0], ["0.a", "0.b.0", "1"]),
    "a named tuple": ((Pair(X, X), Y), lambda p: p.left - p.right * 2, ["0.left", "0.right", "1"]),
    "constants": ((X, 2, "left", None, True, Y), lambda x, n, *rest: x * n, ["0", "5"]),
    "a dict": ({"x": X, "labels": Y}, lambda x: x, ["x", "labels"]),
    "an ordered dict": (OrderedDict(x=X, target=Y), lambda x: x, ["x", "target"]),
    "a dict with a constant": ({"x": X, "scale": 0.5, "y": Y}, lambda x: x, ["x", "y"]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_any_nesting(name):
    batch, get, names = BATCHES[name]

    def call(model, batch):
        if not isinstance(batch, dict):
            return cross_entropy(model(*batch[:-1]), batch[-1])
        target = next(k for k in ("labels", "target", "y") if k in batch)
        return cross_entropy(model(**{k: v for k, v in batch.items() if k != target}), batch[target])

    graph = assert_eagers_bits(Pick(get), batch, cross_entropy, call=call)
    assert set(graph.input_nodes(InputKind.BATCH)) == set(names)


def test_a_tensor_alone_is_a_batch_for_a_model_with_its_own_loss():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x).square().mean()

    assert_eagers_bits(Own(4, 3), X, call=lambda m, x: m(x))


def test_batch_tensors_that_require_grad_get_gradients():
    x = X.clone().requires_grad_()
    graph = capture(mlp(), (x, Y), loss=cross_entropy)
    assert "0" in graph.output_nodes(OutputKind.GRADIENT)
    assert x.grad is None


# -- what models return ---------------------------------------------------------------------------------------------


@dataclass
class Result:
    loss: torch.Tensor
    logits: torch.Tensor


class Returning(nn.Module):
    """A model that returns ``form(loss, logits)``."""

    def __init__(self, form):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.form = form

    def forward(self, x, y):
        logits = self.body(x)
        return self.form(cross_entropy(logits, y), logits)


@pytest.mark.parametrize(
    "form",
    [
        lambda loss, logits: loss,
        lambda loss, logits: (loss, logits),
        lambda loss, logits: {"logits": logits, "loss": loss},
        lambda loss, logits: Result(loss, logits),
        lambda loss, logits: loss[None],
    ],
)
def test_models_that_return_their_own_loss(form):
    assert_eagers_bits(Returning(form), (X, Y), call=lambda m, b: own(m(*b)))


def own(output):
    """The loss in an output, as a user takes it."""
    output = output["loss"] if isinstance(output, dict) else getattr(output, "loss", output)
    return (output[0] if isinstance(output, tuple) else output).reshape(())


@pytest.mark.parametrize(
    "form, names",
    [
        (lambda x, h: h, ["0"]),
        (lambda x, h: (h, x), ["0", "1"]),
        (lambda x, h: {"hidden": h, "last": [h[:, 0], 3]}, ["hidden", "last.0"]),
        (lambda x, h: Result(h.sum(), h), ["loss", "logits"]),
        (lambda x, h: (h, h), ["0", "1"]),
    ],
)
def test_outputs_without_a_loss_have_tangents_as_inputs(form, names):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x):
            return form(x, self.body(x))

    graph = capture(Model(), X)
    assert list(graph.output_nodes(OutputKind.OUTPUT)) == names
    assert set(graph.input_nodes(InputKind.TANGENT)) <= set(names)
    assert set(graph.output_nodes(OutputKind.GRADIENT)) == {"body.weight", "body.bias"}


def test_tangents_give_eagers_gradients():
    model, tangent = mlp(), torch.randn(5, 3)
    graph = capture(model, X)
    expected = torch.autograd.grad(model(X), list(model.parameters()), tangent)
    given = {**dict(model.named_parameters()), "0": None}
    arguments = [
        X if i.kind is InputKind.BATCH else tangent if i.kind is InputKind.TANGENT else given[i.name]
        for i in graph.inputs
    ]
    with torch.no_grad():
        output, *gradients = lower(graph).run(*arguments)
    assert torch.equal(output, model(X))
    assert [o.name for o in graph.outputs[1:]] == [n for n, _ in model.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected))


def test_backward_false_is_the_forward_alone():
    model = Net()
    graph = capture(model, images()[0], backward=False)
    assert {n.meta["phase"] for n in graph.nodes} == {Phase.INPUT, Phase.FORWARD, Phase.OUTPUT}
    assert not graph.output_nodes(OutputKind.GRADIENT) and not graph.input_nodes(InputKind.TANGENT)
    batch = images()
    graph = capture(model, batch, loss=cross_entropy, backward=False)
    assert torch.equal(forward(graph, model, batch)[0], cross_entropy(copy.deepcopy(model)(batch[0]), batch[1]))


# -- which gradients ------------------------------------------------------------------------------------------------


def test_gradients_that_are_wanted():
    model = mlp()
    model[0].requires_grad_(False)

    def names(**options):
        return set(capture(model, (X, Y), loss=cross_entropy, **options).output_nodes(OutputKind.GRADIENT))

    assert names() == {"2.weight", "2.bias"}
    assert names(gradients="all") == {"0.weight", "0.bias", "2.weight", "2.bias", "0"}
    assert names(gradients=["0.bias"]) == {"0.bias"}
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_a_parameter_that_the_loss_does_not_use_has_no_gradient():
    model = mlp()
    model.unused = nn.Parameter(torch.ones(2))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    graph = capture(model, (X, Y), loss=cross_entropy)
    assert "unused" not in graph.output_nodes(OutputKind.GRADIENT)


def test_tied_weights_are_one_input_with_eagers_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.body = nn.Linear(4, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.embed(x) + self.body(self.embed(x.flip(0))))

    graph = assert_eagers_bits(Tied(), (torch.randint(7, (9,)), torch.randint(7, (9,))), cross_entropy)
    assert list(graph.input_nodes(InputKind.PARAMETER)) == ["embed.weight", "body.weight", "body.bias"]


class Transposed(nn.Module):
    """Uses a weight by its transpose, whose gradient is laid out the other way round."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, 64))
        self.spread = nn.Parameter(torch.randn(64, 48))

    def forward(self, x):
        return x @ self.weight.t() + self.spread.sum(0)


def test_gradients_have_the_layout_of_their_parameters():
    """As autograd gives them; norms over them would otherwise be summed in another order."""
    model = Transposed()
    graph = capture(model, (torch.randn(5, 64), torch.randn(5, 48)), loss=mse)
    for name, node in graph.output_nodes(OutputKind.GRADIENT).items():
        assert node.meta["val"].stride() == dict(model.named_parameters())[name].stride()


# -- buffers and other things that change ---------------------------------------------------------------------------


def test_buffers_that_change():
    model = Net()
    graph = assert_eagers_bits(model, images(), cross_entropy)
    assert set(graph.output_nodes(OutputKind.BUFFER)) == {
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    }  # fmt: skip
    model.eval()
    graph = assert_eagers_bits(model, images(), cross_entropy)
    assert not graph.output_nodes(OutputKind.BUFFER)


def test_buffers_that_are_replaced():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("last", torch.zeros(3), persistent=False)

        def forward(self, x):
            self.count = self.count + 1
            out = super().forward(x) * self.count
            self.last = out.detach().mean(0)
            return out

    graph = assert_eagers_bits(Counting(), (X, Y), cross_entropy)
    assert set(graph.output_nodes(OutputKind.BUFFER)) == {"count", "last"}


def test_dropout_draws_eagers_numbers():
    assert_eagers_bits(Net(0.5), images(), cross_entropy)


class Keeping(nn.Module):
    """Leaves all sorts of things on itself while it runs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.last = None
        self.kept = [1]
        self.table = {"a": 1}

    def forward(self, x):
        self.last = self.body(x)
        self.kept.append(x)
        self.table[x.shape] = x
        self.body.seen = x
        self.new_one = x * 2
        return self.last


class Failing(Keeping):
    """As `Keeping`, and fails behind it."""

    def forward(self, x):
        if super().forward(x).sum() > 0:
            raise ValueError("positive")
        return self.last


@pytest.mark.parametrize("kind", [Keeping, Failing])
def test_the_model_is_left_as_it_was(kind):
    model = kind()
    model.body.weight.grad = torch.ones(3, 4)
    model.body.eval()
    model.body.bias.requires_grad_(False)
    with untouched(model):
        if kind is Failing:
            with pytest.raises(CaptureError):
                capture(model, (X, Y), loss=cross_entropy)
        else:
            graph = capture(model, (X, Y), loss=cross_entropy)
            assert len(graph)
    assert model.last is None and model.kept == [1] and model.table == {"a": 1} and not hasattr(model.body, "seen")
    assert not [v for m in model.modules() for v in m.__dict__.values() if isinstance(v, FakeTensor)]
    assert not any(isinstance(p.grad, FakeTensor) for p in model.parameters())
    assert torch.is_grad_enabled() and not torch.compiler.is_compiling()


def test_nothing_is_kept_alive():
    """A captured model can be freed, a graph does not hold it."""
    import weakref

    model = mlp()
    gone = weakref.ref(model[0].weight)
    graph = capture(model, (X, Y), loss=cross_entropy)
    del model
    gc.collect()
    assert gone() is None and len(graph)


def test_a_number_read_off_a_tensor_stays_an_operator():
    model = Pick(lambda x: x * x.max().item())
    graph = assert_eagers_bits(model, (X, Y), cross_entropy)
    batch = (3 * X, Y)
    expected = eager_values(model, batch, lambda m, b: cross_entropy(m(b[0]), b[1]))
    assert_same(run_graph(graph, model, batch).values["loss"], expected["loss"], "loss")


def test_a_tensor_that_is_no_buffer_and_changes_is_refused():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)
            self.seen = torch.zeros(())

        def forward(self, x):
            self.seen += 1
            return self.body(x) * self.seen

    model = Hidden()
    with pytest.raises(CaptureError, match="neither a parameter nor a buffer is changed in place"):
        capture(model, (X, Y), loss=cross_entropy)
    assert float(model.seen) == 0


def test_a_tensor_that_is_no_buffer_and_does_not_change_is_a_constant():
    model = Pick(lambda x: x * table)
    table = torch.randn(4)
    graph = assert_eagers_bits(model, (X, Y), cross_entropy)
    assert [t.shape for t in graph.constants.values()] == [(4,)]


# -- places ---------------------------------------------------------------------------------------------------------


def test_every_operator_knows_its_module_and_line():
    graph = capture(Net(0.5), images(), loss=cross_entropy)
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        nodes = [n for n in graph.nodes if n.meta["phase"] == phase and "convolution" in str(n.target)]
        assert [n.meta["module"] for n in nodes] == ["conv"]
        assert all(n.meta["source"].startswith("tests/training.py:") for n in nodes)
    modules = {n.meta["module"] for n in graph.nodes if n.meta["phase"] == Phase.BACKWARD}
    assert {"conv", "norm", "head"} <= modules
    assert "# conv  tests/training.py:" in graph.text()
    assert "tests/training.py" not in graph.text(source=False)


# -- sizes ----------------------------------------------------------------------------------------------------------


def test_two_batch_sizes_give_one_graph():
    model = Net()
    graphs = [capture(model, images(size), loss=cross_entropy) for size in (4, 7)]
    assert graphs[0].hash() == graphs[1].hash()
    assert [g.symbols.hints for g in graphs] == [{"batch": 4}, {"batch": 7}]
    assert graphs[0].flops({"batch": 7}) == graphs[1].flops()
    assert graphs[0].bytes_kept({"batch": 7}) == graphs[1].bytes_kept()


def test_a_graph_is_valid_at_other_sizes():
    model = Net()
    graph = capture(model, images(4), loss=cross_entropy)
    assert graph.symbols.admits({"batch": 9}) and not graph.symbols.admits({"batch": 1})
    batch = images(9)
    expected = eager_values(model, batch, lambda m, b: cross_entropy(m(b[0]), b[1]))
    for name, value in run_graph(graph, model, batch).values.items():
        assert_same(value, expected[name], name)


def test_what_was_assumed_of_the_size_is_a_guard():
    class Even(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (2 if x.shape[0] % 2 == 0 else 3)

    model = Even(4, 3)
    even, odd = (capture(model, rows(size), loss=cross_entropy) for size in (6, 5))
    assert even.symbols.admits({"batch": 12}) and not even.symbols.admits({"batch": 7})
    assert odd.symbols.admits({"batch": 7}) and not odd.symbols.admits({"batch": 12})
    big = capture(Pick(lambda x: x * (2 if x.shape[0] > 3 else 3)), rows(6), loss=cross_entropy)
    assert big.symbols.admits({"batch": 4}) and not big.symbols.admits({"batch": 3})


def test_batch_size_one_is_fixed():
    graph = capture(mlp(), rows(1), loss=cross_entropy)
    assert not graph.symbols.symbols and graph.symbols.admits({"batch": 1}) and not graph.symbols.admits({"batch": 2})


def test_a_model_that_fixes_its_batch_size_is_captured_at_that_size():
    class Fixed(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.tensor([float(i) for i in range(int(x.shape[0]))])[:, None]

    graph = assert_eagers_bits(Fixed(4, 3), rows(6), cross_entropy)
    assert graph.symbols.admits({"batch": 6}) and not graph.symbols.admits({"batch": 5})


# -- autocast -------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Autocast for one layer only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.first(x)
        with torch.autocast("cpu", enabled=False):
            return self.second(torch.relu(h.float()))


def test_autocast_within_the_model():
    graph = assert_eagers_bits(Mixed(), (X, Y), cross_entropy)
    assert "bf16[batch, 8] = aten.addmm" in graph.text()


@pytest.mark.parametrize("make", [Mixed, mlp, Net])
def test_autocast_around_the_call(make):
    batch = images() if make is Net else (X, Y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = assert_eagers_bits(make(), batch, cross_entropy)
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu") and len(graph)


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_graph_with_its_optimizer_saves_and_loads(tmp_path):
    model, batch = Net(0.5), images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    graph = capture(model, batch, loss=cross_entropy, optimizer=optimizer, clip=1.0)
    graph.save(tmp_path / "step.graph")
    loaded = TrainingGraph.load(tmp_path / "step.graph")
    assert loaded.text() == graph.text() and loaded.hash() == graph.hash()
    assert loaded.inputs == graph.inputs and loaded.outputs == graph.outputs
    arguments = [example(node) for node in graph.placeholders]
    results = []
    for one in (graph, loaded):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(lower(one, in_place=False).run(*arguments))
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results):
        assert_same(a, b, "result")


def example(node):
    """A value for an input at batch size 6."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return 0.1
    made = torch.rand([s if isinstance(s, int) else 6 for s in value.shape])
    return (made + 1).to(value.dtype)


# -- errors ---------------------------------------------------------------------------------------------------------


def test_errors_name_what_came_and_where():
    with pytest.raises(
        BatchError, match=r"in module 'conv' at tests/training\.py:\d+: .*0: torch.float32 \[4, 9, 6, 6\]"
    ):
        capture(Net(), (torch.randn(4, 9, 6, 6), images()[1]), loss=cross_entropy)
    with pytest.raises(CaptureError, match=r"cannot be captured as one graph .*at tests/training\.py:\d+: "):
        capture(nn.Sequential(nn.Identity(), Branching()), (X, Y), loss=cross_entropy)
    with pytest.raises(CaptureError, match="in module '1'"):
        capture(nn.Sequential(nn.Identity(), Branching()), (X, Y), loss=cross_entropy)


@pytest.mark.parametrize("ask", [lambda x: x[: int(x.argmax())].sum(), lambda x: x.nonzero().shape[0] * x.sum()])
def test_sizes_that_depend_on_values_are_refused_with_their_line(ask):
    with pytest.raises(CaptureError, match=r"at tests/graph/test_capture\.py:\d+"):
        capture(Pick(lambda x: x * (2 if ask(x) > 0 else 3)), (X, Y), loss=cross_entropy)


# -- real models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2_classifier", "t5"])
def test_models_of_transformers(name):
    case = zoo.case(name)
    model, batch = case.build(), case.batch(3)
    graph = assert_eagers_bits(model, batch, call=lambda m, b: m(**b).loss)
    assert graph.symbols.admits({"batch": 4})


class Caches(nn.Module):
    """Keeps what it computed at the first call, as relative position biases of many models in eval mode."""

    def __init__(self):
        super().__init__()
        self.weight, self.cache, self.bias = nn.Parameter(torch.randn(4)), {}, None

    def forward(self, x):
        if "flipped" not in self.cache:
            self.cache["flipped"] = self.weight.flip(0)
        if self.bias is None:
            self.bias = self.weight * 2
        return x * self.cache["flipped"] + self.bias


def test_what_a_model_caches_is_computed_in_the_graph_and_not_left_in_the_model():
    model, x = Caches(), torch.randn(3, 4)
    for take in (capture, capture_forward):
        graph = take(model, (x, x), loss=nn.functional.mse_loss)
        assert not graph.constants and "aten.flip" in str(graph)
        assert not model.cache and model.bias is None
