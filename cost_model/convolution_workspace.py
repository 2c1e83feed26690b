"""Workspace of convolutions on the CPU: oneDNN's reordered operands, and im2col where it is not used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.cost_model.convolution_backends import uses_onednn
from graphopt.cost_model.kernel_sizes import (
    Moments,
    Shape,
    Sizes,
    channels_last,
    contiguous,
    reaches,
    suggests_channels_last,
    tensor_of,
)
from graphopt.graph.op_rules.arguments import operand
from graphopt.graph.sizes import Expr, product

_WIDE = "AVX512" in torch.backends.cpu.get_cpu_capability()

_LANES = 16 if _WIDE else 8
"""Channels in a block of oneDNN's memory layout."""

_IMAGES = (1, 2, 3) if _WIDE else (3,)
"""Numbers of channels of an input that oneDNN does not reorder for the gradient of the weight."""

_LARGEST_WINDOW = 14 if _WIDE else 13
"""The widest window for which it has a direct kernel of that gradient."""

LARGEST_DEPTHWISE = 3
"""The same of depthwise convolutions."""


@dataclass(frozen=True)
class _Convolution:
    """One convolution, all sizes in bytes: input ``x``, weight ``w`` and output ``y``, in oneDNN's layout too."""

    x: Expr
    w: Expr
    y: Expr
    x_blocked: Expr
    w_blocked: Expr
    y_blocked: Expr
    w_blocked_once: Expr  # only its output channels
    for_weight: tuple[Expr, Expr, Expr]  # input, weight and output as the gradient of the weight takes them
    columns: Expr  # of im2col, which the kernels without oneDNN use
    group_column: Expr  # the same of one image and one group
    copies: Expr  # of operands that are not in the layout chosen
    onednn: Expr  # 1 where oneDNN is used, else 0
    w_last: Expr  # the gradient of the weight in oneDNN's layout, channels last
    channels_last: bool  # operands and result are in that layout, which oneDNN takes as it is
    in_channels: Expr
    strided: bool
    gemm: bool  # oneDNN has no direct kernel for these groups: a matrix product over columns
    weight_by_gemm: bool  # the same for the gradient of the weight only, whose window is dilated or too large

    def moments(self, onednn: Sequence[Expr], plain: Sequence[Expr]) -> Moments:
        """Those of the kernel that is used."""
        if self.onednn == 1:
            return [m + self.copies for m in onednn]
        chosen = [self.onednn * m for m in onednn] + [(1 - self.onednn) * m for m in plain]
        return [m + self.copies for m in chosen]

    def forward(self) -> Moments:
        """oneDNN reorders input and weight, computes, and copies the result back."""
        if self.channels_last:
            return [self.w_blocked]
        if self.gemm:
            return [self.group_column, self.y]
        if isinstance(self.in_channels, int) and self.in_channels < _LANES:  # the first layer's input is read as it is
            return [self.w_blocked_once + self.y_blocked - self.y, self.y_blocked]
        return [self.x_blocked + self.w_blocked + self.y_blocked - self.y, self.y_blocked]

    def transposed_forward(self) -> Moments:
        """The same with a copy of the result in its place."""
        return [self.x_blocked + self.w_blocked + self.y_blocked - self.y, self.y_blocked + self.y]

    def backward(self, data: bool, weight: bool) -> Moments:
        """First the gradient of the input, then that of the weight; each is copied out of oneDNN's layout."""
        if self.channels_last:
            return [(self.w_last if weight else self.w_blocked) + self.w]
        results = (self.x if data else 0) + (self.w if weight else 0)
        held = self.x if data else 0
        x, w, y = self.x_blocked, self.w_blocked, self.y_blocked
        moments: Moments = []
        if data and self.gemm:
            moments += [self.x + self.group_column, 2 * self.x]
        elif data:
            moments += [x + w + y, x + self.x * (2 if self.strided else 1)]
        if weight:
            x, w, y = self.for_weight
            if self.gemm or self.weight_by_gemm:
                x, w, y = self.group_column, self.w, 4 * self.w
            moments += [held + x + w + y, held + w + self.w]
        return [m - results for m in moments]


