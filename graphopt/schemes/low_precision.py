"""Low precision: forward and loss under `torch.autocast`, when the user asked for it."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from graphopt.graph.step_module import active_autocast, autocast
from graphopt.schemes.base import Prepared

PRECISIONS = {"bf16": torch.bfloat16}
"""What ``precision=`` names, as the dtype that autocast is entered with."""


def why_not_low(prepared: Prepared) -> str | None:
    """Why forward and loss cannot run in low precision; None if they can."""
    devices = _devices(prepared)
    if active := active_autocast(devices):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in active.values())
        return f"autocast to {names} is active already; the scheme without a precision runs in it"
    if missing := [d for d in devices if not torch.amp.is_autocast_available(d)]:
        return f"there is no autocast for {missing[0]}"
    return None


def low_precision(prepared: Prepared, precision: str | None) -> ExitStack:
    """The region for forward and loss; an empty one without a precision."""
    if precision is None:
        return ExitStack()
    return autocast(dict.fromkeys(_devices(prepared), PRECISIONS[precision]))


def _devices(prepared: Prepared) -> list[str]:
    found = {d.type for d in prepared.layout.devices} | {p.device.type for p in prepared.task.model.parameters()}
    return sorted(found)
