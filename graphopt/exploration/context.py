"""What a trial is given beside its net and hyper-parameters."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.errors import ExplorationError
from graphopt.exploration.early_stopping import ASHA
from graphopt.exploration.pool import finite_number

__all__ = ["Context", "Invalid", "Pruned"]


class Pruned(Exception):
    """Raised by `Context.report` when the trial is to end early. Let it pass, or clean up and raise it again."""


class Invalid(Exception):
    """Raised by `Context.report` for a value that is no finite number: a trial that diverged ends at once."""


@dataclass
class Context:
    """Of one trial.

    Attributes:
        number: of the model in the study.
        seed: for this trial; the same whenever and wherever it runs.
        attempt: 0 for the first run of this trial, 1 after its process died once ...
        folder: its own, for checkpoints; it is kept while the trial may be run again, and removed when it has ended.
        predicted: what the gate expects, by name.
        effort: how much longer than usual it shall train: 1 in the search, more in the final retraining.
        final: whether this is the final retraining.
    """

    number: int
    seed: int
    folder: Path
    attempt: int = 0
    predicted: dict[str, float] = field(default_factory=dict)
    effort: float = 1.0
    final: bool = False
    stopping: ASHA | None = None
    tell: Callable[[int, float, int | None], bool] | None = None
    _rung: int = 0

    def report(self, step: int, value: float) -> None:
        """An intermediate value of the main objective after ``step`` steps (or epochs): they are counted from 1.

        Raises:
            Pruned: the trial is not among the best, and ends here.
            Invalid: ``value`` is no finite number.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 1:
            raise ExplorationError(f"report: expected a step of at least 1, got {step!r}")
        if not finite_number(value):
            raise Invalid(f"at step {step} the trial reported {value!r}; expected a finite number")
        rung = self.stopping.rung(self._rung, step) if self.stopping is not None and not self.final else None
        if rung is not None:
            self._rung = rung
        if self.tell is not None and not self.tell(step, float(value), rung):
            raise Pruned(f"at step {step}")

    def save(self, state: Any) -> None:
        """Keep ``state`` (whatever `torch.save` takes) for another attempt of this trial: written aside, then renamed,
        so that there is always a whole one."""
        torch = sys.modules.get("torch")  # a trial without torch has no tensors, and need not import it
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"checkpoint.{os.getpid()}.part"
        try:
            with open(part, "wb") as file:
                if torch is not None:
                    torch.save(state, file)
                else:
                    pickle.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.folder / "checkpoint.pt")
        finally:
            part.unlink(missing_ok=True)

    def load(self) -> Any:
        """What an earlier attempt saved last; None where there is nothing."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"  # what torch writes
            file.seek(0)
            if not zipped:
                return pickle.load(file)
            import torch

            return torch.load(file, weights_only=False)
