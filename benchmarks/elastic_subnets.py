"""Subnets as they run: steps of half the width, the emission of graphs, prices against clocks.

The parts ``speed``, ``emit`` and ``prices`` of `benchmarks.elastic`; each gives the rows of a table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import mean, median
from time import perf_counter, process_time
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import digit_supernets
from benchmarks.measure import eager_step, interleaved
from graphopt.cost_model import Machine
from graphopt.elastic import Choice, Kind, Space
from graphopt.elastic import space as make_space
from graphopt.elastic.captures import Captures
from graphopt.elastic.prices import Prices, Training
from graphopt.elastic.sampling import Fixed
from graphopt.elastic.step import ElasticStep

Row = dict[str, Any]


# -- models ---------------------------------------------------------------------------------------------------------


def resnet18() -> tuple[nn.Module, Any]:
    """torchvision's, on 224 x 224."""
    return _torchvision("resnet18"), torch.randn(2, 3, 224, 224)


def resnet50() -> tuple[nn.Module, Any]:
    """torchvision's, on 224 x 224."""
    return _torchvision("resnet50"), torch.randn(2, 3, 224, 224)


def vit_b_16() -> tuple[nn.Module, Any]:
    """torchvision's, 12 layers of width 768, on 224 x 224."""
    return _torchvision("vit_b_16"), torch.randn(2, 3, 224, 224)


def vit_small() -> tuple[nn.Module, Any]:
    """timm's ViT-S/16, 12 layers of width 384, on 224 x 224."""
    import timm

    return timm.create_model("vit_small_patch16_224"), torch.randn(2, 3, 224, 224)


def gpt2() -> tuple[nn.Module, Any]:
    """transformers', 12 layers of width 768, on 64 tokens."""
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
    return model, {"input_ids": torch.randint(1000, (2, 64))}


def _torchvision(name: str) -> nn.Module:
    from benchmarks.zoo._torchvision import define_missing_operators

    define_missing_operators()
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)(weights=None)
    return model


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet18": resnet18, "resnet50": resnet50, "vit_small": vit_small, "vit_b_16": vit_b_16, "gpt2": gpt2,
}  # fmt: skip
"""Models at their real sizes, with random weights, and a batch of two."""

EMITTED = ("resnet50", "vit_b_16", "gpt2")
STEPPED = ("resnet18", "vit_small")


def half(space: Space) -> Choice:
    """Half of every width, of all heads and of the embedding; all layers and whole kernels."""
    halved = {d.name: 0.5 for d in space.dimensions if d.kind in (Kind.WIDTH, Kind.HEADS, Kind.EMBEDDING)}
    return space.choice(halved)


