"""Pass, Pipeline and the invariants: a pass that breaks one is told so by name."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from graphopt import PassError
from graphopt.passes import DeadCode, NoOps, Pass, PassResult, Pipeline, Tier
from tests.helpers import body, traced

aten = torch.ops.aten


@dataclass(frozen=True)
class Custom(Pass):
    """A pass that edits a draft by the function given."""

    edit: object = None
    name: ClassVar[str] = "custom"
    tier: ClassVar[Tier] = Tier.REORDERS

    def rewrite(self, graph):
        draft = graph.draft()
        self.edit(draft)
        return PassResult(draft.finish())


class Dropping(Custom):
    """The same, allowed to drop outputs."""

    drops_outputs = True


def example():
    def function(step, x, y):
        noise = aten.rand_like.default(x)
        return aten.add.Tensor(aten.mul.Tensor(x, noise), aten.bernoulli.default(noise)), aten.exp.default(y)

    return traced(function, (2, 3), (2, 3))


def node(draft, name):
    return next(n for n in draft.graph.nodes if n.name == name)


def set_results(draft, *results):
    draft.output.args = (tuple(results),)


def reorder_draws(draft):
    draws = node(draft, "rand_like"), node(draft, "bernoulli")
    new = draft.add(aten.bernoulli.p, node(draft, "x"), 0.5, like=draws[0])
    draft.replace(draws[1], new)


def transpose_a_result(draft):
    exp = node(draft, "exp")
    set_results(draft, node(draft, "add"), draft.add(aten.t.default, exp, like=exp, after=exp))


BROKEN = {
    "result type": (
        lambda d: set_results(
            d, node(d, "add"), d.add(aten.t.default, node(d, "exp"), like=node(d, "exp"), after=node(d, "exp"))
        ),
        "output 1 was",
    ),
    "output became an input": (lambda d: set_results(d, node(d, "add"), node(d, "x")), "input batch x"),
    "outputs became one": (lambda d: set_results(d, node(d, "add"), node(d, "add")), "share memory"),
    "dropped output": (lambda d: d.keep_outputs([True, False]), "outputs of the signature differ"),
    "missing result": (lambda d: set_results(d, node(d, "add"), None), "output 1 was"),
    "random operator lost": (
        lambda d: d.replace(node(d, "bernoulli"), d.add(aten.exp.default, node(d, "x"), like=node(d, "bernoulli"))),
        "random operators",
    ),
    "random operators reordered": (reorder_draws, "random operators"),
    "not well formed": (lambda d: d.output.append(node(d, "exp")), "well formed|used before"),
}


@pytest.mark.parametrize("edit, message", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_invariant_names_the_pass(edit, message):
    graph = example()
    before = body(graph)
    with pytest.raises(PassError, match=message) as error:
        Custom(edit)(graph)
    assert error.value.pass_name == "custom"
    assert body(graph) == before


@pytest.mark.parametrize("name", ["dropped output", "missing result"])
def test_outputs_may_be_dropped_by_passes_that_say_so(name):
    assert Dropping(BROKEN[name][0])(example()).graph


def test_a_pipeline_is_a_pass_and_collects_what_its_passes_did():
    def function(step, x):
        aten.exp.default(x)
        return aten.sin.default(aten.detach.default(x)), aten.clone.default(x)

    graph = traced(function, (3,))
    result = Pipeline([DeadCode(), Pipeline([NoOps()])])(graph)
    assert [c.pass_name for c in result.changes] == ["dead_code", "no_ops"]
    assert [r.pass_name for r in result.refusals] == ["no_ops"]
    assert result.saving == result.changes[0].saving + result.changes[1].saving
    assert NoOps()(DeadCode()(graph)).changes == result.changes


def test_a_pipeline_reorders_arithmetic_if_one_of_its_passes_does():
    assert Pipeline([DeadCode()]).tier is Tier.EXACT
    assert Pipeline([DeadCode(), Custom()]).tier is Tier.REORDERS
    assert Pipeline([DeadCode(), Dropping()]).drops_outputs


def test_nothing_to_do_gives_back_the_same_graph():
    graph = traced(lambda step, x: aten.exp.default(x), (3,))
    result = Pipeline([DeadCode(), NoOps()])(graph)
    assert result.graph is graph and not result.changed
