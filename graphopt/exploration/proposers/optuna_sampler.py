"""Any sampler of Optuna as a proposer: ``proposer="optuna:TPESampler"`` (``pip install graphopt[optuna]``).

Optuna is imported when a search with it begins, and only then. For each request the sampler is made anew, with a seed
of the request's number, and reads the trials of the view: so its proposals too depend on the request and the prefix
alone. Samplers that keep state of their own between trials (CMA-ES, grids) lose it by that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.errors import ExplorationError
from graphopt.exploration.pool import View
from graphopt.exploration.sieve import Nothing, Request, Sieve

__all__ = ["OptunaSampler"]


class OptunaSampler:
    """Asks a sampler of ``optuna.samplers``.

    Args:
        sampler: the name of its class.
        options: of its constructor; the seed is given here.
        tries: of the sampler, before a model is drawn by chance.

    Raises:
        ExplorationError: Optuna is not installed, or has no such sampler.
    """

    def __init__(self, sampler: str = "TPESampler", *, tries: int = 16, **options: Any):
        self.name = f"optuna:{sampler}"
        self.tries = tries
        self._class, self._options = sampler, options
        _optuna()
        self._make(0)

    def _make(self, seed: int) -> Any:
        found = getattr(_optuna().samplers, self._class, None)
        if found is None:
            raise ExplorationError(f"proposer: optuna.samplers has no {self._class!r}")
        options = self._options
        if self._class == "TPESampler":  # else workers that are served at the same time get the same
            options = {"constant_liar": True} | options
        try:
            return found(**({"seed": seed} | options))
        except TypeError:  # a sampler without a seed
            return found(**self._options)

    def propose(self, request: Request, view: View, sieve: Sieve, random: np.random.Generator) -> Nothing | None:
        """Fill ``sieve.chosen``; see `graphopt.exploration.proposers.Proposer`."""
        optuna = _optuna()
        knobs = view.space.knobs
        # Ordered knobs as integers, so that the sampler knows which values are alike.
        ranges = {
            str(i): optuna.distributions.IntDistribution(0, knobs[i].size - 1)
            if knobs[i].range.ordered
            else optuna.distributions.CategoricalDistribution(list(range(knobs[i].size)))
            for i in view.space.free
        }
        study = self._replayed(optuna, view, ranges)
        study.sampler = self._make(int(random.integers(2**31)))
        for _ in range(self.tries * request.count):
            if len(sieve.chosen) == request.count:
                break
            asked = study.ask(ranges)
            point = [knob.size - 1 for knob in knobs]
            for name, value in asked.params.items():
                point[int(name)] = int(value)
            if not sieve.take(view.space.canonical(tuple(point)), None, self.name):
                # Repeated or refused: the sampler has to know that it is bad, or it asks for it again.
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
        while len(sieve.chosen) < request.count:
            if nothing := sieve.take_by_chance(random, "chance"):
                return nothing
        return None

    def _replayed(self, optuna: Any, view: View, ranges: dict[str, Any]) -> Any:
        """A study with the trials of the view, in order, and nothing else: those with scores, then those that run."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        objectives = view.scores.shape[1] if len(view.scored) else 1
        study = optuna.create_study(directions=["maximize"] * objectives)
        states = optuna.trial.TrialState
        models = [(view.model(result.number), list(result.scores or ())) for result in view.scored]
        trials = []
        for model, scores in [*models, *((model, None) for model in view.pending)]:
            counts = view.space.active(model.point)
            # TPE looks at each parameter by itself, and at trials that have it; other samplers leave out parameters
            # that any trial lacks.
            params = {str(i): model.point[i] for i in view.space.free if counts[i] or self._class != "TPESampler"}
            trials.append(
                optuna.trial.create_trial(
                    params=params,
                    distributions={name: ranges[name] for name in params},
                    values=scores,
                    state=states.RUNNING if scores is None else states.COMPLETE,
                )
            )
        study.add_trials(trials)
        return study


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ExplorationError(
            "proposer: Optuna's samplers need Optuna, which is not installed; pip install 'graphopt[optuna]'"
        ) from error
    return optuna
