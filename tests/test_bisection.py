"""Bisection: a wrong pass between right ones is named, and the operator at which it goes wrong."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import graphopt
from graphopt import verify
from graphopt.bisection import Bisection, locate
from graphopt.errors import CaptureError, GraphoptError
from graphopt.passes import Change, Pass, PassResult, Tier
from graphopt.step import PASSES
from tests.helpers import random_values, traced
from tests.test_verify import Wrong
from tests.training import Branching, Net, cross_entropy, images, mlp, rows, untouched

aten = torch.ops.aten


@dataclass(frozen=True)
class Replace(Pass):
    """Replaces one operator of each kind named by another; ``wrong``: one that computes something else."""

    name: ClassVar[str] = "replace"
    tier: ClassVar[Tier] = Tier.REORDERS
    wrong: bool = True

    def rewrite(self, graph):
        draft, changes = graph.draft(), []
        for node in list(draft.graph.nodes):
            if node.target is aten.tanh.default:  # right: tanh x = 2 sigmoid(2 x) - 1
                twice = draft.add(aten.mul.Tensor, node.args[0], 2.0, like=node)
                gate = draft.add(aten.sigmoid.default, twice, like=node)
                new = draft.add(aten.sub.Tensor, draft.add(aten.mul.Tensor, gate, 2.0, like=node), 1.0, like=node)
            elif node.target is aten.tanh_backward.default:  # g (1 - y y)
                gradient, y = node.args
                square = draft.add(aten.mul.Tensor, y, y, like=node)
                rest = draft.add(aten.rsub.Scalar, square, 1.0 if not self.wrong else 1.001, like=node)
                new = draft.add(aten.mul.Tensor, gradient, rest, like=node)
            else:
                continue
            changes.append(Change(self.name, f"{node.name} is spelt out", *(node.meta["module"], node.meta["source"])))
            draft.replace(node, new)
        return PassResult(draft.finish(), tuple(changes)) if changes else PassResult(graph)


def bisected(model, batch, make=torch.optim.SGD, **options) -> Bisection:
    """The bisection of a step; model, gradients and random numbers stay as they are."""
    optimizer = make(model.parameters(), lr=0.1)
    state = torch.get_rng_state()
    with untouched(model):
        found = graphopt.bisect(model, batch, loss=cross_entropy, optimizer=optimizer, **options)
    assert torch.equal(torch.get_rng_state(), state)
    return found


def between(wrong: Pass) -> tuple[Pass, ...]:
    """A pass among those of the library."""
    return (*PASSES[:2], wrong, *PASSES[2:])


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_right_steps_are_right(make):
    found = bisected(Net(0.5), images(), make)
    names = [one.name for one in found.tested]
    assert found.culprit is None and found.location is None and "nothing is wrong" in found.explain()
    assert names[:7] == ["capture", "gradient_liveness", *(p.name for p in PASSES)] and "lowering" in names
    assert any(name.startswith("form: flat, fused optimizer") for name in names)


@pytest.mark.parametrize("how", ["scale gradients", "scale the loss", "scale a buffer", "scale an update", "a NaN"])
def test_a_wrong_pass_is_named_with_the_operator(how):
    found = bisected(Net(), images(), torch.optim.AdamW, passes=between(Wrong(how)))
    assert found.culprit == "wrong"
    assert [one.name for one in found.tested] == [
        "capture",
        "gradient_liveness",
        PASSES[0].name,
        PASSES[1].name,
        "wrong",
    ]
    assert [one.wrong is None for one in found.tested] == [True] * 4 + [False]
    assert len(found.location.after) == 1 and "aten.mul.Tensor" in found.location.after[0]
    assert found.location.node == found.location.after[0].split(":")[0].lstrip("%")


def test_the_wrong_one_of_two_rewrites_is_found():
    """Both operators are replaced by several; only the backward one is wrong."""
    found = bisected(mlp(), rows(), passes=between(Replace()))
    assert found.culprit == "replace"
    assert found.location.stands_for.startswith("tanh_backward") and "aten.tanh_backward" in found.location.before[0]
    assert [line.split(" = ")[1].split("(")[0] for line in found.location.after] == [
        "aten.mul.Tensor", "aten.rsub.Scalar", "aten.mul.Tensor"
    ]  # fmt: skip
    assert found.location.changes == ("tanh_backward is spelt out",)
    assert found.location.module == "1"
    assert bisected(mlp(), rows(), passes=between(Replace(wrong=False))).culprit is None


@pytest.mark.parametrize("how, why", [("break a shape", "it broke"), ("crash", "ZeroDivisionError: it crashed")])
def test_a_pass_that_raises_is_the_culprit(how, why):
    found = bisected(mlp(), rows(), passes=between(Wrong(how)))
    assert found.culprit == "wrong" and why in found.wrong and found.graphs is None


def test_gradient_liveness_is_tried_too(monkeypatch):
    from graphopt.bisection import bisecting

    live = bisecting.live
    monkeypatch.setattr(bisecting, "live", lambda task, whole: Wrong("scale an update")(live(task, whole)))
    assert bisected(mlp(), rows()).culprit == "gradient_liveness"


def test_code_in_place_is_tried_too(monkeypatch):
    lower = verify.lower
    broken = lambda graph, in_place=True: lower(Wrong("scale the loss")(graph).graph if in_place else graph,
                                                in_place=in_place)  # fmt: skip
    monkeypatch.setattr(verify, "lower", broken)
    assert bisected(mlp(), rows()).culprit == "lowering"


def test_other_forms_are_tried_too(monkeypatch):
    from graphopt.bisection import bisecting

    monkeypatch.setattr(bisecting, "check_form", lambda scheme, prepared, sample: f"{scheme.name} is off")
    found = bisected(mlp(), rows())
    assert found.culprit.startswith("form: ") and found.wrong.endswith("is off")


# -- checks of one's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, wrong", [
    (lambda stage: len(stage.passes) < 3, "the check says no"),
    (lambda stage: "too many" if len(stage.passes) == 3 else None, "too many"),
    (lambda stage: {}[0] if len(stage.passes) == 3 else True, "the check raised KeyError: 0"),
])  # fmt: skip
def test_a_check_is_asked_after_each_pass(answer, wrong):
    found = bisected(mlp(), rows(), check=answer, verify=False)
    assert found.culprit == PASSES[2].name and found.wrong == wrong


def test_a_check_sees_values_and_can_train():
    batch, seen = rows(), []

    def check(stage):
        values = stage.values()
        assert values["loss"].shape == () and values["gradient 0.weight"].shape == (8, 4)
        assert any(name.startswith("new parameter") for name in stage.outputs())
        step = stage.step()
        losses = [float(step(*batch)) for _ in range(3)]
        seen.append((stage.name, losses))
        return losses[-1] < losses[0]

    found = bisected(mlp(), batch, check=check)
    assert found.culprit is None and [name for name, _ in seen] == [
        "capture",
        "gradient_liveness",
        *(p.name for p in PASSES),
    ]
    assert len({tuple(losses) for _, losses in seen}) == 1  # each from the same start


def test_what_makes_no_sense_is_refused():
    for options, why in (
        ({"check": 3}, "check: expected a function"), ({"passes": [Wrong]}, "passes: expected objects"),
        ({"verify": False}, "a check of your own"), ({"check": lambda stage: 7}, "None, True, False or a sentence"),
    ):  # fmt: skip
        with pytest.raises(GraphoptError, match=why):
            bisected(mlp(), rows(), **options)
    with pytest.raises(GraphoptError, match="no training step"):
        graphopt.bisect(mlp(), rows())
    with pytest.raises(CaptureError):
        bisected(Branching(), rows())


# -- what is handed on ----------------------------------------------------------------------------------------------


def test_the_report_is_complete(tmp_path):
    found = bisected(mlp(), rows(), passes=between(Replace()))
    written = {path.name for path in found.save(tmp_path / "report")}
    assert written == {
        "report.txt",
        "report.json",
        "before.txt",
        "after.txt",
        "changes.diff",
        "before.graph",
        "after.graph",
    }
    text = (tmp_path / "report" / "report.txt").read_text()
    for part in ("-> replace", f"torch {torch.__version__}", "for a bug report attach", "tanh_backward", "stands for"):
        assert part in text
    graph = graphopt.TrainingGraph.load(tmp_path / "report" / "after.graph")
    assert graph.text() == found.graphs[1].text()


# -- locating -------------------------------------------------------------------------------------------------------


def test_rounding_is_no_difference():
    graph = traced(lambda step, x: aten.tanh.default(x), (6, 5))

    @dataclass(frozen=True)
    class Off(Pass):
        name: ClassVar[str] = "off"
        tier: ClassVar[Tier] = Tier.REORDERS
        factor: float = 1.0

        def rewrite(self, graph):
            draft = graph.draft()
            (node,) = [n for n in draft.graph.nodes if n.target is aten.tanh.default]
            new = draft.add(aten.mul.Tensor, node, self.factor, like=node, after=node)
            draft.output.args = ((new,),)
            return PassResult(draft.finish(), (Change("off", "off"),))

    values = random_values(graph, special=False)
    assert locate(graph, Off(1 + 2e-7)(graph).graph, values) is None
    found = locate(graph, Off(1.01)(graph).graph, values)
    assert found.stands_for == "tanh" and found.before == ("%tanh: f32[6, 5] = aten.tanh(%x)",)


def test_random_operators_draw_the_same(tmp_path):
    found = bisected(Net(0.5), images(), passes=between(Wrong("scale gradients")))
    assert found.culprit == "wrong" and len(found.location.after) == 1
