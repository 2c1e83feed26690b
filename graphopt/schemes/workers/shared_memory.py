"""Memory that main and a worker share: tensors pass without serialisation.

A `Segment` is an anonymous file mapped by both sides (``memfd_create``, or a file without a name): nothing can be left
behind in ``/dev/shm``, no limit of it applies, and the memory goes when the last process that maps it ends. Its
descriptor goes over the socket. Inside a segment tensors lie at *places*, which JSON can hold.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

Place = list[Any]
"""``[offset in bytes, shape, strides, name of the dtype]``."""

ALIGNMENT = 64
"""Tensors start at multiples of it: a cache line, and what vector loads want."""


class Segment:
    """Bytes shared by processes. ``file`` is the descriptor to send (-1 when it is closed), ``data`` a uint8 tensor
    over all of it."""

    def __init__(self, file: int, nbytes: int):
        self.file = file
        self.nbytes = nbytes
        self.data = torch.frombuffer(mmap.mmap(file, nbytes), dtype=torch.uint8)

    @classmethod
    def new(cls, nbytes: int) -> Segment:
        """A segment of at least ``nbytes``, all zeros. Raises OSError where there is no memory or descriptor left."""
        nbytes = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        file = _anonymous_file()
        try:
            os.ftruncate(file, nbytes)
            return cls(file, nbytes)
        except BaseException:
            os.close(file)
            raise

    @classmethod
    def received(cls, file: int) -> Segment:
        """The segment of a descriptor that came over a socket, which is closed: the mapping stays."""
        try:
            segment = cls(file, os.fstat(file).st_size)
        finally:
            os.close(file)
        segment.file = -1
        return segment

    def view(self, place: Place) -> torch.Tensor:
        """The tensor at ``place``."""
        offset, shape, strides, name = place
        dtype = getattr(torch, name)
        end = offset + _span(shape, strides) * dtype.itemsize
        return self.data[offset:end].view(dtype).as_strided(shape, strides)

    def release(self) -> None:
        """Close the descriptor, when it was sent. The memory lives as long as a tensor or another process maps it."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class Parcel:
    """What one worker gets for one step: its rows of the batch and whatever else differs between processors. Each step
    overwrites what the last one sent, which the worker has done with."""

    def __init__(self) -> None:
        self._segment: Segment | None = None

    def pack(self, tensors: Sequence[torch.Tensor]) -> tuple[list[Place], Segment | None]:
        """Copy ``tensors`` in. Gives their places, and the segment where it is a new one, which must be sent."""
        places, end = [], 0
        for tensor in tensors:
            places.append(place_of(tensor, end))
            end = place_end(places[-1])
        fresh = None
        if self._segment is None or self._segment.nbytes < end:
            self._segment = fresh = Segment.new(end + end // 2)  # a batch may grow row by row
        for tensor, place in zip(tensors, places, strict=True):
            self._segment.view(place).copy_(tensor)
        return places, fresh


def place_of(tensor: torch.Tensor, offset: int) -> Place:
    """The place of a copy of ``tensor`` at the next aligned offset from ``offset``: with its strides where its elements
    lie side by side (channels-last), contiguous where there are gaps or overlaps between them."""
    shape, strides = list(tensor.shape), list(tensor.stride())
    if _span(shape, strides) != tensor.numel():
        strides = list(torch.empty(shape, device="meta").stride())
    return [-(-offset // ALIGNMENT) * ALIGNMENT, shape, strides, str(tensor.dtype).removeprefix("torch.")]


def place_end(place: Place) -> int:
    """The first byte behind ``place``."""
    offset, shape, strides, name = place
    return offset + _span(shape, strides) * getattr(torch, name).itemsize


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last in memory."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _anonymous_file() -> int:
    """A file without a name, in memory where the system has that."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("graphopt")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
