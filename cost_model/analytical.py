"""`estimate`: the seconds and bytes of a training step before it is run.

A roofline of each kernel with efficiencies by family and size (`Curve`), the launches of the host, the memory that the
operating system gives anew in each step, and the update of the optimizer. All counts are compiled to arrays over the
free sizes once, so that another batch size, sequence length or width is priced without a capture.

The form is that of Calculon (Isaev et al., SC'23): a roofline with efficiencies that depend on size. The efficiencies
are measured (`graphopt.cost_model.calibrate`) or those that public measurements of data-sheet machines show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import sympy

from graphopt.cost_model.communication import Schedule, exposed_seconds, scheduled
from graphopt.cost_model.estimate import TERMS, Estimate
from graphopt.cost_model.kernels import (
    ALIASED,
    CONVOLUTIONS,
    DEPTHWISE,
    GROUPED,
    IMAGEWISE,
    LOOPS,
    Family,
    operator_name,
)
from graphopt.cost_model.machine import Machine
from graphopt.cost_model.work import Counts, Mode, Work, compiled
from graphopt.errors import CostModelError
from graphopt.graph.training_graph import TrainingGraph

GROUPS: dict[str, frozenset[Family]] = {
    "gemm": frozenset([Family.GEMM]),
    "convolution": frozenset([*CONVOLUTIONS, *GROUPED, Family.GROUPED_PRODUCTS, *IMAGEWISE, *ALIASED]),
    "depthwise": frozenset([*DEPTHWISE, Family.DEPTHWISE_PLAIN, Family.DEPTHWISE_PADDED]),
    "attention": frozenset([Family.ATTENTION, Family.ATTENTION_BACKWARD, Family.RECURRENT]),
    "pointwise": frozenset([Family.POINTWISE, Family.TRANSCENDENTAL, Family.FILL, Family.RANDOM]),
    "normalisation": frozenset(
        [Family.BATCH_NORM, Family.BATCH_NORM_BACKWARD, Family.NORM, Family.NORM_BACKWARD, Family.SOFTMAX]
    ),
    "reduction": frozenset([Family.REDUCTION]),
    "copy": frozenset([Family.COPY, Family.GATHER, Family.SCATTER, Family.POOLING, Family.POOLING_BACKWARD]),
    "update": frozenset([Family.UPDATE, Family.UPDATE_STREAM]),
}
"""Families of kernels that share one factor of a machine."""

FACTORS = (*GROUPS, "eager launch", "flat launch", "touch")
"""The global factors of a machine (`Machine.scales`), at most 12, by which seconds of a step are linear."""


def estimate(
    graph: TrainingGraph,
    machine: Machine | None = None,
    sizes: Mapping[str, int] | None = None,
    *,
    mode: Mode = "flat",
    precision: str | None = None,
    processors: int = 1,
) -> Estimate:
    """Price one step of ``graph`` on ``machine``.

    Args:
        graph: a captured graph. For ``mode="eager"`` the graph as captured, before passes: what autograd runs.
        machine: `Machine.current()` by default (measured once, about a minute); or ``Machine.named("H100")``.
        sizes: free sizes by name (``{"batch": 64}``); axes of the graph by name besides (``{"0.hidden": 512}``,
            `Axes.groups`), each of which must be free. What is not given is as at capture.
        mode: ``flat`` (straight-line code), ``eager`` (autograd) or ``compiled`` (fused kernels).
        precision: price the products of forward and backward as if in ``bf16``, ``fp16`` or ``tf32``; by default
            those of the graph's dtypes.
        processors: of this kind run the graph together; its collectives are theirs. 1 communicates with nobody.

    Raises:
        CostModelError: no operators, a size that is unknown, no positive integer, or one the graph does not hold for; a
            machine without a link to others where ``processors`` communicate.
        AxisError: the name of an axis that does not exist or must keep its size.

    Example:
        >>> import torch, graphopt
        >>> from graphopt.cost_model import Machine, estimate
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> batch = torch.randn(16, 64), torch.randint(8, (16,))
        >>> graph = graphopt.capture(net, batch, loss=torch.nn.functional.cross_entropy)
        >>> at = [estimate(graph, Machine.named("H100"), {"batch": n}) for n in (16, 32)]
        >>> at[1].flops == 2 * at[0].flops, at[1].seconds >= at[0].seconds
        (True, True)
    """
    if not isinstance(graph, TrainingGraph):
        raise CostModelError(f"graph: expected a TrainingGraph (see graphopt.capture), got {type(graph).__name__}")
    if mode not in get_args(Mode):
        raise CostModelError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
    if isinstance(processors, bool) or not isinstance(processors, int) or processors < 1:
        raise CostModelError(f"processors: expected a positive integer, got {processors!r}")
    machine = machine if machine is not None else Machine.current()
    sizes = dict(sizes or {})
    work = compiled(graph, mode, sizes, machine.threads)
    values = work.values(sizes)
    counts, peak = work.at(values), work.memory.at(values)
    kernel, by_compute = kernel_seconds_at(work, counts, machine, precision)
    launch = _visible_launches(work, machine, kernel)
    touched = machine.touch * machine.scales.get("touch", 1.0) * fresh_bytes(peak.blocks, machine.largest)
    updating = work.updating
    terms = dict.fromkeys(TERMS, 0.0)
    terms["optimizer"] = float((kernel + launch)[updating].sum())
    terms["compute"] = float(kernel[by_compute & ~updating].sum())
    terms["memory"] = float(kernel[~by_compute & ~updating].sum())
    binding = binding_seconds(work, machine)
    terms["launch"] = float(launch[~updating].sum()) + binding
    terms["allocation"] = touched
    terms["communication"] = _communication_seconds(work, counts, machine, processors, kernel + launch)
    seconds = sum(terms.values())
    fixed, each = machine.compile_seconds
    return Estimate(
        seconds=seconds,
        interval=(seconds * math.exp(-machine.spread), seconds * math.exp(machine.spread)),
        terms=terms,
        compile_seconds=fixed + each * len(work.kernels) if mode == "compiled" else 0.0,
        flops=int(counts.flops.sum()),
        bytes_moved=int(counts.bytes.sum()),
        bytes_kept=int(counts.bytes_kept),
        sizes={**graph.symbols.hints, **sizes},
        machine=machine.name,
        mode=mode,
        peak=peak,
        node_seconds=np.bincount(work.node_of, kernel + launch, len(work.nodes)),
        work=work,
        counts=counts,
        precision=precision,
    )


def factor_seconds(graph: TrainingGraph, machine: Machine, sizes: Mapping[str, int], *, mode: Mode) -> dict[str, float]:
    """The seconds of a step by factor (`FACTORS`), where all factors are 1: what a fit of them needs."""
    work = compiled(graph, mode, sizes, machine.threads)
    values = work.values(sizes)
    counts, plain = work.at(values), replace(machine, scales={})
    kernel, _ = kernel_seconds_at(work, counts, plain, None)
    found = dict.fromkeys(FACTORS, 0.0)
    for family, at in work.of_family.items():
        if family in _GROUP_OF:
            found[_GROUP_OF[family]] += float(kernel[at].sum())
    found[_launch_factor(mode)] = float(launch_seconds(work, plain).sum())
    found["touch"] = machine.touch * fresh_bytes(work.memory.at(values).blocks, machine.largest)
    return found


@dataclass(frozen=True)
class Pieces:
    """The seconds of one step, piece by piece: what its `Estimate` is the sum of.

    ``kernels``: of each kernel with its launch. ``transfers``: of each collective. ``schedule``: when those run.
    ``binding``: before the first kernel. ``rest``: what has no place in the step, such as memory that the operating
    system gives anew.
    """

    kernels: np.ndarray
    transfers: tuple[float, ...]
    schedule: Schedule
    binding: float
    rest: float


def pieces(price: Estimate, machine: Machine, processors: int = 1) -> Pieces:
    """The seconds of a price in their order. ``machine`` and ``processors`` must be those that it was made for."""
    work, counts = price.work, price.counts
    kernel, _ = kernel_seconds_at(work, counts, machine, price.precision)
    kernel = kernel + _visible_launches(work, machine, kernel)
    seconds = tuple(_transfer_seconds(work, counts, machine, processors))
    found = scheduled(work.transfers if seconds else (), seconds, kernel)
    binding = binding_seconds(work, machine)
    return Pieces(kernel, seconds, found, binding, price.seconds - float(kernel.sum()) - found.stalled - binding)


def kernel_seconds(work: Work, machine: Machine) -> np.ndarray:
    """Seconds of each kernel at the sizes of the capture."""
    return kernel_seconds_at(work, work.at(work.values({})), machine, None)[0]


def node_seconds(
    work: Work, machine: Machine, values: Mapping[sympy.Symbol, int], precision: str | None = None
) -> np.ndarray:
    """Seconds of each operator (`Work.nodes`) where the free sizes have these values: its kernels and, where the host
    does not run ahead of them, its launches. Nothing is checked: parts may be smaller than a graph admits."""
    seconds, _ = kernel_seconds_at(work, work.at(values), machine, precision)
    if not machine.asynchronous:
        seconds = seconds + launch_seconds(work, machine)
    return np.bincount(work.node_of, seconds, len(work.nodes))


def kernel_seconds_at(
    work: Work, counts: Counts, machine: Machine, precision: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each kernel, and whether its FLOPs decide them; at many sizes at once for the counts of many."""
    moved, dims = counts.kernel_bytes.astype(np.float64), counts.dims.astype(np.float64)
    seconds, by_compute = np.zeros(moved.shape), np.zeros(moved.shape, dtype=bool)
    each = (slice(None), *[None] * (moved.ndim - 1))  # what a kernel has at all sizes
    if precision in ("bf16", "fp16"):
        moved = np.where(work.updating[each], moved, moved / 2)
    rates = work.per_kernel(machine, precision or "rate", lambda i: _rate(work, i, machine, precision))[each]
    relative = work.per_kernel(machine, "relative", lambda i: _relative(work, i, machine))[each]
    streams = _streams(moved[work.updating].sum(axis=0), machine)
    for family, at in work.of_family.items():
        if family in (Family.NONE, Family.COMMUNICATION):
            continue
        curve = machine.curves[family]
        least = curve.points[0][1] if curve.points else 0.0  # of any call: an operator is slower by what it does
        found = least + relative[at] * (curve.memory_seconds(moved[at]) - least)
        if family is Family.UPDATE:
            streamed = machine.curves[Family.UPDATE_STREAM].memory_seconds(moved[at])
            found = (1 - streams) * found + streams * np.maximum(found, streamed)
        if family in LOOPS and curve.rates:
            products = curve.product_seconds(dims[:, at], rates[at])
            by_compute[at] = (products > found) & (counts.kernel_flops[at] > 0)
            found = np.maximum(products, found) + curve.passes * found
        seconds[at] = found * machine.scales.get(_GROUP_OF.get(family, ""), 1.0)
    return seconds, by_compute


