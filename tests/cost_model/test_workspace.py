"""Workspace of kernels: counted by hand, and for convolutions against the allocations that torch's profiler sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.measure import peak_bytes
from graphopt.cost_model.blocks import stored_bytes
from graphopt.cost_model.kernel_sizes import Sizes
from graphopt.cost_model.workspace import workspace
from tests.helpers import Step, traced

aten = torch.ops.aten
ROW = (4, 8)  # 128 bytes


@pytest.mark.parametrize(
    ("function", "examples", "expected"),
    [
        (lambda step, x, m: aten.mul.Tensor(x, m), [ROW, torch.ones(4, 8, dtype=torch.bool)], 128),  # as floats
        (lambda step, x, m: aten.mul.Tensor(x, m), [ROW, ROW], 0),
        (lambda step, x, i: aten.gt.Tensor(x, i), [ROW, torch.ones(4, 8, dtype=torch.int64)], 128),
        (lambda step, x: aten.cumsum.default(x, 0), [torch.ones(4, 8, dtype=torch.bool)], 256),
        (lambda step, x, y: aten.mse_loss.default(x, y), [ROW, ROW], 256),
        (lambda step, x: aten._safe_softmax.default(x, -1), [ROW], 32),
        (lambda step, x: aten.native_layer_norm.default(x, [8], None, None, 1e-5), [ROW], 0),
        (lambda step, x: aten.native_layer_norm.default(x, [4], None, None, 1e-5), [torch.ones(ROW).t()], 128),
        (lambda step, w, i: aten.embedding.default(w, i), [ROW, torch.zeros(6, 2, dtype=torch.int64).t()], 96),
    ],
)  # fmt: skip
def test_workspace_counted_by_hand(function: Callable[..., Any], examples: list[Any], expected: int) -> None:
    graph = traced(function, *examples)
    (node,) = (n for n in graph.nodes if n.op == "call_function")
    assert max(workspace(node, Sizes()), default=0) == expected


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": 2},
    "few channels": {"x": (4, 3, 20, 20), "w": (16, 3, 3, 3)},
    "depthwise": {"w": (16, 1, 3, 3), "groups": 16},
    "depthwise, wide": {"w": (16, 1, 7, 7), "groups": 16, "padding": 3},
    "depthwise, channels last": {"w": (16, 1, 3, 3), "groups": 16, "layout": torch.channels_last},
    "depthwise, wide, channels last": {
        "w": (32, 1, 7, 7), "groups": 32, "x": (4, 32, 12, 12), "padding": 3, "layout": torch.channels_last,
    },
    "grouped": {"w": (16, 4, 3, 3), "groups": 4},
    "groups of 8 beyond the image": {"x": (4, 32, 2, 2), "w": (32, 8, 3, 3), "groups": 4},
    "groups of 24 beyond the image": {"x": (4, 96, 2, 2), "w": (96, 24, 3, 3), "groups": 4},
    "groups of 8": {"x": (4, 32, 6, 6), "w": (32, 8, 3, 3), "groups": 4},
    "groups of 16 beyond the image": {"x": (4, 64, 2, 2), "w": (64, 16, 3, 3), "groups": 4},
    "pointwise": {"w": (24, 16, 1, 1), "padding": 0},
    "pointwise, large batch": {"x": (16, 16, 12, 12), "w": (24, 16, 1, 1), "padding": 0},
    "odd channels": {"x": (4, 13, 12, 12), "w": (21, 13, 3, 3)},
    "one image": {"x": (1, 16, 12, 12)},
    "waveform": {"x": (4, 1, 500), "w": (16, 1, 80), "stride": 8, "padding": 0, "data": False},
    "window beyond the image": {"x": (4, 16, 2, 2)},
    "patches": {"x": (4, 3, 32, 32), "w": (16, 3, 16, 16), "stride": 16, "padding": 0, "data": False},
    "one dimension": {"x": (4, 16, 30), "w": (24, 16, 5), "padding": 2},
    "transposed": {"w": (16, 16, 4, 4), "stride": 2, "transposed": True},
    "of a transposed view": {"x": (4, 12, 16, 12), "view": (1, 2)},
}  # fmt: skip


@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="formulas are oneDNN's on x86")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_workspace_of_convolutions_is_what_the_profiler_sees(name: str, backward: bool) -> None:
    config = {"x": (4, 16, 12, 12), "w": (16, 16, 3, 3), "stride": 1, "padding": 1, "groups": 1, "transposed": False}
    config["data"] = True
    config |= CONVOLUTIONS[name]
    x, w = torch.randn(config["x"]), torch.randn(config["w"])
    if "view" in config:
        x = x.transpose(*config["view"])
    n = x.dim() - 2
    rest = ([config["stride"]] * n, [config["padding"]] * n, [1] * n, config["transposed"], [0] * n, config["groups"])
    mask = [config["data"], True, False]
    y = torch.randn_like(aten.convolution(x, w, None, *rest)).contiguous()
    if "layout" in config:
        x, y = x.to(memory_format=config["layout"]), y.to(memory_format=config["layout"])

    def function(step: Step, x: Any, w: Any, y: Any) -> Any:
        if backward:
            return step.call(aten.convolution_backward.default, y, x, w, None, *rest, mask)
        return step.call(aten.convolution.default, x, w, None, *rest)

    (node,) = (n for n in traced(function, x, w, y).nodes if n.op == "call_function")

    def call() -> Any:
        if backward:
            return aten.convolution_backward(y, x, w, None, *rest, mask)
        return aten.convolution(x, w, None, *rest)

    call()
    expected = max(0, *workspace(node, Sizes())) + sum(stored_bytes(node))
    assert expected == pytest.approx(peak_bytes(call), rel=0.03)
