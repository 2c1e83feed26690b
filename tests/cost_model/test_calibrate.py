"""Calibration: curves from timed kernels, factors from timed steps, the whole of it on a few probes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from graphopt import cli
from graphopt.cost_model import calibrate as calibration
from graphopt.cost_model import calibration_steps, operator_probes, probes
from graphopt.cost_model.analytical import FACTORS
from graphopt.cost_model.calibrate import curves, fitted
from graphopt.cost_model.calibration_steps import Row
from graphopt.cost_model.curves import Curve, increasing
from graphopt.cost_model.kernels import LOOPS, Family, Kernel, operator_name
from graphopt.cost_model.machine import LAUNCHES, Machine, fingerprint
from graphopt.errors import GraphoptWarning
from tests.cost_model.machines import simple

LAUNCH = 1e-6


def pointwise(bandwidth=1e10):
    return [(Kernel(None, Family.POINTWISE, 0, n), n / bandwidth + LAUNCH) for n in (10**3, 10**5, 10**7)]


def test_curves_find_the_rate_and_half_sizes_that_made_the_times():
    true = Curve({"fp32": 5e10}, (4.0, 16.0, 2.0), passes=0.5)
    samples = pointwise()
    for m, n, k in itertools.product((4, 64, 512), (8, 64, 512), (16, 128, 1024)):
        kernel = Kernel(None, Family.GEMM, 2 * m * n * k, 4 * (m * k + k * n + m * n), m, n, k, 1)
        product = true.product_seconds(np.array([[m], [n], [k], [1.0]]), np.array([5e10]))[0]
        memory = kernel.bytes / 1e10
        samples.append((kernel, max(product, memory) + 0.5 * memory + LAUNCH))
    found = curves(samples, LAUNCH, {"fp32": 1.0, "bf16": 4.0})[Family.GEMM]
    assert found.rates["fp32"] == pytest.approx(5e10, rel=0.1)
    assert found.rates["bf16"] == 4 * found.rates["fp32"]
    assert found.halves == pytest.approx((4.0, 16.0, 2.0), rel=0.35) and found.passes == pytest.approx(0.5, abs=0.2)
    dims = np.array([[k.rows, k.columns, k.depth, k.batch] for k, _ in samples[3:]], dtype=float).T
    memory = found.memory_seconds(np.array([float(k.bytes) for k, _ in samples[3:]]))
    products = found.product_seconds(dims, np.full(27, found.rates["fp32"]))
    again = np.maximum(products, memory) + found.passes * memory
    assert again == pytest.approx([s - LAUNCH for _, s in samples[3:]], rel=0.15)


def test_points_of_a_curve_never_fall_and_continue_in_proportion():
    curve = Curve(points=increasing([(100.0, 3.0), (10.0, 1.0), (1000.0, 2.0)]))
    assert curve.points == ((10.0, 1.0), (100.0, 3.0), (1000.0, 3.0))
    seconds = curve.memory_seconds(np.array([1.0, 10.0, 55.0, 1000.0, 2000.0]))
    assert seconds == pytest.approx([1.0, 1.0, 2.0, 3.0, 6.0])


SIZES = st.lists(st.floats(1, 1e4), min_size=4, max_size=4)


@given(SIZES, st.lists(st.floats(1, 3), min_size=4, max_size=4), st.tuples(*[st.floats(0, 500)] * 3))
def test_no_kernel_gets_cheaper_when_a_dimension_or_its_bytes_grow(dims, factors, halves):
    curve = Curve({"fp32": 1e9}, halves, ((10.0, 1e-6), (1e4, 5e-6), (1e6, 1e-3)), passes=0.7)
    both = np.array([dims, np.multiply(dims, factors)]).T
    small, large = curve.product_seconds(both, np.full(2, 1e9))
    assert large >= small * (1 - 1e-12)
    small, large = curve.memory_seconds(both.prod(axis=0))
    assert large >= small * (1 - 1e-12)


def test_factors_are_fitted_to_steps_and_the_interval_to_what_is_left():
    generator = np.random.default_rng(0)
    true = {name: 1.0 for name in FACTORS} | {"gemm": 1.6, "eager launch": 0.7}
    rows = []
    for i in range(240):
        parts = dict.fromkeys(FACTORS, 5e-5) | {FACTORS[i % len(FACTORS)]: 1e-3}
        seconds = sum(true[n] * s for n, s in parts.items()) * np.exp(generator.normal(0, 0.02))
        rows.append(Row(f"net {i % 24}", "flat", 4, float(seconds), parts))
    found = fitted(simple(), rows)
    assert found.scales["gemm"] == pytest.approx(1.6, rel=0.15)
    assert found.scales["eager launch"] == pytest.approx(0.7, rel=0.2) and 0.02 < found.spread < 0.2


def test_every_probe_is_one_kernel_and_most_families_have_some():
    families = {probe.kernel().family for probe in itertools.islice(probes.probes(), 0, None, 3)}
    assert len(families) >= 15


def test_probed_operators_are_kernels_that_only_bytes_decide_and_none_comes_twice():
    kernels = [probe.kernel() for probe in operator_probes.operator_probes()]
    names = [(kernel.family is Family.UPDATE, operator_name(kernel.node)) for kernel in kernels]
    assert len(set(names)) == len(names) >= 40 and not {kernel.family for kernel in kernels} & LOOPS


def test_operators_are_timed_relative_to_the_curve_of_their_family():
    curve = Curve(points=((1e3, 1e-6), (1e6, 1e-3)))
    probe = next(p for p in operator_probes.operator_probes() if p.function is torch.ops.aten.tanh.default)
    kernel = replace(probe.kernel(), bytes=10**6)
    least = 1e-6
    taken = LAUNCH + least + 3 * (1e-3 - least)
    found = calibration._relative([(kernel, taken)], {Family.TRANSCENDENTAL: curve}, LAUNCH)
    assert found == {"tanh": pytest.approx(3.0)}
    in_update = replace(kernel, family=Family.UPDATE)
    found = calibration._relative([(in_update, taken)], {Family.UPDATE: curve}, LAUNCH)
    assert found == {"update tanh": pytest.approx(3.0)}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A calibration of a few probes and networks."""
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    kept = {Family.POINTWISE, Family.GEMM, Family.UPDATE, Family.SOFTMAX}
    chosen = [probe for probe in probes.probes() if probe.kernel().family in kept and probe.tensors[0].numel() < 2**17]
    monkeypatch.setattr(calibration, "probes", lambda: iter(chosen))
    some = [probe for probe in operator_probes.operator_probes() if probe.function is torch.ops.aten.tanh.default]
    monkeypatch.setattr(calibration, "operator_probes", lambda: iter(some))
    monkeypatch.setattr(calibration_steps, "CASES", calibration_steps.CASES[:1])
    monkeypatch.setattr(calibration, "SECONDS", 3.0)
    monkeypatch.setattr(calibration, "_seconds_of", lambda call: 0.001)  # tests run beside each other
    return tmp_path