def _streams(moved: np.ndarray, machine: Machine) -> np.ndarray:
    """How much of an update comes from memory, 0 to 1, where it moves ``moved`` bytes: each tensor some times."""
    if not machine.cache_bytes:
        return np.zeros(())
    tensors = np.maximum(moved / _TIMES_MOVED, 1.0)
    return np.clip(np.log(tensors / machine.cache_bytes) / math.log(16.0) + 0.5, 0.0, 1.0)


IN_UPDATES = "update "
"""Before the names of operators of updates in `Machine.relative`: they are of another family."""

_TIMES_MOVED = 5.0
"""Bytes that an update of AdamW moves for each byte of parameter, gradient and state: 20 for 4."""

_BINDING = 2.0
"""What a step of straight-line code spends on each of its inputs before it runs, in launches: it looks whether the
model is still the same, and binds the input."""


def _rate(work: Work, kernel: int, machine: Machine, precision: str | None) -> float:
    """flop/s of one kernel at full efficiency; 0 for one without products."""
    family = work.kernels[kernel].family
    rates = machine.curves[family].rates if family in LOOPS else {}
    if not rates:
        return 0.0
    name = work.precisions[kernel]
    if name == "fp32" and not work.updating[kernel]:
        name = precision or ("tf32" if machine.tf32 else "fp32")
    if name not in rates:
        raise CostModelError(f"precision: {machine.name} has no rate for {name}; it has {', '.join(rates)}")
    return rates[name]


