"""Elastic: what share of real architectures becomes a supernet without code, and whether every subnet is right.

    python -m benchmarks.elastic convert                     # the zoo; writes results/elastic_convert.json
    python -m benchmarks.elastic convert --strangers         # those of `benchmarks.strangers`, likewise
    python -m benchmarks.elastic convert --resume            # go on after an interruption
    python -m benchmarks.elastic convert --unchecked         # what is elastic, in a quarter of the time
    python -m benchmarks.elastic convert --only 'resnet*' vit_small --jobs 2
    python -m benchmarks.elastic report                      # writes docs/elastic_models.md of these results
    python -m benchmarks.elastic speed                       # steps of half the width against the full net
    python -m benchmarks.elastic emit                        # milliseconds of analysis and emission
    python -m benchmarks.elastic prices                      # predicted against measured steps
    python -m benchmarks.elastic peers                       # Torch-Pruning beside it

**convert** makes a space of each architecture and checks it by execution: see `benchmarks.conversion`. The exit code is
1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import elastic_peers, elastic_subnets, zoo
from benchmarks.conversion import CASES, OK, WRONG, convert
from benchmarks.measure import machine_description, print_table, write_json

RESULTS = Path(__file__).resolve().parent / "results"
CONVERTED = RESULTS / "elastic_convert.json"
PAGE = RESULTS.parents[1] / "docs" / "elastic_models.md"

FAMILIES = ("torchvision", "timm", "transformers")
ZOO = {case.name for case in zoo.CASES}
RIGID_BAR = 0.10


# -- reports --------------------------------------------------------------------------------------------------------


def convert_all(names: Sequence[str], jobs: int, known: dict[str, dict[str, Any]], *, checked: bool = True) -> None:
    """Convert these architectures, each in a process of its own; each result is saved at once."""
    machine = machine_description()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("forkserver")  # libraries are imported once, by a process without threads
    context.set_forkserver_preload(["benchmarks.conversion", "transformers", "timm"])
    with context.Pool(jobs, maxtasksperchild=1 if checked else 20) as pool, Progress(*columns) as progress:
        task = progress.add_task("elastic", total=len(names))
        for row in pool.imap_unordered(partial(convert, checked=checked), names, chunksize=1):
            known[row.name] = asdict(row)
            ordered = [known[name] for name in CASES if name in known]
            write_json(CONVERTED, {"machine": machine, "results": ordered})
            detail = row.note if row.result != OK else ""
            wrong = "; ".join(f"{n}: {c}" for n, c in row.checks.items() if c != OK)
            text = f"{row.result}  {row.name}  {row.rigid:.1%} rigid  {row.seconds} s  {detail} {wrong}"
            progress.print(text, markup=False, highlight=False)
            progress.advance(task)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a family, one for all of the zoo, and one for the strangers."""
    parts = {f: [r for r in rows if r["family"] == f and r["name"] in ZOO] for f in FAMILIES}
    parts["all of these"] = [r for r in rows if r["name"] in ZOO]
    parts["seen here first"] = [r for r in rows if r["name"] not in ZOO]
    lines = []
    for part, mine in parts.items():
        if not mine:
            continue
        done = [r for r in mine if r["result"] == OK]
        attention, residual = ([r for r in mine if r[what]] for what in ("attention", "residual"))
        heads = sum(any(r["dimensions"].get(k) for k in ("heads", "queries")) for r in attention)
        depth = sum(bool(r["dimensions"].get("depth")) for r in residual)
        few = sum(r["rigid"] <= RIGID_BAR for r in done)
        lines.append({
            "models": part, "number": len(mine), "converted": f"{len(done)} ({len(done) / len(mine):.0%})",
            "at most 10 % rigid": f"{few} ({few / len(mine):.0%})",
            "heads elastic": f"{heads} of {len(attention)}", "depth elastic": f"{depth} of {len(residual)}",
            "checked": sum(bool(r["checks"]) for r in mine),
            "wrong": sum(r["result"] == WRONG for r in mine),
        })  # fmt: skip
    return lines


