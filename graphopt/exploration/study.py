"""`Study`: what a search found."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import ExplorationError
from graphopt.exploration.history import History, Refusal, Trial
from graphopt.exploration.hyper_parameters import HyperParameter
from graphopt.exploration.outcome import Objectives
from graphopt.exploration.ranking import best_first, pareto_front
from graphopt.exploration.search_space import Knob, SearchSpace, net_of
from graphopt.exploration.study_file import read_study
from graphopt.exploration.tensorboard import write_log

__all__ = ["Study", "open_study"]


class Study:
    """Results of `graphopt.explore`, or of a file by `open_study`.

    Attributes:
        space: what was searched. budget: of the search. stopped: why it ended.
    """

    def __init__(
        self,
        history: History,
        *,
        budget: Mapping[str, float] | None = None,
        nets: Any = None,
        path: Path | None = None,
        stopped: str = "",
    ):
        self.history = history
        self.space = history.space
        self.objectives = history.objectives
        self.budget = dict(budget or {})
        self.path = path
        self.stopped = stopped
        self._nets = nets

    def __len__(self) -> int:
        return len(self.history.trials)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {state}" for state, count in self.counts().items())
        return f"Study({counts or 'empty'})"

    def counts(self) -> dict[str, int]:
        """How many trials are in each state, and how many candidates the gate refused."""
        found = dict(Counter(trial.state for trial in self.history.trials))
        return found | ({"gated": self.history.refused} if self.history.refused else {})

    def trials(self, state: str | None = None) -> list[Trial]:
        """All trials in the order of their numbers, or those in one state."""
        return [trial for trial in self.history.trials if state is None or trial.state == state]

    def best(self, budget: Mapping[str, float] | None = None) -> Trial:
        """The trial with the best main objective under ``budget`` (by default that of the search), by its score after
        the final retraining where there was one.

        Raises:
            ExplorationError: no trial that ended well keeps it.
        """
        limits = self.budget if budget is None else dict(budget)
        trials = self.history.done(limits)
        if not trials:
            done = len(self.history.done())
            raise ExplorationError(f"best: none of {done} finished trials keeps the budget {limits}; {self!r}")
        main, sign = self.objectives.main, self.objectives.signs[self.objectives.main]
        if retrained := [trial for trial in trials if main in trial.final]:
            return max(retrained, key=lambda trial: sign * trial.final[main])
        return max(trials, key=lambda trial: (trial.scores or (0.0,))[0])

    def pareto(self, budget: Mapping[str, float] | None = None) -> list[Trial]:
        """Trials that no other beats in all objectives, those with the best main objective first."""
        trials = self.history.done(self.budget if budget is None else budget)
        if not trials:
            return []
        scores = np.array([trial.scores for trial in trials])
        front = [trials[place] for place in pareto_front(scores)]
        return sorted(front, key=lambda trial: tuple(-score for score in trial.scores or ()))

    def top(self, count: int, budget: Mapping[str, float] | None = None) -> list[Trial]:
        """The best trials under ``budget`` (by default that of the search), best first; with several objectives, by
        Pareto rank."""
        trials = self.history.done(self.budget if budget is None else budget)
        scores = np.array([trial.scores for trial in trials]).reshape(len(trials), len(self.objectives.names))
        return [trials[place] for place in best_first(scores, count)]

    def build(self, trial: Trial) -> Any:
        """The net of a trial, made new (with the supernet's weights where there is a supernet)."""
        return net_of(self._nets, self.space, trial.point)

    def rank_correlation(self) -> float | None:
        """Kendall's tau between the scores of the search and those of the final retraining; None for fewer than three
        retrained models: how far a short trial tells which model is better."""
        from scipy.stats import kendalltau

        main = self.objectives.main
        pairs = [(trial.metrics[main], trial.final[main]) for trial in self.history.trials if main in trial.final]
        if len(pairs) < 3:
            return None
        found = float(kendalltau(*zip(*pairs)).statistic)
        return found if np.isfinite(found) else None

    def why(self, trial: int | str) -> str:
        """What became of a model and why: ``trial`` is its number, or the beginning of its key (those that were refused
        have only a key)."""
        if isinstance(trial, int) or trial.isdigit():
            number = int(trial)
            if number >= len(self):
                raise ExplorationError(f"why: there is no trial {number}; the study has {len(self)}")
            return self._why(self.history.trials[number])
        found: list[Trial | Refusal] = [t for t in self.history.trials if t.key.startswith(trial)]
        found += [r for key, r in self.history.refusals.items() if key.startswith(trial)]
        if len(found) != 1:
            raise ExplorationError(f"why: {len(found)} models have a key that begins with {trial!r}")
        if isinstance(found[0], Trial):
            return self._why(found[0])
        row = found[0]
        return f"{row.key[:8]}: {self.space.describe(row.point)}\n  never built: {row.why}"

    def _why(self, trial: Trial) -> str:
        lines = [f"trial {trial.number} ({trial.key[:8]}): {self.space.describe(trial.point)}"]
        origin = f" from trial {trial.parent}" if trial.parent is not None else ""
        lines.append(f"  proposed by request {trial.request} ({trial.how or 'unknown'}){origin}")
        if trial.parent is not None:
            parent = self.history.trials[trial.parent].point
            changed = [
                f"{knob.name} {knob.range.values[a]} -> {knob.range.values[b]}"
                for knob, a, b in zip(self.space.knobs, parent, trial.point)
                if a != b
            ]
            lines.append(f"  changed: {', '.join(changed)}")
        for name, (value, low, high) in trial.predicted.items():
            told = f" (budget {self.budget[name]:.4g})" if name in self.budget else ""
            measured = f", measured {trial.metrics[name]:.4g}" if name in trial.metrics else ""
            lines.append(f"  {name}: predicted {value:.4g}, {low:.4g} to {high:.4g}{measured}{told}")
        state = f"  {trial.state} after {trial.seconds:.3g} s, {trial.attempts} attempts"
        lines.append(state + (f": {trial.cause}" if trial.cause else ""))
        if trial.scores is not None:
            better = sum(other.scores[0] > trial.scores[0] for other in self.history.done() if other.scores)
            lines.append(f"  {_numbers(trial.metrics)}; {better} trials have a better {self.objectives.main}")
        if trial.final:
            lines.append(f"  after retraining: {_numbers(trial.final)}")
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """All trials as flat rows of plain data. A metric has a column of its name; ``metric.NAME`` where that is taken
        (a metric that is called ``seconds``)."""
        found = []
        for trial in self.history.trials:
            row: dict[str, Any] = {
                "number": trial.number, "key": trial.key, "state": trial.state, "how": trial.how,
                "parent": trial.parent, "attempts": trial.attempts, "seconds": trial.seconds, "cause": trial.cause,
            }  # fmt: skip
            own = set(row)
            for prefix, values in (
                ("net.", trial.sizes), ("hp.", trial.hyper_parameters), ("final.", trial.final),
                ("predicted.", {name: value for name, (value, _, _) in trial.predicted.items()}),
            ):  # fmt: skip
                row |= {prefix + name: value for name, value in values.items()}
            for name, value in trial.metrics.items():
                taken = name in own or name.startswith(("net.", "hp.", "final.", "predicted.", "metric."))
                row[f"metric.{name}" if taken else name] = value
            found.append(row)
        return found

    def export(self, path: str | os.PathLike[str], format: str | None = None) -> Path:
        """Write all trials as ``csv`` or ``jsonl`` (by the name of the file, if ``format`` is not given), or into a
        folder for TensorBoard (``tensorboard``).

        Raises ExplorationError for another format.
        """
        path = Path(path)
        format = format or path.suffix.removeprefix(".")
        if format == "tensorboard":
            write_log(self.history, path, self.budget)
            return path
        rows = self.rows()
        if format == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif format == "csv":
            names = list(dict.fromkeys(name for row in rows for name in row))
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(rows)
        else:
            raise ExplorationError(f"export: expected csv, jsonl or tensorboard, got {format!r}")
        return path


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.5g}" for name, value in values.items())


