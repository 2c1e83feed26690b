"""The data-parallel scheme: each processor runs forward and backward on its rows of the batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import fx

from graphopt.cost_model import Estimate, Machine, estimate
from graphopt.cost_model.kernels import Family
from graphopt.errors import CaptureError, GraphoptError
from graphopt.graph.halves import Halves, cut_update
from graphopt.graph.in_place import overwritten
from graphopt.graph.lowering import Lowered, lower
from graphopt.graph.sizes import nbytes
from graphopt.graph.training_graph import Input, InputKind, Output, OutputKind, TrainingGraph
from graphopt.passes import BucketGradients, GatherAtOwner, ShardAxes
from graphopt.schemes.base import Machines, Prepared, Runner, Scheme
from graphopt.schemes.graph_step import GraphStep
from graphopt.schemes.micro_batches import part_sizes
from graphopt.schemes.workers import Job, Pool

Synchronise = Literal["all-reduce", "owner"]
"""How gradients come together: summed by all in buckets, beside backward; or added by the owner of the parameters."""


@dataclass(frozen=True)
class DataParallel(Scheme):
    """Rows of the batch over processors of this machine: this process and workers that it starts.

    Each processor runs forward and backward on its rows; their gradients are brought together; this process, which
    owns parameters and optimizer state, updates when all have finished. A step happens whole or not at all. What a step
    computes is what one processor would: means are those of the whole batch, masks are drawn for all of it. Sums are
    taken in another order, so results differ in their last bits.

    Args:
        processors: how many take part, at least 2.
        synchronise: ``"all-reduce"``: every processor gets the sums, in buckets that overlap with backward.
            ``"owner"``: each hands its part to this process, through shared memory, which adds them up.
        batch_norm: ``"synchronized"``: statistics of the whole batch; ``"local"``: of each processor's rows, as DDP.
        threads: of torch on each processor.

    Raises:
        GraphoptError: an option has no such value.
    """

    processors: int = 2
    synchronise: Synchronise = "owner"
    batch_norm: Literal["synchronized", "local"] = "synchronized"
    threads: int = 1

    kind: ClassVar[str] = "data parallel"

    def __post_init__(self) -> None:
        if isinstance(self.processors, bool) or not isinstance(self.processors, int) or self.processors < 2:
            raise GraphoptError(f"processors: expected an integer of at least 2, got {self.processors!r}")
        for name, value, known in (
            ("synchronise", self.synchronise, get_args(Synchronise)),
            ("batch_norm", self.batch_norm, ("synchronized", "local")),
        ):
            if value not in known:
                raise GraphoptError(f"{name}: expected one of {', '.join(known)}, got {value!r}")

    @property
    def name(self) -> str:
        """See `Scheme.name`."""
        parts = [f"{self.kind} on {self.processors}", self.synchronise]
        parts += ["local batch norm"] * (self.batch_norm == "local")
        parts += [f"{self.threads} threads each"] * (self.threads > 1)
        return ", ".join(parts)

    def why_not(self, prepared: Prepared, size: int) -> str | None:
        """See `Scheme.why_not`. Divides the graph, which is kept with the step."""
        found = super().why_not(prepared, size)
        if found is None and prepared.task.accumulate > 1:
            found = "gradients are accumulated over several batches"
        if found is None and any(device.type != "cpu" for device in prepared.layout.devices):
            found = "the batch is not on the CPU, where local workers run"
        if found is None and size < self.processors:
            found = f"a batch of {size} has no row for each of {self.processors} processors"
        if found is not None:
            return found
        try:
            self.divided(prepared)
        except CaptureError as error:
            return str(error)
        return None

    def divided(self, prepared: Prepared) -> Divided:
        """The step cut and divided, made once. Raises CaptureError with the reason where it cannot be divided."""
        return prepared.variant(replace(self, threads=1), lambda: self._divided(prepared.step.whole.graph))  # type: ignore[no-any-return]

    def _divided(self, whole: TrainingGraph) -> Divided:
        halves = cut_update(whole)
        result = ShardAxes(self.processors, batch_norm=self.batch_norm)(halves.first)
        if result.graph is halves.first:
            raise CaptureError(f"the step cannot be divided: {'; '.join(r.why for r in result.refusals)}")
        if self.synchronise == "owner":
            return Divided(halves, GatherAtOwner()(result.graph).graph)
        return Divided(halves, BucketGradients()(result.graph).graph)

    def _shared_memory_seconds(self, divided: Divided, machine: Machine) -> float:
        """Seconds of copies: parameters and buffers that a step changes go to the workers; the owner gets each worker's
        gradients, which all copy at a time, and adds them one after the other."""
        copy, add = machine.curves[Family.COPY], machine.curves[Family.POINTWISE]
        graph, symbols = divided.halves.first, divided.first.symbols
        new = {o.name for o in (*graph.outputs, *divided.halves.second.outputs)}
        static = [
            symbols.evaluate(nbytes(node.meta["val"]))
            for given, node in zip(graph.inputs, graph.placeholders, strict=True)
            if given.kind in (InputKind.PARAMETER, InputKind.BUFFER) and given.name in new
        ]
        gathered = [symbols.evaluate(nbytes(node.meta["val"])) for node in divided.partial]
        moved = copy.memory_seconds(2.0 * np.array([*static, *gathered], dtype=np.float64)).sum()
        added = add.memory_seconds(3.0 * np.array(gathered, dtype=np.float64)).sum()
        return float(moved + (self.processors - 1) * added)

    def build(self, prepared: Prepared) -> Runner:
        """See `Scheme.build`. Starts the workers, which are ready at the first step."""
        divided = self.divided(prepared)
        pool = prepared.task.pools.of(self.processors, self.threads)
        return GraphStep(prepared, lambda graph: _lowered(divided, pool, graph))

    def estimate(self, prepared: Prepared, size: int, machines: Machines) -> Estimate | None:
        """See `Scheme.estimate`: the largest part and its communication, then the update. None without a link."""
        machine = machines(self.threads)
        if machine is None or machine.link is None:
            return None
        divided = self.divided(prepared)
        part = -(-size // self.processors)
        sizes = {"batch": part, "batch.total": size}
        if not divided.first.symbols.admits(sizes):
            return None
        steps = estimate(divided.first, machine, sizes, processors=self.processors)
        terms = dict(steps.terms)
        terms["communication"] += self._shared_memory_seconds(divided, machine)
        if len(divided.halves.second):
            update = estimate(divided.halves.second, machine)
            terms = {name: terms[name] + update.terms[name] for name in terms}
        seconds = sum(terms.values())
        share = seconds / steps.seconds
        return replace(
            steps, seconds=seconds, terms=terms, interval=(steps.interval[0] * share, steps.interval[1] * share)
        )


def data_parallel(processors: int, batch_norm: str) -> tuple[DataParallel, DataParallel]:
    """The data-parallel schemes for so many processors, which share the cores of this machine; best guess first."""
    threads = threads_of_each(processors)
    by_owner, reduced = (
        DataParallel(processors, synchronise, batch_norm, threads)  # type: ignore[arg-type]
        for synchronise in ("owner", "all-reduce")
    )
    return by_owner, reduced


def threads_of_each(processors: int) -> int:
    """How many threads each of so many processors gets where they share the cores of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // processors, 1)


