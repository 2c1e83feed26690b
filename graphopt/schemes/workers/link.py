"""What collectives cost between the processors of a pool, measured."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import torch
from torch import nn

from graphopt.cost_model import Link
from graphopt.cost_model.curves import increasing
from graphopt.graph.capture import capture
from graphopt.graph.training_graph import Output, OutputKind, TrainingGraph
from graphopt.schemes.workers.pool import Pool

SIZES = tuple(4**power for power in range(6, 13))
"""Bytes of measured messages: 4 KiB to 16 MiB, four times as many from one to the next."""

_ROUNDS = 7
_IN_A_ROW = 4

BUSY = 0.5
"""`Link.busy` of processors that share the memory and the cores of one machine; not measured."""

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


def measure_link(pool: Pool) -> Link:
    """Time all-reduces of several sizes, `SIZES`, between the processors of ``pool``; takes a few seconds.

    Other collectives follow from it: an all-gather is half of an all-reduce (the ring). A reduce-scatter counts as a
    whole one: with gloo the two take the same time, measured side by side at 4 KiB and at 16 MiB.
    """
    empty = _seconds(pool, _reducing(0, 0))
    points = [(float(size), max(_seconds(pool, _reducing(size, _IN_A_ROW)) - empty, 1e-7) / _IN_A_ROW)
              for size in SIZES]  # fmt: skip
    whole = increasing(points)
    half = tuple((size, seconds / 2) for size, seconds in whole)
    n = pool.processors
    (few, short), (many, long) = whole[0], whole[-1]
    return Link(
        latency=short / (2 * (n - 1)),
        bandwidth=2 * (n - 1) / n * (many - few) / max(long - short, 1e-9),
        points={f"all_reduce {n}": whole, f"reduce_scatter {n}": whole, f"all_gather {n}": half},
        busy=BUSY,
    )


def _seconds(pool: Pool, graph: TrainingGraph) -> float:
    job = pool.load(graph)
    common, part = [torch.zeros(1, 1)], [torch.zeros(2, 1)] * 2
    taken = []
    for _ in range(_ROUNDS):
        start = perf_counter()
        job(common, [part] * pool.processors)
        taken.append(perf_counter() - start)
    return min(taken[1:])  # what others do to the machine only adds


def _reducing(nbytes: int, times: int) -> TrainingGraph:
    """A graph that makes so many bytes and all-reduces them, one time after the other."""
    batch = torch.zeros(2, 1), torch.zeros(2, 1)
    draft = capture(nn.Linear(1, 1, bias=False), batch, loss=nn.functional.mse_loss).draft()
    like = next(n for n in draft.graph.nodes if n.op == "call_function")
    results, outputs = list(draft.results), list(draft.signature.outputs)
    keep = [i for i, output in enumerate(outputs) if output.kind is OutputKind.LOSS]
    results, outputs = [results[i] for i in keep], [outputs[i] for i in keep]
    if times:
        value = draft.add(aten.full.default, [nbytes // 4], 1.0, like=like, before=draft.output)
        for _ in range(times):
            for op, more in ((c10d.all_reduce.default, ("max", "graphopt")), (c10d.wait_tensor.default, ())):
                with draft.graph.inserting_before(draft.output):
                    made = draft.graph.call_function(op, (value, *more))
                made.meta = {**value.meta}
                value = made
        results.append(draft.add(aten.sum.default, value, like=like, before=draft.output))
        outputs.append(Output(OutputKind.SAVED, "sum"))
    draft.output.args = (tuple(results),)
    draft.signature = replace(draft.signature, outputs=tuple(outputs))
    return draft.finish()
