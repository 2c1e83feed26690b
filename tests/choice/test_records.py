"""What was measured serves a later process; a store that fails stops nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import graphopt
from graphopt.choice import Records
from graphopt.choice.records import FRESH_SECONDS
from graphopt.cost_model import store as store_module
from graphopt.cost_model.store import ProfileStore
from tests.choice.fakes import Training


def process(path: Path, *, a: float = 1.0, b: float = 1.3) -> tuple[Training, list[str]]:
    """A training as a new process begins it, and who ran."""
    records = Records(ProfileStore(path))
    training = Training(records=records)
    training.add("a", a, graph=True)
    training.add("b", b, graph=True)
    ran = training.run(30)
    records.flush()
    return training, ran


def test_a_later_process_confirms_by_one_step(tmp_path):
    path = tmp_path / "profiles.sqlite"
    first, ran = process(path)
    assert first.plan.reason.startswith("measured") and ran.count("b") == 2 + 1
    second, ran = process(path)
    assert set(ran) == {"a"} and second.plan.reason == "stored measurements, confirmed by a step"
    assert second.plan.candidate("b").predicted[3] == "stored"
    assert second.plan.candidate("b").lost == "took 1.30 times as long as a"


def test_what_does_not_hold_any_more_is_measured_again(tmp_path):
    path = tmp_path / "profiles.sqlite"
    process(path)
    training, ran = process(path, a=5.0)
    assert ran[-1] == "b" and training.plan.reason.startswith("measured")
    assert any("a step took 5 s, not 1 s as stored" in note for note in training.plan.notes)
    training, ran = process(path, a=5.0)
    assert ran == ["b"] * 30, "the last measurement counts"


def test_old_rows_are_not_used(tmp_path, monkeypatch):
    path = tmp_path / "profiles.sqlite"
    process(path)
    now = store_module.time.time() + FRESH_SECONDS + 1
    monkeypatch.setattr("graphopt.choice.records.time.time", lambda: now)
    assert "b" in process(path)[1]


def test_another_graph_is_another_row(tmp_path):
    path = tmp_path / "profiles.sqlite"
    process(path)
    training = Training(records=Records(ProfileStore(path)), accumulate=2)
    training.add("a", 1.0, graph=True)
    training.add("b", 2.0, graph=True)
    assert "b" in training.run(20)


@pytest.mark.parametrize("error", [OSError("disk full"), graphopt.CostModelError("newer"), RuntimeError("no thread")])
def test_a_store_that_fails_stops_nothing(error, monkeypatch, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise error

    for method in ("steps", "add_step"):
        monkeypatch.setattr(ProfileStore, method, fail)
    training, ran = process(tmp_path / "profiles.sqlite")
    assert len(ran) == 30 and training.plan.chosen == "a"
