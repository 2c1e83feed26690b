"""Reach: every architecture of the zoo, stepped three times by `graphopt.optimize` and by eager, compared bit for bit.

    python -m benchmarks.reach                    # all, writes docs/models.md and benchmarks/results/reach.json
    python -m benchmarks.reach --resume           # go on after an interruption
    python -m benchmarks.reach --only 'resnet*'   # these; their rows are put in the place of the old ones
    python -m benchmarks.reach --fast             # the cheapest dozen, one of each modality at least; writes nothing

Both sides start from the same seed and see the same batches of sizes 4, 4 and 3. Compared are the losses, all
parameters, buffers and optimizer state, and the state of the random generator afterwards. The results:

- ``equal``: the same bits everywhere, all three steps by the flat graph;
- ``close``: not the same bits, but no further from a float64 run than eager itself (by how much it differs is told);
- ``eager fallback``: some or all steps were not captured, the reason is told;
- ``WRONG``: anything else, exceptions and time-outs included. Then the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import graphopt
from benchmarks import axes, zoo
from benchmarks.measure import machine_description, print_table, write_json
from graphopt.verify import Values, disagreement

__all__ = ["FAST", "Reached", "reach"]

ROOT = Path(__file__).resolve().parent.parent
JSON = ROOT / "benchmarks" / "results" / "reach.json"
PAGE = ROOT / "docs" / "models.md"

SIZES = (4, 4, 3)
SEED = 0
EQUAL, CLOSE, FALLBACK, WRONG = "equal", "close", "eager fallback", "WRONG"

FAST = (
    "mlp", "embedding_mlp", "wide_and_deep", "text_cnn", "tied_lm", "lstm_forecaster", "temporal_conv", "digits_cnn",
    "waveform_cnn", "spectrogram_cnn", "gan_discriminator", "gpt2",
)  # fmt: skip
"""Cheap cases, at least one of each modality."""


@dataclass(frozen=True)
class Reached:
    """How far one architecture came. Counts are those of the whole step at batch size 4; pairs: captured, optimised."""

    name: str
    family: str
    modality: str
    result: str
    note: str = ""
    optimizer: str = ""
    parameters: int = 0
    operators: tuple[int, int] | None = None
    flops: tuple[int, int] | None = None
    bytes_kept: tuple[int, int] | None = None
    captures: int = 0
    capture_seconds: float | None = None
    seconds: float = 0.0


# -- one case -------------------------------------------------------------------------------------------------------


def reach(case: zoo.Case) -> Reached:
    """Step ``case`` by eager and by `graphopt.optimize` and compare."""
    start = perf_counter()
    given = case.name, case.family, case.modality
    eager = _Run(case)
    for i, batch in enumerate(eager.batches):
        _seed(SEED + 1 + i)
        eager.losses.append(eager.step(batch))
    eager.finish()

    ours = _Run(case)
    step = graphopt.optimize(
        ours.model, _example(ours.batches[0]), loss=case.loss, optimizer=ours.optimizer, schemes="flat"
    )
    plans = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", graphopt.GraphoptWarning)  # the plan says the same
        for i, batch in enumerate(ours.batches):
            _seed(SEED + 1 + i)
            ours.losses.append(step(batch) if isinstance(batch, dict) else step(*batch))
            plans.append(step.plan)
    ours.finish()

    result, note = _judge(case, eager, ours, plans)
    facts = plans[0].facts
    made = dict.fromkeys(p.facts.capture_seconds for p in plans if p.facts)  # two captures never take the same time
    reached = Reached(
        *given, result, note or case.note, optimizer=type(ours.optimizer).__name__,
        parameters=sum(p.numel() for p in ours.model.parameters()), captures=len(made),
        capture_seconds=sum(made) if made else None, seconds=perf_counter() - start,
    )  # fmt: skip
    if facts is None:
        return reached
    return replace(reached, operators=facts.operators, flops=facts.flops, bytes_kept=facts.bytes_kept)


class _Run:
    """A model from the seed with its optimizer and batches, and what its steps gave."""

    def __init__(self, case: zoo.Case, dtype: torch.dtype | None = None):
        self.case = case
        _seed(SEED)
        self.model = case.build()
        self.batches = [case.batch(size) for size in SIZES]
        if dtype is not None:
            self.model = self.model.to(dtype)
            self.batches = [_cast(batch, dtype) for batch in self.batches]
        self.optimizer = _optimizer(case, self.model)
        self.losses: list[Tensor] = []
        self.random_state: Tensor | None = None

    def step(self, batch: Any) -> Tensor:
        """One step of eager."""
        loss = self.case.compute_loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def finish(self) -> None:
        """Note the random state after the last step."""
        self.random_state = torch.get_rng_state()

    def values(self) -> dict[str, Tensor]:
        """Everything a step may change, by name."""
        values = {f"loss of step {i}": loss for i, loss in enumerate(self.losses)}
        parameters = dict(self.model.named_parameters())
        values |= {f"parameter {n}": p.detach() for n, p in parameters.items()}
        values |= {f"buffer {n}": b for n, b in self.model.named_buffers()}
        for name, parameter in parameters.items():
            for field, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    values[f"{field} of {name}"] = value
        return values


def _judge(case: zoo.Case, eager: _Run, ours: _Run, plans: Sequence[graphopt.Plan]) -> tuple[str, str]:
    """The result of a case and what there is to say about it."""
    wanted, got = eager.values(), ours.values()
    if set(wanted) != set(got):
        return WRONG, f"only one side has {', '.join(sorted(set(wanted) ^ set(got))[:3])}"
    differing = [name for name in wanted if not _same_bits(wanted[name], got[name])]
    fallback = next((p for p in plans if p.chosen == "eager"), None)
    assert eager.random_state is not None and ours.random_state is not None
    if not torch.equal(eager.random_state, ours.random_state):
        return WRONG, "other random numbers were drawn"
    if not differing:
        if fallback is None:
            return EQUAL, ""
        steps = sum(p.chosen == "eager" for p in plans)
        return FALLBACK, f"{steps} of {len(plans)} steps: {fallback.candidate('flat').why_not}"
    try:
        exact = _Run(case, torch.float64)
        for i, batch in enumerate(exact.batches):
            _seed(SEED + 1 + i)
            exact.losses.append(exact.step(batch))
        truth = Values(exact.values())
    except (RuntimeError, TypeError):  # a model that fixes a dtype in its code has no float64 form
        truth = None
    where = f"{len(differing)} of {len(wanted)} tensors differ, {differing[0]} first"
    if found := disagreement(Values(got), Values(wanted), truth):
        return WRONG, f"{found}; {where}"
    worst = max(_relative(got[name], wanted[name]) for name in differing)
    return CLOSE, f"{where}; by at most {worst:.1e} of the largest value of a tensor"


def _optimizer(case: zoo.Case, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum for images and sound, AdamW for the rest."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if case.modality in ("image", "audio"):
        return torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-4)
    return torch.optim.AdamW(trained, lr=1e-3)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _example(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, dict) else tuple(batch)


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    if isinstance(batch, dict):
        return {key: cast(tensor) for key, tensor in batch.items()}
    return tuple(cast(tensor) for tensor in batch)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return not a.numel() or torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _relative(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value."""
    if not a.is_floating_point():
        return float("inf")
    scale = float(b.abs().max()) or 1.0
    return float((a.double() - b.double()).abs().max()) / scale


