"""Names of axes: from their kind and their first carrier, so that two captures and two processes give the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

from graphopt.graph.axes.axis import Kind, Place

Key = TypeVar("Key")

_ALONE = {
    Kind.BATCH: "batch", Kind.SEQUENCE: "seq", Kind.EMBEDDING: "embed", Kind.VOCABULARY: "vocab",
    Kind.CLASSES: "classes", Kind.INPUT: "input",
}  # fmt: skip
"""Kinds of which a model usually has one: the first axis of the kind has the plain name."""


def names_of(axes: Mapping[Key, tuple[Kind, Sequence[Place]]]) -> dict[Key, str]:
    """A name for each axis, given its kind and places in the order of the graph's inputs. No two are equal.

    The first axis of a kind that a model usually has once is called by the kind alone: ``batch``, ``embed``. Others are
    called after the module around their first carrier, or where that is ambiguous after the carrier itself:
    ``layers.3.mlp.hidden``, ``layers.3.mlp.gate.hidden``.
    """
    names: dict[Key, str] = {}
    used: set[str] = set()
    for key, (kind, _) in axes.items():
        if kind in _ALONE and _ALONE[kind] not in used:
            names[key] = _ALONE[kind]
            used.add(names[key])
    rest = {key: value for key, value in axes.items() if key not in names}
    wanted = Counter(_candidates(kind, places)[0] for kind, places in rest.values())
    for key, (kind, places) in rest.items():
        candidates = _candidates(kind, places)
        name = next((c for c in candidates if c not in used and wanted[c] <= 1), candidates[-1])
        number, plain = 2, name
        while name in used:
            name = f"{plain}.{number}"
            number += 1
        names[key] = name
        used.add(name)
    return names


def _candidates(kind: Kind, places: Sequence[Place]) -> list[str]:
    word = _ALONE.get(kind, kind.replace(" ", "_"))
    carrier = places[0]
    module = carrier.name.rpartition(".")[0]  # of the parameter
    around = module.rpartition(".")[0]
    if not module:
        return [f"{carrier.name}.{word}"]
    if kind in (Kind.HIDDEN, Kind.HEADS, Kind.HEAD_SIZE, Kind.EMBEDDING) and around:
        return [f"{around}.{word}", f"{module}.{word}"]
    return [f"{module}.{word}"]
