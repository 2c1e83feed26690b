"""Tracing a user's step: arguments checked, several attempts, and errors that say what was wrong and where."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from graphopt.errors import BatchError, CaptureError, GraphoptError, LossError
from graphopt.graph.batch import BatchLayout, ModelLoss, flatten
from graphopt.graph.provenance import Provenance
from graphopt.graph.stateless import functional_call
from graphopt.graph.step_module import StepModule, autocast, unchanged
from graphopt.graph.torch_internals import Exported, fails_on_fakes, fake_mode_is_active

FreeSizes = Mapping[str, Mapping[str, int]]
"""Sizes that stay free in a graph, by name, each with the dimensions of batch tensors (by name) that have it."""


@dataclass(frozen=True)
class Traced:
    """A traced step: the graph, the module it was traced from, the batch and the sizes it was traced with."""

    exported: Exported
    module: StepModule
    layout: BatchLayout
    sizes: Mapping[str, int]


def trace(
    export: Callable[..., Exported],
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[..., Any] | str | None,
    trainable: Collection[str],
    batch_gradients: bool | None,
    accumulate: int = 1,
    free: FreeSizes | None = None,
    opaque: bool = False,
) -> Traced:
    """Trace forward and loss of ``model`` by ``export`` (`export_joint` or `export_forward`).

    Args:
        export: how to trace.
        model: left as it was.
        batch: as in `graphopt.capture`.
        loss: a callable, ``"model"``, or None.
        trainable: names of the parameters that require grad while tracing.
        batch_gradients: whether floating-point tensors of the batch require grad; None: those that do.
        accumulate: what the loss is divided by.
        free: further sizes to keep free.
        opaque: whether outputs that are neither tensors nor plain data are None instead of an error.

    Raises:
        BatchError: the batch is empty, the model rejects it, or ``free`` names what it does not have.
        CaptureError: no attempt succeeded; says where the first failed.
        LossError: backward cannot start from the loss.
    """
    check_arguments(model, loss, accumulate)
    tensors, layout, size = flatten(batch)
    _check_devices(model, tensors, layout)
    wanted = [t.requires_grad if batch_gradients is None else batch_gradients for t in tensors]
    tensors = [_with_gradient(t, flag) for t, flag in zip(tensors, wanted, strict=True)]
    sizes, named = _named_sizes(tensors, layout, size, free or {})
    failure: GraphoptError | None = None
    for attempt in _attempts(sizes, bool(batch_gradients)):
        provenance = Provenance(model)
        module = StepModule(model, layout, loss, trainable, provenance, accumulate, opaque)
        given = tensors if attempt.batch_gradients else [t.detach() for t in tensors]
        try:
            without = autocast(module.autocast, enabled=False)  # which forward enters by itself
            with unchanged(model, loss), provenance.recording(), torch.enable_grad(), without:
                dims = [{d: name for d, name in of.items() if name in attempt.free} for of in named]
                exported = export(module, given, dims, compiling=attempt.compiling)
            if module.counted:
                raise CaptureError(
                    f"the model's forward changes {', '.join(module.counted)}: a Python number, which a graph cannot "
                    "follow; make it a buffer, or count outside of the model"
                )
            return Traced(exported, module, layout, sizes)
        except GraphoptError:
            raise
        except Exception as error:  # the model's own code ran: any exception is possible, the first is raised below
            failure = failure or _explained(error, provenance, model, tensors, layout, loss)
            if isinstance(failure, (BatchError, LossError)):
                break
    assert failure is not None
    raise failure


@dataclass(frozen=True)
class _Attempt:
    """One way to trace. ``compiling``: the model's code is told that it is being compiled, so that it leaves out what
    asks for the values of tensors (the mask checks of transformers)."""

    free: frozenset[str]
    compiling: bool = False
    batch_gradients: bool = True


def _attempts(sizes: Mapping[str, int], all_gradients: bool) -> list[_Attempt]:
    """The plain trace with free sizes first; what could make a failed one succeed after it: telling the model that it
    is compiled, fixed sizes, no gradients of batch tensors (some operators refuse to give any). A size 1 is fixed."""
    every = frozenset(name for name, size in sizes.items() if size > 1)
    free = dict.fromkeys([every, every & {"batch"}, frozenset[str]()])
    attempts = [_Attempt(names, compiling) for names in free for compiling in (False, True)]
    if all_gradients:
        attempts += [replace(attempt, batch_gradients=False) for attempt in attempts]
    return attempts


def _named_sizes(
    tensors: Sequence[torch.Tensor], layout: BatchLayout, size: int, free: FreeSizes
) -> tuple[dict[str, int], list[dict[int, str]]]:
    """All sizes that are to stay free, and which dimensions of each tensor have them."""
    sizes, named = {"batch": size}, [{0: "batch"} if batched else {} for batched in layout.batched]
    for name, dims in free.items():
        for tensor_name, d in dims.items():
            at = layout.names.index(tensor_name) if tensor_name in layout.names else None
            if at is None or not 0 <= d < tensors[at].dim() or d in named[at]:
                shapes = ", ".join(f"{n}: {list(t.shape)}" for n, t in zip(layout.names, tensors, strict=True))
                raise BatchError(f"free: {name!r} names dimension {d} of {tensor_name!r}; the batch has {shapes}")
            found = int(tensors[at].shape[d])
            if sizes.setdefault(name, found) != found:
                raise BatchError(f"free: {name!r} is {sizes[name]}, but dimension {d} of {tensor_name!r} is {found}")
            named[at][d] = name
    return sizes, named


def check_arguments(model: Any, loss: Any, accumulate: int = 1) -> None:
    """Raise CaptureError for what cannot be traced, whatever the batch is."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise CaptureError("model: TorchScript hides its operators; give the module it was made from")
    if loss is not None and loss != ModelLoss and not callable(loss):
        raise CaptureError(f"loss: expected a callable, None or {ModelLoss!r}, got {loss!r}")
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise CaptureError("loss: it has trainable parameters of its own; make it a submodule of the model")
    if not isinstance(accumulate, int) or accumulate < 1:
        raise CaptureError(f"accumulate: expected a positive integer, got {accumulate!r}")
    if fake_mode_is_active():
        raise CaptureError("a FakeTensorMode is active: build model, batch and optimizer in it, and capture outside")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise CaptureError(f"model: {name} is not initialized; call the model once on a batch before")