# -- many cases -----------------------------------------------------------------------------------------------------


def _work(names: Connection) -> None:
    """A worker: receives names of cases, sends what became of them."""
    torch.set_num_threads(1)
    while name := names.recv():
        case = zoo.case(name)
        try:
            names.send(reach(case))
        except Exception as error:  # whatever a case raises is a finding
            text = " ".join(f"{type(error).__name__}: {error}".split())
            names.send(Reached(case.name, case.family, case.modality, WRONG, text[:300]))


class _Worker:
    """A process that runs one case after the other, replaced when it dies or takes too long."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Connection | None = None

    def run(self, case: zoo.Case, limit: float) -> Reached:
        """`reach` in the process, ended after ``limit`` seconds."""
        if self._process is None:
            self._pipe, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_work, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        assert self._pipe is not None
        try:
            self._pipe.send(case.name)
            if self._pipe.poll(limit):
                return self._pipe.recv()
            why = f"no result within {limit:.0f} s"
        except EOFError:
            self._process.join()
            why = f"the process died with exit code {self._process.exitcode}"
        self.close()
        return Reached(case.name, case.family, case.modality, WRONG, why)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def run_all(cases: Sequence[zoo.Case], *, limit: float, report: Callable[[Reached], None]) -> Iterator[Reached]:
    """Reach each case in a process of its own kind, with a progress bar; ``report`` sees each result at once."""
    console = Console()
    worker = _Worker()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("reach", total=len(cases))
            for case in cases:
                progress.update(task, description=f"{case.name:24}")
                reached = worker.run(case, limit)
                report(reached)
                if reached.result != EQUAL or not console.is_terminal:
                    style = {WRONG: "bold red", EQUAL: "green"}.get(reached.result, "yellow")
                    text = f"[{style}]{reached.result}[/]  {reached.name}  {reached.seconds:.1f} s  "
                    progress.print(text, end="")
                    progress.print(reached.note, markup=False, highlight=False)
                progress.advance(task)
                yield reached
    finally:
        worker.close()


# -- reports --------------------------------------------------------------------------------------------------------


_PAGE_TOP = """\
# Models

Written by `make reach` (`benchmarks/reach.py`); do not edit.

