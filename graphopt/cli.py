"""The command ``graphopt``."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from graphopt.cost_model import Machine
from graphopt.cost_model.calibrate import calibrate as measure_machine
from graphopt.cost_model.kernels import Family
from graphopt.cost_model.machine import fingerprint, load, path_of
from graphopt.errors import GraphoptError
from graphopt.exploration.commands import app as explore_commands
from graphopt.schemes.data_parallel import threads_of_each
from graphopt.schemes.workers import Pool
from graphopt.schemes.workers.link import measure_link
from graphopt.visualize import commands

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Optimise and price PyTorch training steps.")
app.add_typer(explore_commands, name="explore")


@app.callback()
def _commands() -> None:
    """Optimise and price PyTorch training steps."""


@app.command()
def calibrate(
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; by default what torch takes.")] = None,
    processors: Annotated[
        int | None, typer.Option(min=2, help="Measure collectives between so many processors of this machine too.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say whether what is kept still holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure what this machine can do, in at most a minute, and keep it for prices.

    Nothing else should run meanwhile. Example: graphopt calibrate --threads 2

    With --processors the cores are divided among them, unless --threads says how many each has; it takes some seconds
    more.
    """
    if processors is not None and threads is None:
        threads = threads_of_each(processors)
    if threads is not None:
        torch.set_num_threads(threads)
    path = path_of(fingerprint())
    if check:
        kept = load(path)
        stale = "not measured yet for this hardware, torch and threads" if kept is None else kept.stale()
        typer.echo(stale or f"{path}: still holds")
        raise typer.Exit(1 if stale else 0)
    machine = measure_machine(progress=not as_json)
    if processors is not None:
        with Pool(processors, threads=torch.get_num_threads()) as pool:
            machine = replace(machine, link=measure_link(pool))
    kept_at = machine.save()
    if as_json:
        typer.echo(json.dumps(summary(machine), indent=1))
        return
    table = Table(title=f"{machine.name}, {torch.get_num_threads()} threads", show_header=False)
    for name, value in summary(machine).items():
        table.add_row(name.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else str(value))
    Console().print(table)
    typer.echo(f"kept in {kept_at}" if kept_at else "not kept")


app.command()(commands.show)
app.command()(commands.explain)


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


def main() -> None:
    """Entry point: errors of ours are a line, not a traceback."""
    try:
        app()
    except GraphoptError as error:
        Console(stderr=True).print(f"graphopt: {error}", style="red", markup=False)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
