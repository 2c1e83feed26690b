"""`functional_call`: a module called with other tensors in the place of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def functional_call(
    module: nn.Module, tensors: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Any:
    """`torch.func.functional_call`, also for a module that stands at several paths of ``module``.

    torch swaps tensors at each path and then puts them back in the same order: at the second path of one module it
    takes the given tensor for the module's own, which is left with it (torch 2.13). Here each place is swapped once.

    Args:
        module: to call. It has its own tensors again afterwards.
        tensors: by one of the names of each parameter or buffer; those that are shared need one of theirs. A buffer
            that the module replaces is replaced here.
        args, kwargs: of the call.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    names = {tensor: name for name, tensor in reversed(named) if name in tensors}
    places = {
        f"{path}.{own}" if path else own: names[tensor]
        for path, each in module.named_modules()  # each module once
        for own, tensor in (*each._parameters.items(), *each._buffers.items())
        if tensor is not None and tensor in names
    }
    given = {place: tensors[name] for place, name in places.items()}
    before = dict(given)
    try:
        return torch.func.functional_call(module, given, args, dict(kwargs or {}), tie_weights=False)
    finally:
        tensors.update({places[place]: new for place, new in given.items() if new is not before[place]})
