"""Real processes: killed, hanging, out of memory; nothing is left behind, nothing that ended is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graphopt.errors import ExplorationError, StoreError
from graphopt.exploration import choice, explore, linear, open_study
from tests.exploration.searches import (
    BOWL,
    KilledWhereItArrives,
    alive,
    bowl,
    processes_of,
    slow_bowl,
    troubled,
    wait_for,
    with_child,
)

ROOT = Path(__file__).resolve().parents[2]


def test_trouble_is_recorded_and_the_study_goes_on():
    """F6 to F9 in one study: each kind of trouble, and trials that are well."""
    kinds = ("nan", "raise", "memory", "die", "exit", "hang", "once", "well")
    study = explore(
        None, troubled, hyper_parameters={"do": choice(*kinds)}, trials=len(kinds), workers=2, generation="master",
        proposer="random", first_seconds=5.0, hang_after=5.0, progress=False,
    )  # fmt: skip
    by_kind = {trial.hyper_parameters["do"]: trial for trial in study.trials()}
    states = {kind: trial.state for kind, trial in by_kind.items()}
    assert states == {
        "nan": "invalid", "raise": "failed", "memory": "failed", "die": "failed", "exit": "failed", "hang": "failed",
        "once": "done", "well": "done",
    }  # fmt: skip
    assert "out of memory" in by_kind["memory"].cause and by_kind["memory"].out_of_memory
    assert "SIGSEGV" in by_kind["die"].cause and by_kind["die"].attempts == 2
    assert "exit code 7" in by_kind["exit"].cause and "the last words" in by_kind["exit"].cause
    assert "it hung" in by_kind["hang"].cause
    assert by_kind["once"].metrics == {"score": 1.5} and by_kind["once"].attempts == 2  # from its checkpoint
    assert processes_of(os.getpid()) == []


def test_workers_that_are_killed_whenever_they_start_end_the_study():
    """As the system does where memory runs out while the search is unpickled."""
    with pytest.raises(ExplorationError, match=r"trainer of worker 0 ended \d+ times without doing anything.*SIGKILL"):
        explore(
            None, KilledWhereItArrives(), hyper_parameters=BOWL, trials=1, workers=1, generation="master",
            progress=False,
        )  # fmt: skip
    assert processes_of(os.getpid()) == []


def test_generators_in_their_own_processes_give_the_same_models():
    options = {"hyper_parameters": BOWL, "trials": 24, "reproducible": True, "window": 6, "progress": False}
    here = explore(None, bowl, on="inline", **options)
    there = explore(None, bowl, workers=2, generation="workers", **options)
    assert [t.key for t in here.trials()] == [t.key for t in there.trials()]
    assert [t.scores for t in here.trials()] == [t.scores for t in there.trials()]
    assert processes_of(os.getpid()) == []


def script(tmp_path, **options):
    """A search in a process of its own, and its store."""
    given = {"trials": 30, "workers": 2, "reproducible": True, "window": 6, "progress": False} | options
    trial = given.pop("trial", "slow_bowl")
    code = (
        "from graphopt.exploration import explore\n"
        f"from tests.exploration.searches import BOWL, {trial}\n"
        f"study = explore(None, {trial}, hyper_parameters=BOWL, store={str(tmp_path / 's.db')!r}, **{given!r})\n"
        "print(study.stopped, study.counts(), flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def done(store):
    """Numbers of the trials that have ended, with their scores."""
    try:
        return {t.number: t.scores for t in open_study(store).trials("done")}
    except Exception:
        return {}  # not begun yet


def test_kill_9_of_workers_and_of_the_master(tmp_path):
    """F1, F2: trainers, a generator, then the master are killed; a later run ends with the same models."""
    store = tmp_path / "s.db"
    expected = explore(
        None, bowl, hyper_parameters=BOWL, trials=30, on="inline", reproducible=True, window=6, progress=False
    )
    master = script(tmp_path)
    try:
        wait_for(lambda: len(done(store)) >= 3)
        for kind in ("trainer", "generator"):
            victims = [p for p in processes_of(master.pid) if kind in Path(f"/proc/{p}/cmdline").read_text()]
            os.kill(victims[0], signal.SIGKILL)
            before = len(done(store))
            wait_for(lambda before=before: len(done(store)) >= before + 2)
        with pytest.raises(StoreError, match=f"process {master.pid}"):  # F5
            explore(None, slow_bowl, hyper_parameters=BOWL, trials=1, store=store, on="inline", progress=False)
        workers = processes_of(master.pid)
        assert len(workers) == 4
        known = done(store)
        master.kill()
        killed = time.monotonic()
        wait_for(lambda: not any(map(alive, workers)), 5.0)
        assert time.monotonic() - killed < 1.5
    finally:
        master.kill()
        master.communicate()
    assert known.items() <= done(store).items()  # no result that ended is lost
    study = explore(
        None, slow_bowl, hyper_parameters=BOWL, trials=30, store=store, workers=2, reproducible=True, window=6,
        progress=False,
    )  # fmt: skip
    assert [t.key for t in study.trials()] == [t.key for t in expected.trials()]
    assert study.counts() == {"done": 30}
    assert sum(trial.attempts for trial in study.trials()) <= 30 + 1 + 2  # one worker, and two with the master


def test_ctrl_c_once_and_twice(tmp_path):
    """F14."""
    store, master = tmp_path / "s.db", script(tmp_path, trials=500, generation="master")
    try:
        wait_for(lambda: len(done(store)) >= 2)
        os.kill(master.pid, signal.SIGINT)
        out, err = master.communicate(timeout=30)
    finally:
        master.kill()
    assert master.returncode == 0 and "interrupted" in out and "Ctrl-C again" in err
    assert not open_study(store).trials("running")
    first = len(done(store))
    master = script(tmp_path, trials=500, generation="master")
    try:
        wait_for(lambda: len(done(store)) >= first + 2)
        workers = processes_of(master.pid)
        os.kill(master.pid, signal.SIGINT)
        os.kill(master.pid, signal.SIGINT)
        time.sleep(0.02)  # two signals of one kind may become one
        os.kill(master.pid, signal.SIGINT)
        _, err = master.communicate(timeout=30)
    finally:
        master.kill()
    wait_for(lambda: not any(map(alive, workers)), 2.0)
    assert len(done(store)) >= first + 2


def test_trials_may_be_defined_in_the_script(tmp_path):
    """With the guard of multiprocessing; what happens without it is told."""
    body = "explore(None, trial, hyper_parameters={'a': choice(1, 2)}, trials=2, workers=1, progress=False)"
    (tmp_path / "script.py").write_text(
        "from graphopt.exploration import choice, explore\n"
        "def trial(net, hyper_parameters, context):\n"
        "    return hyper_parameters['a']\n"
        "import sys\n"
        "if sys.argv[1:] == ['bare']:\n"
        f"    print({body}.best().metrics)\n"
        "elif __name__ == '__main__':\n"
        f"    print({body}.best().metrics)\n"
    )
    for arguments, told in (([], "{'score': 2.0}"), (["bare"], "if __name__ == '__main__':")):
        run = subprocess.run(
            [sys.executable, "script.py", *arguments], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert told in run.stdout + run.stderr


def test_what_a_trial_started_ends_with_it(tmp_path, monkeypatch):
    """A trial that hangs, with a process of its own."""
    monkeypatch.setenv("CHILD_FILE", str(tmp_path / "child"))
    study = explore(
        None, with_child, hyper_parameters={"a": linear(0, 1, steps=2)}, trials=1, workers=1, generation="master",
        first_seconds=3.0, progress=False,
    )  # fmt: skip
    assert study.counts() == {"failed": 1}
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not alive(child), 2.0)


def test_a_trial_that_takes_long_ends_with_a_killed_master(tmp_path, monkeypatch):
    """Its worker does not listen to the connection meanwhile; and it has a process of its own."""
    monkeypatch.setenv("CHILD_FILE", str(tmp_path / "child"))
    master = script(tmp_path, trial="with_child", workers=1, generation="master")
    try:
        child = int(wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text()))
        (worker,) = [p for p in processes_of(master.pid) if p != child]
    finally:
        master.kill()
        master.communicate()
    wait_for(lambda: not alive(worker) and not alive(child), 2.0)


@pytest.mark.skipif(not os.environ.get("GRAPHOPT_SOAK"), reason="takes minutes: make soak")
def test_soak(tmp_path):
    """F1, F2 at length (`make soak`): workers are killed 100 times and the master 20 times, at random moments."""
    import random

    store, chance = tmp_path / "s.db", random.Random(0)
    options = {"trials": 800, "reproducible": True, "window": 6, "proposer": "evolve", "progress": False}
    expected = explore(None, bowl, hyper_parameters=BOWL, on="inline", **options)
    kills, masters, known, slowest = 0, 0, {}, 0.0
    while masters < 20 or kills < 100:
        assert len(known) < 780, "the study ended before all was killed"
        master = script(tmp_path, **options)
        try:
            begun = len(done(store))
            wait_for(lambda begun=begun: len(done(store)) > begun, 60)
            for _ in range(6):
                time.sleep(chance.uniform(0, 0.6))
                try:
                    os.kill(chance.choice(wait_for(lambda master=master: processes_of(master.pid))), signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it was being replaced
                kills += 1
            time.sleep(chance.uniform(0, 0.3))
            workers = processes_of(master.pid)
            known |= done(store)
            assert master.poll() is None
            master.kill()
            masters += 1
            killed = time.monotonic()
            wait_for(lambda workers=workers: not any(map(alive, workers)), 5.0)
            slowest = max(slowest, time.monotonic() - killed)
        finally:
            master.kill()
            master.communicate()
        assert known.items() <= done(store).items()
    study = explore(None, slow_bowl, hyper_parameters=BOWL, store=store, workers=2, **options)
    again = sum(t.attempts for t in study.trials()) - len(study)
    print(f"\n{kills} workers and {masters} masters killed: {len(known)} results known before the end, none lost; "
          f"{again} attempts repeated; the last orphan ended after {slowest:.2f} s")  # fmt: skip
    assert known.items() <= {t.number: t.scores for t in study.trials("done")}.items()
    assert [(t.key, t.scores) for t in study.trials()] == [(t.key, t.scores) for t in expected.trials()]
    assert slowest < 1.0 and again <= kills + 2 * masters
