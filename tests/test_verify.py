"""Verification: good graphs pass; a wrong pass is dropped, a wrong capture runs in eager, and the plan says so."""

import random
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop

from benchmarks import zoo
from graphopt import capture, optimize
from graphopt import step as step_module
from graphopt.errors import PassError
from graphopt.graph.training_graph import OutputKind, Phase
from graphopt.passes import DeadCode, Pass, PassResult, Tier
from graphopt.passes._base import Change
from graphopt.verify import SEEDS, Values, check_graph, disagreement, fresh_batch, reference, run_graph
from tests.training import Net, Twins, cross_entropy, images, mlp, no_warning, one_warning, rows, untouched

aten = torch.ops.aten


@dataclass(frozen=True)
class Wrong(Pass):
    """A pass that changes numbers: what it does to ``target`` nodes of a phase is up to ``how``."""

    name: ClassVar[str] = "wrong"
    tier: ClassVar[Tier] = Tier.EXACT
    how: str = "scale gradients"

    def rewrite(self, graph):
        draft = graph.draft()
        if self.how == "break a shape":
            raise PassError("it broke")
        if self.how == "crash":
            raise ZeroDivisionError("it crashed")
        kind = {
            "scale a buffer": OutputKind.BUFFER,
            "scale the loss": OutputKind.LOSS,
            "scale an update": OutputKind.PARAMETER,
        }.get(self.how, OutputKind.GRADIENT)
        results = draft.results
        for position, output in enumerate(graph.outputs):
            value = results[position]
            if output.kind is kind and value is not None and value.meta["val"].is_floating_point():
                factor = 1.0 + 1e-3 if self.how != "a NaN" else float("nan")
                phase = value.meta["phase"] if value.op == "call_function" else Phase.BACKWARD
                results[position] = draft.add(
                    aten.mul.Tensor, value, factor, like=value, before=draft.output, phase=phase
                )
                break
        if results == draft.results:
            return PassResult(graph)
        draft.output.args = (tuple(results),)
        return PassResult(draft.finish(), (Change(self.name, self.how),))


@pytest.fixture
def with_pass(monkeypatch):
    """`optimize` with one more pass."""

    def put(one):
        monkeypatch.setattr(step_module, "PASSES", (*step_module.PASSES, one))

    return put


# -- good models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, options",
    [
        (lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9), {"accumulate": 2}),
        (lambda m: AdamW(m.head.parameters()), {"clip": 0.1}),
        (lambda m: NAdam(m.parameters()), {"keep_grads": True}),
        (lambda m: [Adam(m.head.parameters(), amsgrad=True), RMSprop(m.conv.parameters(), momentum=0.5)], {}),
    ],
)
def test_good_models_pass(make, options):
    twins = Twins(Net(0.5), make, verify=True, **options)
    with no_warning():
        twins.steps(images, 4)
    assert twins.run.plan.chosen == "flat" and not twins.run.plan.notes


def test_verification_follows_autocast():
    twins = Twins(Net(), lambda m: SGD(m.parameters(), lr=0.1), verify=True)
    for _ in range(2):
        with no_warning(), torch.autocast("cpu", dtype=torch.bfloat16):
            twins.step(*images())


@pytest.mark.parametrize("name", ["embedding_mlp"])
def test_good_architectures_pass(name):
    case = zoo.case(name)
    model, batch = case.build(), case.batch(3)
    loss = case.loss or "model"
    graph = capture(model, batch, loss=loss)
    with untouched(model):
        assert check_graph(graph, model, batch, loss) is None


def test_dropout_over_another_layout_passes():
    """It draws in the order of memory in eager, in another one under `torch.func`."""
    model = nn.Sequential(nn.Dropout(0.3), nn.Flatten(), nn.Linear(72, 3))
    batch = images()[0].to(memory_format=torch.channels_last), images()[1]
    assert check_graph(capture(model, batch, loss=cross_entropy), model, batch, cross_entropy) is None


def test_a_model_without_trained_parameters_passes():
    model, batch = mlp().requires_grad_(False), rows()
    assert check_graph(capture(model, batch, loss=cross_entropy), model, batch, cross_entropy) is None


def test_verification_changes_nothing():
    model = Net(0.5)
    optimizer = AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model.eval()
    step = optimize(model, (4, 2, 6, 6), loss=cross_entropy, optimizer=optimizer, verify=True, schemes="flat")
    batch = images()
    with untouched(model):
        step(*batch)


# -- wrong passes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["scale gradients", "scale the loss", "scale a buffer", "scale an update", "a NaN", "break a shape"]
)
def test_a_wrong_pass_is_dropped_and_the_run_goes_on(with_pass, how):
    with_pass(Wrong(how))
    twins = Twins(Net(), lambda m: AdamW(m.parameters(), lr=0.1), verify=True)
    with one_warning("pass 'wrong' was dropped by verification"):
        twins.steps(images, 3)
    plan = twins.run.plan
    assert plan.chosen == "flat" and "pass 'wrong' was dropped" in plan.explain()
    assert "wrong" not in {c.pass_name for c in plan.passes.changes}
    assert plan.to_dict()["notes"] == plan.notes


def test_without_verification_a_wrong_pass_runs(with_pass):
    """What the tests above would not notice if `verify` did nothing."""
    with_pass(Wrong("scale an update"))
    twins = Twins(Net(), lambda m: SGD(m.parameters(), lr=0.1))
    with pytest.raises(AssertionError, match=r"parameter .* differs"):
        twins.steps(images, 1)


