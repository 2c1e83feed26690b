"""The API reference: a page a package, an entry for each public name."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from docs.generate.pass_pages import PassFacts
from docs.generate.sources import definition, exported, home, path_of, tree


@dataclass(frozen=True)
class ApiPage:
    """The reference of one module: its public names, but those that have a page elsewhere."""

    module: str
    lead: str
    errors: bool = False

    @property
    def page(self) -> str:
        """The name of its page in the documentation."""
        last = "errors" if self.errors else self.module.removeprefix("graphopt.").replace(".", "_")
        return f"api/{last}.md"

    @property
    def title(self) -> str:
        """What stands above it."""
        return "Errors" if self.errors else self.module


PAGES = (
    ApiPage("graphopt", "What most people need. A name is imported when it is first used."),
    ApiPage("graphopt", "Each is explained by message in [troubleshooting](../troubleshooting.md).", errors=True),
    ApiPage("graphopt.passes", "What passes share; the passes have [pages of their own](../passes/index.md)."),
    ApiPage("graphopt.cost_model", "Prices of a step before it is run: [how they are made](../prices.md)."),
    ApiPage("graphopt.schemes", "Ways to run a step: [what they do](../schemes.md), [the choice](../choice.md)."),
    ApiPage(
        "graphopt.elastic",
        "One set of weights, many sizes: [spaces](../elastic.md), [training](../elastic_training.md)",
    ),
    ApiPage("graphopt.exploration", "Search with many workers: [how it works](../exploration.md)."),
    ApiPage("graphopt.visualize", "[Pages, graphs and traces](../show.md)."),
    ApiPage("graphopt.visualize.plots", "[Figures](../plots.md), by matplotlib."),
    ApiPage("graphopt.graph.axes", "[Identities of tensor dimensions](../axes.md)."),
)


def names(each: ApiPage, apart: Sequence[PassFacts]) -> list[tuple[str, str]]:
    """``(module, name)`` of all entries of a page, in the order of ``__all__``."""
    have_pages = {facts.name for facts in apart} if each.module == "graphopt.passes" else set()
    found = []
    for name in exported(each.module):
        where = home(each.module, name)
        of_errors = where == "graphopt.errors"
        if not name.startswith("_") and name not in have_pages and of_errors == each.errors:
            found.append((where, name))
    return found


def page(each: ApiPage, apart: Sequence[PassFacts]) -> str:
    """One page of the reference."""
    entries = []
    for where, name in names(each, apart):
        if _documented(where, name):
            entries.append(f"::: {where}.{name}\n")
    return f"# {each.title}\n\n{each.lead}\n\n" + "\n".join(entries)


def _documented(module: str, name: str) -> bool:
    """Whether the name is a class, a function, or a constant of that module (a text behind it documents it)."""
    if definition(module, name) is not None:
        return True
    targets = [
        target
        for node in tree(path_of(module)).body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)
