"""``graphopt calibrate``: what this machine can do, measured and kept."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich.table import Table

from graphopt.commands.common import NO, AsJson, emit, rendered
from graphopt.cost_model import Machine
from graphopt.cost_model.calibrate import calibrate as measure_machine
from graphopt.cost_model.kernels import Family
from graphopt.cost_model.machine import fingerprint, load, path_of
from graphopt.schemes.data_parallel import threads_of_each
from graphopt.schemes.workers import Pool
from graphopt.schemes.workers.link import measure_link


def calibrate(
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; by default what torch takes.")] = None,
    processors: Annotated[
        int | None, typer.Option(min=2, help="Measure collectives between so many processors of this machine too.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say whether what is kept still holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what this machine can do, in about a minute, and keep it for prices.

    Nothing else should run meanwhile: prices would be too high. Example: graphopt calibrate --threads 2

    With --processors the cores are divided among them, unless --threads says how many each has; it takes some seconds
    more. Exit code 1: with --check, what is kept does not hold any more, or there is nothing.
    """
    if processors is not None and threads is None:
        threads = threads_of_each(processors)
    if threads is not None:
        torch.set_num_threads(threads)
    if check:
        _check(as_json)
        return
    machine = measure_machine(progress=True)
    if processors is not None:
        with Pool(processors, threads=torch.get_num_threads()) as pool:
            machine = replace(machine, link=measure_link(pool))
    kept_at = machine.save()
    emit(
        as_json,
        lambda: summary(machine) | {"path": str(kept_at) if kept_at else None},
        lambda: "\n".join([_table(machine), f"kept in {kept_at}" if kept_at else "not kept"]),
    )


def _check(as_json: bool) -> None:
    path = path_of(fingerprint())
    kept = load(path)
    stale = "not measured yet for this hardware, torch and threads" if kept is None else kept.stale()
    emit(
        as_json,
        lambda: {"path": str(path), "holds": not stale, "why_not": stale or None},
        lambda: stale or f"{path}: still holds",
    )
    raise typer.Exit(NO if stale else 0)


def _table(machine: Machine) -> str:
    table = Table(title=f"{machine.name}, {torch.get_num_threads()} threads", show_header=False)
    for name, value in summary(machine).items():
        table.add_row(name.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else str(value))
    return rendered(table)


def summary(machine: Machine) -> dict[str, float | str]:
    """The figures of a machine that people know: rates, bandwidth, launches."""
    moved, seconds = machine.curves[Family.POINTWISE].points[-1]
    link = {} if machine.link is None else {"all_reduce_bytes_per_second": machine.link.bandwidth}
    return {
        "gemm_flops_per_second": machine.curves[Family.GEMM].rates["fp32"] / machine.scales.get("gemm", 1.0),
        "convolution_flops_per_second": machine.curves[Family.CONVOLUTION].rates["fp32"]
        / machine.scales.get("convolution", 1.0),
        "memory_bytes_per_second": moved / seconds / machine.scales.get("pointwise", 1.0),
        "eager_launch_seconds": machine.launch["eager forward"] * machine.scales.get("eager launch", 1.0),
        "flat_launch_seconds": machine.launch["flat"] * machine.scales.get("flat launch", 1.0),
        "fresh_memory_seconds_per_gib": machine.touch * machine.scales.get("touch", 1.0) * 2**30,
        **link,
        "interval": f"within a factor {math.exp(machine.spread):.2f}",
        "measured": machine.measured,
    }
