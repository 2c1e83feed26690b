"""Steps of all ranks of `torch.distributed`, in processes of their own: what they compute, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graphopt.errors import GraphoptError
from graphopt.schemes.world.ranks import find_world, launched
from tests.worlds import ENVIRONMENT, ROOT, Outcomes, assert_passed, free_port, names_of, outcomes_in

SCRIPT = Path(__file__).with_name("world_script.py")
NAMES = names_of(SCRIPT)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What came of each case on each rank, after one launch by torchrun."""
    folder = tmp_path_factory.mktemp("world")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *command, str(SCRIPT), str(folder)],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return outcomes_in(folder, done.stderr)


@pytest.mark.parametrize("name", NAMES)
def test_a_world_of_two(name: str, outcomes: Outcomes) -> None:
    assert_passed(name, outcomes)


LOSING = """
import os, torch, graphopt
from graphopt.schemes.world.sameness import digest, held
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
adam = torch.optim.Adam(net.parameters())
step = graphopt.optimize(net, (4, 4), loss=torch.nn.functional.cross_entropy, optimizer=adam)
rank = torch.distributed.get_rank()
x, y = torch.randn(4, 4), torch.randint(2, (4,))
for i in range(30):
    before = [digest(t) for _, t in held(step.task)]
    if i == 25 and rank == 1:
        LAST
    try:
        step(x, y)
    except graphopt.RankError as error:
        whole = before == [digest(t) for _, t in held(step.task)]
        print(f"rank {rank}, step {i}, whole: {whole}, {error}", flush=True)
        raise SystemExit
"""
ENDINGS = {
    "between steps": "os._exit(9)",
    "amid a step": "step.task.world.meet = lambda *a, meet=step.task.world.meet, **k: (meet(*a, **k), os._exit(9))",
    "by an operator": "y = torch.full((4,), 7)",
}


@pytest.mark.parametrize("ending", [pytest.param(e, marks=[pytest.mark.slow] * (e != "amid a step")) for e in ENDINGS])
def test_a_rank_that_is_lost_ends_the_others_with_an_error_and_whole_models(ending: str) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    code = LOSING.replace("LAST", ENDINGS[ending])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**ENVIRONMENT, **shared, "RANK": str(k), "LOCAL_RANK": str(k)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for k in range(2)
    ]  # fmt: skip
    try:
        (out, err), (_, lost) = (rank.communicate(timeout=240) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert out.startswith("rank 0, step 25, whole: True, another rank is gone, has failed"), (out, err, lost)
    # A thread of gloo that still waits for the lost rank may abort the process when it ends (torch 2.13).
    assert ranks[0].returncode in (0, -signal.SIGABRT) and ranks[1].returncode != 0


def test_a_process_by_itself_has_no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    assert find_world(model, None) is None and find_world(model, 2) is None
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        assert not launched(os.environ)
        monkeypatch.setenv(name, value)
    assert launched(os.environ)
    assert find_world(model, 1) is None  # asked for
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert find_world(model, None) is None


def test_a_world_of_one_is_none(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        assert find_world(torch.nn.Linear(2, 2), None) is None
        with pytest.raises(GraphoptError, match=r"processors: got 2, but torch\.distributed has a world of 1"):
            find_world(torch.nn.Linear(2, 2), 2)
    finally:
        torch.distributed.destroy_process_group()
