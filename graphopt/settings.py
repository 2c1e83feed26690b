"""`Settings`: what `optimize` was asked for beside the task, and the schemes that a user can name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graphopt.errors import GraphoptError
from graphopt.schemes import EXACT, SCHEMES, SHARED_SCHEMES, Scheme


@dataclass(frozen=True)
class Settings:
    """What `optimize` was asked for beside the task: which schemes, and what bounds them.

    ``schemes`` is None for ``"auto"``. ``memory`` in bytes, ``steps`` in whole training steps.
    """

    schemes: tuple[Scheme, ...] | None = None
    processors: int | None = None
    steps: int | None = None
    precision: str | None = None
    batch_norm: str = "synchronized"
    memory: int | None = None


def as_schemes(
    schemes: str | Sequence[str | Scheme], processors: int | None = None, batch_norm: str = "synchronized"
) -> tuple[Scheme, ...] | None:
    """The schemes that a user named, None for ``"auto"``. Those on several processors get ``processors`` and
    ``batch_norm``; `Scheme` objects are taken as they are.

    Raises:
        GraphoptError: an unknown name, something that is no scheme, or a scheme on several processors without their
            number.

    >>> [scheme.processors for scheme in as_schemes(["data parallel", "hybrid"], processors=4)]
    [4, 4]
    """
    if isinstance(schemes, str):
        if schemes == "auto":
            return None
        schemes = EXACT if schemes == "exact" else (schemes,)
    found = []
    for one in schemes if isinstance(schemes, Iterable) else (schemes,):
        if not isinstance(one, (str, Scheme)):
            raise GraphoptError(f"schemes: expected names or Scheme objects, got {one!r}")
        found.append(_named(one, processors, batch_norm) if isinstance(one, str) else one)
    if not found:
        raise GraphoptError("schemes: got none; expected 'auto' or at least one")
    return tuple(found)


def _named(name: str, processors: int | None, batch_norm: str) -> Scheme:
    if name in SCHEMES:
        return SCHEMES[name]
    if name not in SHARED_SCHEMES:
        known = "'auto', 'exact', " + ", ".join([*SCHEMES, *SHARED_SCHEMES])
        raise GraphoptError(f"schemes: unknown name {name!r}; expected {known}, or a Scheme")
    if processors is None or processors < 2:
        raise GraphoptError(
            f"processors: got {processors}, but schemes={name!r} runs on several; expected at least 2, as in "
            f"optimize(..., schemes={name!r}, processors=2)"
        )
    return SHARED_SCHEMES[name](processors, batch_norm)
