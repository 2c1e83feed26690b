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
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from scipy.optimize import least_squares
from torch import nn

from graphopt.cost_model.analytical import FACTORS
from graphopt.cost_model.calibration_steps import Row, rows
from graphopt.cost_model.curves import Curve, increasing
from graphopt.cost_model.fit import fit
from graphopt.cost_model.kernels import PRODUCTS, Family, Kernel
from graphopt.cost_model.machine import LAUNCHES, Link, Machine, fingerprint, processor_name
from graphopt.cost_model.probes import features, probes

SECONDS = 60.0
"""What a calibration may take; stages that would take longer measure less."""

_LARGEST_KEPT = 32 * 2**20
"""glibc's malloc maps larger blocks at each request (DEFAULT_MMAP_THRESHOLD_MAX on 64 bits)."""


def calibrate(*, progress: bool = True, seconds: float = SECONDS) -> Machine:
    """Measure this machine at the present number of threads. Nothing else should run meanwhile.

    Args:
        progress: show a progress bar.
        seconds: the most it may take.
    """
    began = perf_counter()
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("calibrating this machine", total=100)
        _settle_allocator()
        launch = _launches()
        bar.update(task, completed=5)
        samples = []
        for i, (function, tensors) in enumerate(probes()):
            samples.append((features(function, tensors), time_of(partial(function, *tensors))))
            bar.update(task, completed=5 + min(45, i / 5))
        machine = Machine(
            name=processor_name(),
            device="cpu",
            curves=curves(samples, launch["flat"]),
            launch=launch,
            memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            touch=_touch_seconds(),
            largest=_LARGEST_KEPT if _maps_large_blocks() else 0,
            link=Link(latency=1e-4, bandwidth=1e9),
            fingerprint=dict(fingerprint()),
            measured=datetime.now(UTC).isoformat(timespec="seconds"),
            source="measured on this machine",
        )
        left = seconds - (perf_counter() - began)
        return fitted(machine, rows(machine, left, lambda share: bar.update(task, completed=50 + 50 * share)))


def fitted(machine: Machine, steps: Sequence[Row]) -> Machine:
    """The machine with its factors and its interval fitted to measured steps; seconds are linear in the factors."""
    predict = lambda factors, row: sum(factors[name] * s for name, s in row.by_factor.items())
    found = fit([(row, row.seconds) for row in steps], FACTORS, predict, dict.fromkeys(FACTORS, 1.0))
    return replace(machine, scales=found.parameters, spread=found.half_width)


# -- kernels ----------------------------------------------------------------------------------------------------------


def time_of(call: Callable[[], Any], budget: float = 0.03) -> float:
    """Seconds of a call: the lower quartile of what fits into ``budget`` seconds, at least three, after two."""
    call()
    call()
    taken: list[float] = []
    end = perf_counter() + budget
    while len(taken) < 3 or (perf_counter() < end and len(taken) < 200):
        start = perf_counter()
        call()
        taken.append(perf_counter() - start)
    return float(np.quantile(taken, 0.25))


def curves(samples: Sequence[tuple[Kernel, float]], launch: float) -> dict[Family, Curve]:
    """Curves of all families from timed kernels; a family without a sample takes that of the nearest that has."""
    by_family: dict[Family, list[tuple[Kernel, float]]] = defaultdict(list)
    for kernel, seconds in samples:
        by_family[kernel.family].append((kernel, max(seconds - launch, seconds * 0.02)))
    stream = _points(by_family[Family.POINTWISE])
    found: dict[Family, Curve] = {}
    for family in Family:
        if family in (Family.NONE, Family.COMMUNICATION) or family not in by_family:
            continue
        if family in PRODUCTS:
            found[family] = _product_curve(by_family[family], stream)
        else:
            found[family] = Curve(points=_points(by_family[family]))
    found[Family.RECURRENT] = Curve(found[Family.GEMM].rates, (1e5, 0.0, 0.0), stream)
    return found


def _points(samples: Sequence[tuple[Kernel, float]]) -> tuple[tuple[float, float], ...]:
    """(bytes, seconds) of memory-bound kernels: the geometric mean of those of nearly equal bytes."""
    near: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for kernel, seconds in samples:
        near[round(math.log2(float(kernel.bytes)))].append((float(kernel.bytes), seconds))
    mean = lambda values: math.exp(sum(map(math.log, values)) / len(values))
    return increasing([(mean([b for b, _ in each]), mean([s for _, s in each])) for each in near.values()])


