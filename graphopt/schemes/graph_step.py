"""A captured step at work: a lowered graph bound to the user's model, optimizers and batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch

from graphopt.graph.assemble import WholeStep
from graphopt.graph.batch import BatchLayout
from graphopt.graph.hyper_parameters import hyper_reader, lags, structure_key
from graphopt.graph.lowering import Lowered
from graphopt.graph.step_module import active_autocast, autocast
from graphopt.graph.storages import storage_root
from graphopt.graph.torch_internals import has_step_hooks
from graphopt.graph.training_graph import InputKind, Output, OutputKind, TrainingGraph
from graphopt.graph.update import initialize_state
from graphopt.schemes.base import Prepared
from graphopt.schemes.captured_step import CapturedStep
from graphopt.schemes.fused_optimizer import lay_out_state
from graphopt.schemes.task import Task, clear_gradients


class GraphStep:
    """Runs a captured step on the user's own tensors: binds inputs, runs, puts gradients where they belong."""

    def __init__(self, prepared: Prepared, lowered: Callable[[TrainingGraph], Lowered]):
        self.task = prepared.task
        step: CapturedStep = prepared.step
        self._whole = _Bound(self.task, prepared.layout, step.whole, lowered(step.whole.graph), fused=step.fused)
        self._part = None
        if step.part is not None:
            accumulating = WholeStep(step.part, outside="accumulating")
            self._part = _Bound(self.task, prepared.layout, accumulating, lowered(step.part))
        self._groups = [(g, g["params"], len(g["params"])) for o in self.task.optimizers for g in o.param_groups]
        self._constants = _owners(self.task, step.before)
        self._hooked = self._hooks()
        self._fits = step.structure == structure_key(self.task.optimizers)  # later changes are seen by what follows
        self._lagging = [
            (o, p, "momentum_buffer" in o.state.get(p, ()))
            for o in self.task.optimizers for g in o.param_groups if lags(o, g) for p in g["params"]
        ]  # fmt: skip

    def fresh(self) -> bool:
        """Whether options, groups, hooks and guards of the optimizers are those of the capture."""
        return (
            self._fits
            and self._whole.hyper() is not None
            and sum(len(o.param_groups) for o in self.task.optimizers) == len(self._groups)
            and all(g["params"] is listed and len(listed) == length for g, listed, length in self._groups)
            and all(("momentum_buffer" in o.state.get(p, ())) is there for o, p, there in self._lagging)
            and all(slots.get(key) is tensor for slots, key, tensor in self._constants)
            and self._hooks() == self._hooked
        )

    def close(self) -> None:
        """See `Runner`. What was lowered (recordings too) lives no longer than this."""
        del self._whole, self._part

    def _hooks(self) -> list[tuple[bool, Any]]:
        return [(has_step_hooks(o), o.__dict__.get("step")) for o in self.task.optimizers]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """One batch: a whole step, or a part of one while gradients are accumulated."""
        task = self.task
        if self._part is None:
            return self._finish(self._whole(tensors))
        if task.begins:
            clear_gradients(task)
        if task.ends:
            loss = self._finish(self._whole(tensors))
        else:
            loss, gradients = self._part(tensors)
            _add(gradients)
        task.count()
        return loss

    def in_parts(self, parts: Sequence[Sequence[torch.Tensor]], shares: Sequence[float]) -> torch.Tensor:
        """One step on a batch given in parts, with the share of each in the loss, which is the gradient that enters its
        backward. A part without any has nothing to add, not even the NaN that is the mean of nothing."""
        order = sorted((k for k, share in enumerate(shares) if share), key=lambda k: shares[k], reverse=True)
        whole = not order
        clear_gradients(self.task)
        assert self._part is not None
        total: torch.Tensor | float = 0.0
        try:
            for k in order[:-1]:
                loss, gradients = self._part(parts[k], self._tangent(shares[k]))
                _add(gradients)
                total = total + shares[k] * loss
            last = -1 if whole else order[-1]
            share = 1.0 if whole else shares[last]
            loss, gradients = self._whole(parts[last], self._tangent(share))
        except BaseException:
            clear_gradients(self.task)
            raise
        return self._finish((total + share * loss, gradients))

    def _tangent(self, share: float) -> torch.Tensor:
        like = self._whole.tangent
        return torch.full(like.shape, share, dtype=like.dtype, device=like.device)

    def _finish(self, result: tuple[torch.Tensor, list[tuple[torch.nn.Parameter, torch.Tensor]]]) -> torch.Tensor:
        loss, gradients = result
        for parameter in self._whole.parameters:
            if parameter.grad is not None:
                parameter.grad = None
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for optimizer in self.task.optimizers:
            if self._whole.outside:
                optimizer.step()
            else:
                optimizer._opt_called = True  # type: ignore[attr-defined]  # what learning-rate schedulers look at
        if self._whole.outside and not self.task.keep_grads and self.task.optimizers:
            clear_gradients(self.task)
        return loss


