"""Single operators that a calibration times: a few sizes of each family of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.cost_model.kernels import Family, Kernel, kernels

aten = torch.ops.aten


@dataclass(frozen=True)
class Probe:
    """A function that calls one ATen operator, and its tensors; ``run``: the form of it that an update calls."""

    function: Callable[..., Any]
    tensors: tuple[torch.Tensor, ...]
    run: Callable[..., Any] | None = None

    def kernel(self) -> Kernel:
        """What it starts, with its counts, by the rules that price a graph."""
        traced = make_fx(self.function, tracing_mode="fake")(*self.tensors)
        threads = torch.get_num_threads()
        (kernel,) = (k for node in traced.graph.nodes for k in kernels(node, threads) if k.bytes)
        return kernel if self.run is None else replace(kernel, family=Family.UPDATE)


_COUNTS = tuple(2**power for power in (10, 13, 16, 18, 20, 21, 22))
"""Elements of pointwise probes."""

_IMAGES = ((1, 16, 8, 8), (8, 512, 2, 2), (16, 256, 4, 4), (4, 256, 14, 14), (4, 64, 28, 28), (8, 64, 56, 56))
_ROWS = ((8, 64), (64, 128), (256, 256), (1024, 512), (4096, 512))

_PRODUCTS = (
    (1, 512, 512), (8, 512, 512), (32, 256, 512), (64, 64, 64), (128, 512, 512), (256, 1024, 256), (512, 512, 512),
    (512, 64, 576), (1024, 1024, 512), (2048, 256, 64), (64, 2048, 256), (4, 2048, 1024),
)  # fmt: skip
_WEIGHT_GRADIENTS = ((512, 512, 4), (1024, 256, 8), (512, 512, 16), (256, 1024, 64), (512, 512, 256))
_BATCHED = ((24, 64, 64, 32), (48, 128, 32, 128), (16, 197, 197, 64))

_CONVOLUTIONS = (
    # batch, in, out, size, kernel, stride, groups
    (4, 3, 64, 96, 7, 2, 1), (8, 3, 32, 64, 3, 2, 1), (2, 64, 64, 56, 3, 1, 1), (8, 64, 64, 28, 3, 1, 1),
    (4, 128, 128, 28, 3, 1, 1), (2, 256, 256, 14, 3, 1, 1), (4, 512, 512, 7, 3, 1, 1), (8, 256, 256, 4, 3, 1, 1),
    (8, 512, 512, 2, 3, 1, 1), (2, 256, 512, 14, 3, 2, 1), (16, 64, 256, 28, 1, 1, 1), (16, 256, 64, 14, 1, 1, 1),
    (16, 24, 144, 28, 1, 1, 1), (16, 512, 1024, 7, 1, 1, 1), (32, 960, 160, 2, 1, 1, 1), (8, 3, 192, 64, 16, 16, 1),
    (2, 8, 8, 4, 3, 1, 1), (4, 32, 32, 8, 3, 1, 1), (2, 16, 32, 16, 3, 1, 1), (8, 16, 16, 32, 3, 1, 1),
    (8, 32, 16, 32, 3, 1, 1), (4, 32, 64, 16, 3, 1, 1),
    # many weights on few places
    (4, 512, 512, 2, 3, 1, 1), (4, 512, 512, 4, 3, 1, 1), (4, 1024, 2048, 3, 1, 2, 1), (2, 256, 512, 4, 3, 2, 1),
    # where one image goes after the other (at one thread)
    (4, 960, 160, 2, 1, 1, 1), (4, 160, 960, 3, 1, 1, 1), (4, 256, 1024, 4, 1, 1, 1), (2, 96, 576, 4, 1, 1, 1),
    (4, 64, 384, 7, 1, 1, 1), (4, 32, 192, 14, 1, 1, 1), (2, 256, 256, 14, 1, 1, 1), (4, 64, 64, 28, 1, 1, 1),
    (1, 256, 256, 4, 3, 1, 1), (2, 480, 480, 1, 1, 1, 1), (4, 1000, 500, 2, 1, 1, 1), (4, 480, 256, 7, 1, 1, 1),
    # the same, input channels a multiple of 512
    (2, 512, 512, 1, 1, 1, 1), (2, 512, 1024, 2, 1, 1, 1), (4, 2048, 512, 2, 1, 1, 1), (2, 1024, 256, 3, 1, 1, 1),
    (4, 512, 512, 3, 1, 1, 1), (2, 1024, 1024, 4, 1, 1, 1), (4, 512, 256, 7, 1, 1, 1), (2, 1024, 256, 14, 1, 1, 1),
)  # fmt: skip
_GROUPED = (  # 4 to 80 channels a group; kernels are written for 16
    (4, 64, 64, 28, 3, 1, 16), (4, 128, 128, 14, 3, 1, 32), (8, 48, 48, 20, 3, 2, 6), (8, 104, 104, 10, 3, 1, 13),
    (16, 440, 440, 2, 3, 1, 55), (4, 256, 256, 14, 3, 1, 32), (2, 512, 512, 7, 3, 1, 32), (8, 512, 512, 2, 3, 1, 32),
    (8, 240, 240, 8, 3, 1, 10), (4, 240, 480, 14, 1, 1, 3), (8, 1024, 1024, 4, 3, 1, 32), (8, 96, 96, 4, 3, 1, 8),
    (4, 384, 384, 2, 3, 1, 16),
)  # fmt: skip
_DEPTHWISE = tuple(
    (batch, channels, channels, size, kernel, stride, channels)
    for kernel in (3, 5, 7)
    for batch, channels, size, stride in (
        (2, 96, 28, 1),
        (8, 64, 28, 1),
        (4, 240, 14, 1),
        (8, 96, 14, 2),
        (16, 192, 7, 1),
    )
) + (  # on images narrower than the window
    (4, 480, 480, 2, 3, 1, 480), (8, 240, 240, 1, 3, 1, 240), (2, 192, 192, 3, 5, 1, 192), (8, 480, 480, 2, 5, 1, 480),
    (4, 96, 96, 3, 7, 1, 96),
)  # fmt: skip
_CHANNELS_LAST = (  # gradients of weights
    (4, 384, 384, 2, 7, 1, 384), (4, 192, 192, 4, 7, 1, 192), (4, 192, 192, 8, 5, 1, 192), (2, 96, 96, 16, 7, 1, 96),
    (2, 96, 96, 28, 5, 1, 96),
)  # fmt: skip

_HEADS = ((1, 2, 32, 32), (4, 8, 64, 32), (2, 12, 197, 64), (8, 4, 256, 32))


def probes() -> Iterator[Probe]:
    """All probes, made one at a time."""
    yield from _memory_bound()
    yield from _products()
    for case in (*_CONVOLUTIONS, *_GROUPED, *_DEPTHWISE):
        yield from _convolution(*case)
    for case in _CHANNELS_LAST:
        yield from list(_convolution(*case, layout=torch.channels_last))[1:2]
    yield from _attention()
    if torch.backends.mkldnn.is_available():
        yield from _recurrent()


def _memory_bound() -> Iterator[Probe]:
    for n in _COUNTS:
        x, y = torch.randn(n), torch.randn(n)
        yield Probe(aten.add.Tensor, (x, y))
        yield Probe(lambda g, t: aten.threshold_backward.default(g, t, 0), (x, y))
        yield Probe(lambda t: aten._foreach_add.Scalar([t], 1.0), (x,))
        yield Probe(lambda t: aten.mul.Tensor(t, 0.9), (x,), lambda t: t.mul_(0.9))
        yield Probe(lambda t: aten.div.Tensor(t, 1.1), (x,), lambda t: t / 1.1)
        yield Probe(aten.addcdiv.default, (x, y, x.clone()), lambda t, a, b: t.addcdiv_(a, b, value=-1e-3))
        if n > 2**20:  # slow ones: in proportion from there on
            continue
        for operator in (aten.gelu.default, aten.sigmoid.default):
            yield Probe(operator, (x,))
        yield Probe(lambda t: aten.full_like.default(t, 1.0), (x,))
        yield Probe(lambda t: aten.native_dropout.default(t, 0.1, True), (x,))
    for shape in _IMAGES:
        x, channels = torch.randn(shape), shape[1]
        weight, mean = torch.ones(channels), torch.zeros(channels)
        yield Probe(lambda x, w, m: aten._native_batch_norm_legit_functional.default(x, w, m, m, w, True, 0.1, 1e-5), (
            x, weight, mean,
        ))  # fmt: skip
        yield Probe(
            lambda g, x, w, m: aten.native_batch_norm_backward.default(
                g, x, w, m, w, m, w, True, 1e-5, [True, True, True]
            ),
            (x, x.clone(), weight, mean),
        )
        yield Probe(lambda t: aten.sum.dim_IntList(t, [0, 2, 3]), (x,))
        yield Probe(lambda t: aten.mean.dim(t, [2, 3], True), (x,))
        for window in [2, 3] * (shape[-1] >= 14):
            settings = [window, window], [2, 2], [1, 1]
            pooled, where = aten.max_pool2d_with_indices.default(x, *settings)
            yield Probe(partial(_pool, settings), (x,))
            yield Probe(partial(_pool_backward, settings), (pooled, x, where))
    for rows, width in _ROWS:
        x, weight = torch.randn(rows, width), torch.ones(width)
        _, mean, rstd = aten.native_layer_norm.default(x, [width], weight, weight, 1e-5)
        yield Probe(lambda x, w: aten.native_layer_norm.default(x, [x.shape[-1]], w, w, 1e-5), (x, weight))
        yield Probe(
            lambda g, x, m, r, w: aten.native_layer_norm_backward.default(
                g, x, [x.shape[-1]], m, r, w, w, [True, True, True]
            ),
            (x, x.clone(), mean, rstd, weight),
        )
        yield Probe(lambda x: aten._softmax.default(x, -1, False), (x,))
        yield Probe(lambda g, y: aten._softmax_backward_data.default(g, y, -1, torch.float32), (x, x.clone()))
        yield Probe(lambda t: aten.sum.dim_IntList(t, [0], True), (x,))
        heads = x.view(rows // 8, 8, width // 16, 16).transpose(1, 2)
        yield Probe(lambda t: aten.clone.default(t, memory_format=torch.contiguous_format), (heads,))
        yield Probe(lambda a, b: aten.cat.default([a, b], 1), (x, x.clone()))
        places = torch.randint(1000, (rows,))
        yield Probe(lambda w, i: aten.embedding.default(w, i), (torch.randn(1000, width), places))
        yield Probe(lambda g, i: aten.embedding_dense_backward.default(g, i, 1000, -1, False), (x, places))


def _pool(settings: tuple[list[int], ...], x: torch.Tensor) -> Any:
    return aten.max_pool2d_with_indices.default(x, *settings)


def _pool_backward(settings: tuple[list[int], ...], g: torch.Tensor, x: torch.Tensor, i: torch.Tensor) -> Any:
    return aten.max_pool2d_with_indices_backward.default(g, x, *settings, [1, 1], False, i)


def _products() -> Iterator[Probe]:
    for m, n, k in _PRODUCTS:
        yield Probe(aten.mm.default, (torch.randn(m, k), torch.randn(n, k).t()))
    for m, n, k in _WEIGHT_GRADIENTS:
        yield Probe(aten.mm.default, (torch.randn(k, m).t(), torch.randn(k, n)))
    for b, m, n, k in _BATCHED:
        yield Probe(aten.bmm.default, (torch.randn(b, m, k), torch.randn(b, k, n)))


def _convolution(
    batch: int, inputs: int, outputs: int, size: int, kernel: int, stride: int, groups: int,
    layout: torch.memory_format = torch.contiguous_format,
) -> Iterator[Probe]:  # fmt: skip
    """Forward, the gradient of the weight, and that of the input."""
    x = torch.randn(batch, inputs, size, size).to(memory_format=layout)
    w = torch.randn(outputs, inputs // groups, kernel, kernel)
    padding = kernel // 2 if stride < kernel else 0
    window = [stride, stride], [padding, padding], [1, 1], False, [0, 0], groups
    yield Probe(lambda x, w: aten.convolution.default(x, w, None, *window), (x, w))
    gradient = torch.randn_like(aten.convolution.default(x, w, None, *window))
    backward = lambda mask, g, x, w: aten.convolution_backward.default(g, x, w, None, *window, mask)
    masks = [[False, True, False]] + [[True, False, False]] * (inputs > 3)  # images get no gradient
    for mask in masks:
        yield Probe(partial(backward, mask), (gradient, x, w))


def _attention() -> Iterator[Probe]:
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    for batch, heads, length, width in _HEADS:
        q, k, v = (torch.randn(batch, heads, length, width) for _ in range(3))
        yield Probe(forward, (q, k, v))
        out, logsumexp = forward(q, k, v)
        yield Probe(lambda g, q, k, v, o, s: backward(g, q, k, v, o, s, 0.0, False), (
            torch.randn_like(out), q, k, v, out, logsumexp,
        ))  # fmt: skip


def _recurrent() -> Iterator[Probe]:
    for steps, batch, width in ((16, 2, 64), (16, 2, 128), (32, 8, 128), (16, 32, 128), (16, 16, 256)):
        x, w = torch.randn(steps, batch, width), torch.randn(4 * width, width) / 16
        bias, state = torch.zeros(4 * width), torch.zeros(batch, width)
        yield Probe(
            lambda x, w, b, h: aten.mkldnn_rnn_layer.default(
                x, w, w, b, b, h, h, False, [], 2, h.shape[-1], 1, True, False, False, False
            ),
            (x, w, bias, state),
        )
