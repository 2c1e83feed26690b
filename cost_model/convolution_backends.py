"""Which kernels torch takes for a convolution on the CPU: oneDNN's, or matrix products image by image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt.cost_model.kernel_sizes import flag, reaches
from graphopt.graph.op_rules.arguments import operand
from graphopt.graph.sizes import Expr, product


def uses_onednn(node: fx.Node, x: torch.Tensor, image: Sequence[Expr], kernel: Sequence[Expr], threads: int) -> Expr:
    """1 where oneDNN is used, 0 where it is not; an expression where the batch or a free size of the kernel decides.

    The law of ``use_mkldnn`` in aten/src/ATen/native/Convolution.cpp.

    Args:
        node: a convolution or its backward; ``x``: its (fake) input, ``image`` and ``kernel``: shapes of input, weight.
        threads: of torch.
    """
    window = list(kernel[2:])
    used: Expr = int(x.dtype is torch.float32)
    pointwise = product([1 - reaches(k, 2) for k in window])
    plain = all(s == 1 for s in operand(node, "stride")) and all(d == 1 for d in operand(node, "dilation"))
    if plain and threads == 1:
        used = used * (1 - pointwise * (1 - flag(image[0], 16)))
    large: Expr = 1 if operand(node, "groups") > 1 else 0
    if large == 0 and len(window) > 1:
        large = product([reaches(k, 4) for k in window[-2:]])
    other = flag(image[0], 2) if image[0] != 1 else flag(product(image), 20481)
    return used * (1 - (1 - large) * (1 - other))
