"""What is tried for a task, and what it is estimated to cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.cost_model import Machine
from graphopt.cost_model.machine import LAUNCHES
from graphopt.graph.batch import flatten
from graphopt.schemes import Eager, Flat, Inductor, MicroBatches, Prepared, Scheme, Task, candidates
from graphopt.schemes.flat import capture_task
from tests.schemes.trials import OPTIMIZERS, Images, images, mlp, rows


def prepare(
    model: nn.Module, batch: Any, make: Any = OPTIMIZERS["adamw"], *, captured: bool = True, **options: Any
) -> Prepared:
    """A task as `optimize` prepares it, without passes."""
    made = make(model)
    task = Task(model, F.cross_entropy, tuple(made) if isinstance(made, list) else (made,), **options)
    step = capture_task(task, batch, ()) if captured else None
    return Prepared(task, flatten(batch)[1], step)


def names(prepared: Prepared, threads: tuple[int, ...] = (1,), precision: str | None = None) -> list[str]:
    return [s.name for s in candidates(prepared.task, prepared, threads=threads, precision=precision)]


def test_a_convolution_net_with_a_fused_optimizer_and_two_numbers_of_threads() -> None:
    assert names(prepare(Images(), images()), (1, 2)) == [
        "flat, fused optimizer, channels-last",
        "flat, fused optimizer",
        "flat, fused optimizer, channels-last, 2 threads",
        "flat, fused optimizer, 2 threads",
        "flat",
        "eager, fused optimizer, channels-last",
        "eager, fused optimizer",
        "eager",
        "inductor, fused optimizer",
    ]


def test_micro_batches_are_tried_where_memory_is_limited() -> None:
    prepared = prepare(mlp(), rows())
    found = candidates(prepared.task, prepared, threads=(1,), precision=None, saving_memory=True)
    assert [s.name for s in found][-2:] == ["2 micro-batches, fused optimizer", "4 micro-batches, fused optimizer"]


def test_what_is_not_feasible_is_not_tried() -> None:
    without = prepare(mlp(), rows(), lambda m: torch.optim.RMSprop(m.parameters()))
    assert names(without) == ["flat", "eager", "inductor"]


def test_without_a_graph_eager_is_left() -> None:
    plain = prepare(mlp(), rows(), captured=False)
    assert names(plain, (1, 2)) == ["flat", "eager, fused optimizer", "eager, fused optimizer, 2 threads", "eager"]


def test_convolutions_that_are_a_small_part_are_not_tried_in_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(100, 500), nn.Linear(500, 5))
    assert not any("channels-last" in name for name in names(prepare(model, images())))


def test_low_precision_only_where_it_was_asked_for() -> None:
    prepared = prepare(mlp(), rows())
    assert not any("bf16" in name for name in names(prepared))
    assert not any("bf16" in name for name in names(prepared, precision="fp32"))
    asked = names(prepared, precision="bf16")
    assert asked[:2] == ["flat, fused optimizer, bf16", "flat"] and asked[-2:] == [
        "eager",
        "inductor, fused optimizer, bf16",
    ]


@pytest.mark.parametrize(
    "build, draw, optimizer",
    [(Images, images, "adamw"), (mlp, rows, "sgd dampening"), (mlp, rows, "two optimizers"), (mlp, rows, "adagrad")],
)
def test_each_candidate_can_run(build: Any, draw: Any, optimizer: str) -> None:
    """All but the compiled one: first in the list is first to be tried, so none may be a dead end."""
    model = build()
    prepared = prepare(model, draw(8), OPTIMIZERS[optimizer])
    found = candidates(prepared.task, prepared, threads=(1, 2), precision=None)
    assert len({s.name for s in found}) == len(found) <= 11
    for scheme in found:
        assert scheme.why_not(prepared, 8) is None, scheme.name
        if not isinstance(scheme, Inductor):
            runner = scheme.build(prepared)
            assert runner(draw(8)).isfinite()
            if not runner.fresh():  # its first step made a momentum, which the next does not
                assert optimizer == "sgd dampening"
                made = list(prepared.task.optimizers)
                prepared = prepare(model, draw(8), lambda _, made=made: made)
            runner.close()


# -- prices --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine() -> Machine:
    """Figures for a CPU that are no measurements: enough for what prices must keep to."""
    sheet = Machine.named("H100")
    launch = dict.fromkeys(LAUNCHES, 1e-6) | {name: 3e-6 for name in LAUNCHES if name.startswith("eager")}
    fingerprint = {"threads": 1}
    return replace(sheet, device="cpu", asynchronous=False, launch=launch, fingerprint=fingerprint)


@pytest.fixture(scope="module")
def prepared() -> Iterator[Prepared]:
    torch.manual_seed(0)
    yield prepare(mlp(), rows())


def test_prices_of_what_can_be_priced(prepared: Prepared, machine: Machine) -> None:
    price = lambda scheme: scheme.estimate(prepared, 32, lambda threads: machine)
    flat, eager, fused, eager_fused, compiled = map(
        price, (Flat(), Eager(), Flat(fused=True), Eager(fused=True), Inductor())
    )
    assert [p.mode for p in (flat, eager, fused, eager_fused, compiled)] == [
        "flat",
        "eager",
        "flat",
        "eager",
        "compiled",
    ]
    assert all(p.sizes == {"batch": 32} for p in (flat, eager, fused, eager_fused, compiled))
    assert eager.seconds > flat.seconds > fused.seconds
    assert fused.terms["optimizer"] < flat.terms["optimizer"]
    assert eager_fused.terms["optimizer"] < eager.terms["optimizer"]
    assert fused.terms["compute"] == flat.terms["compute"]
    assert compiled.compile_seconds > 0 == flat.compile_seconds


def test_each_number_of_threads_has_its_machine(prepared: Prepared, machine: Machine) -> None:
    asked = []
    Flat().estimate(prepared, 8, asked.append)
    Flat(threads=7).estimate(prepared, 8, asked.append)
    assert asked == [torch.get_num_threads(), 7]


@pytest.mark.parametrize(
    "scheme",
    [Flat(channels_last=True), Eager(channels_last=True), Flat(precision="bf16"), MicroBatches(2)],
    ids=lambda s: s.name,
)
def test_what_has_no_price(scheme: Scheme, machine: Machine) -> None:
    """Without a machine nothing; channels-last kernels and a precision that were not measured."""
    prepared = prepare(Images(), images())
    assert scheme.estimate(prepared, 8, lambda threads: None) is None
    cpu = replace(machine, curves={f: replace(c, rates={}) for f, c in machine.curves.items()})
    found = scheme.estimate(prepared, 8, lambda threads: cpu)
    assert (found is None) == (not isinstance(scheme, MicroBatches))


def test_a_size_that_the_graph_does_not_hold_for_has_no_price(prepared: Prepared, machine: Machine) -> None:
    assert Eager().estimate(prepared, 1, lambda threads: machine) is None


def test_on_another_device_there_is_no_price(prepared: Prepared) -> None:
    assert Flat().estimate(prepared, 8, lambda threads: Machine.named("H100")) is None
