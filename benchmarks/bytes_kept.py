"""Bytes kept from forward to backward: eager, `torch.compile`, and graphopt with and without bit-packed masks.

    python -m benchmarks.bytes_kept            # writes benchmarks/results/bytes_kept.json
    python -m benchmarks.bytes_kept --quick    # small images and texts, no torch.compile
    python -m benchmarks.bytes_kept --models frozen_stack --no-seconds

Partly frozen models, where a backward operator needs less than autograd keeps for it. Bytes are exact: distinct
storages that forward makes and backward reads, without parameters, buffers and batch. On the way the gradients of our
graphs are compared with eager's, bit for bit; a difference makes the exit code 1. Forward and backward are also timed:
eager, ours, and ours with packed masks, in turn in this process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import graphopt
from benchmarks import measure
from benchmarks.zoo._case import CLASSES, image_batch
from benchmarks.zoo._torchvision import define_missing_operators
from benchmarks.zoo.lora import add_lora
from graphopt.graph.lowering import Lowered, lower
from graphopt.graph.training_graph import InputKind, OutputKind, TrainingGraph
from graphopt.passes import Pipeline, SelectiveSaving
from graphopt.step import PASSES

JSON = Path(__file__).resolve().parent / "results" / "bytes_kept.json"


@dataclass(frozen=True)
class Subject:
    """A partly frozen model and its batch. ``trained`` says what has gradients."""

    name: str
    trained: str
    build: Callable[[bool], nn.Module]
    batch: Callable[[bool], Any]
    loss: Callable[..., Tensor] | None = F.cross_entropy


# -- models (quick: smaller ones) -----------------------------------------------------------------------------------


def frozen_stack(blocks: int = 16, width: int = 32) -> nn.Module:
    """A trained convolution, then frozen blocks of convolution, batch norm by fixed statistics, and ReLU."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    for _ in range(blocks):
        block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        layers.append(block.requires_grad_(False))
    head = nn.Linear(width, CLASSES).requires_grad_(False)
    return _norms_eval(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head))


def _frozen_convolutions(name: str, quick: bool, *, fields: Sequence[str]) -> nn.Module:
    """A torchvision model of which only these fields of the norms, and the last layer, are trained."""
    define_missing_operators()
    import torchvision

    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for field in fields:
                getattr(module, field).requires_grad_(True)
    next(reversed(list(model.children()))).requires_grad_(True)
    return _norms_eval(model)