def test_a_calibration_gives_a_machine_that_holds_here(quick):
    machine = calibration.calibrate(progress=False)
    assert machine.fingerprint == dict(fingerprint()) and machine.stale() == "" and set(machine.launch) == set(LAUNCHES)
    assert all(s > 0 for s in machine.launch.values()) and machine.memory_bytes > 2**28
    assert machine.touch > 1e-11 if machine.largest else machine.touch >= 0
    assert 1e8 < machine.curves[Family.GEMM].rates["fp32"] < 1e13
    assert set(machine.relative) == {"tanh"} and machine.relative["tanh"] > 0
    assert set(machine.scales) == set(FACTORS) and machine.spread > 0


def test_a_calibration_on_a_busy_machine_says_so(quick, monkeypatch):
    taken = itertools.cycle([0.001, 0.002])
    monkeypatch.setattr(calibration, "_seconds_of", lambda call: next(taken))
    with pytest.warns(GraphoptWarning, match="the machine was busy.*Calibrate again"):
        calibration.calibrate(progress=False)


def test_the_command_measures_keeps_and_checks(quick):
    run = CliRunner().invoke
    before = run(cli.app, ["calibrate", "--check"])
    assert before.exit_code == 1 and "not measured yet" in before.output
    made = run(cli.app, ["calibrate"])
    assert made.exit_code == 0 and "kept in" in made.output and "gemm flops per second" in made.output
    after = run(cli.app, ["calibrate", "--check"])
    assert after.exit_code == 0 and "still holds" in after.output
    assert Machine.current().fingerprint["threads"] == torch.get_num_threads()
    asked = run(cli.app, ["calibrate", "--json"])
    assert asked.exit_code == 0 and '"gemm_flops_per_second"' in asked.output
    assert run(cli.app, ["calibrate", "--threads", "0"]).exit_code == 2
