"""What the user says about dimensions: which are fixed, tied, named, and what their choices are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar

from graphopt.elastic.dimension import Dimension, Kind, Value
from graphopt.elastic.handles import Handle, Tied
from graphopt.errors import ElasticError

Sizes: TypeAlias = Sequence[int | float]
D = TypeVar("D", Handle, Dimension)


def matches(pattern: Any, name: str, kind: Kind, where: Sequence[str]) -> bool:
    """Whether a pattern means a dimension: a `Kind` or its word, or a shell pattern (``*.mlp.*``) on its name or on the
    paths of all modules that it reaches."""
    if pattern in tuple(Kind):
        return kind == pattern
    return fnmatchcase(name, pattern) or (bool(where) and all(fnmatchcase(path, pattern) for path in where))


def meant(pattern: Any, several: Iterable[D]) -> list[D]:
    """The dimensions (or handles) that a pattern means: a `Kind` means all of that kind, a string the one of
    this very name, else those that it `matches`. So a name does not mean what is inside of a module of that name too.
    """
    given = list(several)
    alone = [d for d in given if d.name == pattern] if not isinstance(pattern, Kind) else []
    return alone or [d for d in given if matches(pattern, d.name, d.kind, d.where)]


def chosen(argument: str, pattern: Any, handles: Iterable[Handle]) -> list[Handle]:
    """The handles that a pattern means. Raises ElasticError for a pattern that means none."""
    if not isinstance(pattern, str):
        raise ElasticError(f"{argument}: expected a Kind or a pattern on names, got {pattern!r}")
    given = list(handles)
    found = meant(pattern, given)
    if not found:
        names = ", ".join(h.name for h in given[:20]) + (" ..." if len(given) > 20 else "")
        raise ElasticError(f"{argument}: no dimension matches {pattern!r}; there are {names}")
    return found


def tie(handles: Sequence[Handle], tied: Any) -> list[Handle]:
    """The handles with those that are tied as one, in the place of the first.

    ``tied``: patterns, or sequences of patterns; the dimensions that one of them means are one. Or a mapping from the
    name of the one to that. Raises ElasticError for dimensions of different kinds or sizes.
    """
    named = list(tied.items()) if isinstance(tied, Mapping) else [("", group) for group in _several(tied)]
    result = list(handles)
    for name, group in named:
        parts = list(dict.fromkeys(h for p in _several(group) for h in chosen("tied", p, result)))
        made = Tied(name or parts[0].name, parts) if len(parts) > 1 or name else parts[0]
        at = result.index(parts[0])
        result = [h for h in result if h not in parts]
        result.insert(at, made)
    return result


def fix(handles: Sequence[Handle], fixed: Any) -> tuple[list[Handle], list[Handle]]:
    """The handles that are not fixed, and those that are."""
    out = {h for pattern in _several(fixed) for h in chosen("fixed", pattern, handles)}
    return [h for h in handles if h not in out], [h for h in handles if h in out]


def choices_of(handles: Sequence[Handle], wanted: Mapping[Any, Sizes] | None) -> dict[Handle, tuple[Value, ...]]:
    """The choices of each handle: by the last pattern of ``wanted`` that means it, else the defaults of its kind."""
    by_handle: dict[Handle, Sizes] = {}
    if wanted is not None and not isinstance(wanted, Mapping):
        raise ElasticError(f"choices: expected a mapping from patterns or kinds to sizes, got {wanted!r}")
    for pattern, sizes in (wanted or {}).items():
        if isinstance(sizes, (str, int, float)) or not isinstance(sizes, Sequence):
            raise ElasticError(f"choices: expected a sequence of sizes for {pattern!r}, got {sizes!r}")
        by_handle.update(dict.fromkeys(chosen("choices", pattern, handles), sizes))
    return {handle: handle.choices(by_handle.get(handle)) for handle in handles}


def rename(handles: Sequence[Handle], names: Mapping[str, str] | None) -> dict[Handle, str]:
    """The name of each handle; ``names``: new ones by pattern, each for one dimension."""
    result = {h: h.name for h in handles}
    for pattern, name in (names or {}).items():
        found = chosen("names", pattern, handles)
        if len(found) > 1:
            raise ElasticError(f"names: {pattern!r} means {len(found)} dimensions: {', '.join(h.name for h in found)}")
        result[found[0]] = name
    if twice := {n for n in result.values() if list(result.values()).count(n) > 1}:
        raise ElasticError(f"names: two dimensions are called {min(twice)!r}")
    return result


def _several(patterns: Any) -> list[Any]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def value_of(dimension: Dimension, given: Any) -> Value:
    """A value that the user gave for a dimension: one of its choices, or a share of its size (the nearest choice).

    Raises ElasticError for what it cannot be.
    """
    if isinstance(given, list):
        given = tuple(given)
    if isinstance(given, float) and 0 <= given <= 1:
        sizes = [(abs(_count(c) - given * dimension.size), c) for c in dimension.choices]
        return min(sizes, key=lambda pair: pair[0])[1]
    if not dimension.admits(given):
        raise ElasticError(
            f"choice: {dimension.name} cannot be {given!r}; it can be {', '.join(map(str, dimension.choices))}"
            + (", or a tuple of indices of runs" if dimension.kind is Kind.DEPTH else "")
        )
    return dimension.normal(given)


def _count(value: Value) -> int:
    return value if isinstance(value, int) else len(value)
