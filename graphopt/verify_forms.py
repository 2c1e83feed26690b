"""Verification of other forms of a step: channels-last images, low precision, fused updates.

What a form computes is held against eager on the same batch with float64 as the judge, each in the tolerance of its
precision; its passes against the form before them; a fused update against the one that the optimizer itself makes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from graphopt.graph.batch import flatten
from graphopt.graph.op_rules import is_random
from graphopt.graph.stateless import functional_call
from graphopt.graph.step_module import ModelWithLoss
from graphopt.schemes import Prepared, Scheme, Task
from graphopt.schemes.captured_step import CapturedStep
from graphopt.schemes.channels_last import converted, image_positions
from graphopt.schemes.fused_optimizer import fused
from graphopt.schemes.low_precision import PRECISIONS, low_precision
from graphopt.schemes.one_processor import OneProcessor
from graphopt.schemes.variants import Form
from graphopt.verify import ROOM, SEEDS, Values, first_difference, fresh_batch, reference, run_graph, run_step

LOW_ROOM = 2.0
"""Units in the last place, of the largest value, that a form in low precision may be off by besides."""

NOISE = 4.0
"""Units in the last place of the largest gradient by which any gradient may be off: one that is zero but for rounding
(of a bias in front of batch normalisation) has no size of its own to be judged by."""


def check_form(scheme: Scheme, prepared: Prepared, sample: Sequence[torch.Tensor]) -> str | None:
    """Whether the form of the step that a scheme is about to run computes the step: None, or what is wrong.

    Numbers of threads are not looked at, and what a compiler makes of the graph is not: the graph that it gets is.

    Args:
        scheme: what is to be built.
        prepared: what from.
        sample: the tensors of a batch; fresh ones are drawn in its likeness.

    Raises:
        CaptureError: the step has no such form.
    """
    if not isinstance(scheme, OneProcessor):
        return None
    form = Form(scheme.channels_last, scheme.precision, scheme.fused)
    if form.plain:
        return None
    check = _check_graph if scheme.needs_graph else _check_eager
    kind = "graph" if scheme.needs_graph else "eager"
    found = prepared.variant(("verified", kind, form), lambda: (check(form, prepared, sample),))
    return found[0]  # type: ignore[no-any-return]


def _check_graph(form: Form, prepared: Prepared, sample: Sequence[torch.Tensor]) -> str | None:
    step, task, layout = form.of(prepared), prepared.task, prepared.layout
    if form.channels_last or form.precision:
        random = any(is_random(n) for n in step.joint.nodes if n.op == "call_function")
        for seed in SEEDS:
            given = fresh_batch(layout.restore(list(sample)), seed)
            own = _in_form(form, prepared, given)
            ours = run_graph(step.joint, task.model, own, seed=seed)
            # random numbers are drawn in the order of memory: eager's on the same images
            if wrong := _judged(ours, form, prepared, own if random else given, seed, random=random):
                return wrong
        batch = _in_form(form, prepared, layout.restore(list(sample)))
        before = run_step(replace(step.whole, graph=step.before), task, batch)
        if wrong := differs(run_step(step.whole, task, batch), before, None, form.precision):
            return f"its passes: {wrong}"
    return _check_update(form, prepared, step, sample) if form.fused else None


def _check_update(form: Form, prepared: Prepared, step: CapturedStep, sample: Sequence[torch.Tensor]) -> str | None:
    """The fused update against the optimizer's own, behind the same gradients."""
    task = prepared.task
    batch = _in_form(form, prepared, prepared.layout.restore(list(sample)))
    own = replace(form, fused=False).of(prepared)
    wrong = differs(run_step(step.whole, task, batch), run_step(own.whole, task, batch), None, None)
    return f"its fused update: {wrong}" if wrong else None


def _check_eager(form: Form, prepared: Prepared, sample: Sequence[torch.Tensor]) -> str | None:
    """Eager steps with options: channels-last images against others; fused kernels on copies of model and optimizers.
    A precision is what the user asked for: eager in it is the judge of graphs."""
    task = prepared.task
    if form.channels_last:
        for seed in SEEDS:
            given = fresh_batch(prepared.layout.restore(list(sample)), seed)
            own = _in_form(form, prepared, given)
            if _draws(task, given):  # in the order of memory: nothing to compare with
                break
            ours = _eager(form, prepared, own, seed)
            if wrong := _judged(ours, form, prepared, given, seed, random=False):
                return wrong
    if form.fused and (wrong := _check_fused_step(task)):
        return f"its fused update: {wrong}"
    return None


