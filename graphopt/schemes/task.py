"""What a scheme is asked to run, and the watch over the user's model that tells when a graph has become stale."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from graphopt.graph.hyper_parameters import Clip


@dataclass
class Progress:
    """How many batches the gradients at hand hold, whatever schemes ran them."""

    batches: int = 0


@dataclass(frozen=True)
class Task:
    """A training step as the user describes it: the arguments of `graphopt.optimize` that every scheme needs."""

    model: nn.Module
    loss: Callable[..., Any] | str | None
    optimizers: tuple[Optimizer, ...] = ()
    clip: Clip | None = None
    accumulate: int = 1
    keep_grads: bool = False
    progress: Progress = field(default_factory=Progress, compare=False)

    @property
    def begins(self) -> bool:
        """Whether the next batch is the first of a step."""
        return self.progress.batches == 0

    @property
    def ends(self) -> bool:
        """Whether the next batch is the last of a step."""
        return self.progress.batches == self.accumulate - 1

    def count(self) -> None:
        """One more batch was run."""
        self.progress.batches = (self.progress.batches + 1) % self.accumulate

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the model and of the optimizers, each once."""
        groups = (p for o in self.optimizers for g in o.param_groups for p in g["params"])
        return list(dict.fromkeys([*self.model.parameters(), *groups]))

    @property
    def needs_closure(self) -> bool:
        """Whether an optimizer evaluates the loss several times a step (LBFGS)."""
        return any(isinstance(o, torch.optim.LBFGS) for o in self.optimizers)


class ModelWatch:
    """Notices that a model is no longer what it was when a graph was captured.

    Watched: the modules and their train/eval mode, the identity of every parameter and buffer and its requires_grad,
    hooks on parameters and modules, and autocast. `same` is on the hot path: a few dictionary look-ups a module.
    """

    def __init__(self, model: nn.Module):
        self._modules = [
            (m, m.__dict__, m.training, len(m._modules), len(m._parameters), len(m._buffers), _module_hooks(m))
            for m in model.modules()
        ]
        slots = [(m._parameters, k, p) for m in model.modules() for k, p in m._parameters.items()]
        self._parameters = [(d, k, p, p is not None and p.requires_grad, _tensor_hooks(p)) for d, k, p in slots]
        self._buffers = [(m._buffers, k, b) for m in model.modules() for k, b in m._buffers.items()]
        self._devices = sorted({p.device.type for p in model.parameters()} | {"cpu"})
        self._autocast = self._autocast_now()

    def _autocast_now(self) -> tuple[Hashable, ...]:
        return tuple(
            (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None)
            for d in self._devices
        )

    def same(self) -> bool:
        """Whether everything watched is as it was."""
        for module, state, training, modules, parameters, buffers, hooks in self._modules:
            if (
                state["training"] is not training
                or len(state["_modules"]) != modules
                or len(state["_parameters"]) != parameters
                or len(state["_buffers"]) != buffers
                or _module_hooks(module) != hooks
            ):
                return False
        for slots, key, parameter, requires_grad, hooks in self._parameters:
            if slots.get(key) is not parameter:
                return False
            if parameter is not None and (
                parameter.requires_grad is not requires_grad or _tensor_hooks(parameter) is not hooks
            ):
                return False
        return all(d.get(k) is b for d, k, b in self._buffers) and self._autocast_now() == self._autocast

    def key(self) -> Hashable:
        """What the captured graph depends on, hashable. The watch keeps the tensors alive, so their ids stay theirs."""
        return (
            tuple((id(m), training, hooks) for m, _, training, *_, hooks in self._modules),
            tuple((id(p), flag, hooked) for *_, p, flag, hooked in self._parameters),
            tuple(id(b) for *_, b in self._buffers),
            self._autocast,
        )

    @property
    def tensor_hooks(self) -> bool:
        """Whether a hook is registered on a parameter: it must see the gradient, so the step has to run in eager."""
        return any(hooked for *_, hooked in self._parameters)

    @property
    def backward_hooks(self) -> bool:
        """Whether a module has backward hooks, which autograd calls and a graph cannot."""
        return any(m._backward_hooks or m._backward_pre_hooks for m, *_ in self._modules)

    @property
    def forward_hooks(self) -> list[str]:
        """Names of the types of modules with forward hooks of the user's."""
        return [type(m).__name__ for m, *_ in self._modules if m._forward_hooks]


def _module_hooks(module: nn.Module) -> int:
    return (
        len(module._forward_hooks)
        + len(module._forward_pre_hooks)
        + len(module._backward_hooks)
        + len(module._backward_pre_hooks)
    )


def _tensor_hooks(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))
