"""Hashes of what a study is about: its results count for the same space, nets, trial and data alone."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from graphopt.exploration.search_space import ModelFunction, SearchSpace

__all__ = ["differences", "digest_of", "fingerprints"]

_BYTES = 1 << 26
_DEPTH = 6  # objects in objects


def fingerprints(found: SearchSpace, nets: Any, trial: Any, objectives: Any) -> dict[str, str]:
    """By name, what must stay the same between runs of one study.

    See `digest_of` for what counts of an object.
    """
    return {
        "space": found.digest,
        "model": digest_of(nets.build if isinstance(nets, ModelFunction) else nets),
        "trial and data": digest_of(trial),
        "objectives": repr(objectives.signs),
    }


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of what changed."""
    return [name for name in now if name in before and before[name] != now[name]]


def digest_of(given: Any, depth: int = 0) -> str:
    """A hash of what an object means, the same in every process.

    An object may have a ``digest`` of its own: a string, or a method that gives one. For others: modules count by their
    state and their settings; functions and classes by their source (those of torch and Python by their name); a
    `functools.partial` by its function and arguments; plain data and tensors by their values; any other object by its
    class and its attributes, without those whose name begins with ``_``: they are for what changes.
    """
    if given is None or isinstance(given, (bool, int, float, complex, str, bytes)):
        return repr(given) if given is not None else ""
    if depth > _DEPTH:
        return type(given).__qualname__
    inner = depth + 1
    digest = getattr(given, "digest", None) if not isinstance(given, type) else None
    if digest is not None:
        return str(digest() if callable(digest) else digest)
    if isinstance(given, functools.partial):
        return _hashed(f"partial {digest_of(given.func, inner)} {_listed((given.args, given.keywords), inner)}")
    if inspect.isroutine(given) or isinstance(given, type):
        owner = getattr(given, "__self__", None)
        bound = "" if owner is None or inspect.ismodule(owner) else digest_of(owner, inner)
        return _code(given) + bound
    if isinstance(given, (Mapping, Sequence, Set)):
        return _hashed(_listed(given, inner))
    if hasattr(given, "state_dict") and hasattr(given, "named_modules"):
        state = "".join(f"{name}:{tensor_digest(value)};" for name, value in given.state_dict().items())
        settings = "".join(
            f"{name}:{type(part).__qualname__}{_settings(part)};" for name, part in given.named_modules()
        )
        return _hashed(state + settings)
    model = getattr(given, "model", None)
    if model is not None and hasattr(given, "dimensions") and hasattr(model, "state_dict"):  # an elastic space
        return digest_of(model, inner)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.Tensor):
        return tensor_digest(given)
    if isinstance(given, np.ndarray):
        content = b"" if given.dtype.hasobject else np.ascontiguousarray(given).tobytes()
        return _hashed(f"{given.dtype}{given.shape}", content)
    attributes = {name: value for name, value in getattr(given, "__dict__", {}).items() if not name.startswith("_")}
    return _hashed(f"{_code(type(given))} {_listed(attributes, inner)}")


def _code(given: Any) -> str:
    """Of a function or a class."""
    name = f"{getattr(given, '__module__', '')}.{getattr(given, '__qualname__', type(given).__qualname__)}"
    if name.partition(".")[0] in ("torch", "builtins", "_operator", "None"):
        return name  # the study goes on with another version
    try:
        return _hashed(inspect.getsource(given))
    except (OSError, TypeError):  # defined in no file
        compiled = getattr(given, "__code__", None)
        return _hashed(repr(compiled.co_code) if compiled is not None else name)


def _listed(given: Any, depth: int) -> str:
    """The parts of a collection, each by its digest; without an order of their own they are sorted."""
    if isinstance(given, Mapping):
        parts = sorted(f"{digest_of(key, depth)}={digest_of(value, depth)}" for key, value in given.items())
    else:
        parts = [digest_of(part, depth) for part in given]
    return ",".join(sorted(parts) if isinstance(given, Set) else parts)


def _settings(module: Any) -> str:
    """Plain attributes of a module itself; whether it trains is not its meaning."""
    plain = (bool, int, float, str, tuple, type(None))
    kept = {n: v for n, v in vars(module).items() if isinstance(v, plain) and n != "training" and n[0] != "_"}
    return repr(sorted(kept.items(), key=lambda pair: pair[0]))


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
