"""Regions chosen by price: known ways to divide networks are found again. No clock, no data: models on the meta device,
processors of data sheets."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt import capture
from graphopt.cost_model import Link, Machine, estimate
from graphopt.errors import CostModelError
from graphopt.graph.op_rules import flops
from graphopt.graph.training_graph import Phase
from graphopt.passes import DivideRegions, NoOps
from graphopt.passes._placement import Partial, Replicated, Sharded
from graphopt.passes._strategies import BATCH, Strategies
from graphopt.schemes.region_prices import axes_that_matter
from graphopt.schemes.regions import WORTH, choose_regions
from tests.cost_model.machines import simple

ETHERNET, NVLINK = 12.5e9, 300e9
"""Bytes per second."""


def gpu(bandwidth):
    return replace(Machine.named("A100"), link=Link(1e-5, bandwidth))


class Images(nn.Module):
    """Convolutions and linear layers, as AlexNet and VGG have them."""

    def __init__(self, convolutions, hidden, pooled=6, classes=1000):
        super().__init__()
        self.features, self.classifier, self.pooled = convolutions, nn.Sequential(), pooled
        last = [m.out_channels for m in convolutions if isinstance(m, nn.Conv2d)][-1] * pooled**2
        for width in hidden:
            self.classifier.extend([nn.Dropout(), nn.Linear(last, width), nn.ReLU()])
            last = width
        self.classifier.append(nn.Linear(last, classes))

    def forward(self, x):
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), self.pooled).flatten(1))


def alexnet(hidden=(4096, 4096), pooled=6):
    layers, last = [], 3
    for i, (width, kernel) in enumerate(((64, 11), (192, 5), (384, 3), (256, 3), (256, 3))):
        layers += [nn.Conv2d(last, width, kernel, stride=1 if i else 4, padding=kernel // 2), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2)] if i in (0, 1, 4) else []
        last = width
    return Images(nn.Sequential(*layers), hidden, pooled)


def vgg():
    layers, last = [], 3
    for width in (64, 128, 256, 512):
        layers += [nn.Conv2d(last, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        last = width
    return Images(nn.Sequential(*layers), (4096, 4096))


class GPTBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LlamaBlock(nn.Module):
    """RMS norms, rotary positions, grouped queries, a gated MLP; no biases."""

    def __init__(self, width, heads, groups=4):
        super().__init__()
        self.groups, self.size = groups, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        linear = lambda a, b: nn.Linear(a, b, bias=False)
        self.q, self.k, self.v = linear(width, width), *(linear(width, groups * self.size) for _ in range(2))
        self.out, hidden = linear(width, width), 8 * width // 3 // 64 * 64
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def rotated(self, x):
        angles = torch.arange(x.shape[2], device=x.device)[:, None] * 0.1 ** torch.arange(self.size, device=x.device)
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (m(h).unflatten(-1, (-1, self.size)).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(q.shape[1] // self.groups, 1) for t in (self.rotated(k), v))
        h = F.scaled_dot_product_attention(self.rotated(q), k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    def __init__(self, block, width=1024, heads=16, layers=3, vocabulary=4096):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.tokens(tokens)))).transpose(1, 2)


MODELS = {
    "alexnet": (alexnet, (3, 224, 224)),
    "alexnet without large layers": (lambda: alexnet((), 1), (3, 224, 224)),
    "vgg": (vgg, (3, 96, 96)),
    "gpt": (lambda: Decoder(GPTBlock), 256),
    "llama": (lambda: Decoder(LlamaBlock), 256),
}


@cache
def table(name, size, processors):
    """The strategies of a model captured at a batch size, and the graph that they are of."""
    make, shape = MODELS[name]
    with torch.device("meta"):
        model = make()
        images = isinstance(shape, tuple)
        x = torch.empty(size, *shape) if images else torch.empty(size, shape, dtype=torch.long)
        y = torch.empty(*((size,) if images else x.shape), dtype=torch.long)
    graph = NoOps()(capture(model, (x, y), loss=F.cross_entropy)).graph
    return graph, Strategies(graph, processors, axes_that_matter(graph, processors))


def chosen(name, size, processors, bandwidth, *, captured=None):
    return choose_regions(table(name, captured or size, processors)[1], gpu(bandwidth), size, synchronise="all-reduce")


def axes(regions, module, phase=None):
    """The axes that the products of a module run along."""
    found = (n for n in regions.strategies.graph.nodes if n.name in regions.chosen and flops(n))
    return {
        regions.chosen[n.name].regime
        for n in found
        if str(n.meta.get("module")).startswith(module) and phase in (None, n.meta["phase"])
    }


def lying(regions):
    """The bytes of gradients by how they lie when they leave backward."""
    found = Counter()
    for _, (_, placement), size in regions.handed_over:
        found[type(placement)] += size
    return found


# -- convolutions ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("alexnet", 128), ("alexnet", 512), ("vgg", 64)])
def test_convolutions_along_the_batch_and_large_linear_layers_along_features(name, size):
    regions = chosen(name, size, 8, ETHERNET, captured=128 if name == "alexnet" else None)
    assert regions.kind == "hybrid" and regions.seconds < regions.rows / 1.2
    assert axes(regions, "features") == {BATCH}
    large = axes(regions, "classifier.1", Phase.FORWARD) | axes(regions, "classifier.4", Phase.FORWARD)
    assert BATCH not in large and None not in large
    moved = lying(regions)
    assert moved[Sharded] > 10 * moved[Partial]  # the gradients of the large layers stay where they are made
    assert "along batch" in regions.explain() and "along classifier" in regions.explain()


def test_the_batch_size_decides():
    small, large = (chosen("alexnet", size, 8, ETHERNET, captured=128) for size in (128, 16384))
    assert small.kind == "hybrid" and large.kind == "data parallel"
    assert large.seconds == large.rows < small.rows * 128


def test_without_large_linear_layers_it_is_data_parallel():
    regions = chosen("alexnet without large layers", 128, 8, ETHERNET)
    assert regions.kind == "data parallel"
    assert axes(regions, "") == {BATCH}
    assert lying(regions)[Sharded] == 0


def test_behind_a_slow_link_nothing_is_divided():
    regions = chosen("alexnet", 128, 8, 1e6)
    assert regions.kind == "whole" and not any(c.collective for c in regions.conversions)
    assert regions.seconds == regions.whole and set(lying(regions)) == {Replicated}


# -- transformers ----------------------------------------------------------------------


def collectives_by_block(regions, phase):
    """All-reduces of each block of a decoder; a reduce-scatter and an all-gather are halves of one."""
    weights = {"all_reduce": 1.0, "reduce_scatter": 0.5, "all_gather": 0.5}
    at = {c.value: c for c in regions.conversions if c.collective}
    found, block = Counter(), None
    for node in regions.strategies.graph.nodes:
        parts = str(node.meta.get("module")).split(".")
        if node.meta.get("phase") != phase:
            continue
        if parts[0] in ("tokens", "norm", "head"):
            block = parts[0]
        elif parts[0] == "blocks" and len(parts) > 1:
            block = int(parts[1])
        if node in at:
            found[block] += weights[at[node].collective]
    return found


@pytest.mark.parametrize(
    ("name", "size", "processors"),
    [("gpt", 4, 4), ("gpt", 2, 4), ("gpt", 1, 4), ("llama", 2, 4), ("llama", 1, 2)],
)
def test_a_block_is_divided_by_columns_and_rows_with_two_all_reduces_each_way(name, size, processors):
    regions = chosen(name, size, processors, NVLINK)
    layers = range(3)
    for i in layers:
        attention = [f"blocks.{i}.{m}" for m in (("qkv", "out") if name == "gpt" else ("q", "k", "v", "out"))]
        for module in (*attention, f"blocks.{i}"):
            assert all(axis.endswith("heads") for axis in axes(regions, module + "", Phase.FORWARD) - mlp(regions, i))
        assert {axis for m in attention for axis in axes(regions, m)} == heads(regions, i)
        assert mlp(regions, i) == {f"blocks.{i}.hidden"}
    forward, backward = (collectives_by_block(regions, phase) for phase in (Phase.FORWARD, Phase.BACKWARD))
    assert all(forward[i] == 2 for i in layers)
    assert backward[1] == 2 and all(backward[i] <= 2.5 for i in layers)  # the ends share with embedding and head
    assert stream(regions) <= {(None, Replicated()), (BATCH, Sharded(0)), ("embed", Sharded(2))}


def heads(regions, i):
    """The axis of attention's heads (those of keys and values, where queries are grouped)."""
    names = {axis for axis in regions.strategies.axes if axis.startswith(f"blocks.{i}.") and "heads" in axis}
    return {min(names, key=len)}


