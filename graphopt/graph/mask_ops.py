"""Operators of our own: boolean masks packed to one bit an element.

Registered in torch's dispatcher under ``graphopt::``, so that graphs that hold them print, save, load and compile like
any other. On the CPU they run numpy's ``packbits``.
"""

from __future__ import annotations

import numpy as np
import torch

_library = torch.library.Library("graphopt", "DEF")
_library.define("pack_mask(Tensor mask) -> Tensor")
_library.define("unpack_mask(Tensor packed, Tensor like) -> Tensor")


def _pack_cpu(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(mask.contiguous().view(-1).view(torch.uint8).numpy(), bitorder="little"))


def _unpack_cpu(packed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    bits = np.unpackbits(packed.numpy(), count=like.numel(), bitorder="little")
    return torch.from_numpy(bits).view(torch.bool).view(like.shape)


def _weights(device: torch.device) -> torch.Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def _pack_any(mask: torch.Tensor) -> torch.Tensor:
    flat = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8))
    return (flat.view(-1, 8) * _weights(mask.device)).sum(1, dtype=torch.uint8)


def _unpack_any(packed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    bits = (packed.unsqueeze(1) & _weights(packed.device)) != 0
    return bits.view(-1)[: like.numel()].view(like.shape)


def _pack_fake(mask: torch.Tensor) -> torch.Tensor:
    return mask.new_empty(((mask.numel() + 7) // 8,), dtype=torch.uint8)


def _unpack_fake(packed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=torch.bool, device=like.device)


_library.impl("pack_mask", _pack_cpu, "CPU")
_library.impl("unpack_mask", _unpack_cpu, "CPU")
_library.impl("pack_mask", _pack_any, "CompositeExplicitAutograd")
_library.impl("unpack_mask", _unpack_any, "CompositeExplicitAutograd")
torch.library.register_fake("graphopt::pack_mask", _pack_fake, lib=_library)
torch.library.register_fake("graphopt::unpack_mask", _unpack_fake, lib=_library)

pack_mask = torch.ops.graphopt.pack_mask.default
"""``pack_mask(mask)``: bool of any shape -> uint8 ``[ceil(numel / 8)]``, first element in the lowest bit."""

unpack_mask = torch.ops.graphopt.unpack_mask.default
"""``unpack_mask(packed, like)``: the contiguous bool mask in the shape of ``like``."""
