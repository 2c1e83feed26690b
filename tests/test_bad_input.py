"""Bad input: a clear `GraphoptError` or a documented fallback, with model, optimizer and random state unchanged."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import SGD, AdamW

import graphopt
from graphopt import BatchError, CaptureError, GraphoptError, OptimizerError, StaleGraphError
from graphopt.errors import LossError
from tests.training import (
    Branching,
    Net,
    Twins,
    cross_entropy,
    images,
    mlp,
    no_warning,
    one_warning,
    rows,
    untouched,
)


def rejected(error, match, batch, twins):
    """A step on ``batch`` raises ``error`` and changes nothing."""
    with untouched(twins.ours, twins.made[1]), no_warning(), pytest.raises(error, match=match) as raised:
        twins.run(*batch) if isinstance(batch, tuple) else twins.run(**batch)
    assert isinstance(raised.value, GraphoptError)


# -- batches --------------------------------------------------------------------------------------------------------

X, Y = torch.randn(4, 2, 6, 6), torch.tensor([0, 1, 2, 0])
BATCHES = {
    "too many channels": (
        (torch.randn(4, 5, 6, 6), Y),
        r"the model rejects it .*expected input.*5 channels.*\[4, 5, 6, 6\]",
    ),
    "too small an image": ((torch.randn(4, 2, 2, 2), Y), "the model rejects it"),
    "a dimension less": ((torch.randn(4, 2, 6), Y), "0 has 3 dimensions, batch_shape said 4"),
    "a dimension more": ((X[None], Y), "0 has 5 dimensions, batch_shape said 4"),
    "another dtype": ((X.long(), Y), "the model rejects it"),
    "float64 for a float32 model": ((X.double(), Y), "the model rejects it .*float64"),
    "a target of another dtype": ((X, Y.float()), "the model rejects it"),
    "a target of another size": ((X, Y[:3]), "the model rejects it"),
    "the device meta": ((X.to("meta"), Y), "0 is on meta, the model on cpu; move one"),
    "batch size 0": ((X[:0], Y[:0]), "size is 0"),
    "nothing": ((), "found no tensor"),
    "no target": ((X,), "needs inputs and a target, got one tensor"),
    "no tensor": ((None, "text"), "found no tensor"),
    "an unhashable thing": ((X, Y, {1, 2}), "2 is a set; expected tensors and plain values"),
    "a dict without a target": ({"x": X}, r"keys \['x'\] has no target.*labels"),
}


@pytest.fixture(scope="module")
def running():
    """A training that goes on through all bad batches."""
    twins = Twins(Net(), lambda m: AdamW(m.parameters(), lr=0.1))
    twins.steps(images, 2)
    return twins


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_that_does_not_fit(name, running):
    batch, match = BATCHES[name]
    rejected(BatchError, match, batch, running)
    running.steps(images, 2)


@pytest.mark.parametrize("name", ["too many channels", "batch size 0", "no target", "the device meta"])
def test_the_first_batch_does_not_fit(name):
    batch, match = BATCHES[name]
    rejected(BatchError, match, batch, Twins(Net(), lambda m: AdamW(m.parameters(), lr=0.1)))


def test_positional_and_keyword_batches_do_not_mix():
    step = Twins(Net(), lambda m: SGD(m.parameters(), lr=0.1)).run
    with pytest.raises(BatchError, match="by position or by keyword, not both"):
        step(X, labels=Y)


def test_a_class_out_of_range_is_eagers_error():
    """Values are not looked at beforehand; the kernel that finds them raises as in eager."""
    twins = Twins(Net(), lambda m: SGD(m.parameters(), lr=0.1))
    twins.steps(images, 1)
    parameters = [p.clone() for p in twins.ours.parameters()]
    with pytest.raises(IndexError, match="out of bounds"):
        twins.run(X, Y + 7)
    assert all(torch.equal(a, b) for a, b in zip(parameters, twins.ours.parameters()))


# -- losses and models ----------------------------------------------------------------------------------------------

LOSSES = {
    "not a scalar": (lambda out, y: out.sum(1), r"expected a scalar tensor, got shape \[(4|batch)\]"),
    "a number": (lambda out, y: 1.0, "expected a scalar tensor, got float"),
    "none": (lambda out, y: None, "expected a scalar tensor, got NoneType"),
    "an integer": (lambda out, y: out.argmax(), "expected a floating-point scalar, got torch.int64"),
    "without a gradient": (lambda out, y: out.sum().detach(), "does not depend on any parameter"),
}


@pytest.mark.parametrize("schemes", ["flat", "eager"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_cannot_start_backward(name, schemes):
    loss, match = LOSSES[name]
    if schemes == "flat":
        rejected(LossError, match, (X, Y), Twins(Net(), lambda m: AdamW(m.parameters(), lr=0.1), loss=loss))
    else:  # eager runs the forward, so that batch norm counts, before it sees the loss
        model = Net()
        step = graphopt.optimize(model, tuple(X.shape), loss=loss, optimizer=SGD(model.parameters()), schemes=schemes)
        with pytest.raises(LossError, match=match):
            step(X, Y)


def test_a_model_that_returns_no_loss():
    model = mlp()
    step = graphopt.optimize(model, (5, 4), optimizer=SGD(model.parameters()))
    x, _ = rows()
    match = r"none was given and the model's output \(a tensor of shape \[batch, 3\]\) holds no"
    with untouched(model), pytest.raises(LossError, match=match):
        step(x)


def test_a_deleted_parameter():
    twins = Twins(Net(), lambda m: SGD(m.parameters(), lr=0.1))
    twins.steps(images, 1)
    weight = twins.ours.head.weight
    del twins.ours.head.weight
    for _ in range(2):
        with untouched(twins.ours), no_warning(), pytest.raises(StaleGraphError, match=r"has lost head\.weight since"):
            twins.run(X, Y)
    twins.ours.head.weight = weight
    twins.steps(images, 1)


def test_a_deleted_buffer():
    twins = Twins(Net(), lambda m: SGD(m.parameters(), lr=0.1))
    twins.steps(images, 1)
    del twins.ours.norm.running_mean
    with untouched(twins.ours), pytest.raises(StaleGraphError, match=r"has lost norm\.running_mean since"):
        twins.run(X, Y)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda m: setattr(m.head, "weight", nn.Parameter(torch.randn(3, 5))), "the model rejects it in module 'head'"),
        (lambda m: m.conv.double(), "the model rejects it in module 'conv'"),
        (lambda m: m.to("meta"), "0 is on cpu, the model on meta"),
    ],
)
def test_a_parameter_that_no_longer_fits(change, match):
    twins = Twins(Net(), lambda m: SGD(m.parameters(), lr=0.1))
    twins.steps(images, 1)
    change(twins.ours)
    with no_warning(), pytest.raises(BatchError, match=match):
        twins.run(X, Y)


def test_a_model_with_data_dependent_control_flow_runs_in_eager():
    model = Branching()
    optimizer = SGD(model.parameters(), lr=0.0)
    step = graphopt.optimize(model, (5, 4), loss=cross_entropy, optimizer=optimizer)
    batches = [rows() for _ in range(3)]
    with untouched(model, optimizer), one_warning("the step runs in eager mode: the step cannot be captured"):
        for batch in batches:
            step(*batch)
    assert "if h.sum() > 0" in source_line(step.plan.candidate("flat").why_not)
    with untouched(model, optimizer), pytest.raises(CaptureError, match=r"training\.py:"):
        graphopt.capture(model, batches[0], loss=cross_entropy)


def source_line(message):
    """The line of code that a message names."""
    import re
    from pathlib import Path

    file, line = re.search(r"(\S*training\.py):(\d+)", message).groups()
    return (Path(__file__).parent / Path(file).name).read_text().splitlines()[int(line) - 1]


def test_a_model_that_writes_into_its_input_runs_in_eager():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x):
            return self.body(x.mul_(2))

    twins = Twins(Writing(), lambda m: SGD(m.parameters(), lr=0.1), shape=((1, 1), (1,)))
    x, y = rows()
    with one_warning("writes into its batch '0' in place"):
        expected = twins.eager_step(x.clone(), y)
        given = x.clone()
        assert torch.equal(twins.run(given, y), expected)
    assert torch.equal(given, 2 * x)
    twins.compare()


def test_sparse_gradients_run_in_eager():
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3))
    twins = Twins(model, lambda m: SGD(m.parameters(), lr=0.1), shape=((1,), (1,)))
    with one_warning("the gradient of a parameter of shape [7, 4] is sparse"):
        twins.steps(lambda: (torch.randint(7, (5,)), torch.randint(3, (5,))), 2)


def test_a_scripted_model_is_refused():
    with warnings.catch_warnings(action="ignore"):  # scripting is deprecated
        model = torch.jit.script(mlp())
    for call in (graphopt.optimize, graphopt.capture):
        with pytest.raises(GraphoptError, match="TorchScript hides its operators"):
            call(model, rows(), loss=cross_entropy)


def test_a_step_in_inference_mode_or_copied_is_refused():
    model = mlp()
    step = graphopt.optimize(model, (5, 4), loss=cross_entropy, optimizer=SGD(model.parameters()))
    with torch.inference_mode(), pytest.raises(GraphoptError, match="called in inference mode"):
        step(*rows())
    with pytest.raises(GraphoptError, match="copy model and optimizer"):
        copy.deepcopy(step)


def test_a_lazy_model_says_what_it_needs():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(GraphoptError, match=r"0\.weight.* not initialized"):
        graphopt.optimize(model, (5, 4), loss=cross_entropy, optimizer=SGD(model.parameters()))(*rows())


# -- optimizers -----------------------------------------------------------------------------------------------------


def test_an_optimizer_of_another_model():
    model, other = mlp(), mlp()
    optimizer = SGD(other.parameters())
    with untouched(model, optimizer), pytest.raises(OptimizerError, match="SGD owns no parameter of the model"):
        graphopt.optimize(model, (5, 4), loss=cross_entropy, optimizer=optimizer)


def test_two_optimizers_of_one_parameter():
    model = mlp()
    both = [SGD(model.parameters()), AdamW(model[2].parameters())]
    with untouched(model, both), pytest.raises(OptimizerError, match=r"'2.bias' is owned by optimizer 0 and by"):
        graphopt.optimize(model, (5, 4), loss=cross_entropy, optimizer=both)


@pytest.mark.parametrize("optimizer", [0.1, "sgd", SGD, [None]])
def test_what_is_no_optimizer(optimizer):
    with pytest.raises(OptimizerError, match=r"expected a torch\.optim\.Optimizer"):
        graphopt.optimize(mlp(), (5, 4), loss=cross_entropy, optimizer=optimizer)


# -- arguments ------------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "model": (42, r"model: expected a torch\.nn\.Module, got int"),
    "batch_shape": ("large", "batch_shape: expected a tuple of ints"),
    "batch_shape of zero": ((0, 4), r"batch_shape: \(0, 4\) has a size below 1"),
    "batch_shape of nothing": ((), "batch_shape: expected a tuple of ints"),
    "batch_shape of floats": ((4.0, 4.0), "batch_shape: expected a tuple of ints"),
    "loss": (7, "loss: expected a callable"),
    "loss by a wrong name": ("cross_entropy", "loss: expected a callable"),
    "clip": ("1.0", "clip: expected a number"),
    "clip below zero": (-1.0, "clip: expected a bound of at least 0"),
    "clip by True": (True, "clip: expected a number"),
    "accumulate": (0, "accumulate: expected a positive integer, got 0"),
    "accumulate by a half": (1.5, "accumulate: expected a positive integer, got 1.5"),
    "steps": (-3, "steps: expected a positive integer, got -3"),
    "steps by name": ("many", "steps: expected a positive integer, got 'many'"),
    "schemes": ("warp", "schemes: unknown name 'warp'; expected 'auto', 'exact', flat, eager"),
    "schemes of nothing": ([], "schemes: got none"),
    "schemes of numbers": ([3], "schemes: expected names or Scheme objects, got 3"),
    "schemes by a number": (3, "schemes: expected names or Scheme objects, got 3"),
    "processors": (0, "processors: expected a positive integer"),
    "precision": ("int3", "precision: expected one of"),
    "batch_norm": ("global", "batch_norm: expected one of"),
    "memory": (-1, r"memory: expected a positive integer \(bytes\), got -1"),
    "memory by True": (True, r"memory: expected a positive integer \(bytes\), got True"),
    "verify": ("yes", "verify: expected True or False, got 'yes'"),
    "keep_grads": (2, "keep_grads: expected True or False, got 2"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_nonsense_arguments_of_optimize(name):
    value, match = ARGUMENTS[name]
    model = mlp()
    optimizer = AdamW(model.parameters())
    arguments = {"model": model, "batch_shape": (5, 4), "loss": cross_entropy, "optimizer": optimizer}
    arguments[name.split()[0]] = value
    with untouched(model, optimizer), pytest.raises(GraphoptError, match=match):
        graphopt.optimize(**arguments)


CAPTURE_ARGUMENTS = {
    "model": (42, r"model: expected a torch\.nn\.Module, got int"),
    "batch": ((), "found no tensor"),
    "loss": ("huber", "loss: expected a callable"),
    "loss with weights": (nn.Linear(3, 1), "trainable parameters of its own; make it a submodule"),
    "optimizer": ("adam", r"expected a torch\.optim\.Optimizer"),
    "gradients": (["0.wight"], r"gradients: \['0.wight'\] are no parameters"),
    "gradients by a wrong name": ("some", "gradients: expected 'wanted', 'all' or names of parameters, got 'some'"),
    "gradients of a buffer": ([3], r"gradients: \['3'\] are no parameters"),
    "clip": ("1.0", "clip: expected a number"),
    "accumulate": (0, "accumulate: expected a positive integer, got 0"),
}


@pytest.mark.parametrize("name", CAPTURE_ARGUMENTS)
def test_nonsense_arguments_of_capture(name):
    value, match = CAPTURE_ARGUMENTS[name]
    model = mlp()
    optimizer = AdamW(model.parameters())
    arguments = {"model": model, "batch": rows(), "loss": cross_entropy, "optimizer": optimizer}
    arguments[name.split()[0]] = value
    with untouched(model, optimizer), pytest.raises(GraphoptError, match=match):
        graphopt.capture(**arguments)


def test_no_plan_before_the_first_batch():
    model = mlp()
    step = graphopt.optimize(model, (5, 4), loss=cross_entropy, optimizer=SGD(model.parameters()))
    with pytest.raises(GraphoptError, match="no batch was run yet"):
        _ = step.plan


# -- models that return more than a tensor, as those of Hugging Face do ----------------------------------------------


class Scores:
    """What `Scoring` returns."""

    def __init__(self, logits, loss):
        self.logits, self.loss = logits, loss


class Scoring(nn.Module):
    """Asks for values of its mask where it thinks that they are known; computes its own loss if given a target."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x, mask=None, labels=None):
        unknown = torch.compiler.is_compiling() or isinstance(mask, FakeTensor)
        if mask is not None and (unknown or not mask.all()):
            x = x * mask
        logits = self.head(x)
        return Scores(logits, None if labels is None else nn.functional.cross_entropy(logits, labels))


