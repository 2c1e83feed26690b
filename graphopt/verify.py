"""Verification: a captured step and each pass against eager, with a float64 reference as the judge.

The reference is independent of autograd's graph capture: `torch.func.functional_call` and `grad_and_value` in float64.
A graph passes where its error is at most a small multiple of eager's own error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError, PassError
from graphopt.graph.assemble import WholeStep
from graphopt.graph.batch import flatten
from graphopt.graph.capture import capture_step
from graphopt.graph.hyper_parameters import hyper_reader
from graphopt.graph.in_place import overwritten
from graphopt.graph.lowering import lower
from graphopt.graph.stateless import functional_call
from graphopt.graph.step_module import ModelWithLoss, active_autocast, autocast, device_types
from graphopt.graph.training_graph import Input, InputKind, OutputKind, TrainingGraph
from graphopt.passes import Pass
from graphopt.schemes.flat import CapturedStep, capture_task
from graphopt.schemes.task import Task

SEEDS = (0, 1, 2)

FACTOR, ROOM = 4.0, 16.0
"""How many times eager's error against float64 an error may be, and units in the last place of the largest value that
it may be besides."""

OTHER_NUMBERS = 1e-2
"""Share of the largest value from which on an error of eager's own is none of rounding: float64 drew other numbers."""


@dataclass(frozen=True)
class Values:
    """What a step gives besides its update: by ``loss``, ``gradient <name>`` and ``new buffer <name>``."""

    values: dict[str, torch.Tensor]