def _add(gradients: Sequence[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    """Add gradients to those in ``.grad``."""
    for parameter, gradient in gradients:
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient


class _Bound:
    """A lowered graph with its inputs bound to the model, the optimizers and a batch."""

    def __init__(self, task: Task, layout: BatchLayout, whole: WholeStep, lowered: Lowered, *, fused: bool = False):
        self.outside = whole.outside is not None
        self.parameters = task.parameters
        self.lowered = lowered
        self._devices = sorted({d.type for d in layout.devices})
        by_name: dict[str, Any] = {**dict(task.model.named_parameters()), **dict(task.model.named_buffers())}
        self._static: list[Any] = [None] * len(whole.graph.inputs)
        self._batch: list[tuple[int, int]] = []
        self._buffers: list[tuple[int, dict[str, Any], str]] = []
        self._state: list[tuple[int, Any, torch.Tensor, str]] = []
        self._gradients: list[tuple[int, torch.nn.Parameter]] = []
        self._hyper: list[int] = []
        self._fused = fused
        self._laid_out: list[torch.Tensor] = []  # state whose layout is known to be that of its parameter
        self._tangents: list[int] = []
        owner = {id(p): o for o in task.optimizers for g in o.param_groups for p in g["params"]}
        for position, input_ in enumerate(whole.graph.inputs):
            if input_.kind is InputKind.PARAMETER:
                self._static[position] = by_name[input_.name]
            elif input_.kind is InputKind.BUFFER:  # the model may put another tensor in its place
                path, _, key = input_.name.rpartition(".")
                self._buffers.append((position, task.model.get_submodule(path)._buffers, key))
            elif input_.kind is InputKind.BATCH:
                self._batch.append((position, layout.names.index(input_.name)))
            elif input_.kind is InputKind.STATE:
                parameter = by_name[input_.name]
                self._state.append((position, owner[id(parameter)], parameter, input_.field))
            elif input_.kind is InputKind.GRADIENT:
                self._gradients.append((position, by_name[input_.name]))
            elif input_.kind is InputKind.TANGENT:
                self._tangents.append(position)
                self.tangent: torch.Tensor = whole.graph.placeholders[position].meta["val"]
            else:
                self._hyper.append(position)
        optimizers = () if self.outside else task.optimizers
        self.hyper = hyper_reader(optimizers, whole.graph.inputs, whole.guards, task.clip)
        self._loss = next(i for i, o in enumerate(lowered.outputs) if o.kind is OutputKind.LOSS)
        outputs = [(i, o, by_name.get(o.name)) for i, o in enumerate(lowered.outputs)]
        shared = _shared(whole.graph)
        gradients = [(i, o, p) for i, o, p in outputs if o.kind is OutputKind.GRADIENT and p is not None]
        self._results = [(i, p, o in shared) for i, o, p in gradients]
        self._new_state = [
            (i, owner[id(p)], p, o.field) for i, o, p in outputs if p is not None and o.kind is OutputKind.STATE
        ]

    def __call__(
        self, tensors: Sequence[torch.Tensor], tangent: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[tuple[torch.nn.Parameter, torch.Tensor]]]:
        """Run on a batch: the loss, and the gradients that the graph gives with their parameters. ``tangent``: the
        gradient of the loss, where that is an input of the graph."""
        arguments = self._static.copy()
        for position, index in self._batch:
            arguments[position] = tensors[index]
        for position, slots, key in self._buffers:
            arguments[position] = slots[key]
        try:
            for position, optimizer, parameter, field in self._state:
                arguments[position] = optimizer.state[parameter][field]
        except KeyError:  # thrown away, or loaded from an optimizer that had made no step
            self._make_state()
            for position, optimizer, parameter, field in self._state:
                arguments[position] = optimizer.state[parameter][field]
        if self._fused:
            self._lay_out(arguments)
        for position in self._tangents:
            arguments[position] = tangent
        for position, parameter in self._gradients:
            gradient = parameter.grad  # None where the user dropped it: -0.0 + g has the bits of g
            arguments[position] = torch.full_like(parameter, -0.0) if gradient is None else gradient
        if self._hyper:
            for position, value in zip(self._hyper, self.hyper() or (), strict=True):
                arguments[position] = value
        with torch.no_grad(), autocast(active_autocast(self._devices), enabled=False):
            results = self.lowered.run(*arguments)
        for i, optimizer, p, field in self._new_state:  # SGD under dampening makes its momentum at step 1
            optimizer.state[p][field] = results[i]
        gradients = [
            (parameter, _own(results[i], parameter) if shared else results[i]) for i, parameter, shared in self._results
        ]
        return results[self._loss], gradients

    def _lay_out(self, arguments: list[Any]) -> None:
        """Fused kernels look at no strides: bring state that lies otherwise than its parameter into its layout."""
        if len(self._laid_out) == len(self._state) and all(
            map(is_, self._laid_out, (arguments[k] for k, *_ in self._state))
        ):
            return
        for optimizer in dict.fromkeys(o for _, o, _, _ in self._state):
            lay_out_state(optimizer, dict.fromkeys(p for _, o, p, _ in self._state if o is optimizer))
        for position, optimizer, parameter, field in self._state:
            arguments[position] = optimizer.state[parameter][field]
        self._laid_out = [arguments[position] for position, *_ in self._state]

    def _make_state(self) -> None:
        """Make state that is missing, as the first step does."""
        for optimizer in dict.fromkeys(o for _, o, _, _ in self._state):
            initialize_state(optimizer, [p for _, o, p, _ in self._state if o is optimizer])


def _owners(task: Task, graph: TrainingGraph) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    """Where the constants of a graph are attributes of the model, or anything of the loss: replaced there, they make it
    stale. (In-place changes of them are seen by it.)"""
    found = [(m.__dict__, m) for m in task.model.modules()]
    if isinstance(task.loss, torch.nn.Module):
        found += [(t, m) for m in task.loss.modules() for t in (m.__dict__, m._buffers, m._parameters)]
    constants = {id(c) for c in graph.constants.values()}
    return [(table, key, value) for table, _ in found for key, value in table.items() if id(value) in constants]


def _shared(graph: TrainingGraph) -> set[Output]:
    """Gradients that share memory: with each other, with an input or a constant, or among their own elements."""
    pairs = [(o, r) for o, r in zip(graph.outputs, graph.results, strict=True) if r is not None]
    roots = Counter(storage_root(r) for _, r in pairs)
    return {
        o
        for o, r in pairs
        if o.kind is OutputKind.GRADIENT
        and (roots[storage_root(r)] > 1 or storage_root(r).op != "call_function" or 0 in r.meta["val"].stride())
    }


def _own(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own and the layout of its parameter, as autograd makes it."""
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)
