"""The sources of graphopt as syntax trees: where a public name is defined, its docstring, who imports whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "graphopt"


@cache
def path_of(module: str) -> Path:
    """The file of a module of graphopt. Raises ModuleNotFoundError if there is none."""
    stem = ROOT.joinpath(*module.split("."))
    for path in (stem / "__init__.py", stem.with_suffix(".py")):
        if path.exists():
            return path
    raise ModuleNotFoundError(module)


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file's tree."""
    return tuple(ast.walk(tree(path)))


def files(folder: Path = PACKAGE) -> Iterator[Path]:
    """All Python files of a folder, through the links to ``passes`` and ``cost_model``, in a fixed order."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from files(path)
        elif path.suffix == ".py":
            yield path


def summary(module: str) -> str:
    """The first line of a module's docstring, empty where it has none."""
    return (ast.get_docstring(tree(path_of(module))) or "").partition("\n")[0]


def exported(module: str) -> list[str]:
    """The names in the ``__all__`` of a module, in its order."""
    for node in tree(path_of(module)).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [str(name) for name in ast.literal_eval(node.value)]
    raise LookupError(f"{module} has no __all__")


def home(module: str, name: str) -> str:
    """The module in which ``name``, that ``module`` offers, is defined: imports are followed.

    >>> home("graphopt", "optimize")
    'graphopt.step'
    """
    for node in nodes(path_of(module)):
        if not isinstance(node, ast.ImportFrom) or node.module is None or not node.module.startswith("graphopt"):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                return home(node.module, alias.name)
    return module


def definition(module: str, name: str) -> ast.ClassDef | ast.FunctionDef | None:
    """The class or function of that name in ``module``; None where it is something else (a constant)."""
    for node in tree(path_of(module)).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node
    return None


def class_constant(node: ast.ClassDef, name: str) -> str | None:
    """The source of what a class assigns to ``name`` in its body, None if nothing."""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id == name:
            return ast.unparse(line.value) if line.value is not None else None
    return None


@cache
def imported_modules(path: Path) -> set[str]:
    """The modules of graphopt that a file imports when it runs (imports for type checking do not count)."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "graphopt")
        else:
            waiting += ast.iter_child_nodes(node)
    return {name for name in found if name.startswith("graphopt.")}
