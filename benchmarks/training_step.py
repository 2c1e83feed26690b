"""Time of a training step: eager, `torch.compile` and `graphopt.optimize`, interleaved in one process.

    python -m benchmarks.training_step            # everything; writes results/training_step_<machine>.json
    python -m benchmarks.training_step --quick    # two models, one batch size, few rounds, without compilers
    python -m benchmarks.training_step --models resnet18 gpt2 --batches 8 --threads 1

The candidates, each with a model and an optimizer of its own:

- ``eager``: forward, loss, ``backward()``, ``optimizer.step()`` of the default implementation; the baseline;
- ``eager fused``: with ``fused=True``;
- ``compile``, ``compile fused``: ``torch.compile(model)``, the rest in eager, as a user writes it;
- ``flat``, ``flat fused``: ``graphopt.optimize(schemes="flat")``, no compilation;
- ``inductor fused``: ``graphopt.optimize(schemes="inductor")``.

FLOPs are exact: for eager those of the captured graph, which are eager's operators (what torch's counter sees stands
beside them in the JSON; it does not know oneDNN's LSTM), for ours those of the graph that runs; both by the
conventions of torch's counter, to which a grouped convolution's weight gradient has one group. Bytes kept are those
from forward to backward, peak bytes the most that one step allocates at once. Seconds to the first step hold capture
and compilation, with empty caches. A last part is host overhead: the MLP at batch 1 on one thread.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.flop_counter import FlopCounterMode

import graphopt
from benchmarks import measure, zoo
from benchmarks.zoo._case import CLASSES, image_batch
from benchmarks.zoo._torchvision import define_missing_operators
from graphopt.graph.lowering import lower
from graphopt.graph.sizes import expression
from graphopt.graph.storages import kept_for_backward
from graphopt.passes import Pipeline
from graphopt.step import PASSES

RESULTS = Path(__file__).resolve().parent / "results"
BATCHES = (1, 8, 32)
EAGER, COMPILE, FLAT, INDUCTOR = "eager", "compile", "flat", "inductor"


# -- what is trained ------------------------------------------------------------------------------------------------


def _sgd(parameters: Any, **options: Any) -> Optimizer:
    return SGD(parameters, lr=1e-3, momentum=0.9, **options)


def _adamw(parameters: Any, **options: Any) -> Optimizer:
    return AdamW(parameters, lr=1e-4, **options)


@dataclass(frozen=True)
class Workload:
    """A model, its batches and its optimizer. ``trained``: the parameters that the optimizer gets (all by default)."""

    name: str
    what: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss: Callable[..., Tensor] | None
    optimizer: Callable[..., Optimizer]
    trained: Callable[[nn.Module], Any] = nn.Module.parameters

    def make(self, **options: Any) -> tuple[nn.Module, Optimizer]:
        """A model from the seed and an optimizer with ``options``."""
        torch.manual_seed(0)
        model = self.build().train()
        return model, self.optimizer(list(self.trained(model)), **options)


def _torchvision(name: str) -> nn.Module:
    define_missing_operators()
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES)


def _vit_tiny() -> nn.Module:
    define_missing_operators()
    import timm

    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=CLASSES, img_size=64)


def _gpt2() -> nn.Module:
    define_missing_operators()
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=1024, n_positions=64, n_embd=256, n_layer=4, n_head=4, use_cache=False, bos_token_id=0,
        eos_token_id=0, loss_type="ForCausalLM",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _words(n: int) -> dict[str, Tensor]:
    words = torch.randint(1024, (n, 64))
    return {"input_ids": words, "labels": words.clone()}


_IMAGES = image_batch(64)
_mlp, _lstm = zoo.case("mlp"), zoo.case("lstm_classifier")

WORKLOADS: tuple[Workload, ...] = (
    Workload("mlp", "three linear layers, 512 wide", _mlp.build, _mlp.batch, _mlp.loss, _adamw),
    Workload("resnet18", "torchvision, 64 x 64", partial(_torchvision, "resnet18"), _IMAGES, F.cross_entropy, _sgd),
    Workload(
        "resnet18_head", "as resnet18, but the optimizer owns the last layer only; nothing is frozen by hand",
        partial(_torchvision, "resnet18"), _IMAGES, F.cross_entropy, _sgd, lambda model: model.fc.parameters(),
    ),
    Workload(
        "mobilenet_v2", "torchvision, 64 x 64", partial(_torchvision, "mobilenet_v2"), _IMAGES, F.cross_entropy, _sgd
    ),
    Workload("vit_tiny", "timm, 12 layers, 64 x 64", _vit_tiny, _IMAGES, F.cross_entropy, _adamw),
    Workload("gpt2", "transformers, 4 layers, 256 wide, 64 tokens, dropout", _gpt2, _words, None, _adamw),
    Workload("lstm", "two directions, 64 wide, 12 tokens", _lstm.build, _lstm.batch, _lstm.loss, _adamw),
)  # fmt: skip


# -- candidates -----------------------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """One way to run a step: the call, the seconds until it had run once, and exact figures where there are some."""

    step: Callable[[], Any]
    first_seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


def _eager(work: Workload, batch: Any, **options: Any) -> Candidate:
    model, optimizer = work.make(**options)
    step = partial(_call, measure.eager_step(model, optimizer, work.loss), batch)
    with FlopCounterMode(display=False) as counter:
        seconds = _seconds(step)
    kept = measure.bytes_kept_by_eager(partial(_loss, work, model, batch), _given(model, batch))
    return Candidate(step, seconds, {"flops_counter": counter.get_total_flops(), "bytes_kept": kept})


def _compiled(work: Workload, batch: Any) -> dict[str, Candidate]:
    """Two steps over one compiled model, which differ in the optimizer."""
    torch.compiler.reset()
    model, optimizer = work.make()
    compiled = torch.compile(model)
    step = partial(_call, measure.eager_step(compiled, optimizer, work.loss), batch)
    seconds = _seconds(step)
    kept = measure.bytes_kept_by_compile(partial(_loss, work, compiled, batch), _given(model, batch))
    fused = work.optimizer(list(work.trained(model)), fused=True)
    fused_step = partial(_call, measure.eager_step(compiled, fused, work.loss), batch)
    figures = {"bytes_kept": kept}
    return {COMPILE: Candidate(step, seconds, figures), f"{COMPILE} fused": Candidate(fused_step, seconds, figures)}


def _ours(work: Workload, batch: Any, scheme: str, **options: Any) -> Candidate:
    model, optimizer = work.make(**options)
    training = graphopt.optimize(model, batch, loss=work.loss, optimizer=optimizer, schemes=scheme)
    step = partial(_call, training, batch)
    seconds = _seconds(step)
    plan = training.plan
    if plan.chosen != scheme or plan.facts is None:
        raise graphopt.CaptureError(plan.candidate(scheme).why_not or plan.reason)
    figures = {
        "flops": plan.facts.flops[1],
        "flops_captured": plan.facts.flops[0],
        "capture_seconds": plan.facts.capture_seconds,
        "operators": plan.facts.operators[1],
    }
    if scheme == FLAT:  # Inductor sees forward and backward as one and decides by itself what to recompute
        figures["bytes_kept"] = _bytes_kept(plan)
    return Candidate(step, seconds, figures)


EVERY = (EAGER, f"{EAGER} fused", FLAT, f"{FLAT} fused", COMPILE, f"{INDUCTOR} fused")
"""What `candidates` makes; ``compile`` makes ``compile fused`` besides."""


def candidates(
    work: Workload, batch: Any, say: Callable[[str], None], names: Iterable[str] = EVERY
) -> dict[str, Candidate]:
    """Candidates for one batch, each stepped once. What cannot run is left out, with a line that says why."""
    made: dict[str, Candidate] = {}
    makers: dict[str, Callable[[], Any]] = {
        EAGER: lambda: _eager(work, batch),
        f"{EAGER} fused": lambda: _eager(work, batch, fused=True),
        FLAT: lambda: _ours(work, batch, FLAT),
        f"{FLAT} fused": lambda: _ours(work, batch, FLAT, fused=True),
        COMPILE: lambda: _compiled(work, batch),
        f"{INDUCTOR} fused": lambda: _ours(work, batch, INDUCTOR, fused=True),
    }
    for name in names:
        say(f"{work.name}: {'compiling for' if name.startswith((COMPILE, INDUCTOR)) else 'preparing'} {name} ...")
        try:
            found = makers[name]()
            made |= found if isinstance(found, dict) else {name: found}
        except Exception as error:  # a compiler's failure is a result too
            first_line = str(error).strip().partition("\n")[0]
            say(f"{work.name}: no {name}: {type(error).__name__}: {first_line}")
    return made


def _bytes_kept(plan: graphopt.Plan) -> int | None:
    """Bytes kept by the graph that runs; None where torch does not tell the size of one of its storages (the workspace
    of oneDNN's LSTM is of size 0 in a trace)."""
    assert plan.facts is not None and plan.passes is not None
    sizes = [expression(storage.nbytes) for storage in kept_for_backward(plan.passes.graph)]
    return None if 0 in sizes else plan.facts.bytes_kept[1]


def _call(step: Callable[..., Any], batch: Any) -> Any:
    return step(batch) if isinstance(batch, dict) else step(*batch)


def _loss(work: Workload, model: Any, batch: Any) -> Tensor:
    if work.loss is None:
        return model(**batch).loss
    return work.loss(model(*batch[:-1]), batch[-1])


def _given(model: nn.Module, batch: Any) -> list[Tensor]:
    """What is there without a step: parameters, buffers and the batch."""
    return [*model.parameters(), *model.buffers(), *(batch.values() if isinstance(batch, dict) else batch)]


def _seconds(step: Callable[[], Any]) -> float:
    start = perf_counter()
    step()
    return perf_counter() - start


# -- measuring ------------------------------------------------------------------------------------------------------


def run(
    work: Workload, size: int, *, compilers: bool, rounds: int, budget: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row a candidate for one model and batch size. At most ``rounds`` rounds or about ``budget`` seconds."""
    torch.manual_seed(1)
    batch = work.batch(size)
    made = candidates(work, batch, say, EVERY if compilers else EVERY[:4])
    slowest = _seconds(made[EAGER].step)
    rounds = max(5, min(rounds, int(budget / (slowest * len(made)))))
    say(f"{work.name}: batch {size}: timing {len(made)} candidates in {rounds} rounds")
    return [{"model": work.name, "batch": size, **row} for row in measured(made, rounds)]


def measured(made: Mapping[str, Candidate], rounds: int) -> list[dict[str, Any]]:
    """Candidates timed in turn: one row each."""
    timings = measure.interleaved({name: c.step for name, c in made.items()}, rounds=rounds, baseline=EAGER)
    captured = next((c.figures["flops_captured"] for c in made.values() if "flops_captured" in c.figures), None)
    rows = []
    for timing in timings:
        candidate = made[timing.name]
        rows.append(
            {
                **timing.summary(),
                "first_seconds": candidate.first_seconds,
                "peak_bytes": measure.peak_bytes(candidate.step),
                "flops": captured if timing.name.startswith(EAGER) else None,
                "bytes_kept": None,
                **candidate.figures,
            }
        )
    return rows


def host_overhead(rounds: int) -> list[dict[str, Any]]:
    """The MLP at batch 1, where the processor waits for Python: forward and backward alone, and the whole step."""
    work = WORKLOADS[0]
    torch.manual_seed(1)
    batch = work.batch(1)
    inputs, target = batch

    eager, _ = work.make()

    def eager_gradients() -> None:
        for parameter in eager.parameters():
            parameter.grad = None
        F.cross_entropy(eager(inputs), target).backward()

    model, _ = work.make()
    graph = Pipeline(PASSES)(graphopt.capture(model, batch, loss=F.cross_entropy)).graph
    lowered = lower(graph)
    arguments = [*model.parameters(), *batch]

    def flat_gradients() -> None:
        with torch.no_grad():
            lowered.run(*arguments)

    module = graphopt.optimize(work.make()[0], inputs)

    def drop_in() -> None:
        for parameter in module.parameters():
            parameter.grad = None
        F.cross_entropy(module(inputs), target).backward()

    gradients = {"eager": eager_gradients, "flat graph": flat_gradients, "drop-in module": drop_in}
    steps = {
        "eager fused": _eager(work, batch, fused=True).step,
        "flat fused": _ours(work, batch, FLAT, fused=True).step,
        "eager": _eager(work, batch).step,
        "flat": _ours(work, batch, FLAT).step,
    }
    rows = []
    for part, group in (("forward and backward", gradients), ("whole step", steps)):
        for timing in measure.interleaved(group, rounds=rounds, warmup=20):
            rows.append({"part": part, **timing.summary(), "baseline": timing.baseline, "ratio": timing.ratio})
    return rows


# -- the command ----------------------------------------------------------------------------------------------------

_SHOWN = ("name", "seconds", "quartiles", "ratio to eager", "ratio quartiles", "first_seconds", "flops", "bytes_kept",
          "peak_bytes")  # fmt: skip


def _show(rows: Sequence[Mapping[str, Any]], title: str, console: Console) -> None:
    measure.print_table([{key: row.get(key) for key in _SHOWN} for row in rows], title=title, console=console)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    names = [work.name for work in WORKLOADS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step")
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing for one table, about")
    parser.add_argument("--no-compilers", action="store_true", help="without torch.compile and Inductor")
    parser.add_argument("--overhead-only", action="store_true", help="the host-overhead case alone")
    parser.add_argument("--quick", action="store_true", help="a minute: two models, batch 8, no compilers")
    parser.add_argument(
        "--output", type=Path, help="the JSON to write (benchmarks/results/training_step_<machine>.json)"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.batches, options.rounds, options.no_compilers = ["mlp", "resnet18"], [8], 5, True
    console = Console(width=max(Console().width, 150))
    warnings.simplefilter("ignore", graphopt.GraphoptWarning)
    torch.set_num_threads(options.threads)
    machine = measure.machine_description()
    output = options.output or RESULTS / f"training_step_{machine_name(machine)}.json"
    caches = tempfile.TemporaryDirectory(prefix="graphopt-bench-")  # empty: compile seconds are those of a first run
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches.name
    rows: list[dict[str, Any]] = []
    if not options.overhead_only:
        for work in (work for work in WORKLOADS if work.name in options.models):
            for size in options.batches:
                with console.status("") as status:
                    some = run(
                        work, size, compilers=not options.no_compilers, rounds=options.rounds, budget=options.budget,
                        say=lambda text: _say(console, status, text),
                    )  # fmt: skip
                _show(some, f"{work.name} ({work.what}), batch {size}", console)
                rows += some
    torch.set_num_threads(1)
    overhead = host_overhead(max(options.rounds, 20))
    for part in dict.fromkeys(row["part"] for row in overhead):
        shown = [
            {k: v for k, v in row.items() if k not in ("part", "ratio")} for row in overhead if row["part"] == part
        ]
        measure.print_table(shown, title=f"host overhead, MLP at batch 1, one thread: {part}", console=console)
    complete = not (options.quick or options.overhead_only)
    if complete or options.output:
        measure.write_json(output, {"machine": machine, "steps": rows, "host_overhead": overhead})
        console.print(f"written: {output}")
    return 0


def _say(console: Console, status: Any, text: str) -> None:
    """What is being done now; kept in a log, where nobody would see it pass."""
    if console.is_terminal:
        status.update(text)
    else:
        console.print(text, markup=False, highlight=False)


def machine_name(machine: Mapping[str, Any]) -> str:
    """A file name's part for a machine: processor (and GPU) and threads."""
    words = f"{machine['gpu'] or machine['cpu'].replace('(R)', '').partition('@')[0]} {machine['threads']} threads"
    return "-".join("".join(c if c.isalnum() else " " for c in words.lower()).split())


if __name__ == "__main__":
    sys.exit(main())
