"""Which kernels of a CPU a convolution is priced as."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.cost_model.kernels import Family, Kernel, kernels

aten = torch.ops.aten
LAST, FIRST = torch.channels_last, torch.contiguous_format


def started(function, *examples: torch.Tensor) -> dict[Family, Kernel]:
    """Kernels that do something, of the one operator that ``function`` calls, at one thread."""
    graph = make_fx(function, tracing_mode="fake")(*examples).graph
    return {kernel.family: kernel for node in graph.nodes for kernel in kernels(node, 1) if kernel.bytes}


def depthwise(window: int, size: int, layout: torch.memory_format, mask: list[bool]) -> dict[Family, Kernel]:
    x = torch.randn(2, 32, size, size).to(memory_format=layout)
    w = torch.randn(32, 1, window, window)
    rest = [1, 1], [window // 2] * 2, [1, 1], False, [0, 0], 32
    if not any(mask):
        return started(lambda x, w: aten.convolution.default(x, w, None, *rest), x, w)
    return started(lambda g, x, w: aten.convolution_backward.default(g, x, w, None, *rest, mask), x.clone(), x, w)


@pytest.mark.parametrize(
    "window, size, layout, forward, weight",
    [
        (3, 14, FIRST, Family.DEPTHWISE, Family.DEPTHWISE_WEIGHT),
        (3, 14, LAST, Family.DEPTHWISE, Family.DEPTHWISE_WEIGHT),
        (3, 2, FIRST, Family.DEPTHWISE, Family.DEPTHWISE_PLAIN),
        (5, 14, FIRST, Family.DEPTHWISE, Family.DEPTHWISE_PLAIN),
        (7, 14, LAST, Family.DEPTHWISE, Family.DEPTHWISE_PADDED),
        (7, 2, FIRST, Family.DEPTHWISE_PLAIN, Family.DEPTHWISE_PLAIN),
        (7, 2, LAST, Family.DEPTHWISE, Family.DEPTHWISE_PADDED),
    ],
)
def test_kernels_of_a_depthwise_convolution(window, size, layout, forward, weight):
    assert set(depthwise(window, size, layout, [False] * 3)) == {forward}
    assert set(depthwise(window, size, layout, [True, False, False])) == {Family.DEPTHWISE_INPUT}
    assert set(depthwise(window, size, layout, [False, True, False])) == {weight}


def test_a_padded_weight_gradient_moves_a_block_of_channels_for_each_channel():
    by_layout = {layout: depthwise(7, 14, layout, [False, True, False]) for layout in (FIRST, LAST)}
    plain, padded = by_layout[FIRST][Family.DEPTHWISE_PLAIN], by_layout[LAST][Family.DEPTHWISE_PADDED]
    lanes = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    assert padded.flops == plain.flops
    assert padded.bytes - plain.bytes == 2 * 32 * 7 * 7 * lanes * lanes * 4


def test_an_image_of_one_place_is_in_the_layout_that_its_strides_say():
    rest = [1, 1], [3, 3], [1, 1], False, [0, 0], 64
    backward = lambda g, x, w: aten.convolution_backward.default(g, x, w, None, *rest, [False, True, False])
    w = torch.randn(64, 1, 7, 7)
    for strides, family in {
        (64, 1, 64, 64): Family.DEPTHWISE_PADDED,
        (64, 1, 1, 1): Family.DEPTHWISE_PLAIN,
    }.items():
        x = torch.empty_strided((2, 64, 1, 1), strides)
        assert set(started(backward, x, x, w)) == {family}


@pytest.mark.parametrize(
    "channels, size, weight",
    [
        (16, 14, Family.GROUPED_WEIGHT),
        (16, 2, Family.GROUPED_WEIGHT),
        (8, 14, Family.GROUPED_WEIGHT),
        (8, 2, Family.GROUPED_PRODUCTS),
        (12, 14, Family.GROUPED_PRODUCTS),
    ],
)
def test_kernels_of_a_grouped_convolution(channels, size, weight):
    """Measured on AVX-512: weight gradients are 5 times slower where none is written for the groups."""
    rest = [1, 1], [1, 1], [1, 1], False, [0, 0], 4
    x, w = torch.randn(2, 4 * channels, size, size), torch.randn(4 * channels, channels, 3, 3)
    assert set(started(lambda x, w: aten.convolution.default(x, w, None, *rest), x, w)) == {Family.GROUPED}
    both = [True, True, False]
    backward = started(lambda g, x, w: aten.convolution_backward.default(g, x, w, None, *rest, both), x.clone(), x, w)
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    assert set(backward) == {Family.GROUPED_INPUT, weight if wide or size > 3 else Family.GROUPED_PRODUCTS}


@pytest.mark.parametrize(
    "channels, gradient", [(500, Family.IMAGEWISE_INPUT), (512, Family.ALIASED_INPUT), (1024, Family.ALIASED_INPUT)]
)
def test_rows_of_a_weight_in_one_place_of_the_cache(channels, gradient):
    """At one thread 1x1 convolutions of few images go image by image."""
    rest = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    x, w, g = torch.randn(2, channels, 3, 3), torch.randn(64, channels, 1, 1), torch.randn(2, 64, 3, 3)
    assert set(started(lambda x, w: aten.convolution.default(x, w, None, *rest), x, w)) == {Family.IMAGEWISE}
    mask = [True, False, False]
    backward = lambda g, x, w: aten.convolution_backward.default(g, x, w, None, *rest, mask)
    assert set(started(backward, g, x, w)) == {gradient}


def test_a_transposed_input_of_a_convolution_is_copied_first():
    w = torch.randn(8, 16, 3)
    forward = lambda x, w: aten.convolution.default(x, w, None, [1], [0], [1], False, [0], 1)
    tokens = torch.randn(4, 50, 16)
    assert Family.COPY not in started(forward, tokens.transpose(1, 2).contiguous(), w)
    copied = started(lambda x, w: forward(x.transpose(1, 2), w), tokens, w)
    assert copied[Family.COPY].bytes == 2 * tokens.numel() * 4
    assert copied[Family.COPY].items == 0  # no launch of its own
