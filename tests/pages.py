"""The pages of the documentation, as tests read them: their links, headings and examples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TOP = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "notebooks/README.md")]

_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_SETUP = re.compile(r"<!-- setup\n(.*?)-->", re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]\n]*(?:\n[^\]\n]+)?\]\(([^)\s]+)\)|<(https?://[^>\s]+)>")


def pages() -> list[Path]:
    """All pages of ``docs``, in a fixed order."""
    return sorted(path for path in DOCS.rglob("*.md") if "generate" not in path.parts)


@dataclass(frozen=True)
class Example:
    """A block of Python on a page: its code (with what a comment ``<!-- setup ... -->`` before it says), and the output
    that the page shows right behind it, None where it shows none."""

    code: str
    output: str | None


def examples(text: str) -> Iterator[Example]:
    """The examples of a page, from its top."""
    fences = list(_FENCE.finditer(text))
    end = 0
    for fence, behind in zip(fences, [*fences[1:], None]):
        if fence[2].strip() != "python":
            continue
        setup = "".join(_SETUP.findall(text, end, fence.start()))
        shown = None
        if behind is not None and not behind[2].strip() and not text[fence.end() : behind.start()].strip():
            shown = behind[3]
        yield Example(setup + fence[3], shown)
        end = fence.end()


def prose(text: str) -> str:
    """A page without its blocks of code, code in lines, and comments."""
    return re.sub(r"<!--.*?-->|`[^`\n]*`", "", _FENCE.sub("", text), flags=re.DOTALL)


def links(text: str) -> list[str]:
    """The targets of all links of a page."""
    return [found[1] or found[2] for found in _LINK.finditer(prose(text))]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them (letters, digits, ``-`` and ``_``)."""
    titles = re.findall(r"^#+ +(.+?) *$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
