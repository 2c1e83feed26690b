"""A folder with a program in it, and no calibration but what a test puts there."""

import sys

import pytest

from graphopt.cost_model import machine as machines
from tests.commands.program import PROGRAM


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with ``my_step.py`` in it; nothing is known of this machine."""
    (tmp_path / "my_step.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_step", raising=False)
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(machines, "_CURRENT", {})
    return tmp_path
