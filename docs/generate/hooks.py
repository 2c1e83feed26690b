"""What ``mkdocs build`` calls: generated pages, their places in the navigation, texts that the sources know."""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # mkdocs loads this file by its path

from docs.generate import api_pages, floors, messages, pass_pages  # noqa: E402

SOURCES = Path(os.environ.get("GRAPHOPT_DOCS_SOURCES", ROOT / "build" / "docs-sources"))
"""A copy of the package with real folders, as griffe follows no links (``passes``, ``cost_model``). Builds that
run at once need one each; ``mkdocs.yml`` reads the same variable."""

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?!https?:|#|docs/)([^)]+)\)")

_UP = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)")
_FENCE = re.compile(r"^```\n.*?^```$", re.DOTALL | re.MULTILINE)
_PAGE = re.compile(r"\[([\w./]+\.md)\]\([\w./#-]+\)")


def on_config(config: Any) -> Any:
    """Copies the sources that mkdocstrings reads, and puts the generated pages into the navigation."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.js", "*.css", "*.html")
    shutil.copytree(ROOT / "graphopt", SOURCES / "graphopt", ignore=ignored)
    config.nav = _filled(config.nav)
    return config


def _filled(entry: Any) -> Any:
    """An entry of the navigation; ``passes/`` and ``api/`` stand for what is generated there."""
    if isinstance(entry, list):
        return [_filled(one) for one in entry]
    if isinstance(entry, dict):
        return {title: _filled(inner) for title, inner in entry.items()}
    if entry == "passes/":
        return ["passes/index.md", *({each.name: each.page} for each in pass_pages.passes())]
    if entry == "api/":
        return [{each.title: each.page} for each in api_pages.PAGES]
    return entry


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    found = pass_pages.passes()
    pages = {"passes/index.md": pass_pages.index(found)}
    pages |= {each.page: pass_pages.page(each) for each in found}
    pages |= {each.page: api_pages.page(each, found) for each in api_pages.PAGES}
    pages |= {f"{name.lower()}.md": _of_the_top(f"{name}.md") for name in ("CHANGELOG", "CONTRIBUTING")}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def _of_the_top(name: str) -> str:
    """A page that stands beside ``docs``: links into ``docs`` are kept, those to other files become plain text."""
    return _OUTSIDE.sub(r"\1", (ROOT / name).read_text()).replace("](docs/", "](")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Lists the messages of a class where a page asks for them, ``<!-- messages: BatchError -->``; takes links out of
    blocks of code, in which they are no links, and out of the site those to files that are not on it."""
    if page.file.src_uri == "troubleshooting.md":
        page.meta["search"] = {"boost": 4}  # who searches for a message finds it there first
    if page.file.src_uri == "models.md":
        page.meta["hide"] = ["toc"]  # its tables are wide
    markdown = _UP.sub(lambda found: _inside(found, page.file.src_uri), markdown)
    markdown = _FENCE.sub(lambda found: _PAGE.sub(r"\1", found[0]), markdown)
    return re.sub(r"<!-- messages: (\w+) -->", lambda found: messages.listed(found[1]), markdown)


def _inside(link: re.Match[str], uri: str) -> str:
    """A link of the page ``uri`` to a file beside ``docs``: to the page of a pass where it is one, else its text."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(uri), link[2]))
    if target.startswith("docs/"):
        return link[0]
    for facts in pass_pages.passes():
        if target == f"{facts.module.removeprefix('graphopt.').replace('.', '/')}.py":
            return f"[{link[1]}]({posixpath.relpath(facts.page, posixpath.dirname(uri) or '.')})"
    return link[1]


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Puts the picture of the floors into its page, where it has the colours of the theme."""
    return re.sub(r'<img [^>]*src="[^"]*floors\.svg"[^>]*>', lambda _: floors.svg(), html)
