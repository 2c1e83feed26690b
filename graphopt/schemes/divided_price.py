"""The price of a divided step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from graphopt.cost_model import Estimate, Machine, estimate
from graphopt.cost_model.kernels import Family
from graphopt.graph.sizes import nbytes
from graphopt.graph.training_graph import InputKind, TrainingGraph
from graphopt.schemes.divided_step import Divided
from graphopt.schemes.pieces import PARTIAL, owner_of, sharded_dim


def price(divided: Divided, size: int, machine: Machine) -> Estimate | None:
    """The price of a step on a batch of ``size``: the largest part of the batch on the processor that has most to do,
    communication, copies through shared memory, and the update of this process. None where the graphs do not hold for
    parts of that size. ``machine`` must have a link."""
    processors = len(divided.graphs)
    named = divided.graphs[0].symbols.hints
    sizes = {"batch": -(-size // processors), "batch.total": size} if "batch.total" in named else {"batch": size}
    if not divided.graphs[0].symbols.admits(sizes):
        return None
    different = {id(graph): graph for graph in divided.graphs}.values()
    found = (estimate(graph, machine, sizes, processors=processors) for graph in different)
    step = max(found, key=lambda each: each.seconds)
    terms = dict(step.terms)
    terms["communication"] += shared_memory_seconds(divided, machine)
    if divided.update is not None and len(divided.update):
        update = estimate(divided.update, machine)
        terms = {name: terms[name] + update.terms[name] for name in terms}
    seconds = sum(terms.values())
    share = seconds / step.seconds
    return replace(step, seconds=seconds, terms=terms, interval=(step.interval[0] * share, step.interval[1] * share))


def shared_memory_seconds(divided: Divided, machine: Machine) -> float:
    """Seconds of copies between this process and the workers.

    What a step changes and workers read (parameters, buffers, state) is copied for all of them together. New values are
    copied by the workers that own them, at a time, and then by this process into the user's tensors, with those that it
    owns. For partial sums and parts see `seconds_of_sums` and `seconds_of_parts`.
    """

    def copies(sizes: Sequence[float]) -> float:
        return float(_copied(sizes, machine).sum())

    first, processors = divided.graphs[0], len(divided.graphs)
    words = list(enumerate(divided.words))
    partial = _sizes(first, [k for k, word in words if word == PARTIAL])
    pieces = [processors * size for size in _sizes(first, [k for k, word in words if sharded_dim(word) is not None])]
    mine: dict[int, list[int]] = {k: [] for k in range(processors)}
    for k, word in words:
        if (owner := owner_of(word)) is not None:
            mine[owner] += _sizes(divided.graphs[owner], [k])
    handed = max(copies(sizes) for owner, sizes in mine.items() if owner)
    taken = sum(copies(sizes) for sizes in mine.values()) if divided.update is None else 0.0
    joined = seconds_of_sums(partial, processors, machine).sum() + seconds_of_parts(pieces, processors, machine).sum()
    return copies(_mirrored(divided)) + float(joined) + handed + taken


def seconds_of_sums(sizes: Sequence[float], processors: int, machine: Machine) -> np.ndarray:
    """Seconds of bringing values of so many bytes, of which each processor has a summand, together in this process: the
    others copy them at a time, and this process adds them one after the other."""
    added = machine.curves[Family.POINTWISE].memory_seconds(3.0 * np.asarray(sizes, dtype=np.float64))
    return _copied(sizes, machine) + (processors - 1) * added


def seconds_of_parts(sizes: Sequence[float], processors: int, machine: Machine) -> np.ndarray:
    """Seconds of bringing values of so many bytes, of which each processor has an equal part, together in this process:
    the others copy them at a time, and this process puts them behind each other."""
    whole = np.asarray(sizes, dtype=np.float64)
    return _copied(whole / processors, machine) + _copied(whole, machine)


def _copied(sizes: Sequence[float] | np.ndarray, machine: Machine) -> np.ndarray:
    return machine.curves[Family.COPY].memory_seconds(2.0 * np.asarray(sizes, dtype=np.float64))


def _mirrored(divided: Divided) -> list[int]:
    """Bytes of each tensor that changes from step to step and is read by a worker."""
    outputs = [*divided.graphs[0].outputs, *(divided.update.outputs if divided.update is not None else ())]
    new = {output.name for output in outputs}
    found: dict[object, int] = {}
    for graph in divided.graphs[1:]:
        for given, node in zip(graph.inputs, graph.placeholders, strict=True):
            static = given.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.STATE)
            if static and given.name in new and node.users:
                found[given] = int(graph.symbols.evaluate(nbytes(node.meta["val"])))
    return list(found.values())


def _sizes(graph: TrainingGraph, positions: list[int]) -> list[int]:
    """Bytes of the values at these outputs, each value once."""
    results = dict.fromkeys(graph.results[k] for k in positions)
    return [int(graph.symbols.evaluate(nbytes(node.meta["val"]))) for node in results if node is not None]
