"""`Page`: one HTML file that needs nothing else: data, scripts and styles are in it, and it asks no network."""

from __future__ import annotations

import html
import json
import re
import webbrowser
from collections.abc import Mapping
from functools import cache, cached_property
from importlib.resources import files
from os import PathLike
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

_LIBRARIES = ("cytoscape.min.js", "dagre.min.js")
_SCRIPTS = ("model.js", "layout.js", "colours.js", "canvas.js", "panels.js", "search.js", "main.js")


class Page:
    """A page that shows a training step. A notebook displays it; `save` writes it, `open` shows it in a browser.

    ``data``: what it shows, see `graphopt.visualize.page_data`. ``height``: of its frame in a notebook, pixels.
    """

    def __init__(self, data: Mapping[str, Any], height: int = 720):
        self.data, self.height = data, height

    @cached_property
    def html(self) -> str:
        """The whole page."""
        text = json.dumps(self.data, separators=(",", ":"), allow_nan=False)
        parts = {
            "{{title}}": html.escape(self.data["title"]),
            "{{style}}": asset("page.css"),
            "{{libraries}}": "".join(f"<script>{asset(name)}</script>\n" for name in _LIBRARIES),
            "{{scripts}}": "\n".join(map(asset, _SCRIPTS)),
            "{{data}}": text.replace("<", "\\u003c"),  # no tag of a name in the data ends the script
        }
        # In one pass: a title or a name in the data may read like a mark.
        return re.sub("|".join(map(re.escape, parts)), lambda mark: parts[mark[0]], asset("page.html"))

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the page; gives the path."""
        target = Path(path)
        target.write_text(self.html, encoding="utf-8")
        return target

    def open(self) -> Path:
        """Write the page to a temporary file and show it in the web browser; gives the path."""
        target = self.save(Path(mkdtemp(prefix="graphopt-")) / "step.html")
        webbrowser.open(target.as_uri())
        return target

    def _repr_html_(self) -> str:
        """The page in a frame: styles and scripts of a notebook and of the page do not meet."""
        return (
            f'<iframe srcdoc="{html.escape(self.html, quote=True)}" width="100%" height="{self.height}" '
            'style="border:1px solid #d5d9e0;border-radius:6px" sandbox="allow-scripts allow-downloads"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Page({self.data['title']!r}, {len(self.data['ops'])} operators; save(path) or open() shows it)"


@cache
def asset(name: str) -> str:
    """The text of a file that comes with the package."""
    return files("graphopt.visualize").joinpath("assets", name).read_text(encoding="utf-8")
