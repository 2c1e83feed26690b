"""Steps of subnets on all ranks of `torch.distributed`, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.worlds import ENVIRONMENT, ROOT, Outcomes, assert_passed, free_port, names_of, outcomes_in

SCRIPT = Path(__file__).with_name("world_script.py")
NAMES = names_of(SCRIPT)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What came of each case on each rank, after one launch."""
    folder = tmp_path_factory.mktemp("world")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)], env={**ENVIRONMENT, **shared, "RANK": str(k)}, cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for k in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return outcomes_in(folder, said)


@pytest.mark.parametrize("name", NAMES)
def test_a_world_of_two(name: str, outcomes: Outcomes) -> None:
    assert_passed(name, outcomes)