def _check_devices(model: nn.Module, tensors: Sequence[torch.Tensor], layout: BatchLayout) -> None:
    devices = {p.device for p in model.parameters()}
    for tensor, name in zip(tensors, layout.names, strict=True):
        if devices and tensor.device not in devices and tensor.dim():
            raise BatchError(
                f"batch: {name} is on {tensor.device}, the model on {', '.join(map(str, devices))}; move one with .to()"
            )


def _with_gradient(tensor: torch.Tensor, wanted: bool) -> torch.Tensor:
    return tensor.detach().requires_grad_(wanted and (tensor.is_floating_point() or tensor.is_complex()))


def _explained(
    error: Exception, provenance: Provenance, model: nn.Module, tensors: Sequence[torch.Tensor], layout: BatchLayout,
    loss: Any,
) -> GraphoptError:  # fmt: skip
    """The error of a failed trace as ours: CaptureError; where forward and loss fail by themselves, the LossError that
    they raise, or BatchError."""
    rejected = None
    if isinstance(error, (RuntimeError, ValueError, TypeError, IndexError)):
        rejected = _rejection(model, tensors, layout, loss)
    if rejected is not None and isinstance(rejected[0], GraphoptError):
        return rejected[0]
    explained: GraphoptError
    if rejected is None:
        explained = CaptureError(f"the step cannot be captured as one graph{_place(provenance)}: {_in_words(error)}")
    else:
        shapes = [f"{n}: {t.dtype} {list(t.shape)}" for n, t in zip(layout.names, tensors, strict=True)]
        cause, at = rejected
        explained = BatchError(
            f"batch: the model rejects it{_place(at)}: {_first_line(cause)} (got {'; '.join(shapes)})"
        )
    explained.__cause__ = error
    return explained


def _place(provenance: Provenance) -> str:
    """Where a model's code was when it failed."""
    place = f" in module {provenance.module!r}" if provenance.module else ""
    return place + (f" at {provenance.source}" if provenance.source else "")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _in_words(error: Exception) -> str:
    """What hinders a trace, where torch's own words would mislead."""
    first_line = _first_line(error)
    if "expected to have an entirely functional graph" in first_line:
        return (
            "a tensor that is neither a parameter nor a buffer is changed in place; make it a buffer (register_buffer)"
        )
    if "FunctionalTensor on its own" in first_line:
        return "transforms of torch.func (vmap, grad ...) have no form of whole operators"
    return first_line


def _rejection(
    model: nn.Module, tensors: Sequence[torch.Tensor], layout: BatchLayout, loss: Any
) -> tuple[Exception, Provenance] | None:
    """The error with which forward and loss fail by themselves, and where; None if they do not. They are tried on fake
    tensors, and then really, since fake tensors refuse more. (A trace fails elsewhere, and with other words.)"""
    provenance = Provenance(model)
    module = StepModule(model, layout, loss, (), provenance, opaque=True)
    with unchanged(model, loss):
        if not fails_on_fakes(module, tensors):
            return None
        with provenance.recording():
            error = _failure(module, tensors)
    return None if error is None else (error, provenance)


def _failure(module: StepModule, tensors: Sequence[torch.Tensor]) -> Exception | None:
    """What ``module(*tensors)`` raises. Writes go into copies of its buffers, random numbers are given back."""
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            functional_call(module, buffers, tuple(t.detach() for t in tensors))
    except Exception as error:  # the answer itself: the model's own code raised
        return error
    return None