def _relative(work: Work, kernel: int, machine: Machine) -> float:
    """What the operator of a kernel takes relative to its family; further kernels of a node are as others."""
    one = work.kernels[kernel]
    if one.family in LOOPS or not one.items:
        return 1.0
    name = operator_name(one.node)
    return machine.relative.get(f"{IN_UPDATES}{name}" if work.updating[kernel] else name, 1.0)


def launch_seconds(work: Work, machine: Machine) -> np.ndarray:
    """Seconds of the host for each kernel."""
    each = work.per_kernel(machine, "launch", lambda i: machine.launch[launch_kind(work, i)])
    scale = machine.scales.get(_launch_factor(work.mode), 1.0)
    return scale * (each * (work.items > 0) + np.maximum(work.items - 1, 0) * machine.launch["item"])


def _visible_launches(work: Work, machine: Machine, kernel: np.ndarray) -> np.ndarray:
    """What launches add to each kernel."""
    launch = launch_seconds(work, machine)
    if machine.asynchronous:  # the host runs ahead: only what it takes longer than the kernels is seen
        launch = launch * max(0.0, 1 - kernel.sum() / max(launch.sum(), 1e-30))
    return launch


def binding_seconds(work: Work, machine: Machine) -> float:
    """Seconds of the host at the beginning of a step of straight-line or compiled code."""
    if work.mode == "eager" or machine.asynchronous:
        return 0.0
    return (
        machine.scales.get(_launch_factor(work.mode), 1.0) * machine.launch["flat"] * _BINDING * len(work.graph.inputs)
    )