def _check_fused_step(task: Task) -> str | None:
    """One step of copied optimizers by fused kernels and by their own, on the same random gradients."""
    results = []
    names = {id(p): name for name, p in task.model.named_parameters()}
    updated = [names[id(p)] for o in task.optimizers for g in o.param_groups for p in g["params"]]
    for kernels in (True, False):
        try:
            optimizers = copy.deepcopy(task.optimizers)  # with the parameters that they hold
        except (RuntimeError, TypeError):  # what cannot be copied
            return None
        generator = torch.Generator().manual_seed(0)
        owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        for parameter in owned:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        for optimizer in optimizers:
            if kernels:
                with fused(optimizer):
                    optimizer.step()
            else:
                optimizer.step()
        values = {f"new parameter {name}": p.detach() for name, p in zip(updated, owned, strict=True)}
        for name, parameter in zip(updated, owned, strict=True):
            states = [o.state[parameter] for o in optimizers if parameter in o.state]  # none of SGD without momentum
            fields: dict[str, Any] = states[0] if states else {}
            values |= {f"{f} of parameter {name}": v for f, v in fields.items() if isinstance(v, torch.Tensor)}
        results.append(Values(values))
    ours, own = results
    return differs(ours, own, None, None)


def _judged(ours: Values, form: Form, prepared: Prepared, batch: Any, seed: int, *, random: bool) -> str | None:
    """How values of a form differ from those of eager, with float64 as the judge."""
    task = prepared.task
    assert task.loss is not None
    eager, exact = _eager(form, prepared, batch, seed), None
    if not random:  # float64 draws other numbers
        try:
            exact = _scaled(reference(task.model, batch, task.loss, dtype=torch.float64, seed=seed), task)
        except (RuntimeError, TypeError):  # a model that fixes a dtype in its code has no float64 form
            exact = None
    return differs(ours, eager, exact, form.precision)


def _eager(form: Form, prepared: Prepared, batch: Any, seed: int) -> Values:
    task = prepared.task
    assert task.loss is not None
    with low_precision(prepared, form.precision):
        return _scaled(reference(task.model, batch, task.loss, seed=seed), task)


def _scaled(values: Values, task: Task) -> Values:
    """With the gradients of a step that accumulates: each batch has its share."""
    shares = {n: v / task.accumulate if n.startswith("gradient") else v for n, v in values.values.items()}
    return Values(shares)


def differs(ours: Values, eager: Values, exact: Values | None, precision: str | None) -> str | None:
    """The first value by which ``ours`` is further off than eager is, in the tolerance of a precision, as a sentence.

    Args:
        ours, eager: values of the form and of eager in the same precision.
        exact: float64 values; None: eager is the judge.
        precision: of forward and loss, None for that of the values.
    """
    judge = (exact or eager).values
    sizes = [float(v.abs().nan_to_num().max()) for n, v in judge.items() if n.startswith("gradient") and v.numel()]
    largest = max(sizes, default=0.0)

    def room(name: str, value: torch.Tensor, scale: float) -> float:
        epsilon, units = torch.finfo(value.dtype).eps, ROOM
        if precision is not None and torch.finfo(PRECISIONS[precision]).eps > epsilon:
            epsilon, units = torch.finfo(PRECISIONS[precision]).eps, LOW_ROOM
        return epsilon * (units * scale + (NOISE * largest if name.startswith("gradient") else 0.0))

    return first_difference(ours, eager, exact, room)


def _in_form(form: Form, prepared: Prepared, batch: Any) -> Any:
    """A batch in the memory format of a form."""
    if not form.channels_last:
        return batch
    tensors, _, _ = flatten(batch)
    return prepared.layout.restore(converted(tensors, image_positions(prepared.layout)))


def _draws(task: Task, batch: Any) -> bool:
    """Whether forward or loss draw random numbers."""
    assert task.loss is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.get_rng_state()
        buffers = {n: b.clone() for n, b in task.model.named_buffers()}
        with torch.no_grad():
            tensors = {n: p.detach() for n, p in task.model.named_parameters()}
            named = {f"model.{n}": t for n, t in {**tensors, **buffers}.items()}
            functional_call(ModelWithLoss(task.model, task.loss), named, (batch,))
        return not torch.equal(before, torch.get_rng_state())
