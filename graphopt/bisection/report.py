"""`Bisection`: what a bisection found, for a person, a program, and whoever is asked for help."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from difflib import unified_diff
from os import PathLike
from pathlib import Path
from typing import Any

from graphopt.bisection.location import Location
from graphopt.errors import GraphoptError
from graphopt.graph.training_graph import TrainingGraph
from graphopt.plan import duration

CAPTURE = "capture"
"""The name of what goes before all passes."""


@dataclass(frozen=True)
class Tested:
    """One thing that was tried. ``wrong``: what is wrong with it, None if nothing; seconds of the trial."""

    name: str
    seconds: float
    wrong: str | None = None


@dataclass(frozen=True)
class Bisection:
    """What `bisect` found.

    Attributes:
        tested: what was tried, in order; the last one is the first that is wrong, if one is.
        location: where a pass went wrong, if that could be told.
        graphs: before and after that pass, where there are two.
        about: the step, and versions.
    """

    tested: tuple[Tested, ...]
    location: Location | None = None
    graphs: tuple[TrainingGraph, TrainingGraph] | None = field(default=None, repr=False)
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def culprit(self) -> str | None:
        """The name of the first pass after which something is wrong; ``capture``, ``lowering`` or a form of the step
        where it is none of the passes; None if all is right."""
        return None if self.wrong is None else self.tested[-1].name

    @property
    def wrong(self) -> str | None:
        """What is wrong then, as a sentence."""
        return self.tested[-1].wrong if self.tested else None

    def explain(self) -> str:
        """The result as text."""
        width = max(len(one.name) for one in self.tested)
        lines = [f"the step of {self.about.get('model', 'the model')}, checked after each pass:"]
        for one in self.tested:
            mark, said = ("->", one.wrong) if one.wrong else ("  ", "right")
            lines.append(f"{mark} {one.name.ljust(width)}  {duration(one.seconds):>7}  {said}")
        if self.culprit is None:
            return "\n".join([*lines, "nothing is wrong"])
        lines.append(f"the first that is wrong: {self.culprit}: {self.wrong}")
        if self.location is not None:
            lines += _place(self.location)
        return "\n".join([*lines, "", "for a bug report attach", *(f"  - {what}" for what in self.attachments())])

    def attachments(self) -> list[str]:
        """What somebody needs who is asked for help."""
        told = ", ".join(f"{name} {value}" for name, value in self.about.items() if name != "model" and value)
        found = ["this text", f"versions: {told}"]
        if self.graphs is not None:
            found.append("what save(folder) writes (`graphopt bisect --out folder`): the graphs before and after it")
        return [*found, "the model, its batch and its optimizer as a function that builds them, or a smaller one"]

    def to_dict(self) -> dict[str, Any]:
        """As plain data (JSON-able)."""
        return {
            "culprit": self.culprit,
            "wrong": self.wrong,
            "tested": [asdict(one) for one in self.tested],
            "location": None if self.location is None else asdict(self.location),
            "about": dict(self.about),
        }

    def save(self, folder: str | PathLike[str]) -> list[Path]:
        """Write what to attach to a bug report; the paths of the files.

        Raises:
            OSError: the folder cannot be written.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        texts = {"report.txt": self.explain() + "\n", "report.json": json.dumps(self.to_dict(), indent=1)}
        if self.graphs is not None:
            before, after = (graph.text() + "\n" for graph in self.graphs)
            lines = unified_diff(before.splitlines(), after.splitlines(), "before", str(self.culprit), lineterm="")
            texts |= {"before.txt": before, "after.txt": after, "changes.diff": "\n".join(lines) + "\n"}
        written = []
        for name, text in texts.items():
            (place / name).write_text(text)
            written.append(place / name)
        for name, graph in zip(("before.graph", "after.graph"), self.graphs or ()):
            try:
                graph.save(place / name)
                written.append(place / name)
            except GraphoptError:  # a function of the user's is in it, which its text names
                pass
        return written

    def __str__(self) -> str:
        return self.explain()


def _place(found: Location) -> list[str]:
    where = "  ".join(filter(None, (found.module, found.source)))
    lines = [
        f"where: %{found.node}{f'  [{where}]' if where else ''}: {found.difference}; it stands for %{found.stands_for}"
    ]
    lines += ["  before:", *(f"    {line}" for line in found.before), "  after:"]
    lines += [f"    {line}" for line in found.after]
    if found.changes:
        lines += ["  what the pass says of it:", *(f"    {what}" for what in found.changes)]
    return lines
