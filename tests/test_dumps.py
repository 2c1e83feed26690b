"""``GRAPHOPT_DUMP``: what is written of each captured step, and that it never ends a training."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import graphopt
from graphopt import dumps
from graphopt.errors import GraphoptWarning
from graphopt.passes import DeadCode
from graphopt.step import PASSES
from tests.test_verify import Wrong
from tests.training import Net, Twins, images, mlp, no_warning, one_warning, rows

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder that is asked for; it is made when it is first needed."""
    monkeypatch.setenv(dumps.VARIABLE, str(tmp_path / "dump"))
    monkeypatch.setattr(dumps, "_given_up", set())
    return tmp_path / "dump"


def train(model, batch, **options):
    optimizer = torch.optim.AdamW(model.parameters())
    step = graphopt.optimize(
        model, batch, loss=torch.nn.functional.cross_entropy, optimizer=optimizer, schemes="flat", **options
    )
    step(*batch)
    return step


def test_a_step_is_written(place):
    with no_warning():
        step = train(Net(), images())
    (folder,) = place.iterdir()
    assert folder.name == f"step_001_pid{os.getpid()}"
    names = {path.name for path in folder.iterdir()}
    assert {"00_captured.txt", "00_captured.graph", "passes.txt", "code.py", "about.json", "plan_batch_4.txt",
            "plan_batch_4.json"} <= names  # fmt: skip
    changed = {change.pass_name for change in step.plan.passes.changes}
    for name in changed:  # each pass that changed something has its graph and the difference
        assert any(path.endswith(f"_{name}.graph") for path in names) and any(
            p.endswith(f"_{name}.diff") for p in names
        )
    before, after = (graphopt.TrainingGraph.load(folder / name) for name in (
        "00_captured.graph", max(n for n in names if n.endswith(".graph"))))  # fmt: skip
    assert before.hash() == step.plan.passes.before.hash() and after.hash() == step.plan.passes.graph.hash()
    said = (folder / "passes.txt").read_text()
    assert all(f"{one.name}: " in said for one in (*PASSES, graphopt.passes.GradientLiveness()))
    assert "def step(" in (folder / "code.py").read_text()
    plan = json.loads((folder / "plan_batch_4.json").read_text())
    expected = json.loads(json.dumps(step.plan.to_dict()))
    expected["candidates"][0]["start_seconds"] = None  # it was decided on before it ran
    assert plan["chosen"] == "flat" and plan == expected
    assert json.loads((folder / "about.json").read_text())["torch"] == str(torch.__version__)


def test_each_step_has_its_folder(place):
    train(mlp(), rows(5))
    step = train(mlp(), rows(5), accumulate=2)
    step(*rows(1))  # a batch of one is a step of its own
    assert [path.name for path in sorted(place.iterdir())] == [f"step_{n:03}_pid{os.getpid()}" for n in (1, 2, 3)]
    captured = [path.name for path in sorted((place / f"step_002_pid{os.getpid()}").glob("*captured.txt"))]
    assert len(captured) == 2  # of a batch that is only accumulated, and of a whole step


def test_a_drop_in_module_is_written(place):
    module = graphopt.optimize(mlp(), (5, 4))
    module(rows()[0]).sum().backward()
    (folder,) = place.iterdir()
    assert "drop-in" in (folder / "about.json").read_text() and (folder / "code.py").exists()
    assert "flat" in (folder / "plan_batch_5.txt").read_text()


def test_a_pass_that_raises_is_named(place):
    with pytest.warns(GraphoptWarning):
        train(Net(), images(), passes=(DeadCode(), Wrong("break a shape")))
    (folder, plan) = sorted(place.iterdir(), key=lambda path: path.is_file())[:2]
    assert "wrong: raised PassError: pass 'wrong': it broke" in (folder / "passes.txt").read_text()
    assert plan.name == f"plan_batch_4_pid{os.getpid()}.json" or plan.suffix == ".txt"


def test_nothing_is_written_where_nobody_asks(tmp_path, monkeypatch):
    monkeypatch.delenv(dumps.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    train(mlp(), rows())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["a file", "full"])
def test_a_folder_that_cannot_be_written_is_one_warning(place, fault, monkeypatch):
    """The training goes on, with eager's bits."""
    if fault == "a file":
        place.write_text("")
    else:

        def full(*args, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
    twins = Twins(Net(), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    with one_warning("nothing more is written to"):
        twins.steps(images, 3)
    assert twins.run.plan.chosen == "flat"
    with no_warning():
        train(mlp(), rows())


def test_processes_do_not_meet(place):
    code = (
        "import torch, graphopt\n"
        "net = torch.nn.Linear(4, 3)\n"
        "step = graphopt.optimize(net, (5, 4), loss=torch.nn.functional.cross_entropy, "
        "optimizer=torch.optim.SGD(net.parameters(), lr=0.1), schemes='flat')\n"
        "step(torch.randn(5, 4), torch.randint(3, (5,)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        train(mlp(), rows())
    assert process.returncode == 0
    assert {path.name for path in place.iterdir()} == {f"step_001_pid{pid}" for pid in (process.pid, os.getpid())}
    for folder in place.iterdir():
        graphopt.TrainingGraph.load(folder / "00_captured.graph")


def test_the_same_number_is_not_taken_twice(place):
    (place / f"step_001_pid{os.getpid()}").mkdir(parents=True)  # of another container's process
    train(mlp(), rows())
    assert (place / f"step_002_pid{os.getpid()}" / "passes.txt").exists()


def test_a_graph_that_no_file_can_hold_is_text(place, monkeypatch):
    def refuse(graph, path):
        raise graphopt.GraphoptError("it calls a function of the user's")

    monkeypatch.setattr(graphopt.TrainingGraph, "save", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(mlp(), rows())
    (folder,) = place.iterdir()
    assert "could not be written: it calls a function" in (folder / "passes.txt").read_text()
    assert (folder / "00_captured.txt").exists()