def mlp(regions, i):
    modules = [f"blocks.{i}.{m}" for m in ("up", "down", "gate")]
    return {axis for m in modules for axis in axes(regions, m)}


def stream(regions):
    """How the sums of the residual stream lie."""
    found = set()
    for node in regions.strategies.graph.nodes:
        if node.target is torch.ops.aten.add.Tensor and node.meta.get("phase") == Phase.FORWARD:
            strategy = regions.chosen[node.name]
            if node.meta["val"].dim() == 3 and node.meta["val"].shape[-1] == 1024:
                found.add((strategy.regime, strategy.results))
    return found


# -- what all choices share ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "processors", "bandwidth"), [("alexnet", 128, 8, ETHERNET), ("gpt", 4, 4, NVLINK)]
)
def test_the_price_of_a_choice_is_that_of_the_divided_graph(name, size, processors, bandwidth):
    graph, _ = table(name, size, processors)
    regions, machine = chosen(name, size, processors, bandwidth), gpu(bandwidth)
    divided = DivideRegions(processors, regions.regimes)(graph)
    assert not divided.refusals, divided.refusals
    known = {"batch": size // processors, "batch.total": size}
    names = divided.graph.symbols.symbols
    sizes = known if "batch.total" in names else {"batch": size}
    price = estimate(divided.graph, machine, sizes, processors=processors)
    summed = lying(regions)[Partial] * machine.link.seconds("all_reduce", 25 << 20, processors) / (25 << 20)
    hidden = 0.05 * price.seconds  # collectives run beside kernels
    assert regions.seconds == pytest.approx(price.seconds + summed, abs=hidden)
    kinds = Counter(n.target._opname for n in divided.graph.nodes if "c10d" in str(n.target))
    del kinds["wait_tensor"]
    expected = Counter({"all_reduce": "all_reduce", "all_gather": "all_gather_into_tensor",
                        "reduce_scatter": "reduce_scatter_tensor"}[c.collective]
                       for c in regions.conversions if c.collective)  # fmt: skip
    assert kinds == expected


def test_regions_must_save_something_to_be_chosen():
    for name, size, processors, bandwidth in (("alexnet", 128, 8, ETHERNET), ("gpt", 4, 4, NVLINK)):
        regions = chosen(name, size, processors, bandwidth)
        assert regions.kind == "hybrid"
        assert regions.seconds * (1 + WORTH) < min(regions.rows, regions.whole)
        assert regions.bound == pytest.approx(regions.seconds)


def test_gradients_that_this_process_adds_up_cost_memory_bandwidth():
    strategies = table("alexnet", 128, 8)[1]
    machine = simple(link=Link(1e-4, 1e8))
    regions = choose_regions(strategies, machine, 128)
    reduced = choose_regions(strategies, machine, 128, synchronise="all-reduce")
    assert regions.rows != reduced.rows and regions.whole == reduced.whole


def test_a_machine_without_a_link_and_sizes_out_of_range_are_refused():
    strategies = table("alexnet", 128, 8)[1]
    with pytest.raises(CostModelError, match="link"):
        choose_regions(strategies, simple(), 128)
    with pytest.raises(CostModelError, match="batch of 1"):
        choose_regions(strategies, gpu(ETHERNET), 1)


def test_the_example_of_the_page_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "schemes.md").read_text()
    (example,) = re.findall(r"```python\n(.*?choose_regions.*?)```", page, re.DOTALL)
    exec(compile(example, "docs/schemes.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "0 ... 2" in printed and "along 4.hidden" in printed and "all-gather of 1 MiB" in printed


def test_axes_that_matter_hold_work_and_are_a_multiple_of_the_processors():
    graph, _ = table("gpt", 4, 4)
    names = axes_that_matter(graph, 4)
    expected = {f"blocks.{i}.{axis}" for i in range(3) for axis in ("heads", "hidden")}
    assert set(names) == {BATCH, "embed"} | expected
    assert set(axes_that_matter(graph, 5)) == {BATCH}
    assert BATCH not in axes_that_matter(table("gpt", 1, 4)[0], 4)  # its size is fixed
