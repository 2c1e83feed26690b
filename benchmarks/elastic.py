"""Elastic: what share of real architectures becomes a supernet without code, and whether every subnet is right.

    python -m benchmarks.elastic convert                     # the zoo; writes results/elastic_convert.json
    python -m benchmarks.elastic convert --strangers         # those of `benchmarks.strangers`, likewise
    python -m benchmarks.elastic convert --resume            # go on after an interruption
    python -m benchmarks.elastic convert --unchecked         # what is elastic, in a quarter of the time
    python -m benchmarks.elastic convert --only 'resnet*' vit_small --jobs 2
    python -m benchmarks.elastic report                      # writes docs/elastic_models.md of these results
    python -m benchmarks.elastic speed                       # milliseconds; writes results/elastic_speed.json

**convert** makes a space of each architecture and checks it by execution: see `benchmarks.conversion`. The exit code is
1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import zoo
from benchmarks.conversion import CASES, OK, WRONG, convert
from benchmarks.measure import machine_description, print_table, write_json
from graphopt.elastic import space as make_space
from graphopt.elastic.captures import Captures

RESULTS = Path(__file__).resolve().parent / "results"
CONVERTED, SPEED = RESULTS / "elastic_convert.json", RESULTS / "elastic_speed.json"
PAGE = RESULTS.parents[1] / "docs" / "elastic_models.md"

FAMILIES = ("torchvision", "timm", "transformers")
ZOO = {case.name for case in zoo.CASES}
RIGID_BAR = 0.10


# -- speed ----------------------------------------------------------------------------------------------------------


@dataclass
class Speed:
    """Of one model at its real size: milliseconds of processor time. ``analysis``: the space without captures.
    ``forward``, ``joint``: to emit the graph of a subnet that was not asked for before, the median of several; joint of
    a pattern of layers that was asked for before. ``cached``: of one that was (wall time)."""

    model: str
    operators: int
    captures: float
    analysis: float
    forward: float
    joint: float
    cached: float


def speed(names: Sequence[str]) -> list[Speed]:
    """The speed of analysis and emission."""
    from statistics import median
    from unittest import mock

    rows = []
    captures = sys.modules[Captures.__module__]
    for name in names:
        torch.manual_seed(0)
        model, batch = BIG[name]()
        seconds: list[float] = []
        real = captures.capture_forward_call  # type: ignore[attr-defined]

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = process_time()
            found = real(*args, **kwargs)  # noqa: B023  (called before the next round)
            seconds.append(process_time() - start)  # noqa: B023
            return found

        start = process_time()
        with mock.patch.object(captures, "capture_forward_call", timed):
            made = make_space(model.eval(), batch)
        total = process_time() - start
        choices = [made.sample(seed=seed, where=_several_heads) for seed in range(12)]
        forward = [_ms(lambda: made.graph(c)) for c in choices]  # noqa: B023
        for c in choices[:2]:
            made.graph(c, backward=True)
        joint = [_ms(lambda: made.graph(c, backward=True)) for c in choices[2:]]  # noqa: B023
        begin = perf_counter()
        for c in choices:
            made.graph(c, backward=True)
        cached = (perf_counter() - begin) / len(choices)
        spent = sum(seconds)
        rows.append(
            Speed(
                name, len(made.primary.graph), round(1e3 * spent), round(1e3 * (total - spent)),
                round(median(forward), 1), round(median(joint), 1), round(1e3 * cached, 2),
            )
        )  # fmt: skip
    return rows


def _several_heads(choice: Any) -> bool:
    """One head changes which dimensions are broadcast: such a subnet's backward is traced by itself."""
    return all(v != 1 for n, v in choice.items() if isinstance(v, int))


def _ms(call: Callable[[], Any]) -> float:
    start = process_time()
    call()
    return 1e3 * (process_time() - start)


def _vit() -> tuple[torch.nn.Module, Any]:
    from benchmarks.zoo._torchvision import define_missing_operators

    define_missing_operators()
    import torchvision

    return torchvision.models.vit_b_16(weights=None), torch.randn(2, 3, 224, 224)


def _resnet() -> tuple[torch.nn.Module, Any]:
    from benchmarks.zoo._torchvision import define_missing_operators

    define_missing_operators()
    import torchvision

    return torchvision.models.resnet50(weights=None), torch.randn(2, 3, 224, 224)


def _gpt2() -> tuple[torch.nn.Module, Any]:
    from benchmarks.zoo._torchvision import define_missing_operators

    define_missing_operators()
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
    return model, {"input_ids": torch.randint(1000, (2, 64))}


BIG = {"resnet50": _resnet, "vit_b_16": _vit, "gpt2, 12 layers": _gpt2}


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
            "checked": sum(bool(r["checks"]) for r in mine), "wrong": sum(r["result"] == WRONG for r in mine),
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.elastic", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("section", choices=("convert", "report", "speed"))
    parser.add_argument("--only", metavar="PATTERN", nargs="+", help="names, such as 'resnet*'")
    parser.add_argument("--strangers", action="store_true", help="the architectures of benchmarks.strangers")
    parser.add_argument("--unchecked", action="store_true", help="nothing is checked by execution")
    parser.add_argument("--resume", action="store_true", help="keep the (checked) results of an interrupted run")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)d)")
    options = parser.parse_args(arguments)
    patterns = options.only or ["*"]
    torch.set_num_threads(1)
    known = load()
    if options.section == "speed":
        rows = speed([n for n in BIG if any(fnmatch(n, p) for p in patterns)])
        write_json(SPEED, {"machine": machine_description(), "results": [asdict(r) for r in rows]})
        print_table(rows, title="milliseconds")
        return 0
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
