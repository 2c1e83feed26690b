"""How a script with workers may end: Ctrl-C, SIGKILL, an exception, a fork, or in peace. No worker outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.schemes.test_workers_failures import alive

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0

START = """
import os, signal, sys, time, tempfile
import torch
from graphopt.schemes.workers import Pool
from tests.schemes.summed import values
from tests.schemes.test_workers_failures import rows, words

def say(*what):
    print(*what, flush=True)

pool = Pool(2, timeout=60)
job, model = words(pool)
common = values(job, model)

def step(commit=None):
    return job(common, [rows(2), rows(2)], commit)

step()
say("workers", *pool.processes, pool._teams[-1].directory)
"""


class Script:
    """A script that runs beside the test; what it says is read line by line."""

    def __init__(self, text: str, folder: Path):
        file = folder / "script.py"
        file.write_text(START + text)
        self.errors = folder / "errors"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(file)], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        word, *self.workers, self.directory = self.line().split()
        assert word == "workers"

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(map(int, self.workers))

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        return line.strip()

    def end(self) -> tuple[int, str, str]:
        """Wait for its end: exit code, what else it said, its errors."""
        assert self.process.stdout is not None
        code = self.process.wait(timeout=PATIENCE)
        return code, self.process.stdout.read().strip(), self.errors.read_text()

    def nothing_is_left(self) -> None:
        """Soon after the end no worker and no file of it is there."""
        _soon(lambda: not alive(self.pids))
        _soon(lambda: not Path(self.directory).exists())


def _soon(holds: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_script_that_ends(tmp_path: Path) -> None:
    script = Script("say('last')", tmp_path)
    assert script.end() == (0, "last", "")
    script.nothing_is_left()


def test_a_script_that_raises(tmp_path: Path) -> None:
    script = Script("raise ValueError('of the script')", tmp_path)
    code, _, errors = script.end()
    assert code == 1 and errors.strip().endswith("ValueError: of the script")
    script.nothing_is_left()


def test_a_script_that_is_killed(tmp_path: Path) -> None:
    script = Script("time.sleep(600)", tmp_path)
    script.process.kill()
    script.nothing_is_left()


def test_a_script_that_is_killed_in_mid_step(tmp_path: Path) -> None:
    script = Script(
        """
os.kill(pool.processes[0], signal.SIGSTOP)
import threading
threading.Timer(1, lambda: (say("waiting"), os.kill(os.getpid(), signal.SIGKILL))).start()
step()
""",
        tmp_path,
    )
    assert script.line() == "waiting"
    for worker in script.pids:
        os.kill(worker, signal.SIGCONT)
    script.nothing_is_left()


def test_an_interrupt_waits_for_the_commit(tmp_path: Path) -> None:
    script = Script(
        """
def commit(results):
    say("commit begins")
    time.sleep(1)
    say("commit ends")
try:
    step(commit)
except KeyboardInterrupt:
    say("interrupted")
step(lambda results: say("again"))
""",
        tmp_path,
    )
    assert script.line() == "commit begins"
    for pid in (script.process.pid, *script.pids):  # as a terminal does
        os.kill(pid, signal.SIGINT)
    assert script.end() == (0, "commit ends\ninterrupted\nagain", "")
    script.nothing_is_left()


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    script = Script(
        """
def commit(results):
    say("commit begins")
    time.sleep(60)
    say("commit ends")
step(commit)
""",
        tmp_path,
    )
    assert script.line() == "commit begins"
    os.kill(script.process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert script.process.poll() is None
    os.kill(script.process.pid, signal.SIGINT)
    code, said, errors = script.end()
    assert code == -signal.SIGINT and said == "" and errors.strip().endswith("KeyboardInterrupt")
    script.nothing_is_left()


def test_interrupts_while_workers_start(tmp_path: Path) -> None:
    script = Script(
        """
pool.close()
pool = Pool(2)
say("started", *pool.processes)
time.sleep(600)
""",
        tmp_path,
    )
    started = tuple(map(int, script.line().split()[1:]))
    for pid in started:  # long before it could have set a handler
        os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert alive(started) == list(started)
    os.kill(script.process.pid, signal.SIGINT)
    script.end()
    _soon(lambda: not alive(started))


def test_a_forked_child_leaves_the_workers_alone(tmp_path: Path) -> None:
    script = Script(
        """
from graphopt.errors import WorkerError
child = os.fork()
if child == 0:
    try:
        step()
    except WorkerError as error:
        say(error)
    sys.exit()  # with the functions that are called at exit
os.waitpid(child, 0)
step(lambda results: say("the step of main"))
""",
        tmp_path,
    )
    assert "the pool belongs to process" in script.line()
    assert script.end() == (0, "the step of main", "")
    script.nothing_is_left()


def test_main_that_was_stopped_gives_workers_their_time_back(tmp_path: Path) -> None:
    script = Script(
        """
pool.timeout = 5
def commit(results):
    say("made")
os.kill(pool.processes[0], signal.SIGSTOP)
say("step")
step(commit)
""",
        tmp_path,
    )
    assert script.line() == "step"
    os.kill(script.process.pid, signal.SIGSTOP)
    time.sleep(9)
    os.kill(script.process.pid, signal.SIGCONT)
    time.sleep(0.3)
    for pid in script.pids:
        os.kill(pid, signal.SIGCONT)
    assert script.end()[:2] == (0, "made")


@pytest.mark.parametrize("settings", [{"WORLD_SIZE": "2", "RANK": "0"}])
def test_a_script_under_torchrun_is_told(settings: dict[str, str], tmp_path: Path) -> None:
    code = "from graphopt.schemes.workers import Pool\ntry: Pool(2)\nexcept Exception as e: print(e)"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **settings, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert "belongs to a group already (torchrun" in result.stdout, result.stderr
