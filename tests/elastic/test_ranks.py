"""Steps of subnets on all ranks of `torch.distributed`, in processes of their own."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.schemes.test_world import ENVIRONMENT, ROOT, free_port

SCRIPT = Path(__file__).with_name("world_script.py")
NAMES = [
    node.name for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "case" for d in node.decorator_list)
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
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
    files = [folder / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), said
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("name", NAMES)
def test_a_world_of_two(name: str, outcomes: list[dict[str, str]]) -> None:
    for rank, found in enumerate(outcomes):
        assert name in found, f"rank {rank} did not come so far"
        assert found[name] == "", f"rank {rank}: {found[name]}"