def _images(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


# -- speed ----------------------------------------------------------------------------------------------------------


def speed(names: Sequence[str], batches: Sequence[int], rounds: int) -> list[Row]:
    """Training steps (forward, backward, update) of half the width: how many times as fast as those of the full net.

    ``extracted``: the module of that size by itself. ``rebuilt``: of the model's own class, where there is one.
    ``sliced``: the supernet's slice, `Space.run`, autograd into the shared weights, an update of those. ``elastic
    step``: the same by `ElasticStep`, as supernets are trained. All in eager mode, in turn.
    """
    rows = []
    for name in names:
        torch.manual_seed(0)
        model, example = MODELS[name]()
        optimizer = _adamw if "vit" in name else _sgd
        space = make_space(model.train(), example)
        choice = half(space)
        small = space.extract(choice).train()
        share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
        step = ElasticStep(space, F.cross_entropy, optimizer(model.parameters()), strategy=Fixed([choice]), subnets=1)
        slices = lambda *x: space.run(choice, *x)  # noqa: B023  (called in this round only)
        steps: dict[str, Callable[..., Any]] = {
            "full": eager_step(model, optimizer(model.parameters()), F.cross_entropy),
            "extracted": eager_step(small, optimizer(small.parameters()), F.cross_entropy),
            "sliced": eager_step(slices, optimizer(model.parameters()), F.cross_entropy),
            "elastic step": step,
        }
        for batch in batches:
            x, y = _images(batch)
            ways = {way: _bound(step, x, y) for way, step in steps.items()}
            for timing in interleaved(ways, rounds=rounds, warmup=2):
                rows.append({
                    "model": name, "batch": batch, "step": timing.name, "seconds": timing.seconds,
                    "times as fast": 1 / timing.ratio, "low": 1 / timing.ratio_high, "high": 1 / timing.ratio_low,
                    "parameters": 1.0 if timing.name == "full" else share, "rounds": rounds,
                })  # fmt: skip
    return rows


def _bound(step: Callable[..., Any], *batch: Any) -> Callable[[], Any]:
    return lambda: step(*batch)


# -- emission -------------------------------------------------------------------------------------------------------


def emit(names: Sequence[str]) -> list[Row]:
    """Milliseconds of processor time. ``analysis``: of the space without the captures. ``forward``, ``joint``: to emit
    the graph of a subnet that was not asked for before, medians; ``cached``: of one that was (wall time). The first
    joint graph is traced; with the second, so is the whole net (`graphopt.elastic.joint`). ``new layers``: one
    of a pattern of layers that was not asked for before, the slowest of a few."""
    rows = []
    module = sys.modules[Captures.__module__]
    for name in names:
        torch.manual_seed(0)
        model, batch = MODELS[name]()
        captures: list[float] = []
        real = module.capture_forward_call  # type: ignore[attr-defined]

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = process_time()
            found = real(*args, **kwargs)  # noqa: B023  (called before the next round)
            captures.append(process_time() - start)  # noqa: B023
            return found

        start = process_time()
        with mock.patch.object(module, "capture_forward_call", timed):
            space = make_space(model.eval(), batch)
        total = process_time() - start
        depth = {d.name: d.full for d in space.dimensions if d.kind in (Kind.DEPTH, Kind.KERNEL)}
        choices = [space.choice({**space.sample(seed=seed), **depth}) for seed in range(40)]
        choices = [c for c in choices if 1 not in c.values()][:12]  # a size of 1 is traced by itself
        forward = [_milliseconds(lambda: space.graph(c)) for c in choices]  # noqa: B023
        first, second, *joint = [_milliseconds(lambda: space.graph(c, backward=True)) for c in choices]  # noqa: B023
        depths = [d for d in space.dimensions if d.kind is Kind.DEPTH]
        fewer = [
            space.choice({**c, **{d.name: tuple(i for i in range(d.size) if (i + k) % 4) for d in depths}})
            for k, c in enumerate(choices[:4])
        ]
        layers = [_milliseconds(lambda: space.graph(c, backward=True)) for c in fewer]  # noqa: B023
        begin = perf_counter()
        for c in choices:
            space.graph(c, backward=True)
        cached = (perf_counter() - begin) / len(choices)
        rows.append({
            "model": name, "operators": len(space.primary.graph), "captures": round(1e3 * sum(captures)),
            "analysis": round(1e3 * (total - sum(captures))), "forward": round(median(forward), 1),
            "joint": round(median(joint), 1), "cached": round(1e3 * cached, 2),
            "first joint": round(first), "second joint": round(second),
            "new layers": round(max(layers), 1) if depths else None,
        })  # fmt: skip
    return rows


def _milliseconds(call: Callable[[], Any]) -> float:
    start = process_time()
    call()
    return 1e3 * (process_time() - start)


# -- prices ---------------------------------------------------------------------------------------------------------


def prices(names: Sequence[str], count: int, rounds: int) -> list[Row]:
    """Predicted against measured training steps of ``count`` subnets as extracted modules in eager mode, on one thread.

    ``error``: mean of the predictions as they are. ``corrected``: of predictions that pass through the measured times
    of the full and the smallest net, which `Prices.corrected` makes; those two are not counted. ``tau``: Kendall's, of
    all pairs.
    """
    rows = []
    for name in names:
        space, batch, optimizer = _priced(name)
        training = Training(batch, F.cross_entropy, optimizer(space.model.parameters()))
        table = Prices(space, Machine.current(), mode="eager", batch_size=len(batch[1]), training=training)
        choices = [space.full, space.smallest, *(space.sample(seed=i) for i in range(count - 2))]
        predicted = table.of(choices, "step_seconds").tolist()
        measured = _measured(space, choices, batch, optimizer, rounds)
        ends = dict(zip(choices[:2], measured[:2]))
        corrected = table.corrected("step_seconds", ends).of(choices, "step_seconds").tolist()
        scale = median(m / p for m, p in zip(measured, predicted))
        rows.append({
            "model": name, "batch": len(batch[1]), "subnets": count, "error": _error(predicted, measured),
            "one factor": _error([scale * p for p in predicted], measured),
            "corrected": _error(corrected[2:], measured[2:]), "tau": _tau(predicted, measured),
            "corrected tau": _tau(corrected, measured), "range": max(measured) / min(measured), "rounds": rounds,
            "predicted": predicted, "measured": measured,
        })  # fmt: skip
    return rows


def _priced(name: str) -> tuple[Space, Any, Callable[[Any], torch.optim.Optimizer]]:
    """A space in train mode, a batch with its target, and the optimizer."""
    torch.manual_seed(0)
    if name.startswith("digits "):
        space = digit_supernets.space_of(name.removeprefix("digits "), 0)
        size = digit_supernets.BATCH
        return space, (torch.randn(size, 1, 8, 8), torch.randint(10, (size,))), digit_supernets.adamw
    model, example = MODELS[name]()
    return make_space(model.train(), example), _images(8), _adamw if "vit" in name else _sgd


PRICED = ("resnet18", "vit_small", "digits resnet", "digits vit")


def _measured(
    space: Space, choices: Sequence[Choice], batch: Any, optimizer: Callable[[Any], Any], rounds: int
) -> list[float]:
    """Seconds of a step of each, as processor time of one thread, which other processes disturb least: its ratio to the
    full net next to it, times the full net's median. One subnet at a time is in memory."""
    reference = space.extract(space.full).train()
    whole = _bound(eager_step(reference, optimizer(reference.parameters()), F.cross_entropy), *batch)
    ratios, times = [], []
    for choice in choices:
        net = space.extract(choice).train()
        step = _bound(eager_step(net, optimizer(net.parameters()), F.cross_entropy), *batch)
        step()
        pairs = [(_processor_seconds(step), _processor_seconds(whole)) for _ in range(rounds)]
        ratios.append(median(one / full for one, full in pairs))
        times += [full for _, full in pairs]
    return [ratio * median(times) for ratio in ratios]


def _processor_seconds(step: Callable[[], Any]) -> float:
    """Of one call, by as many as take 20 ms together."""
    calls, start = 0, process_time()
    while not calls or process_time() - start < 0.02:
        step()
        calls += 1
    return (process_time() - start) / calls


def _error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    return mean(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))


def _tau(predicted: Sequence[float], measured: Sequence[float]) -> float:
    pairs = list(combinations(range(len(measured)), 2))
    agree = [(predicted[a] - predicted[b]) * (measured[a] - measured[b]) > 0 for a, b in pairs]
    return 2 * mean(agree) - 1
