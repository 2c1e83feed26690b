"""How a study begins or goes on: on file or in memory, with what it is about checked against what it was about."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt.errors import ExplorationError, StoreError
from graphopt.exploration.fingerprints import differences, fingerprints
from graphopt.exploration.outcome import Objectives
from graphopt.exploration.search_space import SearchSpace
from graphopt.exploration.store import Store
from graphopt.exploration.study import space_to_meta
from graphopt.exploration.study_file import Event

__all__ = ["Opened", "open_for"]

_MODES = ("auto", "never", "must", "fork", "backup", "accept")


class Opened:
    """A study that can be written to. ``events``: what it holds; ``seed``: the one it was begun with."""

    def __init__(self, store: Store | None, meta: Mapping[str, Any]):
        self._store = store
        self.path = store.path if store is not None else None
        self.events = store.events if store is not None else []
        known = store.meta.get("study") if store is not None else None
        self.seed: int | None = known["search"]["seed"] if known else None
        if store is not None and known is None:
            store.add([], {"study": {**meta, "begun": time.time()}})

    def write(self, events: list[Event]) -> None:
        """Keep events; see `Store.add`."""
        if self._store is not None:
            self._store.add(events)

    def pause(self, seconds: float) -> None:
        """The run ends, as well as it can: after an error the store may not take any more."""
        if self._store is not None:
            try:
                self._store.add([Event("pause", None, {"seconds": round(seconds, 3)})])
            except StoreError:
                pass  # the error that ended the run is the one to be told

    def close(self) -> None:
        """Close the file."""
        if self._store is not None:
            self._store.close()


def open_for(
    path: Path | None,
    resume: str,
    durable: bool,
    found: SearchSpace,
    nets: Any,
    trial: Any,
    objectives: Objectives,
    budget: Mapping[str, float],
    search: Mapping[str, Any],
) -> Opened:
    """Open the study at ``path``, or one in memory.

    Raises StoreError where the file cannot be used, or is of another space, model, trial or data.
    """
    if resume not in _MODES:
        raise ExplorationError(f"resume: expected one of {', '.join(_MODES)}, got {resume!r}")
    now = fingerprints(found, nets, trial, objectives)
    meta = {
        "fingerprints": now, "knobs": space_to_meta(found), "signs": objectives.signs, "budget": dict(budget),
        "search": dict(search),
    }  # fmt: skip
    if path is None:
        return Opened(None, meta)
    if resume == "fork" and path.exists():
        path = _fork(path)
    if resume == "never" and path.exists():
        raise StoreError(f"{path} is there already; resume='auto' goes on with it, resume='fork' begins beside it")
    if resume == "must" and not path.exists():
        raise StoreError(f"{path}: there is no study to go on with")
    store = Store(path, durable=durable, damaged=resume if resume in ("backup", "accept") else "refuse")
    try:
        if "study" in store.meta:
            _require_same(path, store.meta["study"], now, search)
        return Opened(store, meta)
    except BaseException:
        store.close()
        raise


def _require_same(path: Path, known: Mapping[str, Any], now: Mapping[str, str], search: Mapping[str, Any]) -> None:
    if changed := differences(known["fingerprints"], now):
        raise StoreError(
            f"{path} is a study of something else: {' and '.join(changed)} changed since it was begun, and results of "
            "both would be mixed. Name another store, or begin anew beside it with resume='fork'"
        )
    before = known["search"]
    if (before["window"] is None) != (search["window"] is None) or (
        search["window"] is not None and before != dict(search)
    ):
        raise StoreError(
            f"{path} was begun with {before}, now {dict(search)} is asked for: a reproducible search goes on as it was "
            "begun. Use the same, or begin anew beside it with resume='fork'"
        )


def _fork(path: Path) -> Path:
    number = 1
    while (other := path.with_name(f"{path.stem}.fork-{number}{path.suffix}")).exists():
        number += 1
    return other