def _product_curve(samples: Sequence[tuple[Kernel, float]], stream: tuple[tuple[float, float], ...]) -> Curve:
    """Rate, half sizes and, where kernels of several depths were timed, factors of depth: least log error."""
    dims = np.array([[k.rows, k.columns, k.depth, k.batch] for k, _ in samples], dtype=np.float64).T
    seconds = np.array([s for _, s in samples])
    depthwise = samples[0][0].family in (Family.DEPTHWISE, Family.DEPTHWISE_INPUT, Family.DEPTHWISE_WEIGHT)
    deep = sorted(set(dims[2])) if depthwise else []
    free = [bool(np.ptp(row)) for row in dims[:3]]
    if deep:
        free[2] = False

    def curve(x: np.ndarray) -> Curve:
        halves = [math.exp(h) if on else 0.0 for h, on in zip(x[1:4], free)]
        factors = np.exp(np.concatenate([[0.0], x[4:]])) if deep else []
        return Curve({"fp32": math.exp(x[0])}, tuple(halves), (), tuple(zip(deep, factors)))  # type: ignore[arg-type]

    def error(x: np.ndarray) -> np.ndarray:
        found = curve(x)
        predicted = found.product_seconds(dims, np.full(len(seconds), found.rates["fp32"]))
        return np.concatenate([np.log(predicted / seconds), 0.02 * (x[1:4] - math.log(8.0))])

    rate = float(np.max(2 * dims.prod(axis=0) / seconds))
    start = np.concatenate([[math.log(rate)], np.full(3, math.log(8.0)), np.zeros(max(len(deep) - 1, 0))])
    top = math.log(1e9) if samples[0][0].family in (Family.ATTENTION, Family.ATTENTION_BACKWARD) else math.log(4096)
    low, high = np.full(len(start), -np.inf), np.full(len(start), np.inf)
    low[1:4], high[1:4] = math.log(1e-2), top
    best = curve(least_squares(error, start, bounds=(low, high), loss="soft_l1", f_scale=0.2).x)
    fp32 = best.rates["fp32"]
    return Curve({"fp32": fp32, "fp64": fp32 / 2, **_low_precision(fp32)}, best.halves, stream, best.depths)


def _low_precision(fp32: float) -> dict[str, float]:
    """Rates of bf16 and fp16 products beside that of fp32, as one square product of each shows."""
    square = torch.randn(256, 256)

    def seconds(of: torch.Tensor) -> float:
        return time_of(lambda: of @ of)

    base = seconds(square)
    return {
        "bf16": fp32 * base / seconds(square.bfloat16()),
        "fp16": fp32 * base / seconds(square.half()),
        "tf32": fp32,
    }


def _settle_allocator() -> None:
    """glibc's malloc learns from the first large block that is freed to keep blocks of its size. In a training process
    it has; before, each probe would pay for fresh memory."""
    torch.empty(_LARGEST_KEPT - 2**20, dtype=torch.uint8).fill_(1)


# -- launches and memory ----------------------------------------------------------------------------------------------


def _launches() -> dict[str, float]:
    """Seconds of the host by kind of launch (`LAUNCHES`), from chains of tiny operators."""
    n, x = 64, torch.randn(4, 4)
    leaf = torch.randn(4, 4, requires_grad=True)

    def chain(step: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
        """Forward and backward seconds of one of ``n`` operators under autograd."""

        def forward() -> torch.Tensor:
            y = leaf
            for _ in range(n):
                y = step(y)
            return y

        def both() -> None:
            leaf.grad = None
            forward().backward(x)

        first = time_of(forward)
        return first / n, max(time_of(both) - first, 0.0) / n

    forward, backward = chain(nn.ReLU())
    view, view_backward = chain(lambda t: t.transpose(0, 1))
    parameters = [nn.Parameter(torch.randn(4, 4)) for _ in range(16)]
    for parameter in parameters:
        parameter.grad = torch.randn(4, 4)
    adam = torch.optim.AdamW(parameters, foreach=False)
    update = time_of(adam.step) / (16 * 11)  # 11 operators a parameter
    with torch.no_grad():
        flat = time_of(lambda: [torch.mul(x, x) for _ in range(n)]) / n
        looked = time_of(lambda: [torch.reshape(x, (16,)) for _ in range(n)]) / n
        lists = [torch.randn(4) for _ in range(n)]
        item = time_of(lambda: torch._foreach_add(lists, 1.0)) / n
    seconds = (forward, view, backward, view_backward, update, looked, flat, looked, flat, item)
    return dict(zip(LAUNCHES, seconds, strict=True))


def _touch_seconds(nbytes: int = 2**26) -> float:
    """Seconds a byte that the first touch of fresh memory costs beyond writing it."""
    reused = torch.empty(nbytes, dtype=torch.uint8)
    warm = time_of(lambda: reused.fill_(1))
    fresh = time_of(lambda: torch.empty(nbytes, dtype=torch.uint8).fill_(1))
    return max(fresh - warm, 0.0) / nbytes


def _maps_large_blocks() -> bool:
    """Whether the allocator gives a large block back at once, so that the next one comes anew: by page faults."""
    make = lambda: torch.empty(2 * _LARGEST_KEPT, dtype=torch.uint8).fill_(1)
    make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    make()
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return pages > _LARGEST_KEPT / resource.getpagesize()
