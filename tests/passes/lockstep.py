"""All processors of a divided graph in one process, operator by operator, with collectives between them; and the check
that every test of a graph divided by regions makes: `assert_equals_whole`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.graph.lowering import lower
from graphopt.graph.op_rules import is_random
from graphopt.graph.training_graph import InputKind, TrainingGraph
from graphopt.passes import DivideRegions
from graphopt.schemes.pieces import PARTIAL, SHARDED, place_value, rows_of_parts, sharded_dim, whole_of

c10d = torch.ops._c10d_functional
_JOIN = {"sum": lambda values: sum(values[1:], values[0]), "max": lambda values: torch.stack(values).amax(0),
         "min": lambda values: torch.stack(values).amin(0)}  # fmt: skip


def run_together(
    graph: TrainingGraph, inputs: Sequence[Sequence[Any]], seed: int = 0
) -> list[tuple[tuple[Any, ...], torch.Tensor]]:
    """The outputs of each processor and its random state afterwards, given the inputs of each."""
    everyone = range(len(inputs))
    known: list[dict[fx.Node, Any]] = [dict(zip(graph.placeholders, given, strict=True)) for given in inputs]
    states = [torch.Generator().manual_seed(seed).get_state() for _ in everyone]
    for node in graph.nodes:
        if node.op == "get_attr":
            for values in known:
                values[node] = graph.constants[str(node.target)]
        elif node.op == "call_function":
            args = [fx.node.map_arg((node.args, node.kwargs), lambda n, v=values: v[n]) for values in known]
            if "c10d" in str(node.target):
                results = _collective(node, [a for a, _ in args])
            else:
                results = [_run(node, *args[k], states, k) for k in everyone]
            for values, result in zip(known, results, strict=True):
                values[node] = result
    return [
        (tuple(None if n is None else values[n] for n in graph.results), state)
        for values, state in zip(known, states, strict=True)
    ]


def _run(node: fx.Node, args: Any, kwargs: Any, states: list[torch.Tensor], k: int) -> Any:
    if not is_random(node):
        return node.target(*args, **kwargs)  # type: ignore[operator]
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(states[k])
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        states[k] = torch.get_rng_state()
    return result


def _collective(node: fx.Node, args: list[Any]) -> list[Any]:
    """What each processor gets: contiguous memory. Operands must be of one shape, and all but those of an all-reduce,
    which copies them first, contiguous."""
    values = [a[0] for a in args]
    assert all(v.shape == values[0].shape for v in values), node
    assert node.target is c10d.all_reduce.default or all(v.is_contiguous() for v in values), node
    if node.target is c10d.wait_tensor.default:
        return values
    if node.target is c10d.all_reduce.default:
        return [_JOIN[args[0][1]](values).clone(memory_format=torch.contiguous_format) for _ in values]
    if node.target is c10d.all_gather_into_tensor.default:
        assert args[0][1] == len(values)
        return [torch.cat(values) for _ in values]
    assert node.target is c10d.reduce_scatter_tensor.default, node.target
    assert args[0][1:3] == ("sum", len(values))
    return [part.clone() for part in _JOIN["sum"](values).chunk(len(values))]


def inputs_of_each(graph: TrainingGraph, values: Sequence[Any], processors: int, rows: int) -> list[list[Any]]:
    """The inputs of each processor: ``values`` are those of the graph before it was divided, on ``rows`` rows."""
    lies = graph.signature.tree["placements"]["inputs"]
    parts = rows_of_parts(rows, processors)
    found = []
    for k, (begin, count) in enumerate(parts):
        mine: list[Any] = []
        for position, given in enumerate(graph.inputs):
            dim = sharded_dim(lies.get(given.name, ""))
            if given.kind is InputKind.PLACE:
                mine.append(place_value(given, k, parts))
            else:
                mine.append(values[position] if dim is None else values[position].narrow(dim, begin, count).clone())
        found.append(mine)
    return found


def assert_equals_whole(
    graph: TrainingGraph,
    values: Sequence[Any],
    processors: int,
    regimes: Mapping[str, str | None],
    *,
    seed: int = 3,
    tolerance: float = 1e-10,
) -> TrainingGraph:
    """Every output of the divided graph equals that of the graph, within what rounding in float64 explains, and the
    random state of each processor is that of one that ran it all. Gives the divided graph."""
    result = DivideRegions(processors, regimes)(graph)
    assert not result.refusals, result.refusals
    divided = result.graph
    torch.manual_seed(seed)
    with torch.no_grad():
        expected = lower(graph, in_place=False).run(*values)
        state = torch.get_rng_state()
        rows = next(
            v.shape[0] for i, v in zip(graph.inputs, values) if i.kind is InputKind.BATCH and v.dim()
        )  # fmt: skip
        answers = run_together(divided, inputs_of_each(divided, values, processors, rows), seed)
    words = divided.signature.tree["placements"]["outputs"]
    for i, (output, word, whole) in enumerate(zip(graph.outputs, words, expected, strict=True)):
        parts = [outputs[i] for outputs, _ in answers]
        if word == PARTIAL or word.startswith(SHARDED):
            assert {part.shape for part in parts} != {whole.shape} or word == PARTIAL, f"{output} is {word}"
            parts = [whole_of(word, parts)]
        for part in parts:
            if whole is None:
                assert part is None
                continue
            scale = 1 + whole.abs().max().item() if whole.numel() and whole.is_floating_point() else 1
            torch.testing.assert_close(
                part, whole, rtol=tolerance, atol=1e-2 * tolerance * scale, equal_nan=True,
                msg=lambda m, output=output: f"{output}: {m}",
            )  # fmt: skip
    for _, drawn in answers:
        assert torch.equal(drawn, state), "the processors drew other numbers than one alone"
    return divided
