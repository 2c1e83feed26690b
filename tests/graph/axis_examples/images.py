"""Calls of convolutions, pooling, resampling and padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.graph.axis_examples._calls import aten, call, floats, positive, stand_in
from tests.graph.axis_rule_oracle import Call


def convolutions() -> Iterator[Call]:
    plain = ([1, 1], [0, 0], [1, 1], False, [0, 0])
    for name in ("convolution", "convolution_overrideable"):
        yield stand_in(name, aten.convolution, floats(2, 4, 5, 6), floats(6, 4, 3, 2), floats(6), *plain, 1)
    cudnn = lambda x, w, padding, *rest: aten.convolution(x, w, None, [1, 1], padding, [1, 1], False, [0, 0], 2)
    rest = ([0, 0], [1, 1], [1, 1], 2, False, False, True)
    yield stand_in("cudnn_convolution", cudnn, floats(2, 4, 5, 6), floats(6, 2, 3, 3), *rest)
    for groups in (1, 2, 4):
        yield call("convolution", floats(2, 4, 5, 6), floats(8, 4 // groups, 3, 3), floats(8), *plain, groups)
        transposed = ([2, 1], [1, 0], [1, 1], True, [1, 0], groups)
        yield call(
            "convolution", floats(2, 4, 5, 6), floats(4, 6 // groups if groups < 4 else 2, 3, 3), None, *transposed
        )
    yield call("convolution", floats(2, 4, 5, 6), floats(6, 4, 1, 1), None, *plain, 1)
    yield call("convolution", floats(2, 4, 5, 6), floats(6, 4, 1, 1), None, [2, 2], *plain[1:], 1)
    yield call("convolution", floats(2, 4, 5, 6), floats(6, 4, 5, 6), None, *plain, 1)
    yield call("_convolution", floats(2, 4, 5), floats(6, 2, 3), floats(6), [1], [1], [1], False, [0], 2, *[False] * 4)
    yield call("_slow_conv2d_forward", floats(2, 4, 5, 6), floats(6, 4, 3, 3), [3, 3], floats(6), [1, 1], [0, 0])
    for rank, sizes in ((1, (5,)), (2, (5, 6)), (3, (3, 4, 5))):
        for batch in ((2,), ()):
            image, kernel = floats(*batch, 4, *sizes), [2] * rank
            yield call(f"conv{rank}d", image, floats(6, 2, *kernel), floats(6), [1] * rank, [0] * rank, [1] * rank, 2)
            name = f"conv_transpose{rank}d" + (".input" if rank > 1 else "")
            yield call(name, image, floats(4, 3, *kernel), floats(6), [1] * rank, [0] * rank, [0] * rank, 2)


def pooling() -> Iterator[Call]:
    sizes = {1: (6,), 2: (6, 4), 3: (4, 6, 4)}
    for rank, size in sizes.items():
        image, half = floats(2, 3, *size), [2] * rank
        yield call(f"avg_pool{rank}d", image, half)
        yield call(f"avg_pool{rank}d", image, list(size))
        yield call(f"max_pool{rank}d", image, half)
        yield call(f"max_pool{rank}d_with_indices", image, half)
        for out in ([1] * rank, half, list(size)):
            yield call(f"adaptive_avg_pool{rank}d", image, out)
            yield call(f"adaptive_max_pool{rank}d", image, out)
        if rank > 1:
            yield call(f"fractional_max_pool{rank}d", image, half, half, torch.rand(2, 3, rank).double())
            yield call(f"avg_pool{rank}d", image[0], half)
            indices = torch.stack([torch.randperm(24)[: 2**rank] for _ in range(6)]).view(2, 3, *half)
            options = [half, [0] * 3] if rank == 3 else []
            yield call(f"max_unpool{rank}d", floats(2, 3, *half), indices, list(size), *options)
            name = f"fractional_max_pool{rank}d_backward"
            yield call(name, floats(2, 3, *half), image, half, half, indices)
        double = [2 * s for s in size]
        yield call(f"upsample_nearest{rank}d", image, double)
        yield call(f"upsample_nearest{rank}d.vec", image, double, None)
        yield call(f"_upsample_nearest_exact{rank}d", image, double)
        linear = {1: "linear1d", 2: "bilinear2d", 3: "trilinear3d"}[rank]
        yield call(f"upsample_{linear}", image, double, False)
        yield call(f"upsample_{linear}.vec", image, double, True, None)
        for kind in ("reflection", "replication"):
            yield call(f"{kind}_pad{rank}d", image, [1, 0] * rank)
    image = floats(2, 3, 6, 4)
    yield call("upsample_bicubic2d", image, [7, 5], False)
    yield call("upsample_bicubic2d.vec", image, [7, 5], False, None)
    yield call("_upsample_bilinear2d_aa", image, [3, 2], False)
    yield call("_upsample_bicubic2d_aa", image, [3, 2], False)
    yield call("grid_sampler_2d", image, positive(2, 5, 7, 2), 0, 0, False)
    yield call("grid_sampler", image, positive(2, 5, 7, 2), 0, 0, False)
    yield call("grid_sampler_3d", floats(2, 3, 4, 4, 4), positive(2, 5, 4, 3, 3), 0, 0, False)
    yield call("im2col", image, [2, 2], [1, 1], [0, 0], [1, 1])
    yield call("im2col", image[0], [2, 2], [1, 1], [0, 0], [2, 2])
    yield call("col2im", floats(2, 12, 15), [6, 4], [2, 2], [1, 1], [0, 0], [1, 1])
    yield call("pixel_shuffle", floats(2, 12, 3, 4), 2)
    yield call("pixel_unshuffle", floats(2, 3, 4, 6), 2)
    yield call("channel_shuffle", floats(2, 6, 4, 5), 2)
    yield call("native_channel_shuffle", floats(2, 6, 4, 5), 3)
