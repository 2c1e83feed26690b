"""The analytical price: its laws, its counts, and that another size needs no other capture."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from graphopt import AxisError, capture
from graphopt.cost_model import Machine, estimate
from graphopt.cost_model.analytical import FACTORS, binding_seconds, factor_seconds, fresh_bytes
from graphopt.cost_model.datasheets import lookup
from graphopt.cost_model.estimate import TERMS
from graphopt.cost_model.work import compiled
from graphopt.errors import CostModelError, GraphoptError
from graphopt.graph.training_graph import Phase
from tests.cost_model.machines import BANDWIDTH, LAUNCH, RATE, simple
from tests.random_models import cases


class Attention(nn.Module):
    """Embedding, one head group, MLP: batch and sequence are free."""

    def __init__(self, width=16, heads=2, hidden=24, vocabulary=11):
        super().__init__()
        self.embed, self.qkv = nn.Embedding(vocabulary, width), nn.Linear(width, 3 * width)
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(width, vocabulary)
        self.heads = heads

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(split(q), split(k), split(v))
        x = self.norm(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.head(x + self.down(F.gelu(self.up(x)))).mean(1)


class Convolutions(nn.Module):
    """Strided, depthwise and plain convolutions with norms."""

    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.BatchNorm2d(width), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def mlp(hidden=32):
    return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 5))


CASES = {
    "mlp": (mlp, lambda n: (torch.randn(n, 8), torch.randint(5, (n,)))),
    "convolutions": (Convolutions, lambda n: (torch.randn(n, 3, 12, 12), torch.randint(5, (n,)))),
    "attention": (Attention, lambda n: (torch.randint(11, (n, 6)), torch.randint(11, (n,)))),
}


def graph_of(name, batch=4, *arguments, **keywords):
    build, data = CASES[name]
    model = build(*arguments)
    return capture(
        model, data(batch), loss=F.cross_entropy, optimizer=torch.optim.AdamW(model.parameters()), **keywords
    )


GRAPHS = {name: graph_of(name) for name in CASES}
LARGE = {"convolutions": graph_of("convolutions", 32)}


def graph_at(name, batch):
    """A graph that holds at ``batch``: convolutions of 16 images and more take another kernel."""
    return GRAPHS[name] if GRAPHS[name].symbols.admits({"batch": batch}) else LARGE[name]


def counts(price):
    """What must be exact."""
    return price.flops, price.bytes_moved, price.bytes_kept, price.peak_bytes


FEW = settings(max_examples=max(6, settings.default.max_examples // 4))
"""For what captures in each example."""

# -- a price that can be counted by hand ------------------------------------------------------------------------------


def test_one_product_is_priced_by_hand():
    graph = capture(nn.Linear(4, 3, bias=False), (torch.randn(5, 4),))  # backward: one product, of the weight
    price = estimate(graph, simple())
    products = [n for n in price.work.nodes if n.target is torch.ops.aten.mm.default]
    flops, moved = 2 * 5 * 4 * 3, 4 * (5 * 4 + 4 * 3 + 5 * 3)
    assert len(products) == 2 and price.flops == 2 * flops and price.bytes_moved == 2 * moved
    each = max(flops / RATE, moved / BANDWIDTH)
    views = len(price.work.kernels) - 2
    launches = 2 + views + 2 * len(graph.inputs)  # and what binding inputs takes
    assert price.seconds == pytest.approx(2 * each + launches * LAUNCH)
    assert price.terms["launch"] == pytest.approx(launches * LAUNCH)
    assert price.terms["memory"] == pytest.approx(2 * each) and price.terms["compute"] == 0
    fast = simple(curves={f: c if not c.rates else type(c)(c.rates) for f, c in simple().curves.items()})
    assert estimate(graph, fast).terms["compute"] == pytest.approx(2 * flops / RATE)  # no memory time: compute decides


# -- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["flat", "eager", "compiled"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("machine", [simple(), Machine.named("A100"), Machine.named("V100")], ids=lambda m: m.name)
def test_terms_sum_up_twice_the_batch_is_never_cheaper_and_one_processor_talks_to_nobody(name, mode, machine):
    before = None
    for batch in (2, 4, 8, 16, 32, 64, 128):
        price = estimate(graph_at(name, batch), machine, {"batch": batch}, mode=mode)
        assert tuple(price.terms) == TERMS and all(s >= 0 for s in price.terms.values())
        assert price.seconds == pytest.approx(sum(price.terms.values()))
        assert price.terms["communication"] == price.terms["bubble"] == 0
        low, high = price.interval
        assert low < price.seconds < high and math.isclose(price.seconds / low, high / price.seconds)
        assert price.terms["optimizer"] > 0
        if before is not None:
            assert price.seconds >= before.seconds * (1 - 1e-12) and price.peak_bytes >= before.peak_bytes
            assert price.flops > before.flops and price.bytes_moved > before.bytes_moved
        before = price


@given(st.floats(1.0, 100.0), st.floats(1.0, 100.0))
def test_a_price_never_falls_when_the_machine_gets_slower(rate, bandwidth):
    graph = GRAPHS["mlp"]
    slower = {
        f: type(c)({p: r / rate for p, r in c.rates.items()}, points=tuple((b, s * bandwidth) for b, s in c.points))
        for f, c in simple().curves.items()
    }
    assert estimate(graph, simple(curves=slower)).seconds >= estimate(graph, simple()).seconds


def test_a_compiler_merges_pointwise_chains_and_costs_seconds_of_its_own():
    model = nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.Linear(64, 5))
    graph = capture(model, (torch.randn(32, 64), torch.randint(5, (32,))), loss=F.cross_entropy)
    flat, fused = (estimate(graph, simple(), mode=mode) for mode in ("flat", "compiled"))
    assert flat.flops == fused.flops and flat.compile_seconds == 0 < fused.compile_seconds
    assert fused.terms["memory"] + fused.terms["compute"] < 0.8 * (flat.terms["memory"] + flat.terms["compute"])
    assert len(fused.work.kernels) < len(flat.work.kernels) / 2
    forward = [k for k in fused.work.kernels if k.node.meta["phase"] == Phase.FORWARD and not k.flops]
    chain = next(k for k in forward if k.node.name.startswith("mul") or "silu" in k.node.name)
    assert (
        chain.bytes.subs({s: 32 for s in chain.bytes.free_symbols}) <= 5 * 32 * 64 * 4
    )  # one read, writes what is kept


def test_on_a_gpu_kernels_hide_launches_and_low_precision_is_faster():
    graph = capture(mlp(4096), (torch.randn(4, 8), torch.randint(5, (4,))), loss=F.cross_entropy)
    h100 = Machine.named("H100")
    small, large = (estimate(graph, h100, {"batch": n}) for n in (4, 2**17))
    assert small.terms["launch"] > 0.5 * small.seconds and large.terms["launch"] == 0
    full, tf32, bf16 = (estimate(graph, h100, {"batch": 2**17}, precision=p) for p in (None, "tf32", "bf16"))
    assert full.seconds > tf32.seconds > bf16.seconds and full.flops == bf16.flops
    assert estimate(graph, Machine.named("H100", tf32=True), {"batch": 2**17}).seconds == tf32.seconds


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x):
        x = x * self.scale
        return F.scaled_dot_product_attention(x, x, x)


HEAVY = {
    "gemm": (lambda: nn.Linear(4096, 4096), (4096, 4096)),
    "convolution": (lambda: nn.Conv2d(256, 256, 3, padding=1), (64, 256, 28, 28)),
    "grouped convolution": (lambda: nn.Conv2d(512, 512, 3, groups=4), (64, 512, 28, 28)),
    "depthwise": (lambda: nn.Conv2d(256, 256, 3, groups=256), (64, 256, 56, 56)),
    "norm and pooling": (lambda: nn.Sequential(nn.BatchNorm2d(256), nn.MaxPool2d(2)), (64, 256, 56, 56)),
    "attention": (SelfAttention, (16, 16, 1024, 64)),
}


@pytest.mark.parametrize("kind", HEAVY)
def test_large_kernels_of_every_kind_are_near_the_roofline_of_a_data_sheet(kind):
    make, shape = HEAVY[kind]
    with torch.device("meta"):
        graph = capture(make(), (torch.empty(shape),))
    price, sheet = estimate(graph, Machine.named("A100")), lookup("A100")
    counts = price.counts
    roofline = np.maximum(counts.kernel_flops / sheet.flops["fp32"], counts.kernel_bytes / sheet.bandwidth).sum()
    assert roofline < price.terms["compute"] + price.terms["memory"] < 3 * roofline


def test_what_a_price_compiled_dies_with_its_graph():
    graph = capture(mlp(), (torch.randn(4, 8), torch.randint(5, (4,))), loss=F.cross_entropy)
    estimate(graph, simple())
    kept = weakref.ref(graph)
    del graph
    gc.collect()
    assert kept() is None


def test_an_operator_that_is_slower_than_its_family_is_priced_so():
    graph = capture(nn.Sequential(nn.Linear(8, 16), nn.Tanh()), (torch.randn(64, 8),))
    plain, slow = (estimate(graph, simple(relative=r)) for r in ({}, {"tanh": 3.0}))
    nodes = [i for i, node in enumerate(plain.work.nodes) if node.target is torch.ops.aten.tanh.default]
    moved = (2 * 64 * 16 * 4 - 1) / BANDWIDTH  # what a byte takes, any call takes
    assert nodes and slow.seconds - plain.seconds == pytest.approx(2 * moved)
    assert slow.node_seconds[nodes[0]] - plain.node_seconds[nodes[0]] == pytest.approx(2 * moved)


def test_seconds_are_linear_in_the_factors_of_a_machine():
    graph, machine = GRAPHS["convolutions"], simple(touch=1e-9, largest=2**10)
    parts = factor_seconds(graph, machine, {"batch": 4}, mode="flat")
    parts["flat launch"] += binding_seconds(compiled(graph, "flat", ()), machine)
    factors = {name: 1.0 + i / 3 for i, name in enumerate(FACTORS)}
    scaled = machine.scaled(factors, 0.2)
    assert len(FACTORS) <= 12 and estimate(graph, machine).seconds == pytest.approx(sum(parts.values()))
    assert estimate(graph, scaled).seconds == pytest.approx(sum(factors[n] * s for n, s in parts.items()))


def test_fresh_memory_is_that_of_blocks_which_the_allocator_does_not_keep():
    blocks = np.array([10, 20, 100, 50])
    assert fresh_bytes(blocks, 0) == 0 and fresh_bytes(blocks, 50) == 150
    price = estimate(GRAPHS["mlp"], simple(touch=1e-9, largest=1000))
    large = [n for n in price.peak.blocks.tolist() if n >= 1000]
    assert large and price.terms["allocation"] == pytest.approx(sum(large) * 1e-9)


# -- other sizes, no other capture ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["flat", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_another_batch_has_the_counts_of_a_fresh_capture(name, mode):
    for batch in (2, 7, 12, 50):
        fresh = graph_of(name, batch)
        again = estimate(graph_at(name, batch), simple(), {"batch": batch}, mode=mode)
        own = estimate(fresh, simple(), mode=mode)
        assert counts(again) == counts(own) and again.seconds == pytest.approx(own.seconds)


@FEW
@given(cases(), st.integers(2, 20), st.integers(2, 20))
def test_random_models_at_another_batch_have_the_counts_of_a_fresh_capture(case, batch, other):
    model, optimizer = case.instance()
    first, second = (capture(model, case.batch(n), loss=case.loss, optimizer=optimizer) for n in (batch, other))
    if first.symbols.admits({"batch": other}) and first.hash() == second.hash():  # one guard regime, one graph
        for mode in ("flat", "eager"):
            price = estimate(first, simple(), {"batch": other}, mode=mode)
            assert counts(price) == counts(estimate(second, simple(), mode=mode))


@FEW
@given(batch=st.integers(2, 40), length=st.integers(2, 40))
def test_another_sequence_length_has_the_counts_of_a_fresh_capture(batch, length):
    price = estimate(TOKENS, simple(), {"batch": batch, "seq": length})
    data = (torch.randint(11, (batch, length)), torch.randint(11, (batch,)))
    fresh = capture(TOKEN_MODEL, data, loss=F.cross_entropy, free={"seq": {"0": 1}})
    assert counts(price) == counts(estimate(fresh, simple()))


TOKEN_MODEL = Attention()
TOKENS = capture(
    TOKEN_MODEL, (torch.randint(11, (4, 6)), torch.randint(11, (4,))), loss=F.cross_entropy, free={"seq": {"0": 1}}
)


@FEW
@given(st.integers(1, 70), st.integers(2, 20))
def test_another_width_has_the_counts_of_a_fresh_capture(hidden, batch):
    graph = GRAPHS["mlp"]
    (width,) = (g.name for g in graph.axes.groups() if g.size == 32)
    price = estimate(graph, simple(), {width: hidden, "batch": batch})
    assert counts(price) == counts(estimate(graph_of("mlp", batch, hidden), simple()))


def test_residual_width_heads_and_hidden_width_together_have_the_counts_of_a_fresh_capture():
    graph, wider = GRAPHS["attention"], {16: 40, 24: 56, 8: 20}  # of keys and values apart: two head sizes
    sizes = {g.name: wider[g.size] for g in graph.axes.groups() if g.free and g.size in wider}
    assert len(sizes) == 4
    assert counts(estimate(graph, simple(), sizes)) == counts(estimate(graph_of("attention", 4, 40, 2, 56), simple()))


# -- reports and refusals ---------------------------------------------------------------------------------------------


def test_explain_names_terms_memory_and_source_lines():
    price = estimate(GRAPHS["convolutions"], simple())
    text = price.explain(top=5)
    assert "test_analytical.py" in text and "kept for backward" in text and "peak memory" in text and "more" in text
    rows = price.explain("module", sort="order", top=100)
    assert "layers.3" in rows and "(all)" in rows
    assert price.by_module[""]["flops"] == price.flops == GRAPHS["convolutions"].flops()
    assert price.by_module[""]["seconds"] == pytest.approx(price.seconds - binding_seconds(price.work, simple()))
    whole = sum(row["flops"] for path, row in price.by_module.items() if path.count(".") == 1)
    assert whole == price.by_module["layers"]["flops"]
    assert price.explain("family").count("convolution") >= 3
    assert price.to_dict()["flops"] == price.flops and "Estimate(" in repr(price)
    by_bytes = price.explain("node", sort="bytes", top=3).splitlines()[-4:-1]
    assert len(by_bytes) == 3
    with pytest.raises(CostModelError, match="sort"):
        price.explain(sort="colour")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 0}, "positive integer for 'batch', got 0"),
        ({"batch": 2.5}, "positive integer"),
        ({"batch": True}, "positive integer"),
        ({"batch": 2**60}, "62 bits"),
        ({"batch": 1}, "does not hold"),
    ],
)
def test_absurd_sizes_are_refused(sizes, message):
    with pytest.raises(GraphoptError, match=message):
        estimate(GRAPHS["mlp"], simple(), sizes)


def test_axes_that_must_stay_and_unknown_names_are_refused():
    fixed = next(g for g in GRAPHS["mlp"].axes.groups() if not g.free and isinstance(g.size, int))
    with pytest.raises(AxisError, match=f"{fixed.name}.*must keep its size"):
        estimate(GRAPHS["mlp"], simple(), {fixed.name: 3})
    with pytest.raises(AxisError, match="no axis 'colour'"):
        estimate(GRAPHS["mlp"], simple(), {"colour": 3})
    with pytest.raises(CostModelError, match="mode"):
        estimate(GRAPHS["mlp"], simple(), mode="quick")
    with pytest.raises(CostModelError, match="TrainingGraph"):
        estimate(mlp(), simple())
    with pytest.raises(CostModelError, match="precision: simple has no rate for int4"):
        estimate(GRAPHS["mlp"], simple(), precision="int4")


def test_an_empty_graph_has_no_price():
    graph = GRAPHS["mlp"].draft()
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "output":
            node.args = (tuple(None for _ in node.args[0]),)
        elif node.op == "call_function":
            graph.graph.erase_node(node)
    with pytest.raises(CostModelError, match="no operators"):
        compiled(graph.finish(), "flat", ())
