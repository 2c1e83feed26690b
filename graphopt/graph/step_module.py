"""The user's step as one pure module of flat tensors: what AOTAutograd is given to trace."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError, LossError
from graphopt.graph.batch import BatchLayout, call_model, check_loss, compute_loss, leaf_name
from graphopt.graph.exported import Names
from graphopt.graph.provenance import Provenance
from graphopt.graph.stateless import functional_call
from graphopt.graph.training_graph import Output, OutputKind


class StepModule(nn.Module):
    """Forward (and loss) of ``model`` on flat batch tensors, with each parameter and buffer registered once.

    Tied weights are one parameter here, so that their gradients are added in autograd's own order. With a loss the
    result is ``(loss,)`` or, when gradients are accumulated over ``accumulate`` batches, ``(loss / accumulate, loss)``.
    Without one it is the flat tuple of the model's output tensors; ``output_spec`` then tells their nesting. Leaves
    that are neither tensors nor plain data (caches) are refused or, with ``opaque``, None: ``left_out`` says which.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: BatchLayout,
        loss: Callable[..., Any] | str | None,
        trainable: Collection[str],
        provenance: Provenance,
        accumulate: int = 1,
        opaque: bool = False,
    ):
        super().__init__()
        self.layout, self.accumulate, self.provenance = layout, accumulate, provenance
        self.model: nn.Module
        self.loss: Any
        object.__setattr__(self, "model", model)  # not a submodule: its tensors are registered below
        object.__setattr__(self, "loss", loss)  # nor this one: its tensors are constants
        self.parameter_names: dict[str, str] = {}
        self.buffer_names: dict[str, str] = {}
        self.output_spec: Any = None
        self.output_constants: list[tuple[int, Any]] = []
        self.output_names: list[str] = []
        self.opaque, self.left_out = opaque, dict[str, str]()
        self.needs_gradient = bool(trainable)
        self._differentiable = False
        self.counted: dict[str, None] = {}  # Python numbers that the model changed when it was called
        self.autocast = active_autocast(device_types(model, ()) | {d.type for d in layout.devices})
        for index, (name, parameter) in enumerate(model.named_parameters()):
            key = f"p{index}"
            shadow = nn.Parameter(parameter.detach(), requires_grad=name in trainable)
            self.register_parameter(key, shadow)
            self.parameter_names[key] = name
        for index, (name, buffer) in enumerate(model.named_buffers()):
            key = f"b{index}"
            self.register_buffer(key, buffer.detach())
            self.buffer_names[key] = name

    @property
    def names(self) -> Names:
        """What its tensors are to the user; those of the results are known once it was called."""
        outputs: list[Output | None] = [Output(OutputKind.OUTPUT, name) for name in self.output_names]
        if self.loss is not None:
            outputs = (
                [Output(OutputKind.LOSS, "loss")] if self.accumulate == 1 else [None, Output(OutputKind.LOSS, "loss")]
            )
        return Names(self.parameter_names, self.buffer_names, self.layout.names, outputs)

    @property
    def required(self) -> list[str]:
        """Names of the parameters and batch tensors that require grad, whatever was traced."""
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return names + [n for n, flag in zip(self.layout.names, self.layout.requires_grad, strict=True) if flag]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch = self.layout.restore(list(tensors))
        given = {name: getattr(self, key) for key, name in (self.parameter_names | self.buffer_names).items()}
        with ExitStack() as stack:
            stack.enter_context(self.provenance)
            stack.enter_context(autocast(self.autocast))
            state = {f"model.{name}": tensor for name, tensor in given.items()}
            counted = stack.enter_context(same_attributes(self.model, self.loss))
            result = functional_call(ModelWithLoss(self.model, self.loss), state, (batch,))
            for name in self.buffer_names.values():
                _follow(name, given[name], state[f"model.{name}"])
        self.counted.update(dict.fromkeys(counted))
        if self.loss is None:
            return self._flat_outputs(result, tensors, given)
        return self._loss_outputs(result)

    def _loss_outputs(self, loss: Any) -> tuple[torch.Tensor, ...]:
        loss = check_loss(loss)
        self._differentiable |= loss.requires_grad  # a trace before dispatch calls this twice, and knows it at first
        if self.needs_gradient and torch.is_grad_enabled() and not self._differentiable:
            raise LossError("loss: it does not depend on any parameter that requires grad; is it detached?")
        loss = loss.clone() if loss._is_view() else loss
        return (loss,) if self.accumulate == 1 else (loss / self.accumulate, loss.detach())

    def _flat_outputs(
        self, result: Any, inputs: tuple[torch.Tensor, ...], state: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Output tensors, none an alias of an input, a parameter or another output (those are cloned)."""
        _know_dataclasses(result)
        with_paths, self.output_spec = pytree.tree_flatten_with_path(result)
        self.output_constants, self.output_names, self.left_out, outputs = [], [], {}, []
        known = [*inputs, *state.values()]
        for position, (path, leaf) in enumerate(with_paths):
            if not isinstance(leaf, torch.Tensor):
                if not isinstance(leaf, (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)):
                    if self.opaque and len(with_paths) > 1:
                        self.left_out[leaf_name(path)] = type(leaf).__name__
                        self.output_constants.append((position, None))
                        continue
                    raise CaptureError(
                        f"the model's output holds a {type(leaf).__name__}, which is no nesting of tensors that "
                        "torch.utils._pytree knows (for caches of transformers: use_cache=False)"
                    )
                self.output_constants.append((position, leaf))
                continue
            alias = leaf._is_view() or any(leaf is k for k in known)
            outputs.append(leaf.clone() if alias else leaf)
            known.append(leaf)
            self.output_names.append(leaf_name(path) or "0")
        return tuple(outputs)


class UnsettledBuffer(CaptureError):
    """A buffer has another shape or type behind a forward pass than before: what the first one makes, perhaps."""


def _follow(name: str, buffer: torch.Tensor, new: torch.Tensor) -> None:
    """A model that puts a new tensor in place of a buffer (``self.count = self.count + 1``) gives it a new value."""
    if new is buffer:
        return
    if new.shape != buffer.shape or new.dtype != buffer.dtype:
        was, now = (f"{t.dtype} {list(t.shape)}" for t in (buffer, new))
        raise UnsettledBuffer(f"the model replaces its buffer {name!r} ({was}) by a tensor of another kind ({now})")
    buffer.copy_(new)


def _know_dataclasses(result: Any) -> None:
    """Tell torch's pytree of the dataclasses among a model's outputs."""
    while unknown := {type(leaf) for leaf in pytree.tree_leaves(result) if is_dataclass(leaf)}:
        for kind in unknown:
            pytree.register_dataclass(kind)


class ModelWithLoss(nn.Module):
    """A module around the model, so that `functional_call` reaches model and loss in one call."""

    def __init__(self, model: nn.Module, loss: Callable[..., Any] | str | None):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Any:
        return call_model(self.model, batch) if self.loss is None else compute_loss(self.model, batch, self.loss)


def device_types(model: nn.Module, tensors: Iterable[torch.Tensor]) -> set[str]:
    """The types of device that a model and some tensors are on."""
    return {t.device.type for t in (*tensors, *model.parameters())}


def active_autocast(devices: Iterable[str]) -> dict[str, torch.dtype]:
    """The autocast regions that are active for these types of device. They are for forward and loss, not for backward,
    and not for a captured graph, which holds the casts."""
    active = [d for d in sorted(devices) if torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d)]
    return {d: torch.get_autocast_dtype(d) for d in active}


def autocast(regions: Mapping[str, torch.dtype], *, enabled: bool = True) -> ExitStack:
    """The regions that `active_autocast` found, entered again, or left for a while."""
    stack = ExitStack()
    for device, dtype in regions.items():
        stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
    return stack


_REGISTERED = ("_parameters", "_buffers", "_modules")


@contextmanager
def unchanged(model: nn.Module, loss: Any = None) -> Iterator[list[str]]:
    """Undo what tracing the model leaves behind: what `same_attributes` does, and writes into tensors that are no
    buffers. Yields the list that `same_attributes` does.
    """
    values = [value for _, attributes, *_ in _attributes(model, loss) for value in _unregistered(attributes)]
    values += [m._buffers for m in _modules_of(loss)]
    tensors = [(t, t._version, t.detach().clone()) for v in values for t in _loose_tensors(v)]
    try:
        with same_attributes(model, loss) as counted:
            yield counted
    finally:
        for tensor, version, copy in tensors:
            if tensor._version != version:
                tensor.detach().copy_(copy)


@contextmanager
def same_attributes(model: nn.Module, loss: Any = None) -> Iterator[list[str]]:
    """Undo what a call of the model leaves behind in Python: attributes, buffers and parameters set or replaced on its
    modules, and what was put into lists, dicts and sets among the attributes. A loss that is a module counts too.

    A trace calls the model more than once: a tensor of one trace that the model put into a cache must not meet the
    next. At its end the list that it yields names the Python numbers that the model itself changed: their next values
    are not in the graph.
    """
    before = _attributes(model, loss)
    values = [value for _, attributes, *_ in before for value in _unregistered(attributes)]
    contents = [(v, v.copy()) for v in values if type(v) in (list, dict, set, OrderedDict)]  # hooks are in the last
    names = {m: name for name, m in model.named_modules()}
    counted: list[str] = []
    try:
        yield counted
    finally:
        for module, attributes, parameters, buffers in before:
            for key, old in attributes.items():
                new = module.__dict__.get(key)
                if type(old) in (bool, int, float) and type(new) is type(old) and new != old:
                    counted.append(f"{names.get(module, 'loss')}.{key}".removeprefix("."))
            _restore(module._parameters, parameters)
            _restore(module._buffers, buffers)
            _restore(module.__dict__, attributes)
        for value, copy in contents:
            if len(value) != len(copy) or any(a is not b for a, b in zip(_items(value), _items(copy), strict=True)):
                value.clear()
                value.extend(copy) if isinstance(value, list) else value.update(copy)


def _attributes(model: nn.Module, loss: Any) -> list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """The modules with copies of their attributes, parameters and buffers."""
    modules = dict.fromkeys([*model.modules(), *_modules_of(loss)])
    return [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in modules]


def _modules_of(loss: Any) -> list[nn.Module]:
    return list(loss.modules()) if isinstance(loss, nn.Module) else []


def _unregistered(attributes: dict[str, Any]) -> Iterator[Any]:
    return (value for key, value in attributes.items() if key not in _REGISTERED)


def _loose_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors that an attribute holds directly or in a list or dict, without parameters."""
    inside = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
    return (v for v in inside if isinstance(v, torch.Tensor) and not isinstance(v, nn.Parameter))


def _items(value: Any) -> Iterator[Any]:
    return chain.from_iterable(value.items()) if isinstance(value, dict) else iter(value)


def _restore(target: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in [k for k in target if k not in saved]:
        del target[key]
    for key, value in saved.items():
        if target.get(key) is not value:
            target[key] = value
