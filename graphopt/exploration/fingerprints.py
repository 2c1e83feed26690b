"""Hashes of what a study is about: its results count for the same space, nets, trial and data alone."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from graphopt.exploration.search_space import ModelFunction, SearchSpace

__all__ = ["differences", "fingerprints"]

_BYTES = 1 << 26


def fingerprints(found: SearchSpace, nets: Any, trial: Any, objectives: Any) -> dict[str, str]:
    """By name, what must stay the same between runs of one study.

    Objects may have a ``digest`` of their own: a string, or a method that gives one. For others: modules count by
    their state, functions by their source.
    """
    return {
        "space": found.digest,
        "model": _of(nets.build if isinstance(nets, ModelFunction) else nets),
        "trial and data": _of(trial),
        "objectives": repr(objectives.signs),
    }


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of what changed."""
    return [name for name in now if name in before and before[name] != now[name]]


def _of(given: Any) -> str:
    if given is None:
        return ""
    digest = getattr(given, "digest", None)
    if digest is not None:
        return str(digest() if callable(digest) else digest)
    if hasattr(given, "state_dict"):
        return _hashed("".join(f"{name}:{tensor_digest(value)};" for name, value in given.state_dict().items()))
    model = getattr(given, "model", None)
    if model is not None and hasattr(model, "state_dict"):
        return _of(model)
    code = given if inspect.isroutine(given) else type(given)
    try:
        return _hashed(inspect.getsource(code))
    except (OSError, TypeError):  # defined in no file
        compiled = getattr(given, "__code__", None)
        return _hashed(repr(compiled.co_code) if compiled is not None else repr(type(given)))


def tensor_digest(value: Any) -> str:
    """Of a tensor: dtype, shape and its bytes (of more than 64 MiB a part); of anything else its text."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return repr(value)
    flat = value.detach().reshape(-1)
    step = max(1, flat.numel() * flat.element_size() // _BYTES)
    content = flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return _hashed(f"{value.dtype}{tuple(value.shape)}", content)


def _hashed(text: str, content: bytes = b"") -> str:
    return hashlib.blake2b(text.encode() + content, digest_size=12).hexdigest()
