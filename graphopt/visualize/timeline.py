"""`timeline`: the predicted course of a step, as a trace for Perfetto and ``chrome://tracing``.

The format is that of the "Trace Event Format" of Chrome: complete events (``ph: X``) in microseconds, one process for
each processor, one thread for computation and one for communication.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from graphopt.cost_model import Machine, estimate
from graphopt.cost_model.analytical import Pieces, pieces
from graphopt.cost_model.kernels import Family
from graphopt.cost_model.work import Mode, Work
from graphopt.errors import GraphoptError
from graphopt.graph.text import operator_text, shape_text
from graphopt.graph.training_graph import TrainingGraph

COMPUTATION, COMMUNICATION = 1, 2
"""Threads of the trace."""


def timeline(
    graphs: TrainingGraph | Sequence[TrainingGraph],
    path: str | PathLike[str] | None = None,
    *,
    machine: Machine | None = None,
    sizes: Mapping[str, int] | None = None,
    mode: Mode = "flat",
    processors: int | None = None,
) -> dict[str, Any]:
    """When each operator and each collective of a step should run, by the prices of the cost model.

    Args:
        graphs: the graph of a step, which every processor runs; or one for each processor.
        path: where to write the trace as JSON; open it at https://ui.perfetto.dev or chrome://tracing.
        machine, sizes, mode: as for `graphopt.cost_model.estimate`.
        processors: how many there are; by default as many as the graph was divided over, or as there are graphs.

    Returns:
        The trace as plain data. Each processor's last event ends at the seconds of its estimate. ``args`` of an event
        give node, type, phase, module, source, FLOPs and bytes.

    Raises:
        GraphoptError: no graph, or not one for each processor.
        CostModelError: see `graphopt.cost_model.estimate`.

    Example:
        >>> import torch, graphopt
        >>> from graphopt.cost_model import Machine
        >>> from graphopt.visualize import timeline
        >>> graph = graphopt.capture(torch.nn.Linear(64, 64), (torch.randn(16, 64),))
        >>> trace = timeline(graph, machine=Machine.named("H100"))
        >>> [event["name"] for event in trace["traceEvents"] if event["ph"] == "X"][:2]
        ['t', 'addmm']
    """
    each = [graphs] if isinstance(graphs, TrainingGraph) else list(graphs)
    if not each or not all(isinstance(graph, TrainingGraph) for graph in each):
        raise GraphoptError("timeline: expected a TrainingGraph, or one for each processor")
    count = processors if processors is not None else max(_divided(each[0]), len(each))
    if len(each) not in (1, count):
        raise GraphoptError(f"timeline: got {len(each)} graphs for {count} processors")
    machine = machine if machine is not None else Machine.current()
    events: list[dict[str, Any]] = []
    for processor in range(count):
        graph = each[processor if len(each) > 1 else 0]
        price = estimate(graph, machine, sizes, mode=mode, processors=count)
        events += _names(processor, count, machine)
        events += _events(price.work, price.counts, pieces(price, machine, count), processor)
    trace = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"machine": machine.name, "mode": mode}}
    if path is not None:
        Path(path).write_text(json.dumps(trace), encoding="utf-8")
    return trace


def _divided(graph: TrainingGraph) -> int:
    """Over how many processors a graph was divided."""
    return int((graph.signature.tree.get("placements") or {}).get("processors", 1))


def _names(processor: int, count: int, machine: Machine) -> list[dict[str, Any]]:
    label = f"processor {processor} of {count}, {machine.name}"
    threads = {COMPUTATION: "computation", **({COMMUNICATION: "communication"} if count > 1 else {})}
    return [
        {"ph": "M", "name": "process_name", "pid": processor, "tid": 0, "args": {"name": label}},
        *(
            {"ph": "M", "name": "thread_name", "pid": processor, "tid": thread, "args": {"name": name}}
            for thread, name in threads.items()
        ),
    ]


def _events(work: Work, counts: Any, found: Pieces, processor: int) -> list[dict[str, Any]]:
    """The events of one processor in order of time."""
    events: list[dict[str, Any]] = []

    def event(name: str, thread: int, begin: float, seconds: float, category: str, **about: Any) -> None:
        if seconds > 0:
            events.append(
                {
                    "ph": "X", "name": name, "cat": category, "pid": processor, "tid": thread, "ts": begin * 1e6,
                    "dur": seconds * 1e6, "args": {k: v for k, v in about.items() if v not in ("", None)},
                }
            )  # fmt: skip

    start = found.binding
    event("bind inputs", COMPUTATION, 0.0, start, "host")
    stalls: dict[int, float] = {}
    for position, seconds in found.schedule.stalls:
        stalls[position] = stalls.get(position, 0.0) + seconds
    now = start
    for i, kernel in enumerate(work.kernels):
        if i in stalls:
            event("wait for communication", COMPUTATION, now, stalls[i], "stall")
            now += stalls[i]
        node = kernel.node
        if kernel.family is Family.COMMUNICATION:
            event("start a collective", COMPUTATION, now, float(found.kernels[i]), "host", node=node.name)
            now += float(found.kernels[i])
            continue
        event(
            operator_text(node.target).removeprefix("aten."), COMPUTATION, now, float(found.kernels[i]),
            str(node.meta.get("phase", "")), node=node.name, family=str(kernel.family),
            type=shape_text(node.meta.get("val"), work.graph.symbols), module=node.meta.get("module"),
            source=node.meta.get("source"), flops=int(counts.kernel_flops[i]), bytes=int(counts.kernel_bytes[i]),
        )  # fmt: skip
        now += float(found.kernels[i])
    if tail := stalls.get(len(work.kernels), 0.0):
        event("wait for communication", COMPUTATION, now, tail, "stall")
        now += tail
    event("fresh memory, and what communication slows down", COMPUTATION, now, found.rest, "host")
    for transfer, begin, seconds in zip(work.transfers, found.schedule.begins, found.transfers):
        node = work.kernels[transfer.start].node
        event(
            transfer.collective.replace("_", " "), COMMUNICATION, start + begin, seconds, "communication",
            node=node.name, bytes=int(counts.kernel_bytes[transfer.start]), module=node.meta.get("module"),
            source=node.meta.get("source"),
        )  # fmt: skip
    return events
