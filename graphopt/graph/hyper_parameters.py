"""Hyper-parameters of optimizers and of clipping: which are inputs of a graph, and their values at each step.

A number (learning rate, betas, weight decay ...) is an input, so that schedulers need no new capture; a zero, a bool
or None is a constant of the graph, because torch's own code branches on it. The learning rate is an input even when
it is zero: warm-ups start there and no update branches on it. A tensor is an input by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import torch
from torch.optim import SGD, Optimizer

from graphopt.errors import GraphoptError
from graphopt.graph.traced_number import Guard
from graphopt.graph.training_graph import Input, InputKind

Number = (float, int)


@dataclass(frozen=True)
class ClipNorm:
    """Scale all gradients together so that their norm is at most ``max_norm`` (`torch.nn.utils.clip_grad_norm_`)."""

    max_norm: float
    norm_type: float = 2.0

    @property
    def inputs(self) -> dict[Input, float]:
        """The hyper-parameters it gives to a graph, with their values."""
        return {Input(InputKind.HYPER, "clip", "max_norm"): float(self.max_norm)}


@dataclass(frozen=True)
class ClipValue:
    """Clamp each element of each gradient to ``[-value, value]`` (`torch.nn.utils.clip_grad_value_`)."""

    value: float

    @property
    def inputs(self) -> dict[Input, float]:
        """The hyper-parameters it gives to a graph, with their values."""
        return {Input(InputKind.HYPER, "clip", "value"): float(self.value)}


Clip = ClipNorm | ClipValue


def parse_clip(clip: Any) -> Clip | None:
    """What users pass as ``clip=``: None, a number (the largest norm), `ClipNorm` or `ClipValue`.

    >>> parse_clip(1.0)
    ClipNorm(max_norm=1.0, norm_type=2.0)
    """
    if clip is None:
        return None
    if isinstance(clip, Number) and not isinstance(clip, bool):
        clip = ClipNorm(float(clip))
    if not isinstance(clip, (ClipNorm, ClipValue)):
        raise GraphoptError(
            f"clip: expected a number (the largest norm), ClipNorm(max_norm) or ClipValue(value), got {clip!r}"
        )
    bound = clip.max_norm if isinstance(clip, ClipNorm) else clip.value
    if isnan(bound) or bound < 0:
        raise GraphoptError(f"clip: expected a bound of at least 0, got {clip!r}")
    return clip


def group_names(optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Optimizer, int]]:
    """``(name, optimizer, index of the group)`` of all groups; the names are those of hyper-parameter inputs."""
    for i, optimizer in enumerate(optimizers):
        prefix = f"optimizer {i} " if len(optimizers) > 1 else ""
        for j in range(len(optimizer.param_groups)):
            yield f"{prefix}group {j}", optimizer, j


def options(optimizer: Optimizer, group: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """``(field, value)`` of a group's own options; elements of tuples apart (``betas.0``). What schedulers add to a
    group (``initial_lr``) is left out."""
    for key in optimizer.defaults:
        value = group[key]
        if isinstance(value, (tuple, list)):
            yield from ((f"{key}.{i}", v) for i, v in enumerate(value))
        else:
            yield key, value


def is_input(field: str, value: Any) -> bool:
    """Whether an option is an input of the graph rather than a constant of it."""
    if isinstance(value, torch.Tensor):
        return True
    return isinstance(value, Number) and not isinstance(value, bool) and (value != 0 or field == "lr")


def structure_key(optimizers: Sequence[Optimizer]) -> Hashable:
    """What a captured update depends on besides its inputs: classes, options, which numbers are zero, which
    parameters are in which group, and (SGD with dampening) which of them have no momentum yet."""
    return tuple(
        (
            type(o),
            tuple(
                (
                    tuple((f, _kind(f, v)) for f, v in options(o, group)),
                    tuple(id(p) for p in group["params"]),
                    tuple("momentum_buffer" in o.state.get(p, ()) for p in group["params"]) if lags(o, group) else (),
                )
                for group in o.param_groups
            ),
        )
        for o in optimizers
    )


def lags(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the first step of ``group`` differs from later ones: SGD does not dampen the first momentum."""
    return type(optimizer) is SGD and bool(group["momentum"]) and bool(group["dampening"])


def _kind(field: str, value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return "tensor", value.dtype, tuple(value.shape), str(value.device)
    return "number" if is_input(field, value) else value


def hyper_reader(
    optimizers: Sequence[Optimizer], inputs: Sequence[Input], guards: Sequence[Guard] = (), clip: Clip | None = None
) -> Callable[[], tuple[Any, ...] | None]:
    """A function that reads the current values of the hyper-parameters among ``inputs``, in their order, or gives
    None when the update has to be captured anew: groups were added, an option that is no input changed, a guard
    does not hold any more. It is called at each step, so it is compiled to straight code: about 1 µs a group.
    """
    wanted = [i for i in inputs if i.kind is InputKind.HYPER]
    guarded = {(g.name, g.field): [h for h in guards if (h.name, h.field) == (g.name, g.field)] for g in guards}
    scope: dict[str, Any] = {"Number": Number, "Tensor": torch.Tensor}
    lines = ["def read():"]
    local: dict[tuple[str, str], str] = {}
    for i, optimizer in enumerate(optimizers):
        scope[f"o{i}"] = optimizer
        lines += [
            f"    groups = o{i}.param_groups",
            f"    if len(groups) != {len(optimizer.param_groups)}: return None",
        ]
        for name, owner, j in group_names(optimizers):
            if owner is optimizer:
                group = optimizer.param_groups[j]
                lines += [f"    g = groups[{j}]", f"    if len(g['params']) != {len(group['params'])}: return None"]
                for field, value in options(optimizer, group):
                    key, _, index = field.partition(".")
                    expression = f"g[{key!r}]" + (f"[{index}]" if index else "")
                    lines += _check(local, scope, name, field, value, expression, guarded.get((name, field), []))
    values = [local.get((w.name, w.field)) or repr(clip.inputs[w] if clip else None) for w in wanted]
    lines.append(f"    return ({''.join(v + ', ' for v in values)})")
    scope["inf"] = float("inf")
    exec("\n".join(lines), scope)
    return scope["read"]


def _check(
    local: dict[tuple[str, str], str], scope: dict[str, Any], name: str, field: str, value: Any, expression: str,
    guards: Sequence[Guard],
) -> list[str]:  # fmt: skip
    """Lines that read one option into a local variable and return None if the graph does not fit it."""
    variable = f"v{len(scope)}"
    if not is_input(field, value):
        scope[variable] = value
        return [f"    if {expression} != {variable}: return None"]
    scope[variable] = None  # takes the name
    local[name, field] = variable
    kind = "Tensor" if isinstance(value, torch.Tensor) else "Number"
    lines = [f"    {variable} = {expression}", f"    if not isinstance({variable}, {kind}): return None"]
    for guard in guards:
        holds = f"{variable} {guard.comparison} {guard.bound!r}"
        lines.append(f"    if {'not ' if guard.holds else ''}({holds}): return None")
    return lines
