"""Random state of a trial: its own, whatever ran before it in its process, and whoever imports torch when."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import numpy as np

__all__ = ["seeded"]


class _WhenImported(MetaPathFinder):
    """Seeds torch right after it was imported. It takes a second to import: trials that need none go without."""

    def __init__(self, seed: int):
        self._seed = seed

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute, seed = spec.loader.exec_module, self._seed

            def execute_and_seed(module: ModuleType) -> None:
                execute(module)
                module.manual_seed(seed)

            spec.loader.exec_module = execute_and_seed  # type: ignore[method-assign]
        return spec


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's generators begin at ``seed``; torch's also if it is first imported in here."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    waits = None
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    else:
        waits = _WhenImported(seed)
        sys.meta_path.insert(0, waits)
    try:
        yield
    finally:
        if waits in sys.meta_path:
            sys.meta_path.remove(waits)
