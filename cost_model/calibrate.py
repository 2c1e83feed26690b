"""`calibrate`: measure this machine in less than a minute.

Three stages. Single operators (`graphopt.cost_model.probes`) give the curve of each family of kernels. Chains of tiny
operators give what a launch costs in each way of running, fresh memory what its first touch costs. Last, whole steps of
small networks (`graphopt.cost_model.calibration_steps`), eager and flat, correct at most 12 global factors, and what
remains of their errors is the interval of every price.
"""

from __future__ import annotations

import math
import os
import resource
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import cycle
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from scipy.optimize import least_squares
from scipy.stats import t as student

from graphopt.cost_model.analytical import FACTORS, IN_UPDATES
from graphopt.cost_model.calibration_steps import Row, rows
from graphopt.cost_model.curves import Curve, increasing
from graphopt.cost_model.fit import fit
from graphopt.cost_model.kernels import (
    ALIASED,
    CONVOLUTIONS,
    DEPTHWISE,
    GROUPED,
    IMAGEWISE,
    LOOPS,
    Family,
    Kernel,
    operator_name,
)
from graphopt.cost_model.launches import chains, in_steps, time_of
from graphopt.cost_model.machine import Machine, fingerprint, processor_name
from graphopt.cost_model.measured import spin, why_busy
from graphopt.cost_model.operator_probes import operator_probes
from graphopt.cost_model.probes import Probe, probes
from graphopt.errors import GraphoptWarning

_PRIOR_WEIGHT = 2.0
"""Of factors 1: curves and launches were measured just before. The networks of a calibration share one heap and small
tensors, which makes their steps up to a fifth slower than the same kernels in a process of their own; a weaker prior
lets single factors take that up (0.3 doubled updates), and larger networks are priced too high."""

_ERROR_OF_MODELS, _LIKE = 0.13, 20
"""Root mean square of the log errors that prices had over published architectures, and how many of them there were
(benchmarks/cost_accuracy.py)."""

_CACHE = 2**23
"""Bytes that an update may find in caches when its next step comes: a part of the last level, which others share."""

SECONDS = 60.0
"""What a calibration may take; stages that would take longer measure less."""

_MARGIN = 0.8
"""Of the time that is left, what whole steps may plan with: each network takes at least some steps."""

_LARGEST_KEPT = 32 * 2**20
"""glibc's malloc maps larger blocks at each request (DEFAULT_MMAP_THRESHOLD_MAX on 64 bits), unless they are free in
the heap."""

_FRESH = 8 * _LARGEST_KEPT
"""Bytes of a block that is larger than what is free in the heap after all that was measured."""


