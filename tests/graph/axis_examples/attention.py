"""Calls of attention and recurrent layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tests.graph.axis_examples._calls import call, floats, stand_in
from tests.graph.axis_rule_oracle import Call


def attention_gradients(grad: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in rest[:3]]
        return torch.autograd.grad(F.scaled_dot_product_attention(*inputs, enable_gqa=True), inputs, grad)


def rows_first_gradients(*args: Any) -> tuple[torch.Tensor, ...]:
    """The same on ``[batch, rows, heads, size]``."""
    return tuple(t.transpose(1, 2) for t in attention_gradients(*(t.transpose(1, 2) for t in args[:4])))


def attention() -> Iterator[Call]:
    q, k, v = floats(2, 4, 5, 6), floats(2, 4, 7, 6), floats(2, 4, 7, 3)
    mask = floats(5, 7)
    name = "scaled_dot_product_attention"
    yield call(name, q, k, v)
    yield call(name, q, k, v, mask)
    yield call(name, q, k, v, floats(2, 1, 5, 7))
    yield call(name, q, k, v, floats(4, 5, 7) > 0)
    yield call(name, q, floats(2, 4, 5, 6), floats(2, 4, 5, 3), None, 0.0, True)
    yield call(name, q, floats(2, 2, 7, 6), floats(2, 2, 7, 3), enable_gqa=True)
    yield call(name, q, floats(2, 1, 7, 6), floats(2, 1, 7, 3), enable_gqa=True)
    yield call(name, floats(5, 6), floats(7, 6), floats(7, 3))
    yield call(name, floats(2, 5, 6), floats(7, 6), floats(2, 7, 3))
    yield call("_scaled_dot_product_attention_math", q, k, v, mask)
    yield call("_scaled_dot_product_attention_math", q, floats(2, 2, 7, 6), floats(2, 2, 7, 3), enable_gqa=True)
    fused = lambda q, k, v, *rest, **options: (F.scaled_dot_product_attention(q, k, v, enable_gqa=True),)
    few = (floats(2, 2, 7, 6), floats(2, 2, 7, 6))
    yield stand_in("_scaled_dot_product_flash_attention", fused, q, *few)
    yield stand_in("_scaled_dot_product_efficient_attention", fused, q, *few, None, False)
    yield stand_in("_scaled_dot_product_cudnn_attention", fused, q, *few, None, False)
    yield stand_in("_scaled_dot_product_fused_attention_overrideable", fused, q, *few)
    rows_first = lambda q, k, v, *rest, **options: tuple(t.transpose(1, 2) for t in fused(*(
        t.transpose(1, 2) for t in (q, k, v))))  # fmt: skip
    turned = [t.transpose(1, 2).contiguous() for t in (q, *few)]
    yield stand_in("_flash_attention_forward", rows_first, *turned, None, None, 5, 7, 0.0, False, False)
    yield stand_in("_efficient_attention_forward", rows_first, *turned, None, None, None, 5, 7, 0.0, 0)
    seed, lse, out = torch.zeros((), dtype=torch.int64), floats(2, 4, 5), floats(2, 4, 5, 6)
    saved = (floats(2, 4, 5, 6), q, *few)
    for kind, behind in [
        ("flash", (out, lse, None, None, 5, 7, 0.0, False, seed, seed)),
        ("cudnn", (out, lse, seed, seed, None, None, None, 5, 7, 0.0, False)),
        ("efficient", (None, out, lse, seed, seed, 0.0, [True, True, True, False])),
        ("fused", (None, [True] * 4, out, lse, None, None, 5, 7, 0.0, False, seed, seed)),
    ]:
        name = f"_scaled_dot_product_{kind}_attention{'_overrideable' if kind == 'fused' else ''}_backward"
        yield stand_in(name, attention_gradients, *saved, *behind)
    turned = [t.transpose(1, 2).contiguous() for t in saved]
    flash = (out.transpose(1, 2).contiguous(), lse, None, None, 5, 7, 0.0, False, seed, seed)
    yield stand_in("_flash_attention_backward", rows_first_gradients, *turned, *flash)
    efficient = (None, flash[0], None, None, 5, 7, lse, 0.0, seed, seed, 0, False)
    yield stand_in("_efficient_attention_backward", rows_first_gradients, *turned, *efficient)
    yield call("_fused_sdp_choice", q, k, v)
    same = floats(2, 4, 7, 6)
    yield call("_scaled_dot_product_flash_attention_for_cpu", q, k, same)
    yield call("_scaled_dot_product_flash_attention_for_cpu", q, k, same, 0.0, False, attn_mask=mask)
    yield call("_scaled_dot_product_flash_attention_for_cpu", floats(2, 4, 7, 6), k, same, 0.0, True)


def recurrent() -> Iterator[Call]:
    for name, gates, states in (("lstm", 4, 2), ("gru", 3, 1), ("rnn_tanh", 1, 1), ("rnn_relu", 1, 1)):
        for layers, both, batch_first, biases in [(1, False, False, True), (2, False, True, False),
                                                  (2, True, True, True), (1, True, False, False)]:  # fmt: skip
            directions, hidden, params, inputs = 1 + both, 5, [], 3
            for _ in range(layers):
                for _ in range(directions):
                    params += [floats(gates * hidden, inputs), floats(gates * hidden, hidden)]
                    params += [floats(gates * hidden) for _ in range(2 * biases)]
                inputs = directions * hidden
            state = [floats(layers * directions, 2, hidden) for _ in range(states)]
            source = floats(2, 4, 3) if batch_first else floats(4, 2, 3)
            given = state if name == "lstm" else state[0]
            yield call(f"{name}.input", source, given, params, biases, layers, 0.0, False, both, batch_first)
    for name, gates in (("lstm_cell", 4), ("gru_cell", 3), ("rnn_tanh_cell", 1), ("rnn_relu_cell", 1)):
        for biases in (2, 0):
            params = [floats(gates * 5, 3), floats(gates * 5, 5), *(floats(gates * 5) for _ in range(biases))]
            state = [floats(2, 5), floats(2, 5)] if gates == 4 else floats(2, 5)
            yield call(name, floats(2, 3), state, *params)
    weights = [torch.randn(20, 3), torch.randn(20, 5), torch.randn(20), torch.randn(20)]
    states = [torch.randn(2, 5), torch.randn(2, 5)]
    yield call(
        "mkldnn_rnn_layer", torch.randn(4, 2, 3), *weights, *states, False, [], 2, 5, 1, True, False, False, True
    )
