"""Searches that tests share: spaces, trials that real processes can import, and a search on simulated workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.simulated_engine import SimulatedEngine
from graphopt.errors import ExplorationError
from graphopt.exploration import choice, linear, log, open_study
from graphopt.exploration.generator import GeneratorSetup
from graphopt.exploration.history import History
from graphopt.exploration.limits import Limits
from graphopt.exploration.master import Master
from graphopt.exploration.outcome import Objectives, Outcome
from graphopt.exploration.proposers import as_proposer
from graphopt.exploration.search_space import Knob, SearchSpace
from graphopt.exploration.study_file import Event

BOWL = {f"x{i}": linear(0, 1, steps=11) for i in range(5)}
"""Hyper-parameters of a smooth problem."""


def bowl(net: Any, hp: Mapping[str, Any], context: Any) -> float:
    """Best (0) at 0.3 everywhere."""
    return -sum((value - 0.3) ** 2 for value in hp.values())


def small_space() -> SearchSpace:
    """729 points, as in the field notes."""
    return SearchSpace([Knob(f"k{i}", "net", choice(1, 2, 3)) for i in range(6)])


def mixed_space() -> SearchSpace:
    """Nets with layers that may be left out, hyper-parameters with a condition, an unordered knob."""
    return SearchSpace(
        [
            Knob("depth", "net", choice(1, 2, 3)),
            Knob("width1", "net", choice(8, 16, 32, when={"depth": (2, 3)})),
            Knob("width2", "net", choice(8, 16, 32, when={"depth": 3})),
            Knob("lr", "hp", log(1e-4, 1e-1, steps=7)),
            Knob("optimizer", "hp", choice("sgd", "adam", "lion")),
            Knob("momentum", "hp", linear(0, 0.9, steps=4, when={"optimizer": "sgd"})),
        ]
    )


def simulated(
    space: SearchSpace,
    score: Callable[[tuple[int, ...]], Any],
    *,
    trials: int,
    proposer: Any = "anneal",
    speeds: Sequence[float] = (1.0,),
    seed: int = 0,
    window: int | None = None,
    budget: Mapping[str, float] | None = None,
    predictor: Any = None,
    dies: Callable[[int, int, int], bool] = lambda slot, number, attempt: False,
    seconds: Callable[[int], float] = lambda number: 1.0,
    kept: list[Event] | None = None,
    stop_after: int | None = None,
) -> tuple[History, SimulatedEngine]:
    """A search on simulated workers. ``score``: what a trial returns, or its whole outcome; ``kept``: events of an
    earlier part, which are gone on from and added to; ``stop_after``: this master is lost after so many writes."""
    kept = [] if kept is None else kept
    objectives = Objectives("score")
    setup = GeneratorSetup(space, as_proposer(proposer), seed, budget or {}, predictor, 0.9, learns=window is None)

    def trial(number: int, point: tuple[int, ...]) -> tuple[Outcome, float]:
        given = score(point)
        if isinstance(given, Outcome):
            return given, given.seconds
        return objectives.outcome(given, {}, seconds(number)), seconds(number)

    engine = SimulatedEngine(setup, trial, speeds=speeds, dies=dies)
    history = History(space, objectives)
    history.replay([*kept, Event("run", None, {})])
    kept.append(Event("run", None, {}))
    left = [stop_after if stop_after is not None else 10**9]

    def write(events: list[Event]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Lost
        kept.extend(events)

    limits = Limits(trials=trials, ahead=max(2, len(speeds)), window=window)
    try:
        Master(engine, history, limits, seed, write).run()
    except Lost:
        pass
    return history, engine


class Lost(Exception):
    """The master is gone."""


# -- trials that real processes run -----------------------------------------------------------------------------------


def slow_bowl(net: Any, hp: Mapping[str, Any], context: Any) -> float:
    """Long enough to be killed in between."""
    time.sleep(0.1)
    return bowl(net, hp, context)


def troubled(net: Any, hp: Mapping[str, Any], context: Any) -> Any:
    """Does what ``do`` says."""
    do = hp["do"]
    if do == "hang":
        time.sleep(3600)
    elif do == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif do == "exit":
        print("the last words")
        os._exit(7)
    elif do == "memory":
        raise MemoryError("no more")
    elif do == "raise":
        raise ValueError("something is wrong")
    elif do == "once":
        # Dies at the first attempt; goes on from its checkpoint at the second.
        kept = context.load()
        if kept is None:
            context.save({"half": 0.5})
            os.kill(os.getpid(), signal.SIGKILL)
        return float(kept["half"]) + context.attempt
    return {
        "nan": float("nan"),
        "inf": float("inf"),
        "none": None,
        "text": "0.9",
        "list": [0.9],
        "missing": {"x": 1},
    }.get(do, 0.5)


def with_child(net: Any, hp: Mapping[str, Any], context: Any) -> float:
    """Starts a process of its own, tells its number, and takes long."""
    import subprocess

    child = subprocess.Popen(["sleep", "3600"])
    Path(os.environ["CHILD_FILE"]).write_text(str(child.pid))
    time.sleep(3600)
    return 0.0


class KilledWhereItArrives:
    """A trial that kills the process that unpickles it."""

    def __call__(self, net: Any, hp: Mapping[str, Any], context: Any) -> float:
        return 0.0

    def __reduce__(self) -> Any:
        return _kill_this, ()


def _kill_this() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def processes_of(pid: int) -> list[int]:
    """All processes that run and descend from ``pid``, or are in sessions of such."""
    parents: dict[int, tuple[int, int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(folder.name)] = (int(fields[1]), int(fields[3]))
    found, grew = {pid}, True
    while grew:
        more = {p for p, (parent, session) in parents.items() if parent in found or session in found} - found
        grew = bool(more)
        found |= more
    return sorted(found - {pid})


def alive(pid: int) -> bool:
    """Whether a process runs: exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait until ``condition()`` is true; fails the test when it does not come true."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)
    return found


