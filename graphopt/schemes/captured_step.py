"""`CapturedStep`: a task's step as optimised graphs, and how it is made."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from graphopt.dumps import dumped_step, finished
from graphopt.graph.assemble import WholeStep, with_update
from graphopt.graph.capture import capture_step
from graphopt.graph.hyper_parameters import structure_key
from graphopt.graph.training_graph import InputKind, OutputKind, TrainingGraph
from graphopt.passes import GradientLiveness, LivenessResult, Pass, PassResult, Pipeline
from graphopt.schemes.task import Task


@dataclass(frozen=True)
class CapturedStep:
    """A task's step for one batch layout as optimised graphs.

    ``whole`` is the graph of a step with its update (or up to the gradients, where the optimizers stay outside);
    ``part`` that of a batch whose gradients are only accumulated. ``before`` is the graph as captured, ``joint`` the
    same without accumulation, clipping and update, ``result`` what ``passes`` did to it. Seconds are those of capture
    and passes. ``fused``: the update is made by fused kernels that the optimizer's own options do not ask for.
    ``structure``: that of the optimizers whose update it has (`structure_key`). ``variants``: other forms of the step
    (`Prepared.variant`).
    """

    whole: WholeStep
    part: TrainingGraph | None
    before: TrainingGraph
    result: PassResult
    seconds: float
    joint: TrainingGraph
    passes: tuple[Pass, ...]
    fused: bool = False
    structure: Hashable = field(default=None, kw_only=True, compare=False, repr=False)
    variants: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def graph(self) -> TrainingGraph:
        """The optimised graph of a whole step."""
        return self.whole.graph

    def admits(self, size: int) -> bool:
        """Whether the graphs are valid for a batch of ``size``."""
        return self.graph.symbols.admits({"batch": size})


def capture_task(task: Task, batch: Any, passes: Sequence[Pass]) -> CapturedStep:
    """Capture a task's step and run the passes on it. Errors as `graphopt.capture`."""
    start = perf_counter()
    captured = capture_step(task.model, batch, loss=task.loss or "model", accumulate=task.accumulate)
    step = finish_step(task, captured.graph, passes)
    return replace(step, seconds=perf_counter() - start)


def finish_step(task: Task, joint: TrainingGraph, passes: Sequence[Pass], *, fused: bool = False) -> CapturedStep:
    """The step whose forward and backward are ``joint``: with the update behind it, optimised by ``passes``. With
    ``fused`` the update is made by fused kernels (which must exist: `why_not_fused`)."""
    start = perf_counter()
    structure = structure_key(task.optimizers)
    with dumped_step(f"{type(task.model).__name__}{', fused optimizer' if fused else ''}"):
        part = part_of(task, joint, passes) if task.accumulate > 1 else None
        whole = with_update(
            joint, task.model, task.optimizers, clip=task.clip, accumulated=task.accumulate > 1, fused=fused
        )
        result = optimised(task, whole, passes)
        finished(result.graph)
    return CapturedStep(
        replace(whole, graph=result.graph),
        part,
        whole.graph,
        result,
        perf_counter() - start,
        joint,
        tuple(passes),
        fused,
        structure=structure,
    )


def part_of(task: Task, joint: TrainingGraph, passes: Sequence[Pass]) -> TrainingGraph:
    """The optimised graph of a batch whose gradients are only accumulated."""
    return Pipeline(passes)(GradientLiveness(trainable=_wanted(task, joint))(joint)).graph


def optimised(task: Task, whole: WholeStep, passes: Sequence[Pass]) -> PassResult:
    """What gradient liveness and ``passes`` make of a whole step."""
    liveness = live(task, whole)
    result = Pipeline(passes)(liveness)
    return LivenessResult(
        result.graph, result.changes, result.refusals, liveness.layers, before=result.before, removed=result.removed
    )


def live(task: Task, whole: WholeStep) -> LivenessResult:
    """Gradient liveness by what this task reads."""
    gradients = [o.name for o in whole.graph.outputs if o.kind is OutputKind.GRADIENT]
    parameters = whole.graph.input_nodes(InputKind.PARAMETER)
    keep = [n for n in gradients if n in parameters] if task.keep_grads or not task.optimizers else []
    if whole.outside:
        keep = keep or _wanted(task, whole.graph)
        return GradientLiveness(trainable=keep)(whole.graph)
    return GradientLiveness(keep=keep)(whole.graph)


def _wanted(task: Task, graph: TrainingGraph) -> list[str]:
    """Names of the parameters whose gradient this task reads."""
    gradients = {o.name for o in graph.outputs if o.kind is OutputKind.GRADIENT}
    owned = {id(p) for o in task.optimizers for g in o.param_groups for p in g["params"]}
    every = task.keep_grads or not task.optimizers or task.clip is not None
    return [n for n, p in task.model.named_parameters() if n in gradients and (every or id(p) in owned)]
