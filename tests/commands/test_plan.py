"""``graphopt plan`` and ``graphopt bench``."""

import json
from dataclasses import replace

import pytest

from graphopt.choice import Prices
from graphopt.cost_model.machine import fingerprint, path_of
from graphopt.visualize.target import load_target
from tests.commands.program import data, invoke, output
from tests.cost_model.machines import simple


@pytest.fixture
def calibrated(folder):
    """A made-up calibration of this machine, at the present number of threads."""
    machine = simple(fingerprint=dict(fingerprint()))
    machine.save(path_of(fingerprint()))
    return folder


def test_prices_of_all_schemes_at_several_sizes(calibrated):
    found = data("plan", "my_step.py:step", "--batch-sizes", "1,8,64")
    assert [plan["batch_size"] for plan in found["plans"]] == [1, 8, 64]
    for plan in found["plans"]:
        priced = {c["scheme"]: c["estimate"]["seconds"] for c in plan["candidates"] if c["estimate"]}
        assert {"flat", "eager"} <= priced.keys()
        compiled = {name for name in priced if name.startswith("inductor")}
        assert compiled and plan["chosen"] == min(priced.keys() - compiled, key=priced.__getitem__)
        assert all(c["runs"] == 0 and c["seconds"] == [] for c in plan["candidates"])  # nothing was run
    text = output("plan", "my_step.py:step", "--batch-sizes", "64,8,1")
    assert text.index("batch 1 ") < text.index("batch 8 ") < text.index("batch 64")


def test_crossovers_are_where_prices_cross(calibrated, monkeypatch):
    """Prices by hand: flat has the dearer start and the cheaper sample, and is best from 43 on."""
    real = Prices.of

    def by_hand(self, scheme, prepared, size):
        seconds = {"flat": 1e-3 + 1e-6 * size, "eager": 2e-4 + 2e-5 * size}[scheme.name]
        return replace(real(self, scheme, prepared, size), seconds=seconds, interval=(seconds, seconds))

    monkeypatch.setattr(Prices, "of", by_hand)
    said = ("plan", "my_step.py:step", "--batch-sizes", "4,256", "--schemes", "flat,eager")
    found = data(*said)
    assert [plan["chosen"] for plan in found["plans"]] == ["eager", "flat"]
    assert found["crossovers"] == [[43, "eager", "flat"]]
    assert "from batch size 43 on flat instead of eager" in output(*said)


def test_a_named_machine_prices_its_own_device(folder):
    found = data("plan", "my_step.py:step", "--machine", "H100", "--batch", "256")
    (plan,) = found["plans"]
    assert plan["batch_size"] == 256 and found["machine"] == "H100"
    estimate = next(c["estimate"] for c in plan["candidates"] if c["scheme"] == plan["chosen"])
    assert estimate["machine"].startswith("H100")


def test_steps_weigh_a_compilation(calibrated):
    compiled = lambda plan: plan["chosen"].startswith("inductor")
    few, many = (
        data("plan", "my_step.py:step", "--batch", "4096", "--steps", steps)["plans"][0] for steps in (1, 10**12)
    )
    assert not compiled(few)
    by_price = min((c for c in many["candidates"] if c["estimate"]), key=lambda c: c["estimate"]["seconds"])
    assert many["chosen"] == by_price["scheme"]


def test_crossovers_bear_the_compilation(calibrated):
    """Where a compiled scheme is best at all sizes there is no crossover, whatever others take between them."""
    found = data("plan", "my_step.py:step", "--batch-sizes", "4,64", "--steps", 10**12)
    chosen = {plan["chosen"] for plan in found["plans"]}
    assert all(name.startswith("inductor") for name in chosen) and found["crossovers"] == []


def test_measured_plans_come_from_real_steps(folder):
    found = data("plan", "my_step.py:step", "--batch-sizes", "4,8", "--measure", "--schemes", "flat,eager")
    first, second = found["plans"]
    assert all(c["median_seconds"] > 0 for c in first["candidates"]), first["reason"]
    assert second["reason"].startswith(("measured", "predicted from other batch sizes"))
    assert all(c["predicted"] for c in second["candidates"])  # by what was measured at the first


def test_batches_called_by_keyword(folder):
    (plan,) = data("plan", "my_step.py:named", "--machine", "A100", "--batch", "7")["plans"]
    assert plan["batch_size"] == 7


def test_bench_times_steps_against_eager(folder):
    found = data("bench", "my_step.py:step", "--batch", "16", "--seconds", "2", "--schemes", "flat",
                 "--compilers", "eager")  # fmt: skip
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["eager", "graphopt", "torch.compile (eager)"] and found["scheme"] == "flat"
    assert rows["eager"]["ratio"] == 1 and found["batch_size"] == 16
    for row in rows.values():
        low, high = row["ratio_interval"]
        assert low <= row["ratio"] <= high and row["low"] <= row["seconds"] <= row["high"]
        assert row["ratio"] == row["seconds"] / rows["eager"]["seconds"]


def test_bench_says_no_above_a_bound(folder):
    said = ("bench", "my_step.py:step", "--seconds", "0.5", "--schemes", "eager", "--at-most")
    result = invoke(*said, "0.0001", "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["rows"]
    assert "more than 0.0001" in result.stderr
    assert invoke(*said, "1000").exit_code == 0


def test_a_compiler_that_fails_is_a_row_less(folder):
    found = data("bench", "my_step.py:step", "--seconds", "0.5", "--schemes", "eager", "--compilers", "no_such_backend")
    assert [row["name"] for row in found["rows"]] == ["eager", "graphopt"]
    assert "no_such_backend" in str(found["failed"])


def test_a_bench_trains_what_a_user_would(folder):
    """The eager step of the bench changes parameters as a loop by hand does."""
    import torch

    from graphopt.commands.bench import _eager

    found, twin = load_target("my_step.py:step"), load_target("my_step.py:step")
    _eager(found, found.batch)()
    x, y = twin.batch
    torch.nn.functional.cross_entropy(twin.model(x), y).backward()
    twin.optimizer.step()
    assert all(map(torch.equal, found.model.parameters(), twin.model.parameters()))