_PAGE_TOP = """\
# Models as supernets

Written by `python -m benchmarks.elastic report`; do not edit.

Each architecture of [models.md](models.md), and others that no test knows (`benchmarks/strangers.py`), was given to
`graphopt.elastic.space` with an example batch and nothing else.{left}

{summary}

*Checked* by execution, in float64 with weights so spread that attention is far from uniform: random permutations of all
dimensions leave the output, the smallest and random subnets have the outputs and gradients of the graph that is resized
operator by operator, the extracted smallest subnet is the slice bit for bit, the full choice is the model. The others
were made and described; in each space the smallest subnet was run without data, all shapes compared.

*Rigid* is the share of the parameters that no width, head, embedding or kernel dimension changes the number of. Heads
and depth are counted over the models that have attention, or a sum `x + f(x)` with layers in f.

On another list of 167 models of the same three libraries, with no configuration: Torch-Pruning 1.6.1 cut 56 correctly
and 13 wrongly without an error, the others failed or did not end; NVIDIA modelopt 0.47 converted 143, of which 42 were
at least 90 % rigid, and found neither heads nor depth in any of 68 models of transformers.
"""


def page(rows: Sequence[dict[str, Any]]) -> str:
    """`docs/elastic_models.md`."""
    left = len(CASES) - len(rows)
    text = f" (Of {left} others there is no result yet.)" if left else ""
    lines = [_PAGE_TOP.format(summary=_markdown(summary(rows)), left=text)]
    for family in FAMILIES:
        mine = [
            {
                "model": row["name"], "parameters": f"{row['parameters']:,}",
                "dimensions": ", ".join(f"{many} {kind}" for kind, many in row["dimensions"].items() if many) or "-",
                "rigid": f"{row['rigid']:.1%}", "smallest": f"{row['smallest']:.1%}",
                "result": row["result"] + (", checked" if row["checks"] else "")
                + (f": {row['note']}" if row["note"] and row["result"] != OK else ""),
            }
            for row in rows if row["family"] == family
        ]  # fmt: skip
        lines += [f"## {family}", "", _markdown(mine), ""]
    return "\n".join(lines)


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    heads = list(rows[0])
    cells = [[str(row[head]).replace("|", "/") for head in heads] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *cells))


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
    parser.add_argument("section", choices=("convert", "report", *_MEASURED))
    parser.add_argument("--only", metavar="PATTERN", nargs="+", help="names, such as 'resnet*'")
    parser.add_argument("--strangers", action="store_true", help="the architectures of benchmarks.strangers")
    parser.add_argument("--unchecked", action="store_true", help="nothing is checked by execution")
    parser.add_argument("--resume", action="store_true", help="keep the (checked) results of an interrupted run")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)d)")
    parser.add_argument("--rounds", type=int, default=7, help="of timings (%(default)d)")
    options = parser.parse_args(arguments)
    if options.section in _MEASURED:
        return _measure(options.section, options.only or ["*"], options.rounds)
    patterns = options.only or ["*"]
    torch.set_num_threads(1)
    known = load()
    if options.section == "report":
        PAGE.write_text(page([known[n] for n in CASES if n in known]))
        return 0
    names = [n for n in CASES if (n not in ZOO) == options.strangers and any(fnmatch(n, p) for p in patterns)]
    if not names:
        parser.error(f"no case matches {options.only!r}")
    if not options.only and not options.resume:
        known = {name: row for name, row in known.items() if name not in names}
    left = [n for n in names if not options.resume or not known.get(n, {}).get("checks")]
    convert_all(left, options.jobs, known, checked=not options.unchecked)
    print_table(summary([known[n] for n in names if n in known]), title="conversion")
    return 1 if any(known[n]["result"] == WRONG for n in names) else 0


if __name__ == "__main__":
    sys.exit(main())
