"""The drop-in form of `optimize`: a module that is called like the model and differentiated like it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Hashable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.dumps import dumped_step, finished, write_plan
from graphopt.errors import BatchError, CaptureError, GraphoptError, GraphoptWarning
from graphopt.graph.batch import BatchLayout, call_model, flatten
from graphopt.graph.capture import Captured, capture_step
from graphopt.graph.halves import cut_backward
from graphopt.graph.lowering import Lowered, lower
from graphopt.graph.training_graph import InputKind, OutputKind, TrainingGraph
from graphopt.passes import Pass, Pipeline, ZeroTangents
from graphopt.plan import Candidate, GraphFacts, Plan
from graphopt.schemes import ModelWatch


class DropIn(nn.Module):
    """Runs a model's forward as a flat graph and gives autograd a flat backward; made by `optimize`.

    Parameters, buffers and submodules are the model's own (same names, no prefix), other attributes are looked up on
    it. Without gradients (`torch.no_grad`) and where the model cannot be captured it calls the model itself.
    """

    def __init__(self, model: nn.Module, passes: Sequence[Pass]):
        super().__init__()
        self.__dict__["_model"] = model  # not a submodule: the names of its parameters must not change
        self.__dict__["_passes"] = tuple(passes)
        self.__dict__["_compiled"] = {}
        self.__dict__["_watch"] = None
        self.__dict__["_plan"] = None
        self.__dict__["_warned"] = set()
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[shared] = model.__dict__[shared]
        self.training = model.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_model"], name)

    def train(self, mode: bool = True) -> DropIn:
        """Set train or eval mode, also of the model itself."""
        self._model.train(mode)
        self.training = mode
        return self

    @property
    def plan(self) -> Plan:
        """The plan of the last call with gradients. Raises GraphoptError before the first one."""
        if self._plan is None:
            raise GraphoptError("plan: the module was not called with gradients yet")
        return self._plan

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """The model's output; same values, same gradients."""
        self._model.training = self.training
        if not torch.is_grad_enabled():
            return self._model(*args, **keywords)
        batch = self._one_batch(args, keywords)
        if batch is None:
            return self._model(*args, **keywords)
        watch = self.__dict__["_watch"]
        if watch is None or not watch.same():
            watch = self.__dict__["_watch"] = ModelWatch(self._model)
        tensors, layout, size = flatten(batch)
        found = self._find(watch, batch, layout, size)
        if isinstance(found, str):
            self.__dict__["_plan"] = Plan(size, [Candidate("flat", found), Candidate("eager")], "eager", found)
            return call_model(self._model, batch)
        self.__dict__["_plan"] = found.plan(size)
        return found(tensors)

    def _find(self, watch: ModelWatch, batch: Any, layout: BatchLayout, size: int) -> _Compiled | str:
        """A compiled pair of halves for this state of the model and batch, or why the model itself has to run."""
        key: Hashable = (watch.key(), layout)
        candidates = self._compiled.setdefault(key, [])
        for one in candidates:
            if isinstance(one, str) or one.admits(size):
                return one
        try:
            if watch.backward_hooks:
                raise CaptureError("a module has backward hooks, which only autograd calls")
            start = perf_counter()
            captured = capture_step(self._model, batch)
            candidates.append(_Compiled(captured, self._model, self._passes, start, watch))
        except BatchError:
            raise
        except CaptureError as error:
            candidates.append(str(error))
            if str(error) not in self._warned:
                self._warned.add(str(error))
                warnings.warn(f"the model runs in eager mode: {error}", GraphoptWarning, stacklevel=4)
        return candidates[-1]

    def _one_batch(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Arguments as one tuple or dict, None where they cannot be."""
        if not keywords:
            return args
        if not args:
            return keywords
        try:
            return dict(inspect.signature(self._model.forward).bind(*args, **keywords).arguments)
        except TypeError:
            return None


class _Compiled:
    """Forward and backward halves of one captured model, bound to its tensors."""

    def __init__(self, captured: Captured, model: nn.Module, passes: Sequence[Pass], start: float, watch: ModelWatch):
        with dumped_step(f"{type(model).__name__}, drop-in"):
            result = Pipeline(passes)(captured.graph)
            finished(result.graph)
        self.captured, self.result, self.watch = captured, result, watch
        self.graph = result.graph
        self.halves = cut_backward(self.graph)
        self.forward = lower(self.halves.first)
        self.seconds = perf_counter() - start
        self._backward: dict[frozenset[str], Lowered] = {}
        self._plans: dict[int, Plan] = {}
        layout = captured.layout
        tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.sources: list[torch.Tensor | int] = [
            layout.names.index(i.name) if i.kind is InputKind.BATCH else tensors[i.name]
            for i in self.halves.first.inputs
        ]
        self.inputs = [(i.kind, i.name) for i in self.halves.first.inputs]
        outputs = self.forward.outputs
        self.output_count = sum(o.kind is OutputKind.OUTPUT for o in outputs)
        self.output_names = [o.name for o in outputs if o.kind is OutputKind.OUTPUT]
        second = [
            (i, n) for i, n in zip(self.halves.second.inputs, self.halves.second.placeholders, strict=True)
            if i.kind is not InputKind.TANGENT
        ]  # fmt: skip
        self.tangents = [i.name for i in self.halves.second.inputs if i.kind is InputKind.TANGENT]
        saved = [(InputKind.SAVED, i.name) for i, _ in second if i.kind is InputKind.SAVED]
        positions = {key: k for k, key in enumerate([*saved, *self.inputs])}
        self.read_by_backward = [positions[i.kind, i.name] for i, _ in second]  # among saved values, then inputs
        # Buffers are kept without autograd's check of versions: a later forward may update them, as in eager.
        self.checked = [
            isinstance(n.meta["val"], torch.Tensor) and i.kind is not InputKind.BUFFER for i, n in second
        ]  # fmt: skip

    def admits(self, size: int) -> bool:
        return self.graph.symbols.admits({"batch": size})

    def plan(self, size: int) -> Plan:
        if size not in self._plans:
            facts = GraphFacts.of(self.captured.graph, self.graph, size, self.seconds)
            valid = tuple(self.graph.symbols.rename(g) for g in self.graph.symbols.guards)
            self._plans[size] = Plan(
                size, [Candidate("flat")], "flat", "the drop-in module runs flat halves", facts, self.result, valid
            )
            write_plan(self._plans[size])
        return self._plans[size]

    def backward(self, missing: frozenset[str]) -> Lowered:
        """The backward half for these missing tangents."""
        if missing not in self._backward:
            half: TrainingGraph = ZeroTangents(sorted(missing))(self.halves.second).graph
            self._backward[missing] = lower(half, in_place=False)
        return self._backward[missing]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        arguments = [tensors[s] if isinstance(s, int) else s for s in self.sources]
        outputs = list(_Step.apply(self, *arguments))
        leaves: list[Any] = outputs
        for position, value in self.captured.output_constants:
            leaves.insert(position, value)
        return pytree.tree_unflatten(leaves, self.captured.output_spec)


class _Step(torch.autograd.Function):
    """Autograd's view of the two halves."""

    @staticmethod
    def forward(ctx: Any, compiled: _Compiled, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = compiled.forward.run(*inputs)
        outputs, saved = results[: compiled.output_count], results[compiled.output_count :]
        ctx.compiled = compiled
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(o for o, name in zip(outputs, compiled.output_names, strict=True) if name not in compiled.tangents)
        )
        values = (*saved, *inputs)
        wanted = [values[k] for k in compiled.read_by_backward]
        ctx.save_for_backward(*(v for v, check in zip(wanted, compiled.checked, strict=True) if check))
        ctx.others = [None if check else v for v, check in zip(wanted, compiled.checked, strict=True)]
        ctx.shapes = [(o.shape, o.dtype, o.device) for o in outputs]
        return outputs

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        compiled: _Compiled = ctx.compiled
        given = dict(zip(compiled.output_names, tangents, strict=True))
        missing = frozenset(name for name in compiled.tangents if given[name] is None)
        if len(missing) == len(compiled.tangents):
            return (None,) * (1 + len(compiled.inputs))
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if check else v for check, v in zip(compiled.checked, ctx.others, strict=True)]
        facts = dict(zip(compiled.output_names, ctx.shapes, strict=True))
        for name in compiled.tangents:
            tangent = given[name]
            if tangent is None:  # read only by operators without a rule
                shape, dtype, device = facts[name]
                tangent = torch.zeros((), dtype=dtype, device=device).expand(shape)
            values.append(tangent.contiguous())
        lowered = compiled.backward(missing)
        with torch.no_grad():
            results = lowered.run(*values)
        gradients = {o.name: r for o, r in zip(lowered.outputs, results, strict=True)}
        return (None, *(gradients.get(name) for _, name in compiled.inputs))
