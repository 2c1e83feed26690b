"""The page on commands: its examples run, and it names every command."""

import re
from pathlib import Path

from tests.commands.test_cli import COMMANDS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text()


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    variables: dict = {}
    for block in blocks:
        exec(compile(block, "commands.md", "exec"), variables)


def test_every_command_is_named():
    assert all(f"graphopt {name} " in PAGE for name in COMMANDS)
