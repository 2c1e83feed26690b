"""An extension of griffe: docstrings reach mkdocstrings as Markdown."""

from __future__ import annotations

from typing import Any

import griffe

from docs.generate.docstrings import split_entries, to_markdown


class MarkdownDocstrings(griffe.Extension):
    """Turns literal blocks and examples into fenced code, and entries of several parameters into one for each."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe once an object was read."""
        if obj.docstring is not None:
            obj.docstring.value = split_entries(to_markdown(obj.docstring.value))
