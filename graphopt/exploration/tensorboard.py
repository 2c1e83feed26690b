"""Logs of a search for TensorBoard: scores, intermediate values, hyper-parameters, the best under the budget.

================  ==============================================================================================
``FOLDER``        by the number of trials that have ended: ``study/METRIC`` of the one that ended last,
                  ``study/best_METRIC`` of the main objective under the budget, ``study/done``, ``failed``, ``gated``
``trial-00017``   ``intermediate/METRIC`` as it was reported (``final/...`` in the final retraining); its metrics,
                  ``metrics/NAME``, and its sizes and hyper-parameters, for the page HPARAMS
================  ==============================================================================================
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import ExplorationError
from graphopt.exploration.history import History, Trial, within

if TYPE_CHECKING:
    from graphopt.exploration.master import Master

__all__ = ["TensorBoardLog", "write_log"]


class TensorBoardLog:
    """A `Watcher` that writes what happens. A folder that holds a log already is gone on with; one that is new gets all
    trials of the study.

    Raises ExplorationError where TensorBoard is not installed, or the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], history: History, budget: Mapping[str, float]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ExplorationError(
                f"tensorboard needs TensorBoard: pip install 'graphopt[tensorboard]' ({error})"
            ) from error
        self._folder, self._history, self._budget = Path(folder), history, dict(budget)
        self._writer = SummaryWriter
        self._writers: dict[int, Any] = {}  # of trials that run
        self._main = history.objectives.main
        self._sign = history.objectives.signs[self._main]
        self._best: float | None = None
        self._counts: Counter[str] = Counter()
        known = len(history.ended) if any(self._folder.glob("events.out.*")) else 0
        self._finals = {trial.number for trial in history.trials if trial.final} if known else set()
        try:
            self._study = SummaryWriter(str(self._folder))
        except OSError as error:
            raise ExplorationError(f"tensorboard: {self._folder}: {error}") from error
        for place, number in enumerate(history.ended):
            self._ended(history.trials[number], place + 1, written=place >= known)
        self._seen = len(history.ended)

    def reported(self, trial: Trial, step: int, value: float, final: bool) -> None:
        """An intermediate value."""
        writer = self._writer_of(trial.number)
        writer.add_scalar(f"{'final' if final else 'intermediate'}/{self._main}", value, step)
        writer.flush()

    def turned(self, master: Master) -> None:
        """Write of the trials that have ended since the last call."""
        self.update()

    def update(self) -> None:
        """The same."""
        ended = self._history.ended[self._seen :]
        for number in ended:
            self._seen += 1
            self._ended(self._history.trials[number], self._seen)
        if ended:
            self._study.flush()

    def close(self) -> None:
        """Write what is left: scores of the final retraining. Twice is once."""
        self.update()
        for trial in self._history.trials:
            if trial.final and trial.number not in self._finals:
                self._finals.add(trial.number)
                writer = self._writer_of(trial.number)
                for name, value in trial.final.items():
                    writer.add_scalar(f"metrics/final_{name}", value, 0)
                    self._study.add_scalar(f"final/{name}", value, trial.number)
        for number in list(self._writers):
            self._writers.pop(number).close()
        self._study.close()

    def _ended(self, trial: Trial, count: int, written: bool = True) -> None:
        """Trial ``trial`` is the one of number ``count`` that ended."""
        self._counts[trial.state] += 1
        kept = trial.scores is not None and all(within(trial, *limit) for limit in self._budget.items())
        if kept and (self._best is None or self._sign * trial.metrics[self._main] > self._sign * self._best):
            self._best = trial.metrics[self._main]
        if not written:
            return
        for name, value in trial.metrics.items():
            self._study.add_scalar(f"study/{name}", value, count)
        if self._best is not None:
            self._study.add_scalar(f"study/best_{self._main}", self._best, count)
        bad = self._counts["failed"] + self._counts["invalid"]
        for name, counted in (("done", self._counts["done"]), ("failed", bad), ("gated", self._history.refused)):
            self._study.add_scalar(f"study/{name}", counted, count)
        self._hyper_parameters(trial)

    def _hyper_parameters(self, trial: Trial) -> None:
        from torch.utils.tensorboard.summary import hparams

        known = trial.number in self._writers
        writer = self._writer_of(trial.number)
        if not known:  # of an earlier run: what is left of its intermediate values
            for step, value in trial.curve:
                writer.add_scalar(f"intermediate/{self._main}", value, step)
        values = {f"net.{name}": value for name, value in trial.sizes.items()} | dict(trial.hyper_parameters)
        metrics = {f"metrics/{name}": value for name, value in trial.metrics.items()}
        # As `SummaryWriter.add_hparams` does it, in the same file as the curves and not in one more folder.
        for summary in hparams({name: _plain(value) for name, value in values.items()}, metrics):
            writer.file_writer.add_summary(summary)
        for name, value in metrics.items():
            writer.add_scalar(name, value, 0)
        self._writers.pop(trial.number).close()

    def _writer_of(self, number: int) -> Any:
        if number not in self._writers:
            self._writers[number] = self._writer(str(self._folder / f"trial-{number:05d}"))
        return self._writers[number]


def write_log(history: History, folder: Path, budget: Mapping[str, float]) -> None:
    """Write all trials of a study to ``folder``, which must not hold a log yet. Raises ExplorationError."""
    if any(folder.glob("events.out.*")):
        raise ExplorationError(f"export: {folder} holds a log already; name another folder")
    TensorBoardLog(folder, history, budget).close()


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
