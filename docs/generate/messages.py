"""The messages of errors and warnings, read off the places where they are raised."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

from docs.generate.sources import PACKAGE, files, nodes, path_of, tree

HOLE = "…"
"""What stands for a value in a message."""


@cache
def error_classes() -> dict[str, str]:
    """The classes of ``graphopt/errors.py`` with their bases, in the order of the file."""
    return {
        node.name: ast.unparse(node.bases[0])
        for node in tree(path_of("graphopt.errors")).body
        if isinstance(node, ast.ClassDef)
    }


@cache
def messages() -> dict[str, dict[str, str]]:
    """For each class its messages, ``…`` for values, each with the file (``graph/batch.py``) that gives it first."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in files():
        for name, text in _of_file(path):
            found[name].setdefault(text, path.relative_to(PACKAGE).as_posix())
    return dict(found)


def _of_file(path: Path) -> list[tuple[str, str]]:
    """``(class, message)`` for each place in a file that makes an error or gives a warning."""
    found, helpers = [], _helpers(path)
    for node in nodes(path):
        if not isinstance(node, ast.Call):
            continue
        called = _last(node.func)
        if (called == "warn" and any(_last(a) == "GraphoptWarning" for a in node.args)) or called == "_warn":
            name, arguments = "GraphoptWarning", node.args
        elif called in error_classes():
            name, arguments = called, node.args
        elif called in helpers:
            name, arguments = helpers[called], node.args
        else:
            continue
        text = _text(arguments[0]) if arguments else ""
        if re.search(r"\w", text):  # what is only passed on has no words of its own
            found.append((name, text))
    return found


def _helpers(path: Path) -> dict[str, str]:
    """Functions of a file that raise an error with what they are given first: their names, and its class."""
    found = {}
    for function in nodes(path):
        if not isinstance(function, ast.FunctionDef):
            continue
        if len(function.body) > 3:  # helpers are short
            continue
        parameters = [a.arg for a in function.args.args if a.arg != "self"]
        for node in ast.walk(function):
            raised = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(raised, ast.Call) and _last(raised.func) in error_classes() and raised.args:
                given = raised.args[0]
                if isinstance(given, ast.Name) and given.id in parameters[:1]:
                    found[function.name] = _last(raised.func)
    return found


@cache
def all_texts() -> frozenset[str]:
    """All texts in the code of graphopt, with `HOLE` for values: reasons that become messages elsewhere."""
    found = set()
    for path in files():
        for node in nodes(path):
            text = _text(node) if isinstance(node, (ast.Constant, ast.JoinedStr)) else ""
            if len(text.split()) >= 3 and "\n" not in text.strip():  # docstrings of several lines are no reasons
                found.add(text)
    return frozenset(found)


def _last(node: ast.expr) -> str:
    """``warnings.warn`` and ``warn`` are ``warn``."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _text(node: ast.expr) -> str:
    """A message as it is written, with `HOLE` for what is put in when it is made."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return HOLE


def listed(name: str) -> str:
    """The messages of one class as a block that opens, in Markdown."""
    found = messages().get(name, {})
    if not found:
        return ""
    lines = [f'??? note "All messages of {name} ({len(found)})"', ""]
    for text, path in sorted(found.items(), key=lambda item: (item[1], item[0])):
        words = " ".join(text.split()).replace("`", "'")
        lines.append(f"    - `{words}` ({path})")
    return "\n".join(lines) + "\n"
