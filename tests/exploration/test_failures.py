"""The list of failures of docs/exploration.md: that each has its test, and those tests that have no other place.

Long forms run under ``make soak`` alone.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from benchmarks.exploration import scale
from graphopt.errors import StoreError
from graphopt.exploration import explore
from graphopt.exploration.early_stopping import ASHA
from graphopt.exploration.engines.local import LocalProcesses
from graphopt.exploration.engines.workers import Lost
from graphopt.exploration.outcome import Objectives
from graphopt.exploration.payload import of_here, write
from graphopt.exploration.store import Store
from graphopt.exploration.trainer import Task, TrainerSetup
from tests.exploration.searches import (
    BOWL,
    Meanwhile,
    bowl,
    ended,
    halfway,
    halves,
    processes_of,
    simulated,
    slow_bowl,
    small_space,
    wait_for,
)

ROOT = Path(__file__).resolve().parents[2]
soak = pytest.mark.skipif(not os.environ.get("GRAPHOPT_SOAK"), reason="takes minutes: make soak")


def test_each_failure_of_the_list_has_its_tests():
    text = (ROOT / "docs" / "exploration.md").read_text()
    rows = re.findall(r"^\| F(\d+) \|.*\| (.*) \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 16))
    known = {
        (path.stem, name)
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    for number, tests in rows:
        named = re.findall(r"`(test_\w+)::(test_\w+)`", tests)
        assert named and set(named) <= known, f"F{number}: {set(named) - known}"


def test_the_end_of_a_process_is_noticed_at_once(tmp_path):
    """F1. Of one that is at work and says nothing."""
    setup = TrainerSetup(small_space(), None, slow_bowl, Objectives("score"), ASHA(), tmp_path)
    write(tmp_path / "payload", of_here(setup))
    processes = LocalProcesses({"trainer": tmp_path / "payload"}, tmp_path / "logs", {0: {}})
    try:
        process = processes.spawn("trainer", 0)
        assert processes.wait(30) == [(process, ("ready",))]
        processes.send(process, [("task", Task(0, (0,) * 6, 1))])
        os.kill(process.process.pid, signal.SIGKILL)
        killed = time.perf_counter()
        ((lost, what),) = processes.wait(5)
        assert time.perf_counter() - killed < 0.1
        assert lost is process and isinstance(what, Lost) and what.killed and "SIGKILL" in what.cause
    finally:
        processes.close()
    assert processes_of(os.getpid()) == [] and not (tmp_path / "payload").exists()


def test_eight_kills_cost_half_a_trial_each_and_others_nothing(tmp_path):
    """F1. Trials go on from their checkpoints; those of the other worker are not begun again."""
    store, kills = tmp_path / "s.db", []

    def trouble():
        for count in range(8):
            before = len(ended(store))
            trainer = wait_for(lambda: next(iter(trainers()), None))
            time.sleep(0.05 * (count % 4))
            os.kill(trainer, signal.SIGKILL)
            kills.append(trainer)
            wait_for(lambda before=before: len(ended(store)) > before)

    def trainers():
        return [p for p in processes_of(os.getpid()) if b"trainer" in Path(f"/proc/{p}/cmdline").read_bytes()]

    options = {"hyper_parameters": BOWL, "trials": 30, "reproducible": True, "window": 6, "progress": False}
    expected = explore(None, bowl, on="inline", **options)
    meanwhile = Meanwhile(trouble)
    study = explore(None, halfway, workers=2, generation="master", store=store, **options)
    meanwhile.end()
    assert len(kills) == 8
    assert [(t.key, t.scores) for t in study.trials()] == [(t.key, t.scores) for t in expected.trials()]
    assert sum(t.attempts for t in study.trials()) <= 30 + 8
    assert len(halves(Path(f"{store}.d"))) <= 2 * 30 + 8
    assert processes_of(os.getpid()) == []


def test_a_full_disk_ends_a_search_that_goes_on_when_there_is_room(tmp_path, monkeypatch):
    """F4. SQLite is told that its file may not grow."""
    store, take_over = tmp_path / "s.db", Store._take_over

    def nearly_full(self):
        take_over(self)
        (pages,) = self._connection.execute("PRAGMA page_count").fetchone()
        self._connection.execute(f"PRAGMA max_page_count = {pages + 4}")

    options = {"hyper_parameters": BOWL, "trials": 60, "workers": 1, "store": store, "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr(Store, "_take_over", nearly_full)
        with pytest.raises(StoreError, match=r"the disk is full.*make room, then resume"):
            explore(None, bowl, **options)
    assert processes_of(os.getpid()) == []
    known = ended(store)
    study = explore(None, bowl, **options)
    assert known and known.items() <= ended(store).items()
    assert study.counts() == {"done": 60} and all(study.trials()[number].attempts == 1 for number in known)


def test_a_lock_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    """F4. The disk is full before the study begins."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"s\.db\.lock cannot be written to: No space left"):
        Store(tmp_path / "s.db")
    monkeypatch.undo()
    Store(tmp_path / "s.db").close()


def test_models_without_a_score_are_no_parents_of_any_proposer():
    """F6. A third of the space gives NaN, among them what would be best."""
    space = small_space()
    for proposer in ("anneal", "anneal_plain", "evolve"):
        history, _ = simulated(
            space, lambda point: float("nan") if point[0] == 2 else float(sum(point)), trials=60, proposer=proposer
        )
        bad = {t.number for t in history.trials if t.state == "invalid"}
        assert len(bad) > 5 and not {t.parent for t in history.trials} & bad
        assert len({t.key for t in history.trials}) == 60


def test_a_thousand_trials(tmp_path):
    """F15, the short form: what a trial takes in the store, and in a resume."""
    options = {"hyper_parameters": BOWL, "proposer": "random", "on": "inline", "progress": False}
    explore(None, bowl, trials=1000, store=tmp_path / "s.db", **options)
    assert sum(path.stat().st_size for path in tmp_path.glob("s.db*") if "backup" not in path.name) < 5000 * 1000
    before = time.process_time()
    study = explore(None, bowl, trials=1000, store=tmp_path / "s.db", resume="must", **options)
    assert time.process_time() - before < 1.0  # 2 s for ten times as many; this is on a machine that does other things
    assert study.counts() == {"done": 1000}


@soak
def test_soak_ten_thousand_trials():
    """F15. The figures are those of a machine that does nothing else."""
    found = scale(10_000)
    print(f"\n{found}")
    assert found["store_bytes"] < 50e6 and found["resume_cpu_seconds"] < 2.0
    assert found["proposal_seconds"]["median cpu"] < 0.02
