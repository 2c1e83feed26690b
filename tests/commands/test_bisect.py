"""``graphopt bisect``: a wrong pass of the user's is found; what is written can be read."""

import json

import pytest

from graphopt.graph.training_graph import TrainingGraph
from tests.commands.program import data, invoke, output

PASSES = """
from graphopt.step import PASSES
from tests.test_verify import Wrong

PASSES = [*PASSES[:2], Wrong("scale an update"), *PASSES[2:]]

def few():
    return PASSES[:1]

def no_relu(stage):
    assert "aten.relu" not in stage.graph.text(), "there is a relu"
"""


@pytest.fixture
def passes(folder):
    (folder / "my_passes.py").write_text(PASSES)
    return folder


def test_a_right_step_ends_with_0(folder):
    found = data("bisect", "my_step.py:step")
    assert found["culprit"] is None and [one["wrong"] for one in found["tested"]] == [None] * len(found["tested"])
    assert "nothing is wrong" in output("bisect", "my_step.py:step", "--out", "report")
    assert not (folder / "report").exists()


def test_a_wrong_pass_is_found_and_written(passes):
    said = ("bisect", "my_step.py:step", "--passes", "my_passes.py:PASSES", "--out", "report")
    result = invoke(*said)
    assert result.exit_code == 1 and "the first that is wrong: wrong: new parameter 2." in result.stdout
    found = json.loads(invoke(*said, "--json").stdout)
    assert found["culprit"] == "wrong" and [one["name"] for one in found["tested"]][-1] == "wrong"
    graphs = [TrainingGraph.load(passes / "report" / f"{name}.graph") for name in ("before", "after")]
    assert len(graphs[1]) == len(graphs[0]) + 1
    assert "mul" in (passes / "report" / "changes.diff").read_text()
    assert str(passes / "report" / "report.txt").endswith(found["written"][0])


def test_a_check_of_ones_own(passes):
    said = (
        "bisect",
        "my_step.py:step",
        "--passes",
        "my_passes.py:few",
        "--check",
        "my_passes.py:no_relu",
        "--no-verify",
    )
    result = invoke(*said, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and found["culprit"] == "capture"
    assert found["wrong"] == "the check raised AssertionError: there is a relu"