{number} architectures, small but real, with random weights, in train mode with an optimizer. Each was stepped at batch
sizes {sizes} by `graphopt.optimize(schemes="flat")` and by eager from the same seed. Compared are losses, parameters,
buffers, optimizer state and the state of the random generator.

Result: **{result}** (torch {torch}, {system}, one thread).

- **equal**: the same bits everywhere, all three steps by the captured graph.
- **close**: other bits, but no further from a float64 run than eager itself.
- **eager fallback**: not captured; some or all steps ran in eager mode, and the plan says why.

Operators, FLOPs and bytes are those of the whole step at batch size 4. Where two numbers stand, the first is the graph
as captured (what eager does), the second after the passes. FLOPs follow the conventions of torch's counter, which
counts the weight gradient of a grouped convolution as if it had one group. Bytes kept are those from forward to
backward. Capture seconds include the passes. Two captures: the graph holds for one batch size only.

Axes (`python -m benchmarks.axes --check`): how many of the groups of coupled dimensions in the forward graph are free
to be permuted and shrunk, and the share of the parameters that none of these reaches. A dash: not captured, or not
checked.
"""


_COLUMNS = (
    "model", "modality", "parameters", "optimizer", "operators", "MFLOPs", "KiB kept", "captures", "capture s",
    "axes", "result",
)  # fmt: skip


def page(results: Sequence[Reached], machine: dict[str, Any]) -> str:
    """`docs/models.md`."""
    counts, analysed = Counter(r.result for r in results), axes.load()
    lines = [
        _PAGE_TOP.format(
            number=len(results), sizes=", ".join(map(str, SIZES)), torch=machine["torch"], system=machine["system"],
            result=", ".join(f"{count} {name}" for name, count in counts.most_common()),
        )
    ]  # fmt: skip
    for family in dict.fromkeys(r.family for r in results):
        lines += [
            f"## {'Written here, with torch alone' if family == 'torch' else family}",
            "",
            f"| {' | '.join(_COLUMNS)} |",
            "|---|---|---:|---|---:|---:|---:|---:|---:|---|---|",
        ]
        lines += [_row(r, axes.column(analysed.get(r.name))) for r in results if r.family == family]
        lines.append("")
    return "\n".join(lines)


def _row(r: Reached, its_axes: str) -> str:
    cells = [
        r.name, r.modality, f"{r.parameters:,}", r.optimizer, _pair(r.operators), _pair(r.flops, 1e6),
        _pair(r.bytes_kept, 1024), str(r.captures or "-"), f"{r.capture_seconds:.1f}" if r.capture_seconds else "-",
        its_axes, r.result + (f": {r.note}" if r.note else ""),
    ]  # fmt: skip
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _pair(values: Sequence[int] | None, unit: float = 1) -> str:
    if values is None:
        return "-"
    shown = [f"{v / unit:,.0f}" if unit == 1 or v >= 10 * unit else f"{v / unit:,.2f}" for v in values]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} → {shown[1]}"


def _load(path: Path) -> list[Reached]:
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    pairs = ("operators", "flops", "bytes_kept")
    return [Reached(**{k: tuple(v) if k in pairs and v else v for k, v in row.items()}) for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reach", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="PATTERN", nargs="+", help="names to run, such as 'resnet*'")
    parser.add_argument("--fast", action="store_true", help="the cheapest dozen; nothing is written")
    parser.add_argument("--resume", action="store_true", help="keep the results of an interrupted run")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds a case may take (%(default).0f)")
    options = parser.parse_args(arguments)

    cases = [
        c
        for c in zoo.CASES
        if any(fnmatch(c.name, p) for p in options.only or "*") and (not options.fast or c.name in FAST)
    ]
    if not cases:
        parser.error(f"no case matches {options.only!r}")
    known = {r.name: r for r in _load(JSON)} if options.only or options.resume else {}
    torch.set_num_threads(1)  # as the workers: the description below shall be theirs
    machine = machine_description()

    def save(reached: Reached) -> None:
        known[reached.name] = reached
        if not options.fast:
            ordered = [known[c.name] for c in zoo.CASES if c.name in known]
            write_json(JSON, {"machine": machine, "sizes": SIZES, "results": [asdict(r) for r in ordered]})

    left = [c for c in cases if options.only or c.name not in known]
    for _ in run_all(left, limit=options.limit, report=save):
        pass
    results = [known[c.name] for c in cases]
    everything = [known[c.name] for c in zoo.CASES if c.name in known]
    if len(everything) == len(zoo.CASES) and not options.fast:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(everything, machine))
    counts = Counter(r.result for r in results)
    print_table([{"result": name, "models": count} for name, count in counts.most_common()], title="reach")
    return 1 if counts[WRONG] else 0


if __name__ == "__main__":
    sys.exit(main())
