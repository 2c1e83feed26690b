"""The CUDA-graph scheme: forward and backward recorded once a batch shape and replayed by one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.cost_model import Estimate
from graphopt.errors import CaptureError
from graphopt.graph.halves import cut_update
from graphopt.graph.lowering import Lowered, lower
from graphopt.graph.training_graph import InputKind, OutputKind, TrainingGraph
from graphopt.schemes.base import Machines, Prepared
from graphopt.schemes.flat import Flat

WARM_UP = 3
"""Runs before the recording, as torch asks for; buffers and random state are put back after them."""


@dataclass(frozen=True)
class CudaGraphs(Flat):
    """The flat forward and backward as a CUDA graph: no launch cost an operator. The update runs flat behind it, since
    its hyper-parameters are numbers that a recording would fix. Source: ``torch.cuda.graph``.
    """

    kind: ClassVar[str] = "cuda_graphs"

    def why_not(self, prepared: Prepared, size: int) -> str | None:
        """See `Scheme.why_not`."""
        if any(device.type != "cuda" for device in prepared.layout.devices):
            return "the batch is not on a CUDA device"
        return super().why_not(prepared, size)

    def estimate(self, prepared: Prepared, size: int, machines: Machines) -> Estimate | None:
        """None: no calibration measures the launch of a recording."""
        return None

    def lowered(self, graph: TrainingGraph) -> Lowered:
        """See `Flat.lowered`; recorded at the first call with each batch shape."""
        halves = cut_update(graph)
        first, update = lower(halves.first), lower(halves.second)
        inputs_of_first, inputs_of_update = halves.positions(graph.inputs)
        moving = [k for k, i in enumerate(halves.first.inputs) if i.kind in (InputKind.BATCH, InputKind.GRADIENT)]
        buffers = [k for k, i in enumerate(halves.first.inputs) if i.kind is InputKind.BUFFER]
        saved = [k for k, o in enumerate(first.outputs) if o.kind is OutputKind.SAVED]
        own = len(first.outputs) - len(saved)
        recordings: dict[Any, _Recording] = {}

        def run(*inputs: Any) -> tuple[torch.Tensor, ...]:
            given = [inputs[i] for i in inputs_of_first]
            key = tuple((given[k].shape, given[k].stride()) for k in moving)
            if key not in recordings:
                recordings[key] = _Recording(first, given, moving, buffers)
            results = recordings[key].replay(given)
            returned = tuple(r.clone() if r is not None else None for r in results[:own])
            return (*returned, *update.run(*(results[k] for k in saved), *(inputs[i] for i in inputs_of_update)))

        return Lowered(run, (*first.outputs[:own], *update.outputs), first.code + update.code)


class _Recording:
    """One recorded graph with the memory it reads its batch from and writes its results to."""

    def __init__(self, lowered: Lowered, given: Sequence[Any], moving: Sequence[int], buffers: Sequence[int]):
        self._moving = moving
        self._inputs = list(given)
        for k in moving:
            self._inputs[k] = given[k].clone()
        before = [given[k].clone() for k in buffers]
        random_state = torch.cuda.get_rng_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    lowered.run(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = lowered.run(*self._inputs)
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            raise CaptureError(f"the step cannot be recorded as a CUDA graph: {first_line}") from error
        finally:
            for k, value in zip(buffers, before, strict=True):
                given[k].copy_(value)
            torch.cuda.set_rng_state(random_state)

    def replay(self, given: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """Run the recording on a batch of the same shape. The results are overwritten by the next replay."""
        for k in self._moving:
            self._inputs[k].copy_(given[k], non_blocking=True)
        self._graph.replay()
        return self._results
