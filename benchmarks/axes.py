"""Axes: how long the analysis takes, and whether what it claims of every architecture of the zoo holds by execution.

    python -m benchmarks.axes                      # speed; writes benchmarks/results/axes_speed.json
    python -m benchmarks.axes --check              # the oracles; writes benchmarks/results/axes.json
    python -m benchmarks.axes --check --resume     # go on after an interruption
    python -m benchmarks.axes --check --only 'resnet*' --jobs 2
    python -m benchmarks.axes --check --graphs DIR # keep captured graphs there, and take those that lie there

The oracles, on the forward graph (whole operators) and on the joint graph of each architecture, in float64 with
parameters so spread that attention is far from uniform:

- **permutation**: all free axes permuted in all tensors that carry them: every value in the graph is what it was,
  permuted as claimed. A few permutations with one place left out must be noticed.
- **resizing**: free axes halved in the forward graph, one by one and all at once: shapes agree everywhere, zeroed
  indices give what absent ones do where nothing but sums runs over the axis, and the backward that is derived anew has
  autograd's gradients.
- **batch**: at another batch size the graph has the FLOPs, bytes kept and results of a fresh capture there.

The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import partial
from math import prod
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import graphopt
from benchmarks import zoo
from benchmarks.measure import in_words, machine_description, print_table, time_limit, write_json
from graphopt import TrainingGraph
from graphopt.graph.axes import Axes, analyse
from graphopt.graph.axes.report import frozen
from graphopt.graph.training_graph import Input, InputKind, Output, OutputKind, Phase, Signature

RESULTS = Path(__file__).resolve().parent / "results"
SPEED, CHECKED = RESULTS / "axes_speed.json", RESULTS / "axes.json"

SIZE, OTHER_SIZE = 4, 3
OK, WRONG, FALLBACK = "ok", "WRONG", "not captured"

SPEED_MODELS = ("resnet18", "gpt2", "vit_small", "mistral", "swin_small", "densenet121")
BAR = 20.0
"""Milliseconds that 1,000 nodes may take; the exit code is 1 for a graph that takes longer."""
CHAINS = (100, 300, 1_000, 3_000, 10_000, 20_000)


# -- speed ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Milliseconds of processor time of one analysis with its groups (the best of several), and per 1,000 nodes."""

    graph: str
    nodes: int
    ms: float
    ms_per_1000: float


def speed() -> list[Speed]:
    """The speed table: forward and joint graphs of some models, and chains of layers of growing length."""
    rows = [_timed(f"chain of {size:,}", chain(size)) for size in CHAINS]
    for name in SPEED_MODELS:
        case = zoo.case(name)
        model, batch, loss = case.build(), case.batch(SIZE), case.loss or "model"
        rows.append(_timed(f"{name}, forward", graphopt.capture_forward(model, batch, loss=loss)))
        rows.append(_timed(f"{name}, joint", graphopt.capture(model, batch, loss=loss)))
    return rows


def _timed(name: str, graph: TrainingGraph) -> Speed:
    taken, nodes = [], len(graph.nodes)
    for _ in range(9 if nodes < 5_000 else 5):
        start = process_time()  # of this one thread, whatever else the machine does
        analyse(graph).groups()
        taken.append(1e3 * (process_time() - start))
    return Speed(name, nodes, round(min(taken), 3), round(min(taken) / nodes * 1e3, 2))


