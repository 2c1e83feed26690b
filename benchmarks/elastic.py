"""Elastic: what share of real architectures becomes a supernet without code, and whether every subnet is right.

    python -m benchmarks.elastic convert                     # every architecture; writes results/elastic_convert.json
    python -m benchmarks.elastic convert --resume            # go on after an interruption
    python -m benchmarks.elastic convert --only 'resnet*' vit_small --jobs 2
    python -m benchmarks.elastic speed                       # steps of half the width against the full net
    python -m benchmarks.elastic emit                        # milliseconds of analysis and emission
    python -m benchmarks.elastic prices                      # predicted against measured steps
    python -m benchmarks.elastic peers                       # Torch-Pruning beside it

**convert**: each architecture of the zoo in a process of its own, in eval mode and float64, with parameters so spread
that attention is far from uniform. A space is made of it with no option. Reported: dimensions by kind, the share of
parameters that is rigid (in no dimension that changes sizes), whether heads and depth are elastic where the model has
them. Checked by execution:

- **permutation**: the indices of all dimensions at random orders: the whole model's output stays;
- **slice**: the smallest subnet and random ones have the outputs and gradients of the graph that is resized operator by
  operator, on copies of the slices; gradients are zero beside them;
- **full**: the full choice is the model.

The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import graphopt
from benchmarks import elastic_peers, elastic_subnets, zoo
from benchmarks.measure import machine_description, print_table, write_json
from graphopt.elastic import Kind, Space
from graphopt.elastic import space as make_space
from graphopt.elastic.importance import sort_by_importance
from graphopt.elastic.report import rigid
from graphopt.graph.depth import stages
from graphopt.graph.training_graph import InputKind

RESULTS = Path(__file__).resolve().parent / "results"
CONVERTED = RESULTS / "elastic_convert.json"

FAMILIES = ("torchvision", "timm", "transformers")
SIZE = 4
SAMPLES = 2
OK, WRONG, RIGID, NOT_CAPTURED = "ok", "WRONG", "nothing elastic", "not captured"
RIGID_BAR = 0.10


# -- conversion -----------------------------------------------------------------------------------------------------


@dataclass
class Converted:
    """One architecture. ``dimensions``: by kind. ``attention``, ``residual``: whether the model has heads, or runs of
    layers that could be left out. ``checks``: what each found, ``ok`` or what is wrong."""

    name: str
    family: str
    result: str = OK
    note: str = ""
    parameters: int = 0
    dimensions: dict[str, int] = field(default_factory=dict)
    rigid: float = 1.0
    smallest: float = 1.0
    attention: bool = False
    residual: bool = False
    checks: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def convert(name: str, limit: int = 900) -> Converted:
    """Make a space of one architecture and check it, in at most ``limit`` seconds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(limit)
    start = perf_counter()
    case = zoo.case(name)
    row = Converted(case.name, case.family, note=case.note)
    try:
        _convert(case, row)
    except graphopt.ElasticError as error:
        row.result, row.note = RIGID, str(error)
    except graphopt.CaptureError as error:
        row.result, row.note = NOT_CAPTURED, str(error)
    except Exception as error:  # whatever it is, the table tells it
        row.result, row.note = WRONG, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
    finally:
        signal.alarm(0)
    row.seconds = round(perf_counter() - start, 1)
    return row


def _too_long(signum: int, frame: Any) -> None:
    raise TimeoutError("it took too long")


def _convert(case: zoo.Case, row: Converted) -> None:
    from tests.axes_oracles import cast, wide

    torch.manual_seed(0)
    model, batch = case.build().eval(), case.batch(SIZE)
    inputs = batch if isinstance(batch, dict) else batch[:-1]
    row.parameters = sum(p.numel() for p in model.parameters())
    try:
        made = make_space(wide(model), cast(inputs))
    except graphopt.CaptureError:  # an operator has no float64 kernel
        made = make_space(model, inputs)
        _describe(made, row)
        row.checks["all"] = row.note = "not checked: no float64 form"
        return
    _describe(made, row)
    for what, check in (("full", _full), ("slice", _slices), ("permutation", _permuted)):
        row.checks[what] = check(made, cast(inputs))
    if any(found != OK for found in row.checks.values()):
        row.result = WRONG


def _describe(made: Space, row: Converted) -> None:
    row.dimensions = {str(k): sum(d.kind is k for d in made.dimensions) for k in Kind}
    row.rigid = round(rigid(made), 4)
    shapes = made.graph(made.smallest).input_nodes(InputKind.PARAMETER)
    row.smallest = round(sum(n.meta["val"].numel() for n in shapes.values()) / max(1, row.parameters), 4)
    operators = {str(n.target) for n in made.primary.graph.nodes if n.op == "call_function"}
    row.attention = any("softmax" in o or "dot_product_attention" in o for o in operators)
    row.residual = bool(stages(made.primary.axes))


def _outputs(made: Space, run: Callable[..., Any], inputs: Any) -> list[torch.Tensor]:
    from tests.elastic.oracles import outputs

    with torch.no_grad():
        torch.manual_seed(0)
        return outputs(run(**inputs) if isinstance(inputs, dict) else run(*inputs))


def _same(got: list[torch.Tensor], right: list[torch.Tensor]) -> str:
    from tests.axes_oracles_resize import far

    problems = [far(f"output {i}", a, b) for i, (a, b) in enumerate(zip(got, right, strict=True))]
    return "; ".join(filter(None, problems)) or OK