def reference(
    model: nn.Module, batch: Any, loss: Callable[..., Any] | str, *, dtype: torch.dtype | None = None, seed: int = 0
) -> Values:
    """Loss, gradients and new buffers: by `torch.func` in ``dtype``, or by eager itself (None). Changes nothing.

    Raises whatever the model raises (some cannot run in float64).
    """

    def cast(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().clone()
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    wanted = {n: cast(p) for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: cast(p) for n, p in model.named_parameters() if not p.requires_grad}
    buffers = {n: cast(b) for n, b in model.named_buffers()}
    given = pytree.tree_map(cast, batch)

    def compute(
        trainable: dict[str, torch.Tensor], state: dict[str, torch.Tensor], batch: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        tensors = {f"model.{n}": t for n, t in {**trainable, **frozen, **state}.items()}
        with autocast(regions):
            value = functional_call(ModelWithLoss(model, loss), tensors, (batch,))
        return value.reshape(()), {n: tensors[f"model.{n}"] for n in state}

    regions = active_autocast(device_types(model, flatten(batch)[0]))
    with torch.random.fork_rng(), torch.enable_grad(), autocast(regions, enabled=False):
        torch.manual_seed(seed)
        if dtype is None:  # eager itself: some random operators draw otherwise under torch.func
            value, new = compute({n: p.requires_grad_() for n, p in wanted.items()}, buffers, given)
            trained = list(wanted.values())
            found = torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True) if trained else ()
            gradients = dict(zip(wanted, found, strict=True))
        else:
            gradients, (value, new) = torch.func.grad_and_value(compute, has_aux=True)(wanted, buffers, given)
    values = {"loss": value} | {f"gradient {n}": g for n, g in gradients.items()}
    values |= {f"new buffer {n}": b for n, b in new.items()}
    return Values({n: v.detach() for n, v in values.items()})


def joint_arguments(graph: TrainingGraph, model: nn.Module, batch: Any) -> list[torch.Tensor]:
    """What a joint graph is given for a batch: the model's own tensors, detached, and those of the batch."""
    tensors, layout, _ = flatten(batch)
    sources: dict[InputKind, dict[str, torch.Tensor]] = {
        InputKind.PARAMETER: dict(model.named_parameters()),
        InputKind.BUFFER: dict(model.named_buffers()),
        InputKind.BATCH: dict(zip(layout.names, tensors, strict=True)),
    }
    return [sources[i.kind][i.name].detach() for i in graph.inputs]


def run_graph(graph: TrainingGraph, model: nn.Module, batch: Any, *, seed: int = 0) -> Values:
    """The same values by a joint graph, run as functional code on the model's tensors, which are not changed."""
    arguments = joint_arguments(graph, model, batch)
    lowered = lower(graph, in_place=False)
    with as_in_a_step(model, batch, seed):
        results = lowered.run(*arguments)
    names = ["loss" if o.kind is OutputKind.LOSS else f"{o.kind} {o.name}" for o in lowered.outputs]
    return Values({n: r.reshape(()) if n == "loss" else r for n, r in zip(names, results, strict=True)})


@contextmanager
def as_in_a_step(model: nn.Module, batch: Any, seed: int) -> Iterator[None]:
    """The state that a graph is run in: no autograd, no autocast (its casts are operators of it), random numbers by
    ``seed``, and afterwards as they were."""
    regions = active_autocast(device_types(model, flatten(batch)[0]))
    with torch.random.fork_rng(), torch.no_grad(), autocast(regions, enabled=False):
        torch.manual_seed(seed)
        yield


Room = Callable[[str, torch.Tensor, float], float]
"""By how much a value may be off beside eager's error: from its name, the value, and the largest number in it."""


def disagreement(ours: Values, eager: Values, exact: Values | None) -> str | None:
    """The first value by which ``ours`` is further from the float64 values than eager is, as a sentence; else None.

    Without float64 values, or where random numbers differ there, eager itself is the judge. A gradient that eager does
    not have (a parameter that took no part) counts as zero.
    """
    room: Room = lambda name, value, scale: ROOM * torch.finfo(value.dtype).eps * scale
    return first_difference(ours, eager, exact, room, other_numbers=OTHER_NUMBERS)


def first_difference(
    ours: Values, eager: Values, exact: Values | None, room: Room, *, other_numbers: float = math.inf
) -> str | None:
    """The first value by which ``ours`` is further off than eager is and ``room`` allows, as a sentence; else None.

    Args:
        ours, eager: values to compare; those that eager does not have are left out.
        exact: float64 values, the judge; None: eager itself is.
        room: see `Room`.
        other_numbers: share of the largest number from which on an error of eager's own means that ``exact`` was drawn
            by other random numbers; then eager is the judge.
    """
    judge = (exact or eager).values
    for name, value in ours.values.items():
        of_eager = eager.values.get(name)
        if of_eager is None or not value.numel():
            continue
        if not value.is_floating_point():
            if not torch.equal(value, of_eager):
                return f"{name} differs from eager's"
            continue
        truth = judge[name].double()
        scale = float(truth.abs().nan_to_num().max())
        error, own = distance(value, truth), distance(of_eager, truth)
        if own > other_numbers * scale:
            error, own = distance(value, of_eager.double()), 0.0
        if not error <= FACTOR * own + room(name, value, scale) + torch.finfo(value.dtype).tiny:
            return f"{name} is off by {error:.3g}, eager by {own:.3g} (values up to {scale:.3g})"
    return None


def distance(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference; NaN and infinities must stand at the same places."""
    value = value.double()
    if not torch.equal(value.isfinite(), truth.isfinite()):
        return float("inf")
    return float((value - truth).nan_to_num(0.0).abs().max())


def fresh_batch(batch: Any, seed: int) -> Any:
    """A random batch in the layout of ``batch``: normal numbers of its mean and spread, whole numbers reordered."""
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.numel():
            return value
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator).to(value)
            spread = value.std() if value.numel() > 1 else torch.ones_like(value).sum()
            return torch.empty_like(value).copy_(noise * spread.nan_to_num(1.0) + value.mean().nan_to_num(0.0))
        order = torch.randperm(value.shape[0] if value.dim() else 1, generator=generator).to(value.device)
        return torch.empty_like(value).copy_(value[order]) if value.dim() else value

    return pytree.tree_map(draw, batch)


def check_graph(graph: TrainingGraph, model: nn.Module, batch: Any, loss: Callable[..., Any] | str) -> str | None:
    """Whether a joint graph computes the step: None, or what is wrong. Tried on fresh batches with several seeds."""
    for seed in SEEDS:
        given = fresh_batch(batch, seed)
        eager = reference(model, given, loss, seed=seed)
        try:
            exact: Values | None = reference(model, given, loss, dtype=torch.float64, seed=seed)
        except (RuntimeError, TypeError):  # a model that fixes a dtype in its code has no float64 form
            exact = None
        if found := disagreement(run_graph(graph, model, given, seed=seed), eager, exact):
            return found
    return None


def drop_failing(task: Task, batch: Any, passes: Sequence[Pass]) -> tuple[CapturedStep, list[str]]:
    """Capture a task's step with those passes that keep its values, and say which were dropped and why.

    Loss, gradients and buffers are held against eager and float64; the whole step, with clipping and update, against
    itself before the pass. Raises CaptureError if the captured graph itself does not compute what eager computes.
    """
    assert task.loss is not None
    graph = capture_step(task.model, batch, loss=task.loss).graph
    if found := check_graph(graph, task.model, batch, task.loss):
        raise CaptureError(f"the captured step does not compute what eager computes: {found}")
    whole = capture_task(task, batch, ()).whole
    kept: list[Pass] = []
    notes: list[str] = []
    for one in passes:
        try:
            joint, step = one(graph).graph, replace(whole, graph=one(whole.graph).graph)
            wrong = None if joint is graph else check_graph(joint, task.model, batch, task.loss)
            if wrong is None and step.graph is not whole.graph:
                wrong = check_step(step, whole, task, batch)
        except PassError as error:
            wrong = error.message
        if wrong:
            notes.append(f"pass {one.name!r} was dropped by verification: {wrong}")
        else:
            graph, whole = joint, step
            kept.append(one)
    return capture_task(task, batch, kept), notes


def check_step(
    after: WholeStep, before: WholeStep, task: Task, batch: Any, seeds: Sequence[int] = SEEDS[:1]
) -> str | None:
    """Whether a whole step computes what it did before: None, or what is wrong."""
    found = (
        disagreement(run_step(after, task, batch, seed=s), run_step(before, task, batch, seed=s), None) for s in seeds
    )
    return next(filter(None, found), None)


def check_lowering(whole: WholeStep, task: Task, batch: Any, *, seed: int = 0) -> str | None:
    """Whether the code of a step that writes new values in place, and frees what it has read, gives what functional
    code gives: None, or what is wrong. It runs on copies."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in step_arguments(whole, task, batch, seed)]
    lowered = lower(whole.graph)
    with as_in_a_step(task.model, batch, seed):
        returned = lowered.run(*copies)
    values = {str(o): r for o, r in zip(lowered.outputs, returned, strict=True) if r is not None}
    held = dict(zip(whole.graph.placeholders, copies, strict=True))
    for output, result, home in zip(whole.graph.outputs, whole.graph.results, overwritten(whole.graph), strict=True):
        if result is not None and home is not None:
            values[str(output)] = held[home]
    return disagreement(Values(values), run_step(whole, task, batch, seed=seed), None)


def run_step(whole: WholeStep, task: Task, batch: Any, *, seed: int = 0) -> Values:
    """All outputs of a whole step on a fresh batch and random optimizer state, run as functional code."""
    arguments = step_arguments(whole, task, batch, seed)
    lowered = lower(whole.graph, in_place=False)
    with as_in_a_step(task.model, batch, seed):
        results = lowered.run(*arguments)
    return Values({str(o): r for o, r in zip(lowered.outputs, results, strict=True) if r is not None})


def step_arguments(whole: WholeStep, task: Task, batch: Any, seed: int) -> list[Any]:
    """What a whole step is given: the model's own tensors, detached, a fresh batch, random optimizer state."""
    tensors, layout, _ = flatten(fresh_batch(batch, seed))
    by_name = {**dict(task.model.named_parameters()), **dict(task.model.named_buffers())}
    given = dict(zip(layout.names, tensors, strict=True))
    state = {p: fields for o in task.optimizers for p, fields in o.state.items()}
    optimizers = () if whole.outside else task.optimizers
    hyper = iter(hyper_reader(optimizers, whole.graph.inputs, whole.guards, task.clip)() or ())
    generator = torch.Generator().manual_seed(seed)

    def positive(like: torch.Tensor) -> torch.Tensor:
        drawn = torch.rand(like.shape, generator=generator) + 0.5
        return drawn.to(like) if like.is_floating_point() else like

    def value(input_: Input) -> Any:
        if input_.kind is InputKind.BATCH:
            return given[input_.name]
        if input_.kind is InputKind.HYPER:
            return next(hyper)
        tensor = by_name[input_.name].detach()
        if input_.kind is InputKind.STATE:
            return positive(state[by_name[input_.name]][input_.field])
        return positive(tensor) if input_.kind is InputKind.GRADIENT else tensor

    return [value(input_) for input_ in whole.graph.inputs]