def space_to_meta(space: SearchSpace) -> list[dict[str, Any]]:
    """The knobs as plain data, so that a study can be read without the script that made it."""
    return [
        {"name": k.name, "kind": k.kind, "values": list(k.range.values), "ordered": k.range.ordered,
         "when": {name: list(values) for name, values in k.range.when.items()},
         "ways": [{name: list(values) for name, values in way.items()} for way in k.ways]}
        for k in space.knobs
    ]  # fmt: skip


def space_from_meta(rows: list[dict[str, Any]]) -> SearchSpace:
    """The other way round."""
    return SearchSpace(
        [
            Knob(row["name"], row["kind"], HyperParameter(
                tuple(tuple(v) if isinstance(v, list) else v for v in row["values"]), row["ordered"],
                {name: tuple(values) for name, values in row["when"].items()},
            ), tuple({name: tuple(values) for name, values in way.items()} for way in row.get("ways", ())))
            for row in rows
        ]
    )  # fmt: skip


def open_study(path: str | os.PathLike[str]) -> Study:
    """A study on file, as it is now; another process may be at work on it. Nets cannot be built from it.

    Raises StoreError where there is none, or it cannot be read.
    """
    events, meta, _ = read_study(path)
    if "study" not in meta:
        raise ExplorationError(f"{path}: the study was not begun yet")
    told = meta["study"]
    objectives = Objectives.from_signs(told["signs"])
    history = History(space_from_meta(told["knobs"]), objectives)
    history.replay(events)
    return Study(history, budget=told.get("budget"), path=Path(path))