def chain(operators: int) -> TrainingGraph:
    """A forward graph of about this many operators: attention layers one behind the other, each with own weights."""
    aten = torch.ops.aten
    graph, inputs = fx.Graph(), [Input(InputKind.BATCH, "0")]
    layers = max(1, operators // 16)
    names = [f"{i}.{w}" for i in range(layers) for w in ("norm", "qkv", "out", "up", "down")]
    shapes = {"norm": (24,), "qkv": (72, 24), "out": (24, 24), "up": (48, 24), "down": (24, 48)}
    with FakeTensorMode() as mode:

        def placeholder(name: str, *shape: int) -> fx.Node:
            node = graph.placeholder(name)
            node.meta.update(val=mode.from_tensor(torch.empty(shape)), phase=Phase.INPUT)
            return node

        def call(operator: Any, *args: Any) -> fx.Node:
            node = graph.call_function(operator, args)
            node.meta.update(val=operator(*fx.node.map_arg(args, lambda n: n.meta["val"])), phase=Phase.FORWARD)
            return node

        x = placeholder("x", 5, 7, 24)
        weights = {name: placeholder("w" + name.replace(".", "_"), *shapes[name.partition(".")[2]]) for name in names}
        inputs += [Input(InputKind.PARAMETER, name) for name in names]
        for i in range(layers):
            norm, qkv, out, up, down = (weights[f"{i}.{w}"] for w in ("norm", "qkv", "out", "up", "down"))
            y = call(aten.layer_norm.default, x, [24], norm)
            y = call(aten.view.default, call(aten.linear.default, y, qkv), [5, 7, 3, 4, 6])
            heads = [call(aten.transpose.int, call(aten.select.int, y, 2, part), 1, 2) for part in range(3)]
            y = call(aten.transpose.int, call(aten.scaled_dot_product_attention.default, *heads), 1, 2)
            y = call(aten.view.default, call(aten.clone.default, y), [5, 7, 24])
            x = call(aten.add.Tensor, x, call(aten.linear.default, y, out))
            y = call(aten.gelu.default, call(aten.linear.default, x, up))
            x = call(aten.add.Tensor, x, call(aten.linear.default, y, down))
    graph.output((x,)).meta["phase"] = Phase.OUTPUT
    return TrainingGraph(graph, Signature(tuple(inputs), (Output(OutputKind.OUTPUT, "0"),)))


# -- the oracles ----------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What one graph's axes are, and what each oracle says of them: ``ok``, or what is wrong."""

    groups: int = 0
    free: int = 0
    fixed: float = 0.0
    contradictions: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    permutation: str = OK
    sensitivity: str = OK
    batch: str = OK


@dataclass
class Checked:
    """One architecture. ``resizing``: groups tried, resized, compared by masks; refusals. ``differences``: groups that
    forward and joint graph do not agree on."""

    name: str
    result: str
    note: str = ""
    forward: Found = field(default_factory=Found)
    joint: Found = field(default_factory=Found)
    differences: list[str] = field(default_factory=list)
    resizing: str = OK
    resized: str = ""
    refused: list[str] = field(default_factory=list)
    seconds: float = 0.0


def check(name: str, graphs: Path | None = None, limit: int = 600) -> Checked:
    """Run all oracles on one architecture, in at most ``limit`` seconds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = perf_counter()
    try:
        with time_limit(limit):
            result = _checked(zoo.case(name), graphs)
    except Exception as error:  # whatever it is, the table tells it
        result = Checked(name, WRONG, in_words(error))
    result.seconds = round(perf_counter() - start, 1)
    return result


def _checked(case: zoo.Case, graphs: Path | None) -> Checked:
    from tests.axes_oracles_models import groups_of
    from tests.axes_oracles_resize import check_resizing

    torch.manual_seed(0)
    model, batch, loss = case.build(), case.batch(SIZE), case.loss or "model"
    try:
        forward, joint = (
            _graph(case.name, kind, graphs, partial(capture, model, batch, loss=loss))
            for kind, capture in (("fwd", graphopt.capture_forward), ("joint", graphopt.capture))
        )
    except graphopt.CaptureError as error:
        return Checked(case.name, FALLBACK, str(error))
    result = Checked(case.name, OK, case.note)
    for found, graph, capture in (
        (result.forward, forward, graphopt.capture_forward),
        (result.joint, joint, graphopt.capture),
    ):
        _describe(found, graph.axes)
        _permuted(found, graph.axes, model, batch)
        found.batch = _at_another_batch(graph, capture, case, model)
    ours, theirs = (groups_of(graph.axes) for graph in (forward, joint))
    result.differences = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    inputs = batch if isinstance(batch, dict) else batch[:-1]
    report = check_resizing(model, inputs, limit=4)
    result.resized = f"{report.resized} of {report.tried}, {report.masks} masks, {report.backward} backward"
    result.refused = [f"{group}: {reason}" for group, reason in report.refused.items()]
    result.resizing = "; ".join(f"{group}: {problem}" for group, problem in report.wrong.items()) or OK
    judged = [result.resizing, *(getattr(f, o) for f in (result.forward, result.joint) for o in _ORACLES)]
    faults = [*result.forward.contradictions, *result.joint.contradictions]
    result.result = WRONG if faults or any(verdict != OK for verdict in judged) else OK
    return result


_ORACLES = ("permutation", "sensitivity", "batch")


def _graph(name: str, kind: str, graphs: Path | None, capture: Callable[[], TrainingGraph]) -> TrainingGraph:
    """A captured graph, from or into the folder of graphs where there is one."""
    path = graphs / kind / f"{name}.graph" if graphs is not None else None
    if path is not None and path.exists():
        return TrainingGraph.load(path)
    graph = capture()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        graph.save(path)
    return graph


def _describe(found: Found, axes: Axes) -> None:
    found.groups, found.free = len(axes.groups()), sum(g.free for g in axes.groups())
    found.contradictions, found.unknown = list(axes.contradictions), [u.operator for u in axes.unknown]
    sizes, fixed = 0, 0.0
    for node in axes.graph.input_nodes(InputKind.PARAMETER).values():
        size = prod(node.meta["val"].shape)
        sizes += size
        fixed += size * frozen(axes.of(node))[0]
    found.fixed = round(fixed / max(1, sizes), 4)


def _permuted(found: Found, axes: Axes, model: torch.nn.Module, batch: Any) -> None:
    from tests.axes_oracles import PermutationOracle, wide

    recurrent = any("mkldnn_rnn" in str(n.target) for n in axes.graph.nodes)  # oneDNN's layer has no float64
    oracle = PermutationOracle(axes, wide(model), batch, dtype=torch.float32 if recurrent else torch.float64)
    free = [g for g in axes.groups() if g.free]
    wrong = oracle.violations(free)
    found.permutation = "; ".join(f"{name}: {what}" for name, what in wrong.items()) or OK
    several = [g for g in free if len(g.places) > 1]
    missed = oracle.insensitive([g for g in several if len(g.places) < 8][:2])
    found.sensitivity = "; ".join(f"{group} at {place.name}[{place.dim}]" for group, place in missed) or OK


def _at_another_batch(
    graph: TrainingGraph, capture: Callable[..., TrainingGraph], case: zoo.Case, model: torch.nn.Module
) -> str:
    """Compare with a fresh capture at another batch size, where the graph holds there."""
    from tests.axes_oracles_models import wrong_at

    if not graph.symbols.admits({"batch": OTHER_SIZE}):
        return OK
    batch = case.batch(OTHER_SIZE)
    return wrong_at(graph, capture(model, batch, loss=case.loss or "model"), model, batch) or OK


# -- reports --------------------------------------------------------------------------------------------------------


def check_all(names: Sequence[str], graphs: Path | None, jobs: int, known: dict[str, dict[str, Any]]) -> None:
    """Check these architectures in processes of their own; each result is saved at once."""
    machine = machine_description()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    pool = multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=4)
    with pool, Progress(*columns) as progress:
        task = progress.add_task("axes", total=len(names))
        for checked in pool.imap_unordered(partial(check, graphs=graphs), names):
            known[checked.name] = asdict(checked)
            ordered = [known[c.name] for c in zoo.CASES if c.name in known]
            write_json(CHECKED, {"machine": machine, "results": ordered})
            text = (
                f"{checked.result}  {checked.name}  {checked.seconds} s  {checked.note if checked.result != OK else ''}"
            )
            progress.print(text, markup=False, highlight=False)
            progress.advance(task)


def column(row: dict[str, Any] | None) -> str:
    """What docs/models.md says of an architecture's axes: ``31 of 38 free, 2 % fixed``."""
    if row is None or row["result"] == FALLBACK:
        return "-"
    if row["result"] != OK:
        return row["result"]
    forward = row["forward"]
    unknown = f", no rule for {', '.join(forward['unknown'])}" if forward["unknown"] else ""
    return f"{forward['free']} of {forward['groups']} free, {forward['fixed']:.1%} fixed{unknown}"


def load() -> dict[str, dict[str, Any]]:
    """The results of the last check by name, none if there was none."""
    return {row["name"]: row for row in json.loads(CHECKED.read_text())["results"]} if CHECKED.exists() else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.axes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="run the oracles over the zoo instead")
    parser.add_argument("--only", metavar="PATTERN", nargs="+", help="names to check, such as 'resnet*'")
    parser.add_argument("--resume", action="store_true", help="keep the results of an interrupted run")
    parser.add_argument("--graphs", type=Path, metavar="DIR", help="a folder of captured graphs to keep and reuse")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)d)")
    options = parser.parse_args(arguments)
    if not options.check:
        torch.set_num_threads(1)
        rows = speed()
        write_json(SPEED, {"machine": machine_description(), "results": [asdict(r) for r in rows]})
        print_table(rows, title="milliseconds of an analysis with its groups")
        return 1 if any(r.ms_per_1000 > BAR for r in rows if r.nodes >= 1_000) else 0
    known = load() if options.only or options.resume else {}
    names = [c.name for c in zoo.CASES if any(fnmatch(c.name, p) for p in options.only or "*")]
    if not names:
        parser.error(f"no case matches {options.only!r}")
    check_all([n for n in names if not (options.resume and n in known)], options.graphs, options.jobs, known)
    wrong = [known[n] for n in names if known[n]["result"] == WRONG]
    counts = [{"result": r, "models": sum(known[n]["result"] == r for n in names)} for r in (OK, FALLBACK, WRONG)]
    print_table(counts, title="axes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