def test_what_eager_says_is_said_where_the_trace_fails_before_it() -> None:
    batch = {"x": torch.randn(4, 4), "mask": torch.zeros(4, 1)}
    model = Scoring()
    with pytest.raises(LossError, match=r"output \(Scores\) holds no scalar loss"):
        graphopt.optimize(model, (4, 4), optimizer=torch.optim.SGD(model.parameters()))(**batch)
    bad = {**batch, "mask": torch.zeros(4, 5), "labels": torch.tensor([0, 1, 2, 0])}
    with pytest.raises(BatchError, match=r"the model rejects it .*The size of tensor a"):
        graphopt.optimize(model, (4, 4), optimizer=torch.optim.SGD(model.parameters()))(**bad)


def test_a_loss_that_does_not_take_the_output_says_what_would() -> None:
    model, batch = Scoring(), (torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))
    sgd = torch.optim.SGD(model.parameters())
    with pytest.raises(LossError, match=r"does not take the Scores that the model returns .*output\.logits"):
        graphopt.optimize(model, (4, 4), loss=nn.functional.cross_entropy, optimizer=sgd)(*batch)
    step = graphopt.optimize(model, (4, 4), loss=lambda o, y: nn.functional.cross_entropy(o.logits, y), optimizer=sgd)
    assert step(*batch).isfinite()


def test_what_a_step_does_not_have_is_looked_for_where_it_is():
    model = torch.nn.Linear(4, 3)
    adam = torch.optim.Adam(model.parameters())
    step = graphopt.optimize(model, (2, 4), loss=cross_entropy, optimizer=adam)
    for name, where in (
        ("state_dict", "model.state_dict or optimizer.state_dict"), ("parameters", "model.parameters"),
        ("zero_grad", "optimizer.zero_grad"), ("explain", "step.plan.explain"), ("show", "step.plan.show"),
    ):  # fmt: skip
        with pytest.raises(AttributeError, match=f"no '{name}'; use .*{where}"):
            getattr(step, name)
    with pytest.raises(AttributeError, match=r"no 'nonsense'$"):
        _ = step.nonsense
    assert not hasattr(step, "__len__")
