"""Workspace of convolutions on the CPU: oneDNN's reordered operands, and im2col where it is not used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.cost_model.kernel_sizes import Moments, Shape, Sizes, channels_last, contiguous, flag, tensor_of
from graphopt.graph.op_rules.arguments import operand
from graphopt.graph.sizes import Expr, product

_LANES = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
"""Channels in a block of oneDNN's memory layout."""


@dataclass(frozen=True)
class _Convolution:
    """Sizes of one convolution in bytes: input, weight and output; with ``_blocked``, in oneDNN's layout."""

    x: Expr
    w: Expr
    y: Expr
    x_blocked: Expr
    w_blocked: Expr
    y_blocked: Expr
    columns: Expr  # of im2col, which the kernels without oneDNN use
    group_column: Expr  # the same of one image and one group
    onednn: Expr  # 1 where oneDNN is used, else 0
    few_channels: bool  # the first layer: its input is read as it is
    strided: bool
    gemm: bool  # the gradient of the weight has no direct kernel: the window is dilated or too large

    def moments(self, onednn: Sequence[Expr], plain: Sequence[Expr]) -> Moments:
        """Those of the kernel that is used."""
        if self.onednn == 1:
            return list(onednn)
        return [self.onednn * m for m in onednn] + [(1 - self.onednn) * m for m in plain]

    def forward(self) -> Moments:
        """oneDNN reorders input and weight, computes, and copies the result back."""
        x = 0 if self.few_channels else self.x_blocked
        return [x + self.w_blocked + self.y_blocked - self.y, self.y_blocked]

    def transposed_forward(self) -> Moments:
        """The same with a copy of the result in its place."""
        return [self.x_blocked + self.w_blocked + self.y_blocked - self.y, self.y_blocked + self.y]

    def backward(self, data: bool, weight: bool) -> Moments:
        """First the gradient of the input, then that of the weight; each is copied out of oneDNN's layout."""
        results = (self.x if data else 0) + (self.w if weight else 0)
        moments: Moments = []
        if data:
            moments += [
                self.x_blocked + self.w_blocked + self.y_blocked - results,
                self.x_blocked + self.x * (2 if self.strided else 1) - results,
            ]
        if weight:
            x = 0 if self.few_channels else self.x_blocked
            held = self.x if data else 0
            work = 4 * self.w + self.group_column if self.gemm else x + self.y_blocked
            moments += [held + work + self.w_blocked - results, held + self.w_blocked + self.w - results]
        return moments


def _convolution_of(node: fx.Node, sizes: Sizes, x: fx.Node, w: fx.Node, y: Shape) -> _Convolution:
    """Sizes of the convolution with input ``x``, weight ``w`` and an output of shape ``y``."""
    image, kernel = sizes.shape(x), sizes.shape(w)
    itemsize = tensor_of(x).element_size()
    groups, transposed = operand(node, "groups"), operand(node, "transposed")
    strided = any(s != 1 for s in operand(node, "stride"))
    dilated = any(d != 1 for d in operand(node, "dilation"))
    padded = any(p != 0 for p in operand(node, "padding"))
    window = list(kernel[2:])
    n = image[0]
    pointwise = all(k == 1 for k in window)
    # aten/src/ATen/native/Convolution.cpp, use_mkldnn
    always = strided or dilated or not pointwise or sizes.threads > 1
    large = groups > 1 or (len(window) > 1 and all(isinstance(k, int) and k > 3 for k in window[-2:]))
    onednn: Expr = int(tensor_of(x).dtype is torch.float32)
    if not always:
        onednn = onednn * flag(n, 16)
    if not large:
        onednn = onednn * (flag(n, 2) if n != 1 else flag(product(image), 20481))
    unfolded, places = (y[1], image[2:]) if transposed else (image[1], y[2:])
    one_column = product([unfolded, *window, *places]) * itemsize
    group_column = product([unfolded // groups, *window, *places]) * itemsize
    columns = 0 if pointwise and not strided and not padded else one_column * (1 if transposed else n)
    in_channels = kernel[0] if transposed else kernel[1] * groups
    depthwise = groups > 1 and groups == in_channels
    nhwc = channels_last(tensor_of(x)) or channels_last(tensor_of(w))

    def blocked(shape: Shape, *dims: int) -> Expr:
        return product(_padded(s) if i in dims else s for i, s in enumerate(shape)) * itemsize

    small = isinstance(in_channels, int) and in_channels < 4 and not depthwise
    return _Convolution(
        x=product(image) * itemsize, w=product(kernel) * itemsize, y=product(y) * itemsize,
        x_blocked=0 if nhwc else blocked(image) if small else blocked(image, 1),
        w_blocked=blocked(kernel, 0) if groups > 1 or small else blocked(kernel, 0, 1),
        y_blocked=0 if nhwc else blocked(y, 1),
        columns=columns, group_column=group_column, onednn=onednn, few_channels=small, strided=strided,
        gemm=dilated or any(
            isinstance(k, int) and (k >= 14 or (depthwise and k > 3) or (isinstance(s, int) and s < k))
            for s, k in zip((y if transposed else image)[2:], window, strict=True)
        ),
    )  # fmt: skip


def _padded(channels: Expr) -> Expr:
    return -(-channels // _LANES) * _LANES if isinstance(channels, int) else channels


def convolution(node: fx.Node, sizes: Sizes) -> Moments:
    """Of ``aten.convolution``."""
    x, w = node.args[0], node.args[1]
    found = _convolution_of(node, sizes, x, w, sizes.shape(node))  # type: ignore[arg-type]
    work = found.transposed_forward() if operand(node, "transposed") else found.forward()
    copies = _copies(sizes, x)  # type: ignore[arg-type]
    return [m + copies for m in found.moments(work, [found.columns])]


def _copies(sizes: Sizes, *operands: fx.Node) -> Expr:
    """Operands in neither of the layouts that convolutions take are copied."""
    return sum(sizes.nbytes(o) for o in operands if not (contiguous(tensor_of(o)) or channels_last(tensor_of(o))))


def convolution_backward(node: fx.Node, sizes: Sizes) -> Moments:
    """Of ``aten.convolution_backward``."""
    gradient, x, w = node.args[:3]
    found = _convolution_of(node, sizes, x, w, sizes.shape(gradient))  # type: ignore[arg-type]
    data, weight, _ = operand(node, "output_mask")
    copies = _copies(sizes, gradient, x)  # type: ignore[arg-type]
    return [m + copies for m in found.moments(found.backward(data, weight), [found.columns])]