def calibrate(*, progress: bool = True, seconds: float | None = None) -> Machine:
    """Measure this machine at the present number of threads. Nothing else should run meanwhile.

    Args:
        progress: show a progress bar.
        seconds: the most it may take; `SECONDS` by default.

    Warns (`GraphoptWarning`) where other work made the machine slower meanwhile: its figures are then too high.
    """
    began = perf_counter()
    fixed: list[float] = []
    with Progress(disable=not progress, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("calibrating this machine", total=100)
        settle_allocator()
        launch = chains()
        bar.update(task, completed=5)
        kernels: dict[int, Kernel] = {}
        samples: dict[tuple[int, Kernel], float] = {}
        operators = [probe.kernel() for probe in operator_probes()]
        taken_by = [math.inf] * len(operators)
        for sweep in range(2):  # apart in time: a machine that others share is slower for some seconds now and then
            for i, probe in enumerate(probes()):  # made anew: together they hold half a gigabyte
                if i not in kernels:
                    kernels[i] = replace(probe.kernel(), node=_NOWHERE)
                if i % 20 == 0:
                    fixed.append(_seconds_of(spin))
                for found, taken in _timed(kernels[i], probe):
                    samples[i, found] = min(taken, samples.get((i, found), taken))
                bar.update(task, completed=5 + 20 * (sweep + min(i / 420, 1)))
            for i, probe in enumerate(operator_probes()):
                taken_by[i] = min(taken_by[i], time_of(_elsewhere(probe, _IN_CACHES)))
        found_curves = curves([(k, taken) for (_, k), taken in samples.items()], launch["flat"], _precision_rates())
        machine = Machine(
            name=processor_name(),
            device="cpu",
            curves=found_curves,
            relative=_relative(list(zip(operators, taken_by)), found_curves, launch["flat"]),
            launch=launch,
            memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            touch=_touch_seconds(),
            cache_bytes=_CACHE,
            largest=_LARGEST_KEPT if _maps_large_blocks() else 0,
            fingerprint=dict(fingerprint()),
            measured=datetime.now(UTC).isoformat(timespec="seconds"),
            source="measured on this machine",
        )
        machine = replace(machine, launch=in_steps(machine))
        left = _MARGIN * ((SECONDS if seconds is None else seconds) - (perf_counter() - began))
        steps = rows(machine, left, lambda share: bar.update(task, completed=50 + 50 * share))
    if busy := why_busy(fixed):
        warnings.warn(f"{busy}; prices will be too high. Calibrate again when nothing else runs", GraphoptWarning)
    return fitted(machine, steps)


def _seconds_of(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def fitted(machine: Machine, steps: Sequence[Row]) -> Machine:
    """The machine with its factors and its interval fitted to measured steps; seconds are linear in the factors.

    The interval is Student's for one more network, where a network's log error is normal with mean 0 and what other
    models showed before is known as of so many networks: few small ones say little about the next, larger one. Errors
    are those of networks that were left out, so that what the fit does not know is in them.
    """
    predict = lambda factors, row: sum(factors[name] * s for name, s in row.by_factor.items())
    measured = [(row, row.seconds) for row in steps]
    fit_to = lambda rows: fit(rows, FACTORS, predict, dict.fromkeys(FACTORS, 1.0), prior_weight=_PRIOR_WEIGHT)
    found = fit_to(measured)
    networks = sorted({row.name for row in steps})
    if len(networks) < 2:
        return replace(machine, scales=found.parameters, spread=found.half_width)
    squares = []  # mean squared log error of each network where the others were fitted: what one not seen will have
    for name in networks:
        others = fit_to([(row, s) for row, s in measured if row.name != name])
        errors = [math.log(predict(others.parameters, row) / s) for row, s in measured if row.name == name]
        squares.append(float(np.mean(np.square(errors))))
    n = len(networks)
    variance = (sum(squares) + _LIKE * _ERROR_OF_MODELS**2) / (n + _LIKE)
    spread = float(student.ppf(0.95, n + _LIKE)) * math.sqrt(variance)
    return replace(machine, scales=found.parameters, spread=spread)


# -- kernels ----------------------------------------------------------------------------------------------------------


def _timed(kernel: Kernel, probe: Probe) -> list[tuple[Kernel, float]]:
    """The kernel with its seconds. In a step operands were made some operators ago, so each call takes other copies.
    Convolutions of oneDNN are code made for their sizes, which lies in caches only where nothing else ran in between:
    other memory is gone through before each call. Operators of updates are timed in cache and out of it."""
    if kernel.family in (*CONVOLUTIONS, *GROUPED, Family.GROUPED_PRODUCTS, *DEPTHWISE):
        other = torch.zeros(_IN_CACHES // 8)
        return [(kernel, time_of(_elsewhere(probe, _IN_CACHES), before=lambda: other.add_(1.0)))]
    if kernel.family is not Family.UPDATE:
        return [(kernel, time_of(_elsewhere(probe, _IN_CACHES)))]
    streamed = replace(kernel, family=Family.UPDATE_STREAM)
    return [(kernel, time_of(_elsewhere(probe, 0))), (streamed, time_of(_elsewhere(probe, 2**26)))]


_IN_CACHES = 2**24
"""Bytes of the copies that the calls of a probe go through."""

_NOWHERE: Any = None
"""The node of a probe's kernel: equal kernels are one sample."""


def _elsewhere(probe: Probe, nbytes: int) -> Callable[[], Any]:
    """A call that goes through copies of its tensors, of so many bytes together."""
    tensors, run = probe.tensors, probe.run or probe.function
    size = sum(t.numel() * t.element_size() for t in tensors)
    copies = cycle([tensors, *(tuple(t.clone() for t in tensors) for _ in range(min(nbytes // size, 999)))])
    return lambda: run(*next(copies))


def curves(
    samples: Sequence[tuple[Kernel, float]], launch: float, precisions: Mapping[str, float]
) -> dict[Family, Curve]:
    """Curves of all families from timed kernels; a family without a sample takes that of products or of pointwise
    operators, of which there must be some. ``precisions``: the rate of products of each, relative to fp32."""
    by_family: dict[Family, list[tuple[Kernel, float]]] = defaultdict(list)
    for kernel, seconds in samples:
        by_family[kernel.family].append((kernel, max(seconds - launch, seconds * 0.02)))
    stream = _points(by_family[Family.POINTWISE])
    found: dict[Family, Curve] = {}
    for family in Family:
        if family in (Family.NONE, Family.COMMUNICATION) or family not in by_family:
            continue
        if family in LOOPS:
            curve = _product_curve(by_family[family], stream)
            found[family] = replace(curve, rates={name: curve.rates["fp32"] * of for name, of in precisions.items()})
        else:
            found[family] = Curve(points=_points(by_family[family]))
    gemm = found[Family.GEMM]
    for family in Family:  # with several threads, for example, hardly any convolution goes image by image
        found.setdefault(family, gemm if family in LOOPS else found[Family.POINTWISE])
    return found


def _relative(
    operators: Sequence[tuple[Kernel, float]], found: Mapping[Family, Curve], launch: float
) -> dict[str, float]:
    """Seconds of timed operators beyond the least of any, relative to the curves of their families, by name."""
    relative = {}
    for kernel, seconds in operators:
        curve = found[kernel.family]
        least = curve.points[0][1]
        beyond = float(curve.memory_seconds(np.array([float(kernel.bytes)]))[0]) - least
        name = (IN_UPDATES if kernel.family is Family.UPDATE else "") + operator_name(kernel.node)
        relative[name] = max(seconds - launch - least, seconds * 0.02) / max(beyond, seconds * 0.02)
    return relative


def _points(samples: Sequence[tuple[Kernel, float]]) -> tuple[tuple[float, float], ...]:
    """(bytes, seconds) of memory-bound kernels: the geometric mean of those of nearly equal bytes."""
    near: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for kernel, seconds in samples:
        near[round(math.log2(float(kernel.bytes)))].append((float(kernel.bytes), seconds))
    mean = lambda values: math.exp(sum(map(math.log, values)) / len(values))
    return increasing([(mean([b for b, _ in each]), mean([s for _, s in each])) for each in near.values()])


def _product_curve(samples: Sequence[tuple[Kernel, float]], stream: tuple[tuple[float, float], ...]) -> Curve:
    """Rate, half sizes, passes over memory and factors of certain sizes: least log error, with weak priors."""
    dims = np.array([[k.rows, k.columns, k.depth, k.batch] for k, _ in samples], dtype=np.float64).T
    seconds, family = np.array([s for _, s in samples]), samples[0][0].family
    memory = Curve(points=stream).memory_seconds(np.array([float(k.bytes) for k, _ in samples]))
    along = _STEPS.get(family)
    sizes = sorted(set(dims[along])) if along is not None else []
    free = [bool(np.ptp(row)) and along != i for i, row in enumerate(dims[:3])]

    def curve(x: np.ndarray) -> Curve:
        halves = [math.exp(h) if on else 0.0 for h, on in zip(x[1:4], free)]
        factors = np.exp(x[6:] - x[6:].max(initial=0.0)).tolist()
        steps, rates = tuple(zip(map(float, sizes), factors)), {"fp32": math.exp(x[0])}
        return Curve(rates, tuple(halves), stream, math.exp(x[5]), math.exp(x[4]), steps, along or 0)  # type: ignore[arg-type]

    def error(x: np.ndarray) -> np.ndarray:
        found = curve(x)
        product = found.product_seconds(dims, np.full(len(seconds), found.rates["fp32"]))
        predicted = np.maximum(product, memory) + found.passes * memory
        return np.concatenate([np.log(predicted / seconds), 0.02 * (x - start)[1:]])

    rate = float(np.max(2 * dims.prod(axis=0) / seconds))
    start = np.array([math.log(rate), *np.full(3, math.log(8.0)), math.log(0.5), math.log(1e-6), *np.zeros(len(sizes))])
    largest = math.log(1e9) if family in (Family.ATTENTION, Family.ATTENTION_BACKWARD) else math.log(4096)
    low, high = np.full(len(start), -np.inf), np.full(len(start), np.inf)
    low[1:4], high[1:4] = math.log(1e-2), largest
    low[4:6], high[4:6] = (math.log(1e-3), math.log(1e-8)), (math.log(64.0), math.log(1e-3))
    return curve(least_squares(error, start, bounds=(low, high), loss="soft_l1", f_scale=0.2).x)


_STEPS = {
    **dict.fromkeys(DEPTHWISE, 2),  # by kernel size
    **dict.fromkeys((*IMAGEWISE, *ALIASED), 0),  # by places of an image
}
"""Families whose rate jumps between sizes of one dimension of their loops."""


def _precision_rates() -> dict[str, float]:
    """Rates of products in each precision relative to fp32, as one square product of each shows. No CPU has tf32."""
    square = torch.randn(256, 256)

    def seconds(dtype: torch.dtype) -> float:
        of = square.to(dtype)
        return time_of(lambda: of @ of)

    base = seconds(torch.float32)
    found = {"fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
    return {"fp32": 1.0, "tf32": 1.0} | {name: base / seconds(dtype) for name, dtype in found.items()}


def settle_allocator() -> None:
    """glibc's malloc learns from the first large block that is freed to keep blocks of its size. In a training process
    it has; before, each probe would pay for fresh memory."""
    torch.empty(_LARGEST_KEPT - 2**20, dtype=torch.uint8).fill_(1)


# -- memory ----------------------------------------------------------------------------------------------


def _touch_seconds() -> float:
    """Seconds a byte that the first touch of fresh memory costs beyond writing it."""
    reused = torch.empty(_FRESH, dtype=torch.uint8)
    warm = time_of(lambda: reused.fill_(1))
    fresh = time_of(lambda: torch.empty(_FRESH, dtype=torch.uint8).fill_(1))
    return max(fresh - warm, 0.0) / _FRESH


def _maps_large_blocks() -> bool:
    """Whether the allocator gives a large block back at once, so that the next one comes anew: by page faults."""
    make = lambda: torch.empty(_FRESH, dtype=torch.uint8).fill_(1)
    make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    make()
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return pages > _FRESH / 2 / resource.getpagesize()
