"""`Settings`: what `optimize` was asked for beside the task, and the schemes that a user can name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graphopt.errors import GraphoptError
from graphopt.schemes import EXACT, SCHEMES, Scheme


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


def as_schemes(schemes: str | Sequence[str | Scheme]) -> tuple[Scheme, ...] | None:
    """The schemes that a user named, None for ``"auto"``.

    Raises:
        GraphoptError: an unknown name, or something that is no scheme.
    """
    if isinstance(schemes, str):
        if schemes == "auto":
            return None
        schemes = EXACT if schemes == "exact" else (schemes,)
    found = []
    for one in schemes if isinstance(schemes, Iterable) else (schemes,):
        if not isinstance(one, (str, Scheme)):
            raise GraphoptError(f"schemes: expected names or Scheme objects, got {one!r}")
        if isinstance(one, str) and one not in SCHEMES:
            known = "'auto', 'exact', " + ", ".join(SCHEMES)
            raise GraphoptError(f"schemes: unknown name {one!r}; expected {known}, or a Scheme")
        found.append(SCHEMES[one] if isinstance(one, str) else one)
    if not found:
        raise GraphoptError("schemes: got none; expected 'auto' or at least one")
    return tuple(found)
