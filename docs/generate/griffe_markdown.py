"""An extension of griffe: docstrings reach mkdocstrings as Markdown."""

from __future__ import annotations

from typing import Any

import griffe

from docs.generate.docstrings import to_markdown


class MarkdownDocstrings(griffe.Extension):
    """Turns the literal blocks and examples of every docstring into fenced code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe once an object was read."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
