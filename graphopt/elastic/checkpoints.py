"""Checkpoints of a training in stages: one of each stage, kept, and a running one to go on from after a crash."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from graphopt.elastic.progressive import Stage, plan_of
from graphopt.errors import ElasticError

VERSION = 1
RUNNING = "running.pt"


class Checkpoints:
    """A folder of checkpoints. Each file is written whole or not at all; loading runs no code from it.

    Args:
        folder: is made if it is not there.
        stages: of the training; a running checkpoint of another one is refused.
    """

    def __init__(self, folder: str | os.PathLike[str], stages: Sequence[Stage]):
        self.folder, self.stages = Path(folder), tuple(stages)
        self.folder.mkdir(parents=True, exist_ok=True)

    def stage_path(self, index: int) -> Path:
        """Where the checkpoint of a finished stage is kept."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", self.stages[index].name)
        return self.folder / f"stage-{index}-{name}.pt"

    def finish(self, index: int, state: dict[str, Any]) -> None:
        """Keep the state at the end of a stage."""
        self._write(self.stage_path(index), state)

    def save(self, state: dict[str, Any]) -> None:
        """Write the running checkpoint."""
        self._write(self.folder / RUNNING, state)

    def load(self) -> dict[str, Any] | None:
        """The running checkpoint; None if there is none.

        Raises ElasticError for a damaged file, another version, or a training in other stages.
        """
        path = self.folder / RUNNING
        if not path.exists():
            return None
        state = read(path)
        if state["plan"] != plan_of(self.stages):
            raise ElasticError(
                f"checkpoint: {path} is of the stages {state['plan']}, expected {plan_of(self.stages)}; give another "
                "folder, or delete it to start anew"
            )
        return state

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            torch.save({**state, "version": VERSION, "plan": plan_of(self.stages)}, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a checkpoint: ``weights``, ``optimizers`` and what a training needs to go on.

    Raises ElasticError for a file that is damaged or of another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises a family of its own for each way of being damaged
        raise ElasticError(f"checkpoint: {path} cannot be read ({error})") from error
    if not isinstance(state, dict) or state.get("version") != VERSION or "plan" not in state:
        raise ElasticError(f"checkpoint: {path} is none of this version of the library")
    return state
