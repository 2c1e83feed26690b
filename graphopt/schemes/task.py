"""What a scheme is asked to run, and the watch over the user's model that tells when a graph has become stale."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from graphopt.graph.hyper_parameters import Clip
from graphopt.schemes.workers import Pools
from graphopt.schemes.world.ranks import World


@dataclass
class Progress:
    """How many batches the gradients at hand hold, whatever schemes ran them."""

    batches: int = 0


@dataclass(frozen=True)
class Task:
    """A training step as the user describes it: the arguments of `graphopt.optimize` that every scheme needs.

    ``pools``: its local workers; ``world``: the ranks of `torch.distributed` that take it together, None for a process
    by itself.
    """

    model: nn.Module
    loss: Callable[..., Any] | str | None
    optimizers: tuple[Optimizer, ...] = ()
    clip: Clip | None = None
    accumulate: int = 1
    keep_grads: bool = False
    progress: Progress = field(default_factory=Progress, compare=False)
    pools: Pools = field(default_factory=Pools, compare=False, repr=False)
    world: World | None = field(default=None, compare=False, repr=False)

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


def clear_gradients(task: Task) -> None:
    """Set every ``.grad`` to None."""
    for parameter in task.parameters:
        if parameter.grad is not None:
            parameter.grad = None


class ModelWatch:
    """Notices that a model is no longer what it was when a graph was captured.

    Watched: the modules and their plain attributes (train/eval mode, dropout rates ...), the identity, memory and
    requires_grad of every parameter, the identity of every buffer, hooks on parameters and modules, and autocast; also
    of a loss that is a module.
    `same` is on the hot path: a few dictionary look-ups a module.
    """

    def __init__(self, model: nn.Module, loss: Any = None):
        modules = [*model.modules(), *(loss.modules() if isinstance(loss, nn.Module) else ())]
        self._modules = [(m, m.__dict__, dict(m._modules), _module_hooks(m)) for m in modules]
        self._tables = [(t, len(t)) for m in modules for t in (m._parameters, m._buffers)]
        self._plain = [_plain(m) for m in modules]
        slots = [(m._parameters, k, p) for m in modules for k, p in m._parameters.items() if p is not None]
        self._parameters = [(d, k, p, p.requires_grad, _tensor_hooks(p), _address(p)) for d, k, p in slots]
        self._buffers = [(m._buffers, k, b) for m in modules for k, b in m._buffers.items()]
        self._devices = [
            d
            for d in sorted({p.device.type for p in model.parameters()} | {"cpu"})
            if torch.amp.is_autocast_available(d)
        ]
        self._autocast = self._autocast_now()
        self._key = self._make_key()

    def _autocast_now(self) -> tuple[Hashable, ...]:
        return tuple(
            (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None)
            for d in self._devices
        )

    def same(self) -> bool:
        """Whether everything watched is as it was."""
        for module, state, children, hooks in self._modules:
            if state["_modules"] != children or _module_hooks(module) != hooks:
                return False
        for state, read, values in self._plain:
            try:
                if read(state) != values:
                    return False
            except (KeyError, RuntimeError, ValueError):  # deleted, or a tensor now, which has no one truth value
                return False
        for slots, key, parameter, requires_grad, hooked, address in self._parameters:
            if slots.get(key) is not parameter or parameter.requires_grad is not requires_grad:
                return False
            if _tensor_hooks(parameter) is not hooked or _address(parameter) != address:
                return False
        return (
            all(len(table) == length for table, length in self._tables)
            and all(d.get(k) is b for d, k, b in self._buffers)
            and self._autocast_now() == self._autocast
        )

    def _make_key(self) -> tuple[Hashable, ...]:
        return (
            tuple((id(m), hooks) for m, *_, hooks in self._modules),
            tuple(values for _, _, values in self._plain),
            tuple((id(p), flag, hooked, _form(p)) for _, _, p, flag, hooked, _ in self._parameters),
            tuple((key, None if b is None else _form(b)) for _, key, b in self._buffers),
            self._autocast,
        )

    def key(self, *, buffers_are_looked_up: bool = False) -> Hashable:
        """What a captured graph depends on, hashable; with the identity of buffers unless they are looked up at each
        run. The watch keeps modules and tensors alive, so their ids stay theirs."""
        return self._key if buffers_are_looked_up else (self._key, tuple(id(b) for *_, b in self._buffers))

    def absorb(self) -> None:
        """Take over plain attributes that the model's own forward has just set: they are no change by the user."""
        self._plain = [(state, read, _values(state, read, values)) for state, read, values in self._plain]

    @property
    def tensor_hooks(self) -> bool:
        """Whether a hook is registered on a parameter: it must see the gradient, so the step has to run in eager."""
        return any(hooked for *_, hooked, _ in self._parameters)

    @property
    def backward_hooks(self) -> bool:
        """Whether a module has backward hooks, which autograd calls and a graph cannot."""
        return any(m._backward_hooks or m._backward_pre_hooks for m, *_ in self._modules)

    @property
    def forward_hooks(self) -> list[str]:
        """Names of the types of modules with forward hooks of the user's."""
        return [type(m).__name__ for m, *_ in self._modules if m._forward_hooks]


def _module_hooks(module: nn.Module) -> tuple[int, ...]:
    """The handles of a module's hooks, which are never used twice."""
    return (
        *module._forward_hooks,
        *module._forward_pre_hooks,
        *module._backward_hooks,
        *module._backward_pre_hooks,
    )


def _tensor_hooks(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def _address(tensor: torch.Tensor) -> int:
    """Where the elements lie: changes with dtype, device and layout (`model.double()` keeps the very parameters)."""
    return tensor.data_ptr() if type(tensor) is nn.Parameter and tensor.layout is torch.strided else 0


def _form(tensor: torch.Tensor) -> Hashable:
    """What a graph assumes of a tensor."""
    strided = tensor.layout is torch.strided
    return tensor.dtype, tuple(tensor.shape), tensor.device, tensor.stride() if strided else None


_PLAIN = (bool, int, float, str, tuple, type(None))


def _plain(module: nn.Module) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any], Any]:
    """The attributes of a module, a function that reads the plain ones among them, and their present values."""
    state = module.__dict__
    names = [k for k, v in state.items() if type(v) in _PLAIN and _hashable(v) and k != "_is_full_backward_hook"]
    read = itemgetter(*names)  # there is always `training`
    return state, read, read(state)


def _values(state: dict[str, Any], read: Callable[[dict[str, Any]], Any], otherwise: Any) -> Any:
    try:
        return read(state)
    except KeyError:  # an attribute was deleted
        return otherwise


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
