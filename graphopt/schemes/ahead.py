"""Compilation ahead: Inductor compiles a step in a process of its own while training goes on here.

That process gets the saved graph and sizes, nothing of the user's script, and leaves its kernels and its compiled graph
in Inductor's cache on disk (``torch._inductor.codecache``, by a hash of the graph and of its inputs' metadata). The
compilation here then finds them: what is left are the trace and the load. Nothing is shared but files, which Inductor
writes atomically; whatever happens to the process, training does not notice.

``python -m graphopt.schemes.ahead FOLDER`` is that process, started by `Ahead`, never by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from graphopt.graph.training_graph import InputKind, TrainingGraph
from graphopt.schemes.workers.settings import apply, settings

_NICE = 10


class Ahead:
    """A compilation of ``graph`` at a batch size, under way in a process of low priority.

    It ends with this object, with `close` and with this process.

    Args:
        graph: what `Inductor` is to lower.
        size: rows of the batch, the size that is compiled for first.
        frozen: names of parameters that require no gradient.
    """

    def __init__(self, graph: TrainingGraph, size: int, frozen: Iterable[str]):
        """Raises OSError where the process cannot be started, and what `TrainingGraph.save` raises."""
        folder = Path(tempfile.mkdtemp(prefix="graphopt-ahead-"))
        try:
            graph.save(folder / "graph")
            told = {"size": size, "frozen": list(frozen), "threads": torch.get_num_threads(), "settings": settings()}
            (folder / "told.json").write_text(json.dumps(told))
            self._process = _start(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._finalizer = weakref.finalize(self, _end, self._process, folder, os.getpid())

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._process.poll() is not None

    @property
    def failed(self) -> bool:
        """Whether it has ended without a compilation: then nothing is found here."""
        return bool(self._process.poll())

    def close(self) -> None:
        """End it. Twice is once."""
        self._finalizer()


def _start(folder: Path) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])  # where graphopt was imported from
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / "errors").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "graphopt.schemes.ahead", str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            start_new_session=True,  # with the C++ compilers that it starts, and without the terminal's Ctrl-C
        )  # fmt: skip


def _end(process: subprocess.Popen[bytes], folder: Path, owner: int) -> None:
    if os.getpid() != owner:  # a forked child: the process is not its own
        return
    with suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Compile what lies in a folder."""
    from graphopt.schemes.inductor import Inductor

    folder = Path(sys.argv[1])
    _follow(os.getppid())
    with suppress(OSError):
        os.nice(_NICE)
    told = json.loads((folder / "told.json").read_text())
    torch.set_num_threads(told["threads"])
    apply(told["settings"])
    graph = TrainingGraph.load(folder / "graph")
    arguments = inputs_like(graph, told["size"], set(told["frozen"]))
    lowered = Inductor().lowered(graph)
    with torch.no_grad():
        lowered.run(*arguments)


def inputs_like(graph: TrainingGraph, size: int, frozen: set[str]) -> list[Any]:
    """Inputs that look to a compiler like those of a step: zeros of the same shapes, strides and kinds."""
    found: list[Any] = []
    for given, node in zip(graph.inputs, graph.placeholders, strict=True):
        like = node.meta["val"]
        if not isinstance(like, torch.Tensor):
            found.append(0.0)  # hyper-parameters are read by the update, which is not compiled
            continue
        shape, stride = (
            [int(graph.symbols.evaluate(s, {"batch": size})) for s in each] for each in (like.shape, like.stride())
        )
        made = torch.empty_strided(shape, stride, dtype=like.dtype).zero_()
        if given.kind is InputKind.PARAMETER:
            made = torch.nn.Parameter(made, requires_grad=given.name not in frozen and made.is_floating_point())
        found.append(made)
    return found


def _follow(parent: int) -> None:
    """End this process when the one that started it is gone."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=look, daemon=True).start()


if __name__ == "__main__":
    main()
