"""Compilations in another process while training goes on: when they are begun, what they cost, and what they leave."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from graphopt.choice.landscape import Landscape
from graphopt.choice.prices import Prices
from graphopt.choice.starts import RELOAD, Starts
from graphopt.errors import GraphoptError
from graphopt.graph.batch import flatten
from graphopt.schemes import Eager, Inductor, Prepared, Runner, Task
from graphopt.schemes.ahead import Ahead, inputs_like
from graphopt.schemes.flat import capture_task
from graphopt.step import PASSES
from tests.choice.fakes import Clock, Fake, FakeRunner, Training
from tests.training import cross_entropy


@dataclass
class Process:
    """A compilation that ends at a time of the test's clock."""

    clock: Clock
    until: float
    fails: bool
    closed: bool = False

    @property
    def done(self) -> bool:
        return self.clock.now >= self.until

    @property
    def failed(self) -> bool:
        return self.done and self.fails

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True, eq=False)
class Compiled(Fake):
    """A compiler that works ahead, in twice the time."""

    breaks: bool = False
    begun: list[Process] = field(default_factory=list)
    compiles_ahead: ClassVar[bool] = True

    def ahead(self, prepared: Prepared, size: int) -> Process:
        self.begun.append(Process(self.clock, self.clock.now + 2 * self.start, self.breaks))
        return self.begun[-1]

    def build(self, prepared: Prepared) -> Runner:
        ready = self.begun and self.begun[0].done and not self.breaks
        self.clock.now += self.start * (RELOAD if ready else 1.0)
        return FakeRunner(self, Eager().build(prepared))


def training(steps: int, start: float, *, breaks: bool = False, slowed: float = 1.0) -> tuple[Training, Compiled]:
    """Steps of 1 s, and of half a second once they are compiled."""
    made = Training(steps=steps)
    compiled = Compiled("compiled", made.clock, lambda *_: 0.5, lambda _: 0.5, start, breaks=breaks)
    busy = lambda: bool(compiled.begun) and not compiled.begun[0].done
    made.add("plain", lambda *_: slowed if busy() else 1.0, price=lambda _: 1.0)
    made.fakes["compiled"] = compiled
    return made, compiled


def test_training_goes_on_until_the_compilation_is_there() -> None:
    made, compiled = training(steps=400, start=40.0)
    log = made.run(4)
    assert len(compiled.begun) == 1 and "compiled in another process" in made.plan.candidate("compiled").lost
    log = made.run(79)
    assert set(log) == {"plain"} and made.plan.chosen == "plain"
    log = made.run(100)
    assert made.plan.chosen == "compiled" and log.count("compiled") > 60
    assert made.plan.candidate("compiled").start_seconds == pytest.approx(RELOAD * 40.0 + 0.5)
    made.step.close()
    assert compiled.begun[0].closed


def test_what_would_not_pay_back_here_pays_ahead() -> None:
    made, compiled = training(steps=110, start=60.0)  # half a second of a hundred steps is less than a minute
    made.run(4)
    assert compiled.begun != []


def test_what_does_not_pay_back_ahead_is_not_begun() -> None:
    made, compiled = training(steps=30, start=40.0)
    made.run(30)
    assert compiled.begun == [] and "pay back after" in made.plan.candidate("compiled").lost


def test_one_that_fails_leaves_the_whole_cost_to_be_weighed() -> None:
    made, compiled = training(steps=400, start=40.0, breaks=True)
    made.run(110)
    assert len(compiled.begun) == 1 and made.plan.chosen == "compiled"
    assert made.plan.candidate("compiled").start_seconds == pytest.approx(40.5)
    made, compiled = training(steps=170, start=60.0, breaks=True)
    assert "compiled" not in made.run(160) and made.step.situation.choices[8]._under_way is None
    assert "60 s to start" in made.plan.candidate("compiled").lost


