"""The fused implementations of optimizers: one kernel goes through all parameters, gradients and states.

Fused kernels on a CPU walk through memory and look at no strides (aten/src/ATen/native/cpu/FusedAdamKernel.cpp): what
they get must lie in memory as the parameter does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from graphopt.graph.update import supported

KERNELS = (SGD, Adam, AdamW, Adagrad)
"""Optimizers with a fused kernel for CPU and CUDA."""

_DEVICES = ("cpu", "cuda")
_CHECKED = "_need_device_dtype_check_for_fused"


def why_not_fused(optimizers: Sequence[Optimizer]) -> str | None:
    """Why the fused kernels cannot make the update of all ``optimizers``; None if they can."""
    if not optimizers:
        return "there is no optimizer"
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if all(group.get("fused") for group in groups):
        return "the optimizer is fused by its own options"
    for optimizer in optimizers:
        if type(optimizer) not in KERNELS:
            return f"there is no fused kernel for {type(optimizer).__name__}"
        if reason := supported(optimizer):
            return f"{type(optimizer).__name__}: {reason}"
    parameters = [p for group in groups for p in group["params"]]
    devices = {p.device.type for p in parameters}
    if len(devices) != 1 or not devices.issubset(_DEVICES):
        return f"the parameters are on {' and '.join(sorted(devices))}; expected one of {', '.join(_DEVICES)}"
    if not all(map(is_dense, parameters)):
        return "a parameter has gaps or overlaps in memory"
    return None


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill its memory without gaps and overlaps, in whatever order."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def counts_elsewhere(optimizers: Iterable[Optimizer]) -> bool:
    """Whether the step counts of parameters are not what fused kernels read: float32 on the parameter's device."""
    if any(type(o) is not SGD for o in optimizers) and torch.get_default_dtype() is torch.float64:
        return True  # those still to be made
    return any(
        type(o) is not SGD and (p.device.type != "cpu" or not _readable(o.state.get(p, {}).get("step"), p))
        for o in optimizers for group in o.param_groups for p in group["params"]
    )  # fmt: skip


def _readable(count: Any, parameter: torch.Tensor) -> bool:
    return count is None or (count.device == parameter.device and count.dtype is torch.float32)


@contextmanager
def fused(optimizer: Optimizer) -> Iterator[None]:
    """``optimizer.step()`` runs its fused kernel within; its options and the form of its state are as before behind it.

    Where the kernel cannot make this step (a sparse gradient, one in another layout than its parameter's, SGD with
    dampening of which some parameters have no momentum yet), it is left as it is.
    """
    if not _possible_now(optimizer):
        yield
        return
    lay_out_state(optimizer, (p for group in optimizer.param_groups for p in group["params"]))
    options = [(group, group["foreach"], group["fused"]) for group in optimizer.param_groups]
    checked = optimizer.__dict__.get(_CHECKED)
    counts = _with_counts(optimizer)
    try:
        for group in optimizer.param_groups:
            group["foreach"], group["fused"] = False, True
        yield
    finally:
        for group, foreach, was_fused in options:
            group["foreach"], group["fused"] = foreach, was_fused
        if checked is None:
            optimizer.__dict__.pop(_CHECKED, None)
        else:
            optimizer.__dict__[_CHECKED] = checked
        _without_counts(optimizer, counts)


def _possible_now(optimizer: Optimizer) -> bool:
    for group in optimizer.param_groups:
        with_gradient = [p for p in group["params"] if p.grad is not None]
        for p in with_gradient:
            if p.grad.layout is not torch.strided or p.grad.stride() != p.stride() or p.grad.dtype != p.dtype:
                return False
        missing = without_momentum(optimizer, group, with_gradient)
        if missing and group["dampening"]:
            return False
        for p in missing:  # from -0.0 the first step makes the same bits as from nothing
            optimizer.state[p]["momentum_buffer"] = torch.full_like(p, -0.0, requires_grad=False)
    return True


def without_momentum(
    optimizer: Optimizer, group: dict[str, Any], with_gradient: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The parameters of a group of SGD whose momentum begins with this step, where others have one already: the fused
    kernel makes either the first step of all or of none."""
    if type(optimizer) is not SGD or not group["momentum"]:
        return []
    missing = [p for p in with_gradient if optimizer.state.get(p, {}).get("momentum_buffer") is None]
    return missing if len(missing) < len(with_gradient) else []


def lay_out_state(optimizer: Optimizer, parameters: Iterable[torch.Tensor]) -> None:
    """Bring state that lies in memory in another way than its parameter (a checkpoint of another layout) into the
    parameter's layout."""
    for p in parameters:
        stride = p.stride()
        for field, value in optimizer.state.get(p, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.stride() != stride:
                optimizer.state[p][field] = torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)


def _with_counts(optimizer: Optimizer) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Put step counts into the form of the fused kernels; gives those parameters with the counts before, None where
    the step will make one."""
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for group in optimizer.param_groups:
        if group.get("fused"):
            continue
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "step" not in state and type(optimizer) is not SGD:
                found.append((p, None))
            elif "step" in state and not _readable(state["step"], p):
                before = state["step"]
                state["step"] = before.to(p.device, torch.float32)
                found.append((p, before))
    return found


def _without_counts(optimizer: Optimizer, counts: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
    """Give step counts the form that they had, or that the optimizer's own options would have given them."""
    plain = torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32
    for p, before in counts:
        state = optimizer.state.get(p, {})
        if before is not None:
            state["step"] = before.copy_(state["step"])
        elif "step" in state:
            state["step"] = state["step"].to("cpu", plain)
