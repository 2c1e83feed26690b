"""DeadCode: what nobody reads goes, unless removing it could be noticed."""

import torch

from graphopt.graph.training_graph import Phase
from graphopt.passes import DeadCode
from tests.helpers import assert_rewrite, traced

aten = torch.ops.aten


def test_dead_chain_goes():
    def chain(step, x):
        aten.exp.default(aten.mm.default(x, x))
        return aten.sin.default(x)

    result = assert_rewrite(DeadCode(), traced(chain, (3, 3)), "%sin = aten.sin(%x)\nreturn %sin")
    assert [c.what.split(":")[0] for c in result.changes] == ["removed aten.exp", "removed aten.mm"]
    assert result.saving.flops == 2 * 3 * 3 * 3


def test_dead_constant_goes():
    def constant(step, x):
        aten.exp.default(step.constant(torch.ones(3)))
        return aten.sin.default(x)

    result = assert_rewrite(DeadCode(), traced(constant, (3,)), "%sin = aten.sin(%x)\nreturn %sin")
    assert not result.graph.constants


def test_random_operators_stay_with_what_they_read():
    def draws(step, x):
        aten.exp.default(aten.bernoulli.default(aten.sigmoid.default(x)))
        return aten.rand_like.default(x)

    expected = """
    %sigmoid = aten.sigmoid(%x)
    %bernoulli = aten.bernoulli(%sigmoid)
    %rand_like = aten.rand_like(%x)
    return %rand_like
    """
    assert_rewrite(DeadCode(), traced(draws, (3,)), expected, refused="random numbers")


def test_assertions_stay():
    def asserts(step, x):
        aten._assert_async.msg(aten.any.default(x), "no")
        return aten.sin.default(x)

    assert_rewrite(DeadCode(), traced(asserts, torch.ones(3)), special=False)


def test_a_value_that_only_dead_backward_reads_is_no_longer_kept():
    def kept(step, x):
        y = aten.exp.default(x)
        with step.phase(Phase.BACKWARD):
            aten.neg.default(y)
        return aten.tan.default(y)

    result = assert_rewrite(DeadCode(), traced(kept, (8,)), "%exp = aten.exp(%x)\n%tan = aten.tan(%exp)\nreturn %tan")
    assert result.saving.bytes_kept == 32