def _communication_seconds(work: Work, counts: Counts, machine: Machine, processors: int, kernels: np.ndarray) -> float:
    """Seconds of the collectives that computation does not hide."""
    seconds = _transfer_seconds(work, counts, machine, processors)
    if not seconds or machine.link is None:
        return 0.0
    return exposed_seconds(work.transfers, seconds, kernels, machine.link.busy)


def _transfer_seconds(work: Work, counts: Counts, machine: Machine, processors: int) -> list[float]:
    """Seconds of each collective; none where nobody is there to communicate with."""
    if processors == 1 or not work.transfers:
        return []
    if machine.link is None:
        raise CostModelError(f"processors: {machine.name} has no link to another processor; give Machine.link")
    link = machine.link
    return [link.seconds(t.collective, float(counts.kernel_bytes[t.start]), processors) for t in work.transfers]


def _launch_factor(mode: Mode) -> str:
    return "eager launch" if mode == "eager" else "flat launch"


def launch_kind(work: Work, kernel: int) -> str:
    """Which of a machine's launches (`LAUNCHES`) a kernel is."""
    is_view = work.kernels[kernel].family is Family.NONE
    if work.mode == "eager":
        return f"eager {work.phase(kernel)}{' view' if is_view else ''}"
    if work.mode == "compiled":
        return "compiled"
    return "view" if is_view else "flat"


def fresh_bytes(blocks: np.ndarray, largest: int) -> float:
    """Bytes that the operating system gives anew in each step; the first touch of each page of them costs.

    The law of glibc's malloc in a process that has freed a block of 32 MiB before: larger blocks are mapped at each
    request, smaller ones live on a heap that is kept.

    Args:
        blocks: bytes of each block that the step asks for.
        largest: `Machine.largest`; 0 where freed memory is always kept.
    """
    return float(blocks[blocks >= largest].sum()) if largest else 0.0


_GROUP_OF = {family: group for group, families in GROUPS.items() for family in families}