def halfway(net: Any, hp: Mapping[str, Any], context: Any, seconds: float = 0.15) -> float:
    """Two halves with a checkpoint and a report after each; a note of each half that is begun. They take no time any
    more once there is a file `hurry`."""
    half = context.load() or 0
    if half:
        context.report(half, half * bowl(net, hp, context))  # the attempt before may have ended before it was heard
    while half < 2:
        context.folder.mkdir(parents=True, exist_ok=True)
        with open(context.folder.parent / "halves.txt", "a") as file:
            file.write(f"{context.number} {half}\n")
        if not (context.folder.parent / "hurry").exists():
            time.sleep(seconds)
        half += 1
        context.save(half)
        context.report(half, half * bowl(net, hp, context))
    return bowl(net, hp, context)


def halves(folder: Path) -> list[tuple[int, int]]:
    """What trials of `halfway` noted: (number, half)."""
    return [(int(line.split()[0]), int(line.split()[1])) for line in (folder / "halves.txt").read_text().splitlines()]


class Meanwhile(threading.Thread):
    """Runs ``what`` beside this thread; `end` gives what it gave, or raises what it raised."""

    def __init__(self, what: Callable[[], Any]):
        super().__init__(daemon=True)
        self._what, self._gave, self._error = what, None, None
        self.start()

    def run(self) -> None:
        try:
            self._gave = self._what()
        except BaseException as error:
            self._error = error

    def end(self) -> Any:
        self.join(60)
        assert not self.is_alive(), "it is still at it"
        if self._error is not None:
            raise self._error
        return self._gave


def ended(store: Path) -> dict[int, tuple[Any, ...]]:
    """Of the trials that have ended: their state and scores."""
    try:
        study = open_study(store)
    except ExplorationError:
        return {}  # not begun yet
    return {number: (study.trials()[number].state, study.trials()[number].scores) for number in study.history.ended}