def _norms_eval(model: nn.Module) -> nn.Module:
    """Train mode, but batch norms by their fixed statistics, here random ones, as after training."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def _vit_small(quick: bool) -> nn.Module:
    define_missing_operators()
    import timm

    size = {"img_size": 64, "depth": 3} if quick else {}
    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=CLASSES, **size)
    return add_lora(model, ["qkv"], rank=8, trained=["head"]).train()


def _gpt2(quick: bool) -> nn.Module:
    define_missing_operators()
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 512} if quick else {"vocab_size": 8192}
    config = GPT2Config(**size, use_cache=False, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM")
    return add_lora(GPT2LMHeadModel(config), ["c_attn"], rank=8).train()


def _images(quick: bool) -> Any:
    return image_batch(64 if quick else 224)(2 if quick else 8)


def _words(quick: bool) -> dict[str, Tensor]:
    words = torch.randint(512, (2, 32) if quick else (4, 128))
    return {"input_ids": words, "labels": words.clone()}


_AFFINE, _BIASES = ("weight", "bias"), ("bias",)

SUBJECTS: tuple[Subject, ...] = (
    Subject("frozen_stack", "first layer", lambda quick: frozen_stack(), lambda quick: image_batch(32)(8)),
    *(
        Subject(name, f"norm {what}, head", partial(_frozen_convolutions, name, fields=fields), _images)
        for name in ("resnet50", "efficientnet_b0")
        for what, fields in (("weights and biases", _AFFINE), ("biases", _BIASES))
    ),
    Subject("vit_small", "rank 8 adapters of attention, head", _vit_small, _images),
    Subject("gpt2", "rank 8 adapters of attention", _gpt2, _words, None),
)


# -- measuring ------------------------------------------------------------------------------------------------------


def run(subject: Subject, *, quick: bool, compiler: bool, seconds: bool, rounds: int) -> dict[str, Any]:
    """The row of one subject."""
    torch.manual_seed(0)
    model, batch = subject.build(quick), subject.batch(quick)
    given = [*model.parameters(), *model.buffers(), *(batch.values() if isinstance(batch, dict) else batch)]
    loss = partial(_loss, subject, model, batch)
    row: dict[str, Any] = {"model": subject.name, "trained": subject.trained}
    row["eager_bytes"] = measure.bytes_kept_by_eager(loss, given)
    if compiler:
        torch.compiler.reset()
        compiled = torch.compile(model)
        row["compile_bytes"] = measure.bytes_kept_by_compile(partial(_loss, subject, compiled, batch), given)
        torch.compiler.reset()

    captured = graphopt.capture(model, batch, loss=subject.loss or "model")
    row["captured_bytes"] = captured.bytes_kept()
    packing = [SelectiveSaving(pack_masks=True) if isinstance(p, SelectiveSaving) else p for p in PASSES]
    ours, packed = (Pipeline(passes)(captured).graph for passes in (PASSES, packing))
    row["ours_bytes"], row["packed_bytes"] = ours.bytes_kept(), packed.bytes_kept()
    row["eager_to_ours"] = row["eager_bytes"] / row["ours_bytes"]
    row["eager_to_packed"] = row["eager_bytes"] / row["packed_bytes"]
    if compiler:
        row["compile_to_ours"] = row["compile_bytes"] / row["ours_bytes"]

    wanted = _eager_gradients(model, loss)
    flat = {"ours": _Flat(ours, model, batch), "packed": _Flat(packed, model, batch)}
    row["bit_equal"] = all(_equal(one.gradients(), wanted) for one in flat.values())
    if seconds:
        candidates = {"eager": partial(_eager_gradients, model, loss), **flat}
        for timing in measure.interleaved(candidates, rounds=rounds, warmup=1):
            row[f"{timing.name}_seconds"] = timing.seconds
            if timing.name != "eager":
                row[f"{timing.name}_ratio"] = timing.ratio
                row[f"{timing.name}_ratio_quartiles"] = f"{timing.ratio_low:.3f} to {timing.ratio_high:.3f}"
    return row


class _Flat:
    """Forward and backward of a captured graph as a flat function on a model's tensors."""

    def __init__(self, graph: TrainingGraph, model: nn.Module, batch: Any):
        self.lowered: Lowered = lower(graph, in_place=False)
        leaves = list(batch.values()) if isinstance(batch, dict) else list(batch)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        left = iter(leaves)
        self.arguments = [next(left) if i.kind is InputKind.BATCH else tensors[i.name] for i in graph.inputs]

    def __call__(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.lowered.run(*self.arguments)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by the parameter's name, with the seed of `_eager_gradients`."""
        torch.manual_seed(1)
        pairs = zip(self.lowered.outputs, self(), strict=True)
        return {output.name: value for output, value in pairs if output.kind is OutputKind.GRADIENT}


def _loss(subject: Subject, model: Any, batch: Any) -> Tensor:
    if subject.loss is None:
        return model(**batch).loss
    return subject.loss(model(*batch[:-1]), batch[-1])


def _eager_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = None
    loss().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _equal(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return ours.keys() == wanted.keys() and all(_same_bits(ours[name], wanted[name]) for name in wanted)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def _columns(rows: Iterable[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    return [{key: row.get(key) for key in keys} for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    names = list(dict.fromkeys(subject.name for subject in SUBJECTS))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bytes_kept")
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--no-seconds", action="store_true", help="bytes only")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small inputs, no torch.compile, no times")
    parser.add_argument("--output", type=Path, help="the JSON to write (benchmarks/results/bytes_kept.json)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=max(Console().width, 150))
    rows = []
    for subject in (subject for subject in SUBJECTS if subject.name in options.models):
        with console.status(f"{subject.name}, trained: {subject.trained}"):
            rows.append(
                run(
                    subject, quick=options.quick, compiler=not options.quick, rounds=options.rounds,
                    seconds=not (options.quick or options.no_seconds),
                )
            )  # fmt: skip
        console.print(f"measured {subject.name}, trained: {subject.trained}")
    kept = ("model", "trained", "eager_bytes", "compile_bytes", "ours_bytes", "packed_bytes", "eager_to_ours",
            "compile_to_ours", "eager_to_packed", "bit_equal")  # fmt: skip
    measure.print_table(_columns(rows, kept), title="bytes kept for backward", console=console)
    if not (options.quick or options.no_seconds):
        timed = ("model", "trained", "eager_seconds", "ours_seconds", "packed_seconds", "ours_ratio",
                 "ours_ratio_quartiles", "packed_ratio", "packed_ratio_quartiles")  # fmt: skip
        measure.print_table(_columns(rows, timed), title="forward and backward, ratio to eager", console=console)
    if options.output or not (options.quick or set(options.models) != set(names)):
        measure.write_json(options.output or JSON, {"machine": measure.machine_description(), "rows": rows})
    return 0 if all(row["bit_equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
