"""What goes wrong with workers: each failure is made to happen, on real processes.

After each: main has a clear error, its tensors and random numbers are as before the step, no process is left, and the
pool can be used again.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import GraphoptError, GraphoptWarning, WorkerError
from graphopt.schemes.workers import Job, Pool
from tests.schemes.summed import gradients, sum_loss, summed, values

PATIENCE = 60.0


def alive(pids: tuple[int, ...]) -> list[int]:
    """Which of these processes exist and are no zombies."""
    return [p for p in pids if _state(p) not in ("", "Z")]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def workers_of(main: int | None = None) -> list[int]:
    """All workers on this machine that were started by a process, by default this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if "graphopt.schemes.workers" in command and parent == (main or os.getpid()):
            found.append(int(folder.name))
    return found


class Words(nn.Module):
    """An embedding with a dropout: parts can be out of its range, and it draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.scale = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale(nn.functional.dropout(self.embedding(x), 0.5))


def rows(count: int, *, highest: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """A part of a batch for `Words`: that many rows, of one word."""
    return torch.full((count,), highest), torch.arange(3.0 * count).reshape(count, 3)


def words(pool: Pool) -> tuple[Job, nn.Module]:
    model = Words()
    return pool.load(summed(graphopt.capture(model, rows(4), loss=sum_loss))), model


@contextmanager
def unmade(pool: Pool, job: Job, model: nn.Module, says: str) -> Iterator[None]:
    """A step inside fails with an error that says ``says``; everything is as before, and the next step works."""
    pids = pool.processes
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    with pytest.raises(WorkerError, match=says):
        yield
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.get_num_threads() == threads
    assert not workers_of() and not pool.processes
    torch.manual_seed(3)
    results = job(values(job, model), [rows(2), rows(3)])
    assert all(torch.isfinite(g).all() for g in gradients(job, results).values())
    assert pool.processes and not set(pool.processes) & set(pids)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, timeout=PATIENCE) as made:
        yield made
    assert not workers_of()


def later(seconds: float, action: object, *arguments: object) -> threading.Timer:
    timer = threading.Timer(seconds, action, arguments)  # type: ignore[arg-type]
    timer.start()
    return timer


def test_a_worker_that_is_killed_in_mid_step(pool: Pool) -> None:
    job, model = words(pool)
    (worker,) = pool.processes
    os.kill(worker, signal.SIGSTOP)  # so that main waits in a collective when the worker dies
    timer = later(0.5, os.kill, worker, signal.SIGKILL)
    start = time.monotonic()
    with unmade(pool, job, model, rf"processor 1 \(process {worker}\) was killed by SIGKILL"):
        job(values(job, model), [rows(2), rows(2)])
    timer.join()
    assert time.monotonic() - start < PATIENCE


def test_a_worker_that_hangs(pool: Pool) -> None:
    job, model = words(pool)
    (worker,) = pool.processes
    os.kill(worker, signal.SIGSTOP)
    pool.timeout, before = 1.0, pool.timeout
    try:
        with pytest.raises(WorkerError, match=rf"{worker}\) did not answer within 1 s \(stopped by a signal\)"):
            job(values(job, model), [rows(2), rows(2)])
    finally:
        pool.timeout = before
    assert not alive((worker,))
    job(values(job, model), [rows(2), rows(2)])


def test_an_exception_in_a_worker(pool: Pool) -> None:
    job, model = words(pool)
    with unmade(pool, job, model, r"processor 1 .* failed:\n(.*\n)*.*IndexError: index out of range"):
        job(values(job, model), [rows(2), rows(2, highest=10)])


def test_an_exception_in_main(pool: Pool) -> None:
    job, model = words(pool)
    with unmade(pool, job, model, r"processor 0 \(this process\) failed: IndexError: index out of range"):
        job(values(job, model), [rows(2, highest=10), rows(2)])


def test_a_commit_that_fails_is_the_callers(pool: Pool) -> None:
    job, model = words(pool)
    pids = pool.processes
    with pytest.raises(ZeroDivisionError):
        job(values(job, model), [rows(2), rows(2)], commit=lambda results: 1 / 0)
    assert pool.processes == pids


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x @ self.weight) @ x.T).sum()


def test_a_worker_without_memory(pool: Pool) -> None:
    model = Products()
    job = pool.load(summed(graphopt.capture(model, (torch.randn(3, 1),), loss="model")))
    pids = pool.processes
    with pytest.raises(WorkerError, match=r"processor 1 .* failed:\n(.*\n)*.*(memory|alloc)"):
        job(values(job, model), [(torch.randn(2, 1),), (torch.randn(20_000_000, 1),)])  # 1.6e15 bytes
    assert not alive(pids)
    assert float(job(values(job, model), [(torch.ones(2, 1),), (torch.ones(2, 1),)])[0]) == 8


def test_a_worker_that_dies_between_steps(pool: Pool) -> None:
    job, model = words(pool)
    (worker,) = pool.processes
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while pool.processes and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.warns(GraphoptWarning, match=rf"started anew: processor 1 \(process {worker}\) was killed by SIGKILL"):
        job(values(job, model), [rows(2), rows(2)])


def test_two_pools_at_once(pool: Pool) -> None:
    job, model = words(pool)
    pids = pool.processes
    with Pool(2, timeout=PATIENCE) as other:
        twin, other_model = words(other)
        twin(values(twin, other_model), [rows(2), rows(2)])
        job(values(job, model), [rows(2), rows(2)])
        others = other.processes
        assert not set(others) & set(pids)
    assert not alive(others) and alive(pids) == list(pids)
    with pytest.raises(WorkerError, match="the pool is closed"):
        twin(values(twin, other_model), [rows(2), rows(2)])


def test_a_pool_that_is_dropped_ends_its_workers() -> None:
    other = Pool(2, timeout=PATIENCE)
    words(other)
    pids = other.processes
    assert alive(pids) == list(pids)
    del other
    assert not alive(pids)


def test_a_pool_that_is_closed_before_it_has_started() -> None:
    other = Pool(2, timeout=PATIENCE)
    pids = other.processes
    other.close()
    other.close()
    assert not alive(pids)


def test_workers_do_not_care_for_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with Pool(2, timeout=PATIENCE) as other:
            job, model = words(other)
            job(values(job, model), [rows(2), rows(2)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"processors": 1}, "processors: got 1, expected an integer of at least 2"),
        ({"processors": True}, "processors: got True"),
        ({"processors": 2, "threads": 0}, "threads: got 0"),
        ({"processors": 2, "timeout": 0}, "timeout: got 0, expected a positive"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], says: str) -> None:
    before = workers_of()
    with pytest.raises(GraphoptError, match=says):
        Pool(**arguments)  # type: ignore[arg-type]
    assert workers_of() == before


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("/bin/false", r"the workers could not be started: processor 1 \(process \d+\) ended with exit code 1"),
        ("/no/such/python", "cannot start a worker with '/no/such/python': .*No such file"),
    ],
)
def test_workers_that_cannot_be_started(program: str, says: str, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = words(pool)
    monkeypatch.setattr(sys, "executable", program)
    before, files = workers_of(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(WorkerError, match=says):
        Pool(2).load(job.graph)
    gc.collect()
    assert workers_of() == before and len(os.listdir("/proc/self/fd")) <= files


def test_a_script_is_told_when_it_belongs_to_a_group(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.raises(GraphoptError, match="belongs to a group already"):
            Pool(2)
    finally:
        torch.distributed.destroy_process_group()
