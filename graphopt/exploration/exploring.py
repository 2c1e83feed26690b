"""`explore`: search for the best model under a budget, with many workers and one pool of history models."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graphopt.errors import ExplorationError, GraphoptWarning
from graphopt.exploration.early_stopping import ASHA
from graphopt.exploration.engines import Engine
from graphopt.exploration.gate import check_budget
from graphopt.exploration.generator import GeneratorSetup
from graphopt.exploration.history import History
from graphopt.exploration.hyper_parameters import HyperParameter
from graphopt.exploration.interrupts import Interrupts
from graphopt.exploration.limits import Limits
from graphopt.exploration.master import Master
from graphopt.exploration.opening import Opened, open_for
from graphopt.exploration.outcome import Objectives
from graphopt.exploration.progress import Progress
from graphopt.exploration.proposers import Proposer, as_proposer
from graphopt.exploration.search_space import search_space
from graphopt.exploration.store import Event
from graphopt.exploration.study import Study
from graphopt.exploration.trainer import TrainerSetup

__all__ = ["explore"]


def explore(
    space: Any,
    trial: Callable[..., Any],
    *,
    hyper_parameters: Mapping[str, HyperParameter] | None = None,
    maximize: str | Sequence[str] = (),
    minimize: str | Sequence[str] = (),
    budget: Mapping[str, float] | None = None,
    predictor: Callable[..., Mapping[str, Any]] | str | None = "auto",
    confidence: float = 0.9,
    proposer: str | Proposer = "anneal",
    trials: int | None = None,
    time: float | str | None = None,
    workers: int | None = None,
    on: str = "local",
    generation: str = "workers",
    devices: Sequence[Any] | None = None,
    threads: int | None = None,
    seed: int = 0,
    reproducible: bool = False,
    window: int = 16,
    queue: int = 2,
    stop: ASHA | None = None,
    retrain: int = 0,
    effort: float = 4.0,
    hang_after: float = 5.0,
    first_seconds: float = 3600.0,
    store: str | os.PathLike[str] | None = None,
    resume: str = "auto",
    durable: bool = False,
    keep_folders: bool = False,
    progress: bool = True,
) -> Study:
    """Search over architectures and hyper-parameters.

    Args:
        space: a `graphopt.elastic.Space` (each trial starts from the supernet's weights), a `ModelFunction`, a module
            (one architecture; each trial gets a copy), or None for hyper-parameters alone.
        trial: ``trial(net, hyper_parameters, context)`` trains and validates; it returns a number or numbers by name,
            and may report intermediate values (`Context.report`). `Training` is a ready-made one.
        hyper_parameters: by name, `log`, `linear`, `integer` or `choice`.
        maximize, minimize: names of objectives, the main one first; by default one, ``"score"``, to be maximized.
            ``step_seconds`` and others that are predicted need not be returned by the trial.
        budget: limits by name, as ``{"step_seconds": 0.02, "peak_bytes": 2**30}``: what is not expected to keep them is
            neither built nor trained.
        predictor: ``(sizes, hyper_parameters) -> {name: number or (value, low, high)}``; by default the cost model,
            where the trial says what its step is (`CostModelPredictor`); None for none.
        confidence: how likely a model must be to keep the budget.
        proposer: ``anneal``, ``anneal_plain``, ``evolve``, ``random``, ``optuna:CLASS``, or an object of your own.
        trials, time: how many models, and how long ("2h", "30min", seconds): at least one of them.
        workers: trainers at a time; by default one for two cores, or one for each device.
        on: ``local`` (processes of this machine) or ``inline`` (in this process, one after the other: for debugging).
        generation: ``workers``: each worker has a generator process beside its trainer; ``master``: models are
            generated in this process. The models are the same.
        devices: what each worker sees as CUDA_VISIBLE_DEVICES, in turn.
        threads: of torch in each worker; by default the cores are divided, or 1 in a ``reproducible`` search.
        seed: of the search and of its trials.
        reproducible: the same models in the same order for the same seed, whatever the number and speed of workers and
            whoever is killed (if trials are deterministic). Model k is proposed from results up to k - ``window``, so
            at most about ``window`` workers are kept busy; 1.5 to 2 for each worker costs nearly nothing.
        queue: models that a generator gives at a time, at least 2 keep trainers from waiting.
        stop: `ASHA`, to stop trials early.
        retrain: so many of the best are trained again in the end, with ``context.effort`` = ``effort``.
        hang_after: a trial is stopped after so many times its expected duration; ``first_seconds`` while that is not
            known.
        store: the file of the study; without one it is gone with the process.
        resume: ``auto`` (go on with what the file holds, begin if there is none), ``never``, ``must``; ``fork`` (begin
            anew beside it, under another name); ``backup`` or ``accept`` for a damaged file, see `Store`.
        durable: survive a power failure too.
        keep_folders: keep what trials wrote into ``context.folder``.
        progress: show how it goes, on stderr.

    Returns:
        The study. Ctrl-C once lets the trials that run end and returns; twice raises KeyboardInterrupt at once. Both
        can be resumed.

    Raises:
        BudgetTooTight: no model fits; with the nearest one and what it needs.
        StoreError: the file cannot be used, is in use, or is of another study.
        ExplorationError: an argument is wrong, or processes cannot be started.

    Example:
        >>> from graphopt.exploration import explore, linear
        >>> def trial(net, hyper_parameters, context):
        ...     return -((hyper_parameters["x"] - 0.3) ** 2)
        >>> study = explore(None, trial, hyper_parameters={"x": linear(0, 1)}, trials=30, on="inline", progress=False)
        >>> study.best().hyper_parameters
        {'x': 0.3}
    """
    found = search_space(space, hyper_parameters)
    if not callable(trial):
        raise ExplorationError(f"trial: expected a function of (net, hyper_parameters, context), got {trial!r}")
    objectives = Objectives(maximize or getattr(trial, "maximize", ()), minimize or getattr(trial, "minimize", ()))
    limits = Limits(
        trials=trials, seconds=_seconds(time), queue=queue, window=window if reproducible else None,
        hang_after=hang_after, first_seconds=first_seconds, retrain=retrain, effort=effort,
    )  # fmt: skip
    _check(limits, confidence, on, generation, seed, window)
    asked = check_budget(budget)
    chosen = as_proposer(proposer)
    count = 1 if on == "inline" else _workers(workers, devices)
    if threads is None and reproducible:
        threads = 1  # sums are made in another order by other numbers of threads
    threads = None if on == "inline" else threads or max(1, _cores() // count)
    predict = _predictor(predictor, space, trial, asked, objectives, threads)
    limits = replace(limits, ahead=max(queue, count))
    with ExitStack() as stack:
        if store is None:
            path = None
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graphopt-explore-")))
        else:
            path = Path(store)
        opened = open_for(
            path, resume, durable, found, space, trial, objectives, asked,
            {"seed": seed, "window": limits.window, "queue": queue, "proposer": chosen.name},
        )  # fmt: skip
        stack.callback(opened.close)
        if opened.path is not None:
            folder = Path(f"{opened.path}.d")
        history = History(found, objectives)
        history.replay(opened.events)
        if not reproducible and opened.seed is not None:
            seed = opened.seed  # requests go on counting in the stream that they were begun in
        generator = GeneratorSetup(found, chosen, seed, asked, predict, confidence, learns=not reproducible)
        trainer = TrainerSetup(found, space, trial, objectives, stop, folder.absolute(), keep_folders)
        engine = _engine(on, generator, trainer, count, folder, generation, devices, threads)
        stack.callback(engine.close)
        shown = Progress(progress)
        master = Master(engine, history, limits, seed, opened.write, stop, shown, asked)
        if on == "inline":
            engine.on_report = master.decide_now  # type: ignore[attr-defined]
        _run(master, opened, shown)
        stopped = "interrupted" if master.stop_asked else "exhausted" if history.nothing is not None else "limit"
        return Study(history, budget=asked, nets=space, path=opened.path, stopped=stopped)


def _run(master: Master, opened: Opened, shown: Progress) -> None:
    begun = Event("run", None, {"workers": master.engine.slots})
    opened.write([begun])
    master.history.apply(begun)
    try:
        with Interrupts(master):
            master.run()
    finally:
        shown.end()
        opened.pause(master.engine.now() - master.started)


def _engine(
    on: str,
    generator: GeneratorSetup,
    trainer: TrainerSetup,
    workers: int,
    folder: Path,
    generation: str,
    devices: Sequence[Any] | None,
    threads: int | None,
) -> Engine:
    if on == "inline":
        from graphopt.exploration.engines.inline import InlineEngine

        return InlineEngine(generator, trainer)
    from graphopt.exploration.engines.local import LocalEngine

    each = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment = [dict(each) for _ in range(workers)]
    for slot, variables in enumerate(environment):
        if devices:
            variables["CUDA_VISIBLE_DEVICES"] = str(devices[slot % len(devices)])
    return LocalEngine(
        generator, trainer, workers=workers, folder=folder, generation=generation, environment=environment
    )


def _predictor(
    given: Callable[..., Mapping[str, Any]] | str | None,
    space: Any,
    trial: Any,
    budget: Mapping[str, float],
    objectives: Objectives,
    threads: int | None,
) -> Callable[..., Mapping[str, Any]] | None:
    """The predictor to use, of steps with so many threads. Limits that nobody predicts hold for ``best`` alone, with a
    warning."""
    if callable(given):
        return given
    if given not in ("auto", None):
        raise ExplorationError(f"predictor: expected a function, 'auto' or None, got {given!r}")
    from graphopt.exploration.predictor import PREDICTED, for_trial

    wanted = {*budget, *objectives.names} & set(PREDICTED)
    found = for_trial(space, trial, wanted, threads) if given == "auto" and wanted else None
    if budget and found is None:
        warnings.warn(
            f"nothing predicts {', '.join(budget)}: models are run whatever they need, and the budget only decides "
            "which is best. Give predictor=, or a trial that says what its step is (graphopt.exploration.Training)",
            GraphoptWarning,
            stacklevel=3,
        )
    return found


@dataclass(frozen=True)
class _Unit:
    pattern: str
    seconds: float


_UNITS = (
    _Unit(r"s|sec|seconds?", 1.0),
    _Unit(r"m|min|minutes?", 60.0),
    _Unit(r"h|hours?", 3600.0),
    _Unit(r"d|days?", 86400.0),
)


def _seconds(given: float | str | None) -> float | None:
    """``"2h"`` as seconds.

    >>> _seconds("2h"), _seconds("1.5 min"), _seconds(3)
    (7200.0, 90.0, 3.0)
    """
    if given is None:
        return None
    if isinstance(given, str) and (match := re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", given.lower())):
        for unit in _UNITS:
            if re.fullmatch(unit.pattern, match[2] or "s") and match[1].count(".") <= 1 and match[1] != ".":
                given = float(match[1]) * unit.seconds
                break
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not given > 0:
        raise ExplorationError(f"time: expected seconds or text as '30min' or '2h', got {given!r}")
    return float(given)


def _check(limits: Limits, confidence: float, on: str, generation: str, seed: int, window: int) -> None:
    if limits.trials is None and limits.seconds is None:
        raise ExplorationError("trials and time: say how many models are to be tried, or how long")
    for name, value, least in (
        ("trials", 1 if limits.trials is None else limits.trials, 1), ("queue", limits.queue, 1),
        ("retrain", limits.retrain, 0), ("seed", seed, 0), ("window", window, 1),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ExplorationError(f"{name}: expected an integer of at least {least}, got {value!r}")
    for name, number in (
        ("hang_after", limits.hang_after),
        ("effort", limits.effort),
        ("first_seconds", limits.first_seconds),
    ):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
            raise ExplorationError(f"{name}: expected a positive number, got {number!r}")
    if not 0.0 < confidence < 1.0:
        raise ExplorationError(f"confidence: expected a probability between 0 and 1, got {confidence!r}")
    if on not in ("local", "inline"):
        raise ExplorationError(f"on: expected 'local' or 'inline', got {on!r}")
    if generation not in ("workers", "master"):
        raise ExplorationError(f"generation: expected 'workers' or 'master', got {generation!r}")


def _workers(given: int | None, devices: Sequence[Any] | None) -> int:
    if given is None:
        return len(devices) if devices else max(1, _cores() // 2)
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ExplorationError(f"workers: expected a positive integer, got {given!r}")
    return given


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