@dataclass(frozen=True)
class Divided:
    """A step cut before its update, and what each processor runs of it."""

    halves: Halves
    first: TrainingGraph

    @property
    def partial(self) -> list[fx.Node]:
        """The values of which each processor has a part of the sum, each once."""
        words = self.first.signature.tree["placements"]["outputs"]
        found = (r for r, word in zip(self.first.results, words, strict=True) if word == "partial sum")
        return [node for node in dict.fromkeys(found) if node is not None]


def rows_of_parts(rows: int, processors: int) -> list[tuple[int, int]]:
    """First row and number of rows of each processor, as equal as can be, the larger parts first.

    >>> rows_of_parts(7, 3)
    [(0, 3), (3, 2), (5, 2)]
    """
    counts = part_sizes(rows, processors)
    return list(zip(accumulate(counts, initial=0), counts))


class _DividedStep:
    """The divided step as a function of the inputs of the whole one."""

    def __init__(self, divided: Divided, job: Job, inputs: Sequence[Input]):
        first, second = divided.halves.first, divided.halves.second
        position = {given: i for i, given in enumerate(inputs)}
        self._job, self._update = job, lower(second)
        self._processors = int(divided.first.signature.tree["placements"]["processors"])
        self._common = [position[i] for i in job.common]
        words = divided.first.signature.tree["placements"]
        sharded: dict[str, int] = {name: int(word.split()[1]) for name, word in words["inputs"].items()}
        self._own = [(i, position.get(i), sharded.get(i.name)) for i in job.own]
        self._rows = next((p, d) for i, p, d in self._own if p is not None and d is not None)
        self._partial = [k for k, word in enumerate(words["outputs"]) if word == "partial sum"]
        targets = overwritten(first)
        at = {node: i for i, node in enumerate(first.placeholders)}
        own = {i: position[given] for i, given in enumerate(first.inputs)}
        self._buffers = [(k, own[at[node]]) for k, node in enumerate(targets) if node is not None]
        saved = {o.name: k for k, o in enumerate(job.outputs) if o.kind is OutputKind.SAVED}
        self._arguments = [
            (True, saved[i.name]) if i.kind is InputKind.SAVED else (False, position[i]) for i in second.inputs
        ]
        written = {k for k, _ in self._buffers} | set(saved.values())
        self._returned = [k for k in range(len(job.outputs)) if k not in written]
        self.outputs: tuple[Output, ...] = (*(job.outputs[k] for k in self._returned), *self._update.outputs)
        self.code = self._update.code

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        given: list[Any] = []

        def commit(results: tuple[Any, ...]) -> None:
            whole = list(results)
            sums: dict[int, torch.Tensor] = {}  # one value may be several outputs
            for k in self._partial:
                known = sums.get(id(results[k]))
                whole[k] = sums[id(results[k])] = self._sum(k, results[k]) if known is None else known
            with torch.no_grad():
                for k, position in self._buffers:
                    inputs[position].copy_(whole[k])
                updated = self._update.run(*(whole[k] if kept else inputs[k] for kept, k in self._arguments))
            given.extend((*(whole[k] for k in self._returned), *updated))

        position, dim = self._rows
        parts = [self._part(inputs, begin, count) for begin, count in
                 rows_of_parts(inputs[position].shape[dim], self._processors)]  # fmt: skip
        self._job([inputs[k] for k in self._common], parts, commit)
        return tuple(given)

    def _sum(self, position: int, own: torch.Tensor) -> torch.Tensor:
        """The sum of an output over processors, in their order."""
        first, *others = self._job.gathered(position)
        total = own + first
        for part in others:
            total += part
        return total

    def _part(self, inputs: Sequence[Any], begin: int, count: int) -> list[Any]:
        """The values that one processor has for itself."""
        position, dim = self._rows
        values: list[Any] = []
        for own, at, sharded in self._own:
            if own.kind is InputKind.PLACE:
                values.append(inputs[position].shape[dim] if own.field == "total" else begin)
            else:
                assert at is not None
                values.append(inputs[at] if sharded is None else inputs[at].narrow(sharded, begin, count))
        return values


def _lowered(divided: Divided, pool: Pool, whole: TrainingGraph) -> Lowered:
    partial = [
        output for output, word in zip(divided.first.outputs, divided.first.signature.tree["placements"]["outputs"])
        if word == "partial sum"
    ]  # fmt: skip
    step = _DividedStep(divided, pool.load(divided.first, gathered=partial), whole.inputs)
    return Lowered(step, step.outputs, step.code)