def test_a_pass_that_breaks_the_graph_without_verification_leaves_it_to_eager(with_pass):
    with_pass(Wrong("break a shape"))
    twins = Twins(Net(), lambda m: SGD(m.parameters(), lr=0.1))
    with one_warning("pass 'wrong': it broke"):
        twins.steps(images, 2)
    assert twins.run.plan.chosen == "eager"


def test_a_pass_that_crashes_is_not_hidden(with_pass):
    """An error that no pass raises on purpose is a bug to be seen; the model is as it was."""
    with_pass(Wrong("crash"))
    twins = Twins(Net(), lambda m: SGD(m.parameters(), lr=0.1))
    with untouched(twins.ours), pytest.raises(ZeroDivisionError):
        twins.run(torch.zeros(4, 2, 6, 6), torch.zeros(4, dtype=torch.long))


# -- wrong captures -------------------------------------------------------------------------------------------------


class Moody(nn.Module):
    """Draws from Python's generator while it runs: a graph would repeat the number drawn at capture."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x):
        return self.body(x) * random.random()


def test_a_model_that_python_steers_runs_in_eager():
    model = Moody()
    step = optimize(model, (5, 4), loss=cross_entropy, optimizer=SGD(model.parameters(), lr=0.1), verify=True)
    with one_warning("does not compute what eager computes: loss is off by"):
        losses = {float(step(*batch)) for batch in [rows()] * 3}
    assert len(losses) == 3 and step.plan.chosen.startswith("eager")


def test_a_wrong_capture_is_found_by_its_gradients():
    """Right loss, wrong gradient: a tensor that is detached at capture only."""

    class Detaching(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            return out.detach() + 0 * out if torch.compiler.is_compiling() or self.trick else out

    model = Detaching(4, 3)
    model.trick = True
    graph = capture(model, rows(), loss=cross_entropy)
    model.trick = False
    assert "gradient weight is off by" in check_graph(graph, model, rows(), cross_entropy)


# -- the judge ------------------------------------------------------------------------------------------------------


def values(**named):
    return Values({n: torch.as_tensor(v, dtype=torch.float32) for n, v in named.items()})


def exact(**named):
    return Values({n: torch.as_tensor(v, dtype=torch.float64) for n, v in named.items()})


def test_an_error_as_large_as_eagers_passes():
    assert disagreement(values(loss=1.001), values(loss=1.0005), exact(loss=1.0)) is None
    found = disagreement(values(loss=1.01), values(loss=1.0005), exact(loss=1.0))
    assert found == "loss is off by 0.01, eager by 0.0005 (values up to 1)"


@pytest.mark.parametrize("ours, eager", [([1.0, float("nan")], [1.0, 2.0]), ([float("inf")], [float("-inf")])])
def test_nan_and_infinity_must_stand_where_eagers_stand(ours, eager):
    assert disagreement(values(loss=ours), values(loss=eager), exact(loss=eager))
    assert disagreement(values(loss=ours), values(loss=ours), exact(loss=ours)) is None


def test_whole_numbers_must_be_equal():
    ours, eager = (Values({"new buffer n": torch.tensor(n)}) for n in (3, 4))
    assert disagreement(ours, eager, None) == "new buffer n differs from eager's"


def test_the_reference_is_eager_and_float64():
    model, batch = mlp(), rows()
    with untouched(model):
        eager, double = (
            reference(model, batch, cross_entropy),
            reference(model, batch, cross_entropy, dtype=torch.float64),
        )
        ours = run_graph(capture(model, batch, loss=cross_entropy), model, batch)
    assert {v.dtype for v in double.values.values()} == {torch.float64}
    assert ours.values.keys() == eager.values.keys() == double.values.keys()
    assert all(torch.equal(ours.values[n], v) for n, v in eager.values.items())
    assert all(torch.allclose(double.values[n].float(), v, atol=1e-6) for n, v in eager.values.items())


def test_fresh_batches_keep_kind_and_range():
    batch = {
        "x": torch.randn(8, 3) * 5 + 2,
        "y": torch.arange(8),
        "mask": torch.rand(8, 2) > 0.5,
        "scale": 3,
        "e": torch.ones(8),
        "image": torch.randn(8, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    made = [fresh_batch(batch, seed) for seed in SEEDS]
    assert not torch.equal(made[0]["x"], made[1]["x"]) and torch.equal(made[0]["x"], fresh_batch(batch, SEEDS[0])["x"])
    for one in made:
        assert one["scale"] == 3 and sorted(one["y"].tolist()) == list(range(8))
        assert one["mask"].dtype == torch.bool and one["mask"].sum() == batch["mask"].sum()
        assert one["image"].stride() == batch["image"].stride(), "dropout draws in the order of memory"
        assert torch.equal(one["e"], batch["e"]), "equal numbers stay equal"


def test_a_pass_of_our_own_is_checked_alone():
    model, batch = Net(), images()
    graph = capture(model, batch, loss=cross_entropy)
    assert check_graph(DeadCode()(graph).graph, model, batch, cross_entropy) is None
    assert "gradient conv.weight" in check_graph(Wrong()(graph).graph, model, batch, cross_entropy)
