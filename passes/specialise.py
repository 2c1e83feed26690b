"""One capture for many freeze patterns, held against a fresh capture."""

from __future__ import annotations

from collections.abc import Callable, Collection

from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes._base import PassResult, Refusal
from graphopt.passes.gradient_liveness import GradientLiveness


def specialise(
    full: TrainingGraph, trainable: Collection[str], fresh: TrainingGraph | Callable[[], TrainingGraph]
) -> PassResult:
    """The step of a freeze pattern: ``full`` specialised to it, if that is what a fresh capture gives.

    torch chooses some kernels by ``requires_grad`` while it traces (the folding of 3-D matmuls, LSTM, attention with a
    learnable bias), so the specialised graph is compared with a fresh one by `TrainingGraph.hash`. Equal hashes mean
    the same operators on the same operands. Where they differ the fresh graph is the answer, with a refusal that says
    so.

    Args:
        full: a graph of `capture` with ``gradients="all"``.
        trainable: names of the parameters that are trained.
        fresh: `capture` of the model whose ``requires_grad`` flags are those of the pattern, or a function that makes
            it.

    >>> import torch, graphopt
    >>> from graphopt.passes import specialise
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> batch = (torch.randn(5, 4), torch.randint(2, (5,)))
    >>> loss = torch.nn.functional.cross_entropy
    >>> full = graphopt.capture(net, batch, loss=loss, gradients="all")
    >>> frozen = net[0].requires_grad_(False)
    >>> result = specialise(full, ["2.weight", "2.bias"], lambda: graphopt.capture(net, batch, loss=loss))
    >>> result.refusals
    ()
    """
    result = GradientLiveness(trainable=trainable)(full)
    truth = fresh if isinstance(fresh, TrainingGraph) else fresh()
    if result.graph.hash() == truth.hash():
        return result
    why = "torch chooses other kernels for this pattern: the specialised graph differs from a fresh capture, which runs"
    return PassResult(truth, (), (*result.refusals, Refusal(GradientLiveness.name, "the full graph", why=why)))
