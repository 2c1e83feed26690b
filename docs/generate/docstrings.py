"""Docstrings as Markdown: literal blocks and interactive examples become fenced code."""

from __future__ import annotations

import re
import textwrap

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")


def to_markdown(text: str) -> str:
    r"""A docstring of this library, dedented, as Markdown.

    ``::`` opens an indented block that is shown as it is, ``>>>`` an interactive example up to the next empty line;
    both may stand inside of an indented section.

    >>> print(to_markdown("One.\n\nBefore::\n\n    %a = f(%x)\n"), end="")
    One.
    <BLANKLINE>
    Before:
    <BLANKLINE>
    ```text
    %a = f(%x)
    ```
    """
    lines = _ROLE.sub(r"`\1`", text).splitlines()
    found: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        indent = _indent(line)
        if line.lstrip().startswith(">>>"):
            end = at
            while end < len(lines) and lines[end].strip():
                end += 1
            found += _fenced("pycon", lines[at:end], indent)
            at = end
        elif line.rstrip().endswith("::"):
            end = at + 1
            while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > indent):
                end += 1
            words = line.rstrip().removesuffix(":")
            found += [words] if words.strip() != ":" else []
            found += ["", *_fenced("text", _stripped(lines[at + 1 : end]), indent), ""]
            at = end
        else:
            found.append(line)
            at += 1
    return "\n".join(found).rstrip() + "\n" * text.endswith("\n")


def split_entries(text: str) -> str:
    r"""An entry for each name where one speaks of several: griffe knows parameters one by one.

    >>> print(split_entries("Args:\n    low, high: bounds,\n        in seconds.\n    name: of it.\n"), end="")
    Args:
        low: bounds,
            in seconds.
        high: bounds,
            in seconds.
        name: of it.
    """
    found: list[str] = []
    lines = text.splitlines()
    at = 0
    inside = False
    while at < len(lines):
        line = lines[at]
        if line and not line[0].isspace():
            inside = line.rstrip() in ("Args:", "Attributes:")
        names = re.match(r"( +)((?:\w+, )+\w+)(: .*)", line) if inside else None
        end = at + 1
        if names is None:
            found.append(line)
        else:
            while end < len(lines) and lines[end].strip() and _indent(lines[end]) > len(names[1]):
                end += 1
            for name in names[2].split(", "):
                found += [f"{names[1]}{name}{names[3]}", *lines[at + 1 : end]]
        at = end
    return "\n".join(found) + "\n" * text.endswith("\n")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _stripped(lines: list[str]) -> list[str]:
    """Without empty lines at both ends."""
    return "\n".join(lines).strip("\n").splitlines()


def _fenced(language: str, lines: list[str], indent: int) -> list[str]:
    block = textwrap.dedent("\n".join(lines)).splitlines()
    return [" " * indent + line if line else "" for line in (f"```{language}", *block, "```")]
