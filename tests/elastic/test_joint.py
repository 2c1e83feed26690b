"""Joint graphs of subnets are those that are derived from their forward graphs, quickly or not."""

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from graphopt import with_backward
from graphopt.elastic import joint as joints
from graphopt.elastic import left_out, space
from graphopt.graph.training_graph import InputKind, OutputKind
from tests.elastic.test_space import Grouped


def loss(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def assert_same_graph(got, right):
    """The same operators on the same operands, and equal numbers; how sizes are computed may differ."""
    ours, theirs = values(got), values(right)
    place = {node: i for nodes in (ours, theirs) for i, node in enumerate(nodes)}

    def argument(value):
        if isinstance(value, torch.fx.Node):
            return ("node", place[value]) if value in place else str(value.meta["val"].node.expr)
        return repr(value)

    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.target == b.target or a.op == "get_attr", (a, b)
        left, right_ = (list(map(argument, tree_leaves((n.args, n.kwargs)))) for n in (a, b))
        assert left == right_, (a.format_node(), b.format_node())
        x, y = a.meta.get("val"), b.meta.get("val")
        if isinstance(x, torch.Tensor):
            assert [str(s) for s in x.shape] == [str(s) for s in y.shape], a


def values(graph):
    return [n for n in graph.nodes if n.op != "call_function" or not isinstance(n.meta["val"], torch.SymInt)]


def test_a_resized_joint_graph_is_the_derived_one(monkeypatch):
    torch.manual_seed(0)
    found = space(Grouped(groups=3, queries=4).train(), torch.randn(2, 4, 5))
    batch = (torch.randn(2, 4, 5), torch.randint(3, (2, 4)))
    names = ("embed", "layers.0.q.heads", "layers.0.q.queries", "layers.0.hidden")
    sizes = [(24, 3, 4, 16), (12, 2, 3, 8), (18, 2, 2, 24), (18, 1, 2, 32)]
    traced = []
    for module in (joints, left_out):
        monkeypatch.setattr(module, "with_backward", lambda *a, **k: traced.append(a) or with_backward(*a, **k))
    counts = []
    for each in sizes:
        choice = found.choice(dict(zip(names, each, strict=True)))
        got = found.graph(choice, loss=loss, batch=batch)
        assert found.graph(choice, loss=loss, batch=batch) is got
        counts.append(len(traced))
        assert_same_graph(got, with_backward(found.subnet(choice, loss=loss, batch=batch).graph))
        shapes = {n: tuple(node.meta["val"].shape) for n, node in got.output_nodes(OutputKind.GRADIENT).items()}
        assert shapes == {n: tuple(p.meta["val"].shape) for n, p in got.input_nodes(InputKind.PARAMETER).items()}
    # the first is traced by itself, then the pattern is, and one head changes what is broadcast
    assert counts == [1, 2, 2, 3]