def _convolution_of(node: fx.Node, sizes: Sizes, operands: Sequence[Any], y: Shape) -> _Convolution:
    """Sizes of a convolution of ``operands`` (input, weight, in backward the gradient) with output shape ``y``."""
    x, w, *_ = operands
    image, kernel = sizes.shape(x), sizes.shape(w)
    itemsize = tensor_of(x).element_size()
    groups, transposed = operand(node, "groups"), operand(node, "transposed")
    strided = any(s != 1 for s in operand(node, "stride"))
    dilated = any(d != 1 for d in operand(node, "dilation"))
    padded = any(p != 0 for p in operand(node, "padding"))
    window = list(kernel[2:])
    n = image[0]
    pointwise = all(k == 1 for k in window)
    onednn = uses_onednn(node, tensor_of(x), image, kernel, sizes.threads)
    unfolded, places = (y[1], image[2:]) if transposed else (image[1], y[2:])
    one_column = product([unfolded, *window, *places]) * itemsize
    group_column = product([unfolded // groups, *window, *places]) * itemsize
    columns = 0 if pointwise and not strided and not padded else one_column * (1 if transposed else n)
    in_channels = kernel[0] if transposed else kernel[1] * groups
    depthwise = groups > 1 and groups == in_channels
    nhwc = any(suggests_channels_last(tensor_of(o)) for o in (x, w))
    fits = channels_last if nhwc else contiguous

    def blocked(shape: Shape, *dims: int, lanes: int = _LANES) -> Expr:
        return product(_padded(s, lanes) if i in dims else s for i, s in enumerate(shape)) * itemsize

    small = y if transposed else image
    few = isinstance(in_channels, int) and in_channels < 4
    x_blocked = blocked(image) if few and strided else blocked(image, 1)
    w_blocked = blocked(kernel, 0) if groups > 1 else blocked(kernel, 0, 1)
    widest = LARGEST_DEPTHWISE if depthwise else _LARGEST_WINDOW
    large = reaches(window[-1], widest + 1) if depthwise else 0
    w_last = large * padded_depthwise_weight(kernel, itemsize) + (1 - large) * w_blocked
    for_weight = x_blocked, w_blocked, blocked(y, 1)
    if in_channels in _IMAGES and groups == 1:  # read as they are
        for_weight = 0, blocked(kernel, 0), blocked(y, 1)
    elif (
        _WIDE and isinstance(in_channels, int) and in_channels < _LANES and groups == 1
    ):  # by the kernel for narrower registers
        for_weight = blocked(image, 1, lanes=8), blocked(kernel, 0, 1, lanes=8), blocked(y, 1, lanes=8)
    return _Convolution(
        x=product(image) * itemsize, w=product(kernel) * itemsize, y=product(y) * itemsize,
        x_blocked=x_blocked, y_blocked=blocked(y, 1), w_blocked=w_blocked, w_blocked_once=blocked(kernel, 0),
        for_weight=for_weight, w_last=w_last,
        columns=columns, group_column=group_column, onednn=onednn, in_channels=image[1], strided=strided,
        channels_last=nhwc, copies=sum((sizes.nbytes(o) for o in operands if not fits(tensor_of(o))), 0),
        gemm=not depthwise and _unfit(kernel, groups, 4 if _WIDE else _LANES),
        weight_by_gemm=dilated or (not depthwise and by_products(kernel, groups, small)) or any(
            isinstance(k, int) and (k > widest or (isinstance(s, int) and s < k and not _WIDE))
            for s, k in zip(small[2:], window, strict=True)
        ),
    )  # fmt: skip


def by_products(kernel: Shape, groups: int, image: Shape) -> bool:
    """Whether oneDNN makes the gradient of a grouped weight by plain products, image by image and group by group: it
    has kernels for groups of 8 channels; where the window is wider than the image, for groups of 16, and only for
    registers that hold as many."""
    narrow = any(isinstance(s, int) and isinstance(k, int) and s < k for s, k in zip(image[2:], kernel[2:]))
    return _unfit(kernel, groups, 16 if narrow else 8) or (groups > 1 and narrow and not _WIDE)


def _unfit(kernel: Shape, groups: int, lanes: int) -> bool:
    """Whether the channels of a group, in or out, are no multiple of so many."""
    per_group = (kernel[0] // groups, kernel[1])
    return groups > 1 and any(isinstance(c, int) and c % lanes for c in per_group)


def padded_depthwise_weight(kernel: Shape, itemsize: int) -> Expr:
    """Bytes of the gradient of a depthwise weight as a kernel for dense weights makes it: each channel is padded to a
    block of channels in and out. oneDNN takes such a kernel, channels last, for windows beyond
    `LARGEST_DEPTHWISE`."""
    return product(kernel) * _LANES**2 * itemsize


def _padded(channels: Expr, lanes: int) -> Expr:
    return -(-channels // lanes) * lanes if isinstance(channels, int) else channels


def convolution(node: fx.Node, sizes: Sizes) -> Moments:
    """Of ``aten.convolution``."""
    found = _convolution_of(node, sizes, node.args[:2], sizes.shape(node))
    work = found.transposed_forward() if operand(node, "transposed") else found.forward()
    return found.moments(work, [found.columns])


def convolution_backward(node: fx.Node, sizes: Sizes) -> Moments:
    """Of ``aten.convolution_backward``."""
    gradient, x, w = node.args[:3]
    found = _convolution_of(node, sizes, (x, w, gradient), sizes.shape(gradient))  # type: ignore[arg-type]
    data, weight, _ = operand(node, "output_mask")
    return found.moments(found.backward(data, weight), [found.columns])
