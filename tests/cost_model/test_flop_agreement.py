"""FLOPs of captured steps against torch's counter on the eager step: equal but for the differences of docs/flops.md."""

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import graphopt
from benchmarks import zoo
from graphopt.graph import op_rules
from graphopt.graph.op_rules.table import NAMED, RULES
from tests.graph.operator_nodes import node_of

with suppress(ImportError):
    import torch.nn.attention.varlen  # registers its operators with the counter

PAGE = Path(__file__).parents[2] / "docs" / "flops.md"

COUNTED_BY_US_ALONE = {
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    "mkldnn_rnn_layer", "mkldnn_rnn_layer_backward", "mv", "addmv", "dot", "_trilinear",
    "grouped_mm_fallback", "grouped_mm_fallback_backward",
}  # fmt: skip


def _pooler(model: Any, batch: Any) -> int:
    return 2 * len(batch["input_ids"]) * model.fnet.pooler.dense.weight.numel()


def _gradient_of_the_waveform(model: Any, batch: Any) -> int:
    first = next(m for m in model.modules() if isinstance(m, nn.Conv1d))
    rows, samples = batch["input_values"].shape
    places = (samples - first.kernel_size[0]) // first.stride[0] + 1
    return 2 * rows * first.weight.numel() * places


MORE_IN_EAGER: dict[str, Callable[[Any, Any], int]] = {"fnet": _pooler, "wav2vec2": _gradient_of_the_waveform}

NOT_COUNTED_BY_US = {"flex_attention", "flex_attention_backward", "_varlen_attn_out"}
COUNTED_OTHERWISE = {"cudnn_convolution", "_slow_conv2d_forward"}

ARCHITECTURES = [
    "mlp", "wide_and_deep", "text_cnn", "tied_lm", "lstm_forecaster", "digits_cnn", "waveform_cnn", "autoencoder",
    "gan_generator", "squeezenet1_1", "convmixer", "deit", "fnet", "gpt2", "llama", "wav2vec2",
    pytest.param("mixtral", marks=pytest.mark.slow),
]  # fmt: skip


def by_operator(graph: graphopt.TrainingGraph) -> Counter[str]:
    """FLOPs of a graph by the name of the operator, without overload and namespace."""
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        counts[str(node.target).split(".")[-2:][0]] += graph.symbols.evaluate(op_rules.flops(node))
    return +counts


def seed() -> None:
    """The models draw by all three when they train (layers left out, masks)."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_counts_what_eager_counts(name: str) -> None:
    case = zoo.case(name)
    model, batch = case.build(), case.batch(4)
    seed()
    with FlopCounterMode(display=False) as counter:
        case.compute_loss(model, batch).backward()
    extra = MORE_IN_EAGER[name](model, batch) if name in MORE_IN_EAGER else 0
    model.zero_grad()
    seed()
    ours = by_operator(graphopt.capture(model, batch, loss=case.loss or "model"))
    common = sum(count for operator, count in ours.items() if operator not in COUNTED_BY_US_ALONE)
    assert common == counter.get_total_flops() - extra > 0


class Products(nn.Module):
    """Products that torch's counter does not see, beside ones that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.vector = nn.Bilinear(3, 4, 5), nn.Parameter(torch.randn(5))
        self.mixed = nn.Parameter(torch.randn(5, 6, 2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = self.pair(x, y)
        return (z @ self.vector).sum() + torch.einsum("bo,okn,bp->pkn", z, self.mixed, z).sum()


def test_products_that_torch_does_not_count() -> None:
    model, batch = Products(), (torch.randn(7, 3), torch.randn(7, 4))
    with FlopCounterMode(display=False) as counter:
        model(*batch).backward()
    ours = by_operator(graphopt.capture(model, batch, loss="model"))
    alone = Counter({name: count for name, count in ours.items() if name in COUNTED_BY_US_ALONE})
    assert ours.total() - alone.total() == counter.get_total_flops() > 0
    assert alone["_trilinear"] == 2 * (2 * 7 * 3 * 4 * 5)  # forward, and the gradient of the weight
    assert alone["mv"] > 0


def test_every_operator_of_the_counter_has_a_formula() -> None:
    """But for those that docs/flops.md names."""
    lacking = set()
    for operator in flop_registry:
        name = getattr(operator, "_qualified_op_name", None) or str(operator)
        rule = RULES.get(operator) or NAMED.get(name)
        if rule is None or rule.flops is None:
            lacking.add(name.split("::")[-1])
    assert lacking <= NOT_COUNTED_BY_US


def test_every_difference_is_told() -> None:
    page = PAGE.read_text()
    told = COUNTED_BY_US_ALONE | set(MORE_IN_EAGER) | NOT_COUNTED_BY_US | COUNTED_OTHERWISE
    assert not [name for name in told if f"`{name}`" not in page]


def test_attention_over_rows_of_unequal_length() -> None:
    """Without their lengths at hand (fake offsets) the counter takes the greatest for all, as we do."""
    if not hasattr(torch.ops.torch_attn, "_varlen_attn"):
        pytest.skip("this torch has no variable-length attention")

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    q, k, v, out = meta(9, 6, 8), meta(11, 6, 8), meta(11, 6, 8), meta(9, 6, 8)
    offsets = torch.zeros(4, dtype=torch.int32, device="meta")
    forward, backward = torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward
    given = (q, k, v, offsets, offsets, 5, 7)
    node = node_of(forward.default, *given, result=(out, meta(6, 9), meta(2)))
    assert op_rules.flops(node) == flop_registry[forward](*given) > 0
    given = (out, q, k, v, out, meta(6, 9), offsets, offsets, 5, 7, False, meta(2))
    node = node_of(backward.default, *given, result=(q, k, v))
    assert op_rules.flops(node) == flop_registry[backward](*given) > 0
