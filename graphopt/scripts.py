"""`module_of`: the module that a command is told, by its name or as a script."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from graphopt.errors import GraphoptError

__all__ = ["module_of"]


def module_of(place: str) -> ModuleType:
    """The module ``package.module``, or the script ``path/file.py``.

    The working directory counts as a place of modules. A script is imported under its own name, and its folder counts
    as a place of modules too: so it finds what stands beside it, and other processes find its functions.

    Raises GraphoptError where there is no such module or file; and what importing it raises.
    """
    if not place.endswith(".py"):
        _also_from(os.getcwd())
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is not None and (place == error.name or place.startswith(error.name + ".")):
                raise GraphoptError(f"there is no module {place!r} here or on the Python path") from None
            raise
    path = Path(place)
    if not path.is_file():
        raise GraphoptError(f"there is no file {place}")
    _also_from(str(path.parent.absolute()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # as an import does: classes of it can be looked up
    try:
        spec.loader.exec_module(module)
    except BaseException:  # no half of a module stays
        del sys.modules[path.stem]
        if before is not None:
            sys.modules[path.stem] = before
        raise
    return module


def _also_from(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)
