"""The command line, from a script to a table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graphopt.cli import app
from graphopt.errors import ExplorationError, StoreError

SCRIPT = """
from graphopt.exploration import linear

def trial(net, hyper_parameters, context):
    return {"score": -(hyper_parameters["x"] - 0.3) ** 2, "seconds": hyper_parameters["x"]}

def search():
    return dict(
        space=None, trial=trial, hyper_parameters={"x": linear(0, 1)}, maximize="score", minimize="seconds",
        trials=10, progress=False, on="inline",
    )

too_little = {"trial": trial}
"""


def invoke(*arguments):
    result = CliRunner().invoke(app, ["explore", *map(str, arguments)])
    if isinstance(result.exception, (ExplorationError, StoreError)):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_script_is_searched_and_looked_at(tmp_path):
    script, store = tmp_path / "train_this.py", tmp_path / "runs" / "s.db"
    script.write_text(SCRIPT)
    assert "10 done" in invoke("run", f"{script}:search", "--store", store)
    assert "25 done" in invoke("run", f"{script}:search", "--store", store, "--trials", 25)
    status = invoke("status", store)
    assert "25 done, 0 running" in status and "best score" in status and f"process {os.getpid()}" in status
    assert "x=0.3" in invoke("best", store)
    assert len(invoke("best", store, "--top", 3).splitlines()) == 4
    assert "x=0.3" in invoke("pareto", store) and "x=0.0" in invoke("pareto", store)
    assert "trial 3" in invoke("why", store, 3)
    as_json = lambda *arguments: json.loads(invoke(*arguments, "--json"))
    assert as_json("status", store)["counts"] == {"done": 25}
    (best,) = as_json("best", store)
    assert best["score"] == max(row["score"] for row in as_json("best", store, "--top", 25))
    assert best["number"] in {row["number"] for row in as_json("pareto", store)}
    assert "trial 3" in as_json("why", store, 3)["why"]
    assert as_json("run", f"{script}:search", "--store", store, "--trials", 25)["counts"] == {"done": 25}
    invoke("export", store, tmp_path / "s.csv")
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 26


def test_what_is_wrong_is_named(tmp_path):
    (tmp_path / "train_that.py").write_text(SCRIPT)
    for target, told in (("none.py:x", "SCRIPT.py:NAME"), ("train_that.py", "SCRIPT.py:NAME"),
                         ("train_that.py:absent", "dict"), ("train_that.py:too_little", "'space'")):  # fmt: skip
        with pytest.raises(ExplorationError, match=told):
            invoke("run", tmp_path / target, "--store", tmp_path / "s.db")
    with pytest.raises(StoreError, match="no study"):
        invoke("status", tmp_path / "none.db")


def test_public_names_are_imported_when_asked_for():
    """A generator process imports a search space, and no torch."""
    code = (
        "import sys, graphopt, graphopt.exploration as e\n"
        "e.log, e.ModelFunction, graphopt.ExplorationError\n"
        "import graphopt.exploration.generator\n"
        "assert 'torch' not in sys.modules\n"
        "missing = [name for module in (graphopt, e) for name in module.__all__ if not hasattr(module, name)]\n"
        "assert not missing, missing\n"
        "assert graphopt.explore is e.explore and graphopt.passes.DeadCode and not hasattr(graphopt, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
