"""The mirror: shared copies of what is the same on all processors (parameters, buffers, accumulated gradients ...).

The user's model and optimizer keep their own memory; workers read the copies. A tensor has one copy, its *home*, for
all graphs of a pool that read it. Before a step `Shelf.refresh` copies what may have changed since the last one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from graphopt.schemes.workers.shared_memory import Place, Segment, place_end, place_of

_CHUNK = 1 << 22  # bytes of a segment that many small tensors share
_SMALL = 4096  # elements up to which a copy costs less than to find out whether it is needed
_SAMPLE = 1024


@dataclass
class Home:
    """Where the copy of one tensor lies. ``number`` is its name in messages."""

    number: int
    tensor: weakref.ref[torch.Tensor]
    place: Place
    view: torch.Tensor
    version: int = -1


class Mirror:
    """The homes of a pool's workers, and the news of them that its workers have not been told."""

    def __init__(self) -> None:
        self._homes: dict[int, Home] = {}  # by id of the tensor
        self._numbers = count()
        self._segments: list[Segment] = []
        self._end = 0  # of what is taken of the last segment
        self._free: dict[int, list[tuple[int, int]]] = {}  # by bytes: (segment, offset) of homes given up
        self._unsent: list[Segment] = []
        self._described: list[list[Any]] = []

    def home(self, tensor: torch.Tensor) -> Home:
        """The home of ``tensor``, made where it has none of its present form."""
        found = self._homes.get(id(tensor))
        if found is not None and found.tensor() is tensor and found.place[1:] == place_of(tensor, 0)[1:]:
            return found
        if found is not None:
            self._give_up(id(tensor), found.number)
        key, number = id(tensor), next(self._numbers)
        segment, place = self._take(tensor)
        self._described.append([number, segment, place])
        mirror = weakref.ref(self)

        def gone(_: Any) -> None:
            if (alive := mirror()) is not None:
                alive._give_up(key, number)

        home = Home(number, weakref.ref(tensor, gone), place, self._segments[segment].view(place))
        self._homes[key] = home
        return home

    def news(self) -> tuple[list[list[Any]], list[Segment]]:
        """``[number, segment, place]`` of homes and new segments since the last call, for all workers."""
        told = self._described, self._unsent
        self._described, self._unsent = [], []
        return told

    def _take(self, tensor: torch.Tensor) -> tuple[int, Place]:
        """Room for a copy of ``tensor``: the number of its segment and its place there."""
        place = place_of(tensor, 0)
        nbytes = place_end(place)
        if reused := self._free.get(nbytes):
            segment, place[0] = reused.pop()
            return segment, place
        place = place_of(tensor, self._end)
        if not self._segments or place_end(place) > self._segments[-1].nbytes:
            self._segments.append(Segment.new(max(nbytes, _CHUNK)))
            self._unsent.append(self._segments[-1])
            place[0] = 0
        self._end = place_end(place)
        return len(self._segments) - 1, place

    def _give_up(self, key: int, number: int) -> None:
        """The room of a home whose tensor is gone or has another form can be used again."""
        home = self._homes.get(key)
        if home is not None and home.number == number:
            del self._homes[key]
            for index, segment in enumerate(self._segments):
                if segment.data.untyped_storage().data_ptr() == home.view.untyped_storage().data_ptr():
                    nbytes = place_end([0, *home.place[1:]])
                    self._free.setdefault(nbytes, []).append((index, home.place[0]))


class Shelf:
    """The tensors of one graph that are the same on all processors, with their homes, in order.

    ``changing`` tells for each whether a step writes it (a parameter that is trained, a buffer with a new value):
    those are copied before every step. Of the others a copy is made when torch counted a write (`Tensor._version`),
    when they lie elsewhere, or when one of a thousand elements differs: writes through ``.data`` are not counted.
    ``homes``: their numbers.
    """

    def __init__(self, mirror: Mirror, changing: Sequence[bool]):
        self._mirror = mirror
        self._changing = changing
        self.homes: list[int] = []
        self._tensors: list[torch.Tensor] = []
        self._pointers: list[int] | None = None

    def refresh(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Make the homes of ``tensors`` equal to them. Whether `homes` are others than last time."""
        pointers = [tensor.data_ptr() for tensor in tensors]
        same = pointers == self._pointers and all(map(_is, tensors, self._tensors))
        if not same:
            self._place(tensors, pointers)
        if self._always[0]:
            torch._foreach_copy_(*self._always)
        for tensor, home, sample, copied in self._sometimes:
            if tensor._version != home.version or not torch.equal(sample, copied):
                home.version = tensor._version
                home.view.copy_(tensor)
        return not same

    def _place(self, tensors: Sequence[torch.Tensor], pointers: list[int]) -> None:
        self._tensors, self._pointers = list(tensors), pointers
        homes = [self._mirror.home(tensor) for tensor in tensors]
        self.homes = [home.number for home in homes]
        plain = [tensor.detach() for tensor in tensors]
        often = [c or _cheap(t) for c, t in zip(self._changing, plain, strict=True)]
        self._always = (
            [home.view for home, yes in zip(homes, often) if yes],
            [tensor for tensor, yes in zip(plain, often) if yes],
        )
        self._sometimes = [
            (tensor, home, _sample(data), _sample(home.view))
            for tensor, data, home, yes in zip(tensors, plain, homes, often)
            if not yes
        ]


def _is(one: object, other: object) -> bool:
    return one is other


def _cheap(tensor: torch.Tensor) -> bool:
    """Whether a copy is made without looking for changes: of small tensors, and of such as count or sample badly."""
    return tensor.numel() <= _SMALL or not tensor.is_contiguous() or tensor.is_inference()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """About a thousand elements of a contiguous tensor, spread over all of it."""
    return tensor.reshape(-1)[:: max(1, tensor.numel() // _SAMPLE)]
