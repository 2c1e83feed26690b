"""`optimize`: run a training step by the scheme that is best for the batch at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from graphopt.errors import GraphoptError
from graphopt.graph.assemble import as_optimizers
from graphopt.graph.batch import ModelLoss
from graphopt.graph.hyper_parameters import parse_clip
from graphopt.graph.update import check_ownership
from graphopt.passes import (
    CommonSubexpressions,
    ConstantFolding,
    DeadCode,
    NoOps,
    Pass,
    SelectiveSaving,
)
from graphopt.schemes import Scheme, Task
from graphopt.schemes.world.candidates import schemes_in_world
from graphopt.schemes.world.ranks import find_world
from graphopt.settings import Settings, as_schemes
from graphopt.training_step import TrainingStep
from graphopt.world_step import WorldStep

__all__ = ["PASSES", "TrainingStep", "optimize"]

PASSES: tuple[Pass, ...] = (NoOps(), CommonSubexpressions(), ConstantFolding(), SelectiveSaving(), DeadCode())
"""What `optimize` runs after gradient liveness: passes of the exact tier."""


def optimize(
    model: nn.Module,
    batch_shape: Any,
    *,
    loss: Callable[..., Any] | str | None = None,
    optimizer: Any = None,
    clip: Any = None,
    accumulate: int = 1,
    schemes: str | Sequence[str | Scheme] = "auto",
    processors: int | None = None,
    steps: int | None = None,
    precision: str | None = None,
    batch_norm: str = "synchronized",
    memory: int | None = None,
    verify: bool = False,
    keep_grads: bool = False,
    passes: Sequence[Pass] | None = None,
) -> Any:
    """A training step (or a drop-in module) that runs by the fastest scheme for each batch it is given.

    With a loss or an optimizer the result is a `TrainingStep`: ``loss = step(x, y)`` makes forward, backward, clipping
    and update. Without both it is a drop-in module: call it, then ``.backward()``. The model and the optimizer stay
    the only owners of parameters and state; checkpoints, schedulers and a return to eager work at any moment.

    Args:
        model: the model to train, in any mode; a change of mode, ``requires_grad`` or optimizer groups is planned anew.
        batch_shape: the shape of the model's first input (a tuple of ints), a nested structure of shapes, or an example
            batch. Batches of another size choose their scheme anew; only the number of dimensions must stay.
        loss: ``loss(model(*inputs), target)``. None with an optimizer: the model returns its own loss.
        optimizer: a `torch.optim.Optimizer` or a list of them.
        clip: largest gradient norm (a float), `ClipNorm` or `ClipValue`.
        accumulate: batches per update; the loss of each is divided by it, gradients so far lie in ``.grad``.
        schemes: ``"auto"``: all that compute what eager does, up to rounding (other kernels and numbers of threads take
            sums in another order); ``"exact"``: those that give eager's bits; or names and `Scheme` objects to choose
            from.
        processors: up to so many processors of this machine may share a batch: this process, and workers that it starts
            and stops. One by default. Under torchrun, or where `torch.distributed` is initialised: 1 leaves each rank
            by itself; by default, or with their number, all ranks take each step together, each with its own rows.
        steps: how many training steps there will be, where that is known: a scheme that takes long to compile is tried
            if it pays back in those. Without it as many are expected as there were so far.
        precision: ``"bf16"`` allows schemes that compute forward and loss in it; by default none does.
        batch_norm: of schemes on several processors: ``"synchronized"`` normalises by statistics of the whole batch,
            ``"local"`` by those of each processor's rows, as DistributedDataParallel does.
        memory: bytes that a step may need at its peak, parameters and optimizer state included; schemes that need more
            are left out.
        verify: check each captured step, and each of its forms that is about to run (channels-last, bf16, fused
            update), against eager and a float64 reference; what fails is left out and the plan says so.
        keep_grads: leave gradients in ``.grad`` after the step (None otherwise).
        passes: what runs on each captured step after gradient liveness; by default `PASSES`. A list of your own may
            hold them: ``passes=(MyPass(), *graphopt.step.PASSES)``.

    Raises:
        BatchError, OptimizerError, GraphoptError: before anything was changed.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Linear(4, 2)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> step = graphopt.optimize(net, (8, 4), loss=torch.nn.functional.cross_entropy, optimizer=sgd)
        >>> x, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> before = step(x, y)
        >>> bool(step(x, y) < before)
        True
    """
    if not isinstance(model, nn.Module):
        raise GraphoptError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, chosen, known in (
        ("precision", precision, (None, "fp32", "bf16")),
        ("batch_norm", batch_norm, ("synchronized", "local")),
    ):
        if chosen not in known:
            raise GraphoptError(f"{name}: expected one of {known}, got {chosen!r}; nothing else is supported yet")
    for name, value, unit in (
        ("accumulate", accumulate, ""), ("processors", 1 if processors is None else processors, ""),
        ("steps", 1 if steps is None else steps, ""), ("memory", 1 if memory is None else memory, " (bytes)"),
    ):  # fmt: skip
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise GraphoptError(f"{name}: expected a positive integer{unit}, got {value!r}")
    for name, flag in (("verify", verify), ("keep_grads", keep_grads)):
        if not isinstance(flag, bool):
            raise GraphoptError(f"{name}: expected True or False, got {flag!r}")
    if loss is not None and loss != ModelLoss and not callable(loss):
        raise GraphoptError(f"loss: expected a callable, None or {ModelLoss!r}, got {loss!r}")
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise GraphoptError("model: TorchScript hides its operators; give the module it was made from")
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise GraphoptError(f"model: {lazy[0]} is not initialized; call the model once on a batch before")
    chosen_passes = PASSES if passes is None else tuple(passes)
    if not all(isinstance(one, Pass) for one in chosen_passes):
        raise GraphoptError(f"passes: expected objects of graphopt.passes.Pass, got {passes!r}")
    settings = Settings(as_schemes(schemes, processors, batch_norm), processors, steps, precision, batch_norm, memory)
    optimizers = as_optimizers(optimizer)
    if loss is None and not optimizers:
        if clip is not None or accumulate > 1:
            raise GraphoptError("clip and accumulate: they need a loss or an optimizer; a drop-in module has neither")
        from graphopt.drop_in import DropIn

        return DropIn(model, chosen_passes)
    check_ownership(optimizers, {id(p): name for name, p in model.named_parameters()})
    world = find_world(model, processors)
    task = Task(
        model, ModelLoss if loss is None else loss, optimizers, parse_clip(clip), accumulate, keep_grads, world=world
    )
    if world is None:
        return TrainingStep(task, batch_shape, settings, chosen_passes, verify=verify)
    settings = replace(settings, schemes=schemes_in_world(schemes, world, batch_norm))
    return WorldStep(task, batch_shape, settings, chosen_passes, verify=verify)
