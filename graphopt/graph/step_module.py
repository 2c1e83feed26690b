"""The user's step as one pure module of flat tensors: what AOTAutograd is given to trace."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError, LossError
from graphopt.graph.batch import BatchLayout, call_model, check_loss, compute_loss
from graphopt.graph.provenance import Provenance


class StepModule(nn.Module):
    """Forward (and loss) of ``model`` on flat batch tensors, with each parameter and buffer registered once.

    Tied weights are one parameter here, so that their gradients are added in autograd's own order. With a loss the
    result is ``(loss,)`` or, when gradients are accumulated over ``accumulate`` batches, ``(loss / accumulate, loss)``.
    Without one it is the flat tuple of the model's output tensors; ``output_spec`` then tells their nesting.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: BatchLayout,
        loss: Callable[..., Any] | str | None,
        trainable: Collection[str],
        provenance: Provenance,
        accumulate: int = 1,
    ):
        super().__init__()
        self.layout, self.loss, self.accumulate, self.provenance = layout, loss, accumulate, provenance
        self.model: nn.Module
        object.__setattr__(self, "model", model)  # not a submodule: its tensors are registered below
        self.parameter_names: dict[str, str] = {}
        self.buffer_names: dict[str, str] = {}
        self.output_spec: Any = None
        self.output_constants: list[tuple[int, Any]] = []
        self.output_names: list[str] = []
        self.needs_gradient = bool(trainable)
        self.autocast = _ambient_autocast(model, layout)
        for index, (name, parameter) in enumerate(model.named_parameters()):
            key = f"p{index}"
            shadow = nn.Parameter(parameter.detach(), requires_grad=name in trainable)
            self.register_parameter(key, shadow)
            self.parameter_names[key] = name
        for index, (name, buffer) in enumerate(model.named_buffers()):
            key = f"b{index}"
            self.register_buffer(key, buffer.detach())
            self.buffer_names[key] = name

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch = self.layout.restore(list(tensors))
        given = {name: getattr(self, key) for key, name in (self.parameter_names | self.buffer_names).items()}
        with ExitStack() as stack:
            stack.enter_context(self.provenance)
            for device, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype))
            state = {f"model.{name}": tensor for name, tensor in given.items()}
            result = torch.func.functional_call(ModelWithLoss(self.model, self.loss), state, (batch,))
            for (
                name
            ) in self.buffer_names.values():  # `self.count = self.count + 1`: a new tensor in place of the buffer
                if state[f"model.{name}"] is not given[name]:
                    given[name].copy_(state[f"model.{name}"])
        if self.loss is None:
            return self._flat_outputs(result, tensors, given)
        return self._loss_outputs(result)

    def _loss_outputs(self, loss: Any) -> tuple[torch.Tensor, ...]:
        loss = check_loss(loss)
        if self.needs_gradient and torch.is_grad_enabled() and not loss.requires_grad:
            raise LossError("loss: it does not depend on any parameter that requires grad; is it detached?")
        loss = loss.clone() if loss._is_view() else loss
        return (loss,) if self.accumulate == 1 else (loss / self.accumulate, loss.detach())

    def _flat_outputs(
        self, result: Any, inputs: tuple[torch.Tensor, ...], state: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Output tensors, none an alias of an input, a parameter or another output (those are cloned)."""
        with_paths, self.output_spec = pytree.tree_flatten_with_path(result)
        self.output_constants, self.output_names, outputs = [], [], []
        known = [*inputs, *state.values()]
        for position, (path, leaf) in enumerate(with_paths):
            if not isinstance(leaf, torch.Tensor):
                if not isinstance(leaf, (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)):
                    raise CaptureError(
                        f"the model's output holds a {type(leaf).__name__}, which is no nesting of tensors that "
                        "torch.utils._pytree knows (for caches of transformers: use_cache=False)"
                    )
                self.output_constants.append((position, leaf))
                continue
            alias = leaf._is_view() or any(leaf is k for k in known)
            outputs.append(leaf.clone() if alias else leaf)
            known.append(leaf)
            self.output_names.append(".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) or "0")
        return tuple(outputs)


class ModelWithLoss(nn.Module):
    """A module around the model, so that `torch.func.functional_call` reaches model and loss in one call."""

    def __init__(self, model: nn.Module, loss: Callable[..., Any] | str | None):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Any:
        return call_model(self.model, batch) if self.loss is None else compute_loss(self.model, batch, self.loss)


def _ambient_autocast(model: nn.Module, layout: BatchLayout) -> list[tuple[str, torch.dtype]]:
    """The autocast regions that are active around the call: they belong to forward and loss, not to backward."""
    devices = {d.type for d in layout.devices} | {p.device.type for p in model.parameters()}
    active = [d for d in sorted(devices) if torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d)]
    return [(d, torch.get_autocast_dtype(d)) for d in active]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[list[str]]:
    """Undo what tracing the model leaves behind: attributes, buffers and parameters set or replaced on its modules.

    At its end the list that it yields names the Python numbers that the model itself changed: their next values are not
    in the graph.
    """
    names = {m: name for name, m in model.named_modules()}
    before = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    counted: list[str] = []
    try:
        yield counted
    finally:
        for module, attributes, parameters, buffers in before:
            for key, old in attributes.items():
                new = module.__dict__.get(key)
                if type(old) in (bool, int, float) and type(new) is type(old) and new != old:
                    counted.append(f"{names[module]}.{key}".removeprefix("."))
            _restore(module._parameters, parameters)
            _restore(module._buffers, buffers)
            _restore(module.__dict__, attributes)


def _restore(target: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in [k for k in target if k not in saved]:
        del target[key]
    for key, value in saved.items():
        if target.get(key) is not value:
            target[key] = value
