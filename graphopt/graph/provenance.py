"""Where a node comes from: the module path and the user's source line, recorded while the model is traced."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphopt.graph.torch_internals import current_trace_meta, preserve_node_meta

_TORCH = str(Path(torch.__file__).parent) + os.sep
_HERE = str(Path(__file__).parents[1]) + os.sep


class Provenance(TorchFunctionMode):
    """Marks everything traced under it with the module and the line of user code that called for it.

    AOTAutograd hands the mark of a forward operator on to its backward operators. ``module`` and ``source`` hold the
    place reached last: where a capture failed, if it fails.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.module = ""
        self.source = ""

    @contextmanager
    def recording(self) -> Iterator[Provenance]:
        """Hooks on every module for the duration; all are removed at the end."""
        handles = []
        outer: list[str] = []

        def enter(name: str) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                outer.append(self.module)
                self._mark(name, self.source)

            return hook

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._mark(outer.pop() if outer else "", self.source)

        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
            handles.append(module.register_forward_hook(leave))
        try:
            with preserve_node_meta():
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        source = _user_line()
        if source != self.source:
            self._mark(self.module, source)
        return func(*args, **(kwargs or {}))

    def _mark(self, module: str, source: str) -> None:
        self.module, self.source = module, source
        mark(module, source)


def mark(module: str, source: str, **more: str) -> None:
    """Mark what is traced from now on, under `preserve_node_meta`, with its place and ``more`` of it (`MARKS`)."""
    current_trace_meta()["custom"] = {"module": module, "source": source, **more}


MARKS = ("origin", "gradient_of")
"""Marks beside the place that a node keeps in its metadata where it has them, see
`graphopt.graph.differentiate.with_backward`."""


def _user_line() -> str:
    """``package/file.py:line`` of the innermost frame that is neither torch's nor ours; empty where our own frame
    comes first (a loss or a layer of torch called by capture itself)."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_HERE):
            return ""
        if not file.startswith(_TORCH):
            return f"{_short(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


_FRAME = re.compile(r'File "(.+?)", line (\d+)')


def line_of(stack_trace: str) -> str:
    """``package/file.py:line`` of the innermost frame of a printed stack that is not torch's; empty if there is none.

    >>> line_of('  File "/home/me/net.py", line 7, in forward\\n    return self.head(x)')
    'net.py:7'
    """
    frames = [(file, line) for file, line in _FRAME.findall(stack_trace) if not file.startswith(_TORCH)]
    return f"{_short(frames[-1][0])}:{frames[-1][1]}" if frames else ""


_SHORT: dict[str, str] = {}


def _short(file: str) -> str:
    """The file's path as Python imports it: without the entry of ``sys.path`` it lies under."""
    if file not in _SHORT:
        roots = sorted((p.rstrip("/\\") + os.sep for p in sys.path if p), key=len, reverse=True)
        root = next((r for r in roots if file.startswith(r)), None)
        _SHORT[file] = file[len(root) :] if root else Path(file).name
    return _SHORT[file]
