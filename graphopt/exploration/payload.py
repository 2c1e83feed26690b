"""What a child process needs to begin: how to import as this process does, and the search itself, as pickle.

`of_here` is for processes of this machine: the user's script is imported there as `multiprocessing` does it. `of_afar`
is for those of other machines, which need not have the script: what it defines travels as code (Ray's cloudpickle).
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from multiprocessing import current_process, process, spawn
from multiprocessing.spawn import get_preparation_data
from pathlib import Path
from typing import Any

from graphopt.errors import ExplorationError

__all__ = ["load", "of_afar", "of_here", "write"]


def of_here(setup: Any) -> bytes:
    """For processes of this machine. Raises ExplorationError where ``setup`` cannot be sent to another process, with
    what to do about it."""
    content = _pickled(
        setup,
        pickle.dumps,
        "functions of a module or of the script, no lambdas and nothing made inside a function; or use on='inline'",
    )
    head = _head()
    if b"__main__" in content:
        main = sys.modules["__main__"]
        if getattr(main, "__file__", None) is None and getattr(main, "__spec__", None) is None:
            raise ExplorationError(
                "the search cannot be sent to its workers: trial, predictor or nets were defined in an interactive "
                "session; put them into a file and import it, or use on='inline'"
            )
        # Without the key of multiprocessing's own connections, which must not be written down.
        head["main"] = {k: v for k, v in get_preparation_data("graphopt exploration").items() if k != "authkey"}
    return pickle.dumps(head) + content


def of_afar(setup: Any, dumps: Callable[[Any], bytes]) -> bytes:
    """For processes of any machine that has the modules which are imported here. ``dumps``: that of cloudpickle.

    Raises ExplorationError as `of_here`.
    """
    content = _pickled(setup, dumps, "modules that all machines have may be named, the rest travels as code")
    return pickle.dumps(_head() | {"afar": True}) + content


def _head() -> dict[str, Any]:
    if getattr(current_process(), "_inheriting", False):
        raise ExplorationError(
            "a search was begun while a worker imported the script; let the script begin it under "
            "`if __name__ == '__main__':`"
        )
    return {"sys_path": list(sys.path), "directory": os.getcwd(), "main": None, "afar": False}


def _pickled(setup: Any, dumps: Callable[[Any], bytes], expected: str) -> bytes:
    try:
        return dumps(setup)
    except Exception as error:
        raise ExplorationError(
            f"the search cannot be sent to its workers: {type(error).__name__}: {error}. Trial, predictor and nets "
            f"must be picklable: {expected}"
        ) from error


def write(path: Path, payload: bytes) -> None:
    """Write a payload, whole or not at all, for any number of children."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(payload)
        os.replace(part, path)
    except OSError as error:
        raise ExplorationError(f"the search cannot be sent to its workers: {path.parent}: {error}") from error


def load(path: str) -> Any:
    """In the child: import as the master does, then give what was sent."""
    with open(path, "rb") as file:
        head = pickle.load(file)
        if head["afar"]:  # this machine's own packages come first; the master's folders may be here too
            sys.path += [folder for folder in head["sys_path"] if folder not in sys.path]
            if os.path.isdir(head["directory"]):
                os.chdir(head["directory"])
        else:
            sys.path[:] = head["sys_path"]
            os.chdir(head["directory"])
        if head["main"] is not None:
            # As multiprocessing does: the user's script is imported under another name than __main__. What it does
            # outside of its guard is done again; a search that begins there would begin in each worker.
            process.current_process()._inheriting = True  # type: ignore[attr-defined]
            spawn.prepare(head["main"])
            del process.current_process()._inheriting  # type: ignore[attr-defined]
        return pickle.load(file)
