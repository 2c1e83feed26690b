"""`Choice`: one value for each dimension of a space."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from graphopt.elastic.dimension import Value


class Choice(Mapping[str, Value]):
    """One value for each dimension of a space, by name; immutable and hashable. Made by `Space.choice`.

    ``inactive``: dimensions that nothing in this subnet depends on, such as the width inside of a layer that is left
    out. Two choices that differ only there are the same subnet: `key` tells, equality compares every value.

    >>> choice = Choice({"embed": 24, "0.hidden": 64})
    >>> choice["embed"], choice == Choice({"0.hidden": 64, "embed": 24})
    (24, True)
    """

    __slots__ = ("_hash", "_key", "_values", "inactive")

    def __init__(self, values: Mapping[str, Value], inactive: Iterable[str] = ()):
        self._values = dict(values)
        self.inactive = frozenset(inactive)
        self._key: tuple[tuple[str, Value], ...] | None = None
        self._hash: int | None = None

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self._values.items()))
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choice) and self._values == other._values

    def key(self) -> Hashable:
        """The same for two choices of a space that are the same subnet, without inactive dimensions."""
        if self._key is None:
            self._key = tuple((n, v) for n, v in self._values.items() if n not in self.inactive)
        return self._key

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `Space.choice` reads them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._values.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return Choice, (self._values, self.inactive)

    def __repr__(self) -> str:
        inside = ", ".join(f"{n!r}: {v}" + "*" * (n in self.inactive) for n, v in self._values.items())
        return f"Choice({{{inside}}})"
