"""`Kept`: what is made once and kept, up to a limit: the one that was used longest ago goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")

LIMIT = 256
"""How many subnets, codes and joint graphs of patterns a supergraph keeps, of each."""


class Kept(Generic[V]):
    """Values by key, ``limit`` of them at most.

    >>> kept = Kept(2)
    >>> for key in ("a", "b", "a", "c"):
    ...     if key not in kept:
    ...         kept[key] = key.upper()
    ...     value = kept[key]
    >>> "a" in kept, "b" in kept, len(kept)
    (True, False, 2)
    """

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __getitem__(self, key: Hashable) -> V:
        self._values.move_to_end(key)
        return self._values[key]

    def __setitem__(self, key: Hashable, value: V) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self.limit:
            self._values.popitem(last=False)

    def __len__(self) -> int:
        return len(self._values)
