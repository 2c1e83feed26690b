"""Cases that run on all ranks of `torch.distributed`, in processes of their own: the script's side and the test's."""

from __future__ import annotations

import ast
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from torch import distributed

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

Outcomes = list[dict[str, str]]
"""For each rank: by case the empty string, or how it failed."""


def run_cases(cases: Sequence[Callable[[], None]]) -> None:
    """Of a script: runs the cases in turn on this rank, and keeps what came of them in the folder that it is given."""
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    outcomes = {}
    for case in cases:
        try:
            case()
            outcomes[case.__name__] = ""
        except BaseException:  # also pytest's own, which are no Exception
            outcomes[case.__name__] = traceback.format_exc()
        (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(outcomes))
        if outcomes[case.__name__]:
            break  # the other ranks may be anywhere


def names_of(script: Path) -> list[str]:
    """The cases of a script: its functions under ``@case``."""
    return [
        node.name for node in ast.parse(script.read_text()).body
        if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "case" for d in node.decorator_list)
    ]  # fmt: skip


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def outcomes_in(folder: Path, said: object) -> Outcomes:
    """What two ranks have kept. ``said``: what is told where one has kept nothing."""
    files = [folder / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), said
    return [json.loads(file.read_text()) for file in files]


def assert_passed(name: str, outcomes: Outcomes) -> None:
    """The case has passed on all ranks."""
    for rank, found in enumerate(outcomes):
        assert name in found, f"rank {rank} did not come so far"
        assert found[name] == "", f"rank {rank}: {found[name]}"