def _full(made: Space, inputs: Any) -> str:
    ours = _outputs(made, lambda *a, **k: made.run(made.full, *a, **k), inputs)
    return _same(ours, _outputs(made, copy.deepcopy(made.model), inputs))


def _slices(made: Space, inputs: Any) -> str:
    from tests.elastic.oracles import assert_is_slice

    whole = {d.name: d.full for d in made.dimensions if d.kind in (Kind.DEPTH, Kind.KERNEL)}
    for seed in range(-1, SAMPLES):
        choice = made.choice({**(made.smallest if seed < 0 else made.sample(seed=seed)), **whole})
        try:
            assert_is_slice(made, choice, inputs)
        except AssertionError as error:
            return f"{choice}: {str(error)[:300]}"
    return OK


def _permuted(made: Space, inputs: Any) -> str:
    """All dimensions permuted at random: by importance that is random."""
    before = _outputs(made, made.model, inputs)
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(p.shape, generator=generator) for n, p in made.model.named_parameters()}
    orders = sort_by_importance(made, scores)
    moved = any(not order.equal(torch.arange(len(order))) for order in orders.values())
    return _same(_outputs(made, made.model, inputs), before) if moved else "nothing was permuted"


# -- reports --------------------------------------------------------------------------------------------------------


def convert_all(names: Sequence[str], jobs: int, known: dict[str, dict[str, Any]]) -> None:
    """Convert these architectures, each in a process of its own; each result is saved at once."""
    machine = machine_description()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    pool = multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1)
    with pool, Progress(*columns) as progress:
        task = progress.add_task("elastic", total=len(names))
        for row in pool.imap_unordered(convert, names, chunksize=1):
            known[row.name] = asdict(row)
            ordered = [known[c.name] for c in zoo.CASES if c.name in known]
            write_json(CONVERTED, {"machine": machine, "results": ordered})
            detail = row.note if row.result != OK else ""
            wrong = "; ".join(f"{n}: {c}" for n, c in row.checks.items() if c != OK)
            text = f"{row.result}  {row.name}  {row.rigid:.1%} rigid  {row.seconds} s  {detail} {wrong}"
            progress.print(text, markup=False, highlight=False)
            progress.advance(task)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a family, and one for all."""
    lines = []
    for family in (*FAMILIES, "all"):
        mine = [r for r in rows if family in (r["family"], "all")]
        if not mine:
            continue
        done = [r for r in mine if r["result"] == OK]
        attention, residual = ([r for r in mine if r[what]] for what in ("attention", "residual"))
        heads = sum(any(r["dimensions"].get(k) for k in ("heads", "queries")) for r in attention)
        depth = sum(bool(r["dimensions"].get("depth")) for r in residual)
        lines.append({
            "family": family, "models": len(mine), "converted": len(done), "share": f"{len(done) / len(mine):.0%}",
            "at most 10 % rigid": sum(r["rigid"] <= RIGID_BAR for r in done),
            "heads elastic": f"{heads} of {len(attention)}", "depth elastic": f"{depth} of {len(residual)}",
            "wrong": sum(r["result"] == WRONG for r in mine),
        })  # fmt: skip
    return lines


def load() -> dict[str, dict[str, Any]]:
    """The results of the last conversion by name, none if there was none."""
    return {row["name"]: row for row in json.loads(CONVERTED.read_text())["results"]} if CONVERTED.exists() else {}


_MEASURED: dict[str, tuple[Sequence[str], Callable[[Sequence[str], int], list[dict[str, Any]]]]] = {
    "speed": (elastic_subnets.STEPPED, lambda names, rounds: elastic_subnets.speed(names, (8, 16), rounds)),
    "emit": (elastic_subnets.EMITTED, lambda names, rounds: elastic_subnets.emit(names)),
    "prices": (elastic_subnets.PRICED, lambda names, rounds: elastic_subnets.prices(names, 30, rounds)),
    "peers": (elastic_peers.PEERS, lambda names, rounds: elastic_peers.peers(names, 150, rounds)),
}
"""Sections that measure: their models, and what gives the rows of some of them."""


def _measure(section: str, patterns: Sequence[str], rounds: int) -> int:
    """Measure, print a table, and write ``results/elastic_SECTION.json`` where all models were measured."""
    torch.set_num_threads(1)
    known, rows_of = _MEASURED[section]
    names = [n for n in known if any(fnmatch(n, p) for p in patterns)]
    rows = rows_of(names, rounds)
    if len(names) == len(known):
        write_json(RESULTS / f"elastic_{section}.json", {"machine": machine_description(), "results": rows})
    print_table([{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows], title=section)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.elastic", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("section", choices=("convert", *_MEASURED))
    parser.add_argument("--only", metavar="PATTERN", nargs="+", help="names, such as 'resnet*'")
    parser.add_argument("--resume", action="store_true", help="keep the results of an interrupted run")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)d)")
    parser.add_argument("--rounds", type=int, default=7, help="of timings (%(default)d)")
    options = parser.parse_args(arguments)
    if options.section in _MEASURED:
        return _measure(options.section, options.only or ["*"], options.rounds)
    patterns = options.only or ["*"]
    known = load() if options.only or options.resume else {}
    names = [c.name for c in zoo.CASES if c.family in FAMILIES and any(fnmatch(c.name, p) for p in patterns)]
    if not names:
        parser.error(f"no case matches {options.only!r}")
    convert_all([n for n in names if not (options.resume and n in known)], options.jobs, known)
    print_table(summary([known[n] for n in names if n in known]), title="conversion")
    return 1 if any(known[n]["result"] == WRONG for n in names) else 0


if __name__ == "__main__":
    sys.exit(main())
