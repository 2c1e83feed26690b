"""Folding: the operators of a step as a tree of module paths, so that no level has more than a person can read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

MOST = 60
"""Operators of one column, or groups, that are shown on one level."""

FORWARD, BACKWARD, UPDATE = 0, 1, 2
"""Columns of the page."""


class Spot(NamedTuple):
    """Where an operator belongs: column, module path, source line, and its word (none for inputs and constants, which
    stand ``at`` the operator that reads them first)."""

    column: int
    module: str
    source: str
    word: str
    at: int | None = None


@dataclass(eq=False)
class Group:
    """A box of the page. ``kind``: ``module``, ``line`` (operators of one source line beside submodules), ``part`` (a
    piece of a level that is too long) or ``update``. ``members``: indices of the operators directly in it. ``behind``:
    of a line, the first operator of the submodule that comes before it."""

    label: str
    path: str
    kind: str
    children: list[Group] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    behind: float | None = None

    def all_members(self) -> list[int]:
        """All operators in it."""
        return self.members + [i for child in self.children for i in child.all_members()]


def fold(spots: Sequence[Spot]) -> Group:
    """The tree of operators; indices are those of ``spots``, which are in the order of execution.

    A module's operators are its members where it has no submodules; beside submodules they are grouped by source line.
    Levels with more than `MOST` entries are divided into parts. Chains of single children become one group.
    """
    root, update = Group("step", "", "module"), Group("update", "", "update")
    modules: tuple[dict[str, Group], dict[str, Group]] = ({"": root}, {"": update})
    for i, spot in enumerate(spots):
        _module(modules[spot.column == UPDATE], spot.module).members.append(i)
    _finish(root, spots)
    if update.children or update.members:
        _finish(update, spots)
        root = root if root.children else Group("step", "", "module", [root] if root.members else [])
        root.children.append(update)
    return root


def _module(modules: dict[str, Group], path: str) -> Group:
    if path not in modules:
        above, _, last = path.rpartition(".")
        modules[path] = Group(last, path, "module")
        _module(modules, above).children.append(modules[path])
    return modules[path]


def _finish(group: Group, spots: Sequence[Spot]) -> None:
    for child in group.children:
        _finish(child, spots)
    if group.children and group.members:
        lines = _lines(group, spots)
        for line in lines:
            _divide_members(line, spots)
        group.children += lines
        group.members = []
    _divide_members(group, spots)
    order = {id(child): _first(child, spots) for child in group.children}
    group.children.sort(key=lambda child: order[id(child)])
    while group.kind == "module" and len(group.children) == 1 and group.children[0].kind == "module" and group.path:
        (only,) = group.children
        group.label, group.path = f"{group.label}.{only.label}", only.path
        group.children, group.members = only.children, only.members
    if len(group.children) > MOST:
        group.children = [
            Group(f"{part[0].label} … {part[-1].label}", group.path, "part", part)
            for part in _pieces(group.children, MOST // 3)
        ]


def _lines(group: Group, spots: Sequence[Spot]) -> list[Group]:
    """The operators beside submodules, by source line, and by how many submodules come before them.

    Backward runs the other way round: what it comes to before a submodule stands behind it in forward. A submodule
    without backward is one that is not trained; those come first.
    """
    firsts: tuple[list[float], list[float]] = ([], [])
    for child in group.children:
        operators = [i for i in child.all_members() if spots[i].word]
        for column, found in zip((FORWARD, BACKWARD), firsts):
            found.append(min((i for i in operators if spots[i].column == column), default=inf))
    forward, backward = map(sorted, firsts)
    lines: dict[tuple[str, int], Group] = {}
    for i in group.members:
        at = spots[i].at
        at = i if at is None else at
        back = spots[i].column == BACKWARD
        before = len(backward) - bisect_right(backward, at) if back else bisect_right(forward, at)
        line = lines.setdefault((spots[i].source, before), Group("", group.path, "line"))
        line.members.append(i)
        line.behind = forward[before - 1] if before else -1.0
    for (source, _), line in lines.items():
        words, place = _words(line.members, spots), source.rpartition("/")[2]
        line.label = "  ".join(filter(None, (words, place))) or "inputs"
    return list(lines.values())


def _divide_members(group: Group, spots: Sequence[Spot]) -> None:
    """Parts of a long run of operators: the first of forward beside the last of backward, which belong together."""
    columns: tuple[list[int], list[int], list[int]] = ([], [], [])
    for i in group.members:
        columns[spots[i].column].append(i)
    if max(map(len, columns)) <= MOST:
        return
    count = -(-max(map(len, columns)) // (MOST // 2))
    forward, backward, update = (_shares(column, count) for column in columns)
    for k in range(count):
        members = forward[k] + backward[count - 1 - k] + update[k]
        if members:
            label = f"part {k + 1} of {count}: {_words(members, spots)}"
            group.children.append(Group(label, group.path, "part", members=sorted(members)))
    group.members = []


def _shares(items: list[int], count: int) -> list[list[int]]:
    """Consecutive shares of nearly the same length."""
    return [items[len(items) * k // count : len(items) * (k + 1) // count] for k in range(count)]


def _pieces(items: list[Group], length: int) -> list[list[Group]]:
    return [items[at : at + length] for at in range(0, len(items), length)]


def _first(group: Group, spots: Sequence[Spot]) -> float:
    """Where a group stands among others: by its first forward operator, or behind which of the others it comes."""
    members = group.all_members()
    operators = [i for i in members if spots[i].word] or members
    forward = [i for i in operators if spots[i].column != BACKWARD]
    if forward:
        return min(forward)
    return 2 * len(spots) - max(operators, default=0) if group.behind is None else group.behind + 0.5


def _words(members: Sequence[int], spots: Sequence[Spot], most: int = 3) -> str:
    """The operators of a group in a few words: those of forward first."""
    ordered = sorted(members, key=lambda i: spots[i].column)
    words = list(dict.fromkeys(spots[i].word for i in ordered if spots[i].word))
    return ", ".join(words[:most]) + (" …" if len(words) > most else "")
