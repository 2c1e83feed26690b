"""Joint graphs of subnets are those that are derived from their forward graphs, quickly or not."""

import torch
import torch.nn.functional as F

from graphopt import with_backward
from graphopt.elastic import joint as joints
from graphopt.elastic import space
from graphopt.graph.training_graph import InputKind, OutputKind
from tests.elastic.test_space import Grouped


def test_a_resized_joint_graph_is_the_derived_one(monkeypatch):
    torch.manual_seed(0)
    found = space(Grouped(groups=3, queries=4), torch.randn(2, 4, 5))
    batch = (torch.randn(2, 4, 5), torch.randint(3, (2, 4)))

    def loss(output, target):
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    chosen = [found.choice({"embed": e, "layers.0.q.heads": h, "layers.0.q.queries": q, "layers.0.hidden": w})
              for e, h, q, w in [(24, 3, 4, 16), (12, 2, 3, 8), (18, 2, 2, 24), (18, 3, 2, 32)]]  # fmt: skip
    first = found.graph(chosen[0], loss=loss, batch=batch)
    traced = []
    monkeypatch.setattr(joints, "with_backward", lambda *a: traced.append(a) or with_backward(*a))
    for choice in chosen[1:]:
        got = found.graph(choice, loss=loss, batch=batch)
        subnet = found.subnet(choice, loss=loss, batch=batch)
        assert got.hash() == with_backward(subnet.graph).hash(), choice
        shapes = {n: tuple(node.meta["val"].shape) for n, node in got.output_nodes(OutputKind.GRADIENT).items()}
        parameters = {n: tuple(node.meta["val"].shape) for n, node in got.input_nodes(InputKind.PARAMETER).items()}
        assert shapes == parameters
        assert found.graph(choice, loss=loss, batch=batch) is got
    assert len(traced) == 1, "only the pattern is traced"
    assert first.hash() == with_backward(found.subnet(chosen[0], loss=loss, batch=batch).graph).hash()
    one = found.choice({"layers.0.q.heads": 1})
    assert found.graph(one, loss=loss, batch=batch).hash() == with_backward(
        found.subnet(one, loss=loss, batch=batch).graph
    ).hash()
    assert len(traced) == 2, "one head changes broadcasting: traced by itself"
