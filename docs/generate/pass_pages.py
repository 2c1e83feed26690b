"""One page a pass, made from its docstring; and the page that lists them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from docs.generate.sources import (
    PACKAGE,
    class_constant,
    definition,
    exported,
    files,
    home,
    imported_modules,
    nodes,
    path_of,
    tree,
)

TIERS = {
    "Tier.EXACT": "exact: the same bits",
    "Tier.REORDERS": "reorders arithmetic: another rounding, or another function where it says so",
}


@dataclass(frozen=True)
class PassFacts:
    """What the source of a pass says of it, beside its docstring."""

    name: str
    module: str
    node: ast.ClassDef
    users: tuple[str, ...]
    by_default: bool

    @property
    def title(self) -> str:
        """``gradient_liveness`` as words, from the name that the pass has in plans."""
        text = ast.literal_eval(class_constant(self.node, "name") or "''")
        return str(text).replace("_", " ").capitalize()

    @property
    def page(self) -> str:
        """The name of its page in the documentation."""
        return f"passes/{ast.literal_eval(class_constant(self.node, 'name') or '')}.md"

    @property
    def tier(self) -> str:
        """What it promises, in words."""
        return TIERS[class_constant(self.node, "tier") or ""]

    @property
    def summary(self) -> str:
        """The first sentence of its docstring."""
        paragraph = (ast.get_docstring(self.node) or "").partition("\n\n")[0]
        return " ".join(paragraph.split()).partition(". ")[0].removesuffix(".") + "."


@cache
def passes() -> tuple[PassFacts, ...]:
    """The public passes, those that `optimize` runs first, in the order in which they run."""
    running = ["GradientLiveness", *_by_default()]
    found = []
    for name in exported("graphopt.passes"):
        module = home("graphopt.passes", name)
        node = definition(module, name)
        if module.rpartition(".")[2].startswith("_"):
            continue  # `Pass` itself and what passes share
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id == "Pass" for b in node.bases):
            found.append(PassFacts(name, module, node, _users(name), name in running))
    order = {name: k for k, name in enumerate(running)}
    return tuple(sorted(found, key=lambda each: (order.get(each.name, len(order)), each.title)))


def _by_default() -> list[str]:
    """The passes in ``graphopt.step.PASSES``."""
    for node in tree(path_of("graphopt.step")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "PASSES":
            return [
                call.func.id
                for call in ast.walk(node)
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
            ]
    raise LookupError("graphopt.step has no PASSES")


def _users(name: str) -> tuple[str, ...]:
    """The floors above ``passes`` whose files name the pass."""
    found = set()
    for path in files():
        floor = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if floor in ("passes", "__init__") or not any(m.startswith("graphopt.passes") for m in imported_modules(path)):
            continue
        if name in _names(path):
            found.add(floor)
    return tuple(sorted(found))


@cache
def _names(path: Path) -> frozenset[str]:
    """The names that the code of a file reads."""
    return frozenset(node.id for node in nodes(path) if isinstance(node, ast.Name))


def page(facts: PassFacts) -> str:
    """The page of one pass: facts, then what mkdocstrings makes of its docstring."""
    lead = (ast.get_docstring(tree(path_of(facts.module))) or "").partition("\n")[0]
    run = "by `optimize`, on every captured step" if facts.by_default else ""
    run = run or ", ".join(f"by `graphopt.{user}`" for user in facts.users) or "where you call it"
    return f"""# {facts.title}

{lead if len(_siblings(facts)) == 1 else ""}

- **Tier**: {facts.tier}
- **Runs**: {run}
- **Source**: `{facts.module.removeprefix("graphopt.").replace(".", "/")}.py`

::: {facts.module}.{facts.name}
    options:
      heading_level: 2
      members: false
"""


def _siblings(facts: PassFacts) -> list[str]:
    """The public passes of the same file: only where there is one, the module's docstring is on it."""
    return [n for n in exported("graphopt.passes") if home("graphopt.passes", n) == facts.module and n[0].isupper()]


def index(found: Sequence[PassFacts]) -> str:
    """The page that lists the passes."""
    rows: dict[bool, list[str]] = {True: [], False: []}
    for each in found:
        tier = each.tier.partition(":")[0]
        rows[each.by_default].append(
            f"| [{each.name}]({each.page.removeprefix('passes/')}) | {each.summary} | {tier} |"
        )
    head = "| pass | what it does | tier |\n|---|---|---|\n"
    return f"""# Passes

A pass takes a graph and gives a graph, with what it changed, what it left alone, and why. These pages are made from the
docstrings of the passes, so what says why a rewrite is legal stands next to the code that does it.

- **exact**: results are the same bits. `optimize` runs these alone.
- **reorders arithmetic**: results may round differently, or are another function on purpose (a subnet). These run where
  somebody asks for them: a scheme on several processors, an elastic space, you.

```python
import torch
import graphopt
from graphopt.passes import CommonSubexpressions, DeadCode, GradientLiveness, Pipeline

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
batch = torch.randn(5, 4), torch.randint(2, (5,))
graph = graphopt.capture(model, batch, loss=torch.nn.functional.cross_entropy, gradients="all")
head_only = GradientLiveness(trainable=["2.weight", "2.bias"])
result = Pipeline([head_only, CommonSubexpressions(), DeadCode()])(graph)
print(f"{{len(graph)}} -> {{len(result.graph)}} operators")
print(f"{{graph.flops()}} -> {{result.graph.flops()}} FLOPs")
```

## Run by `optimize`

{head}{chr(10).join(rows[True])}

## Run where they are asked for

{head}{chr(10).join(rows[False])}

[Write your own](../extend/pass.md) in one file; [the types](../api/passes.md) that passes share are in the reference.
"""
