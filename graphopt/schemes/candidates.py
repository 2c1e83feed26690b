"""`candidates`: what ``schemes="auto"`` tries for a task, the most promising first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.schemes.base import Prepared, Scheme
from graphopt.schemes.channels_last import image_positions, matters, why_not_channels_last
from graphopt.schemes.cuda_graphs import CudaGraphs
from graphopt.schemes.eager import Eager
from graphopt.schemes.flat import Flat
from graphopt.schemes.fused_optimizer import counts_elsewhere, why_not_fused
from graphopt.schemes.inductor import Inductor
from graphopt.schemes.micro_batches import MicroBatches
from graphopt.schemes.one_processor import OneProcessor
from graphopt.schemes.task import Task

PARTS = (2, 4)
"""Numbers of micro-batches that are tried: they save memory, not time."""


def candidates(
    task: Task, prepared: Prepared, *, threads: Sequence[int], precision: str | None, saving_memory: bool = False
) -> tuple[Scheme, ...]:
    """The schemes on one processor that are worth a try, about ten, the most promising first.

    Options that cannot be met by this task are left out at once. Flat code with the most options comes first; plain
    flat code and plain eager, which give the bits of eager as it is written, are always there; schemes that take long
    to start (Inductor) or only save memory (micro-batches) come last.

    Args:
        task: what is to be run.
        prepared: the captured step (or None) and the layout of the batch.
        threads: numbers of threads to try; the one that the process has is meant by schemes without a number.
        precision: ``"bf16"`` lets each scheme with options run in it, beside plain flat code and plain eager in full
            precision; None: none does.
        saving_memory: whether schemes that save memory, not time, are among them (micro-batches).

    Example:
        >>> import torch
        >>> from graphopt.graph.batch import flatten
        >>> from graphopt.schemes.flat import capture_task
        >>> net = torch.nn.Linear(4, 2)
        >>> task = Task(net, torch.nn.functional.cross_entropy, (torch.optim.AdamW(net.parameters()),))
        >>> batch = torch.randn(8, 4), torch.randint(2, (8,))
        >>> prepared = Prepared(task, flatten(batch)[1], capture_task(task, batch, ()))
        >>> for scheme in candidates(task, prepared, threads=[torch.get_num_threads()], precision=None):
        ...     print(scheme.name)
        flat, fused optimizer
        flat
        eager, fused optimizer
        eager
        inductor, fused optimizer
    """
    fused = why_not_fused(task.optimizers) is None
    options: dict[str, Any] = {"fused": fused, "precision": precision if precision != "fp32" else None}
    in_graph = {**options, "fused": fused and not counts_elsewhere(task.optimizers)}
    images = _images_matter(prepared)
    numbers = _numbers(prepared, threads)
    found: list[OneProcessor] = []
    if prepared.step is not None:
        found += [CudaGraphs(**in_graph)] if _on_cuda(prepared) else []
        for number in numbers:
            found += [Flat(threads=number, channels_last=True, **in_graph)] if images else []
            found += [Flat(threads=number, **in_graph)]
    found += [Flat()]  # without a captured step it says why there is none
    found += [Eager(channels_last=True, **options)] if images else []
    found += [Eager(**options)]
    found += [Eager(threads=number, **options) for number in numbers if prepared.step is None and number is not None]
    found += [Eager()]
    if prepared.step is not None:
        found += [Inductor(**in_graph)]
        found += [MicroBatches(count, fused=in_graph["fused"]) for count in PARTS if saving_memory]
    return tuple(dict.fromkeys(found))


def _numbers(prepared: Prepared, threads: Sequence[int]) -> list[int | None]:
    """The numbers of threads as options: None for the process's own, which comes first."""
    if any(d.type != "cpu" for d in prepared.layout.devices):
        return [None]
    return [None, *(n for n in dict.fromkeys(threads) if n != torch.get_num_threads())]


def _images_matter(prepared: Prepared) -> bool:
    """Whether channels-last images are possible and convolutions do most of the work."""
    if why_not_channels_last(prepared) is not None:
        return False
    if prepared.step is None:
        return True
    layout = prepared.layout
    graph = prepared.step.before
    return matters(graph, {layout.names[i] for i in image_positions(layout)}, graph.symbols.hints["batch"])


def _on_cuda(prepared: Prepared) -> bool:
    return all(d.type == "cuda" for d in prepared.layout.devices)