def test_a_compilation_is_of_one_size_of_one_step() -> None:
    clock = Clock()
    compiled = Compiled("compiled", clock, lambda *_: 0.5, lambda _: 0.5, 40.0)
    prices = Prices(lambda _: None)
    starts = Starts(prices, Landscape(lambda *_: None))
    one, other = prepared_step()[0], prepared_step()[0]
    begun = [starts.ahead(compiled, *place) for place in ((one, 8), (one, 8), (one, 16), (other, 8))]
    assert begun[0] is begun[1] and len(compiled.begun) == len(set(map(id, begun))) == 3
    compiled.begun[0].fails, clock.now = True, 100.0  # of one size alone
    costs = [starts.cost(compiled, *place, built=False) for place in ((one, 8), (one, 16))]
    assert costs == pytest.approx([40.0, RELOAD * 40.0])
    starts.close()
    assert all(process.closed for process in compiled.begun)


def test_steps_that_are_slower_meanwhile_are_no_drift() -> None:
    made, _ = training(steps=1000, start=100.0, slowed=2.0)
    made.run(150)
    assert made.plan.chosen == "compiled" and made.plan.notes == []


# -- real ones ------------------------------------------------------------------------------------------------------


def prepared_step() -> tuple[Prepared, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    task = Task(model, cross_entropy, (torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),))
    batch = torch.randn(8, 4), torch.randint(3, (8,))
    return Prepared(task, flatten(batch)[1], capture_task(task, batch, PASSES)), list(batch)


def test_inputs_look_like_those_of_a_step() -> None:
    prepared, batch = prepared_step()
    graph = prepared.step.graph
    found = dict(zip(graph.inputs, inputs_like(graph, 8, {"0.weight", "0.bias"}), strict=True))
    parameters = dict(prepared.task.model.named_parameters())
    for given, value in found.items():
        like: Any = parameters.get(given.name) if given.kind.value == "parameter" else None
        if like is not None:
            assert isinstance(value, nn.Parameter) and value.requires_grad == like.requires_grad
            assert (value.shape, value.stride(), value.dtype) == (like.shape, like.stride(), like.dtype)
        if given.kind.value == "batch":
            assert value.shape in [t.shape for t in batch]


class Unsaved:
    """A graph that cannot be written."""

    def save(self, path: Path) -> None:
        path.write_text("half of it")
        raise GraphoptError("an operator is not known")


@pytest.mark.parametrize("graph", ["that cannot be saved", "for which no process starts"])
def test_what_cannot_be_begun_leaves_nothing(graph: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if graph == "that cannot be saved":
        with pytest.raises(GraphoptError, match="not known"):
            Ahead(Unsaved(), 8, [])  # type: ignore[arg-type]
    else:
        monkeypatch.setattr("sys.executable", str(tmp_path / "nothing"))
        with pytest.raises(OSError, match="nothing"):
            Ahead(prepared_step()[0].step.graph, 8, [])
    assert list(tmp_path.iterdir()) == []


def test_a_process_ends_with_what_began_it() -> None:
    prepared, _ = prepared_step()
    under_way = Inductor().ahead(prepared, 8)
    assert under_way is not None and not under_way.done
    pid, folder = under_way._process.pid, Path(under_way._process.args[-1])
    assert folder.exists()
    del under_way
    assert not folder.exists() and not os.path.exists(f"/proc/{pid}")


@pytest.mark.slow
def test_what_was_compiled_ahead_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    prepared, batch = prepared_step()
    under_way = Inductor().ahead(prepared, 8)
    assert under_way is not None
    end = time.monotonic() + 400
    while not under_way.done and time.monotonic() < end:
        time.sleep(0.2)
    errors = (Path(under_way._process.args[-1]) / "errors").read_text()
    assert under_way.done and not under_way.failed, errors
    counters.clear()
    Inductor().build(prepared)(batch)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1 and counters["inductor"]["fxgraph_cache_miss"] == 0
