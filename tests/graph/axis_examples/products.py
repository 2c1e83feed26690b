"""Calls of products, sums of products and Fourier transforms."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.graph.axis_examples._calls import call, floats, stand_in
from tests.graph.axis_rule_oracle import Call


def products() -> Iterator[Call]:
    m, v = floats(3, 4), floats(4)
    yield call("mm", m, floats(4, 5))
    yield call("bmm", floats(2, 3, 4), floats(2, 4, 5))
    yield call("mv", m, v)
    yield call("dot", v, floats(4))
    yield call("outer", v, floats(3))
    yield call("ger", v, floats(3))
    yield call("vdot", v, floats(4))
    yield call("cdist", floats(3, 4), floats(5, 4))
    yield call("cdist", floats(2, 3, 4), floats(1, 5, 4))
    for added in (floats(5), floats(3, 5), floats(3, 1), floats(1)):
        yield call("addmm", added, m, floats(4, 5))
    yield call("baddbmm", floats(2, 3, 5), floats(2, 3, 4), floats(2, 4, 5))
    yield call("baddbmm", floats(3, 5), floats(2, 3, 4), floats(2, 4, 5))
    yield call("addbmm", floats(3, 5), floats(2, 3, 4), floats(2, 4, 5))
    yield call("addmv", floats(3), m, v)
    for left, right in [((4,), (4,)), ((3, 4), (4,)), ((4,), (4, 5)), ((3, 4), (4, 5)), ((2, 3, 4), (4, 5)),
                        ((2, 3, 4), (4,)), ((4,), (2, 4, 5)), ((6, 1, 3, 4), (2, 4, 5)),
                        ((3, 4), (2, 4, 5))]:  # fmt: skip
        yield call("matmul", floats(*left), floats(*right))
        yield call("linalg_matmul", floats(*left), floats(*right))
    for shape in ((4,), (3, 4), (2, 3, 4)):
        yield call("linear", floats(*shape), floats(5, 4), floats(5))
        yield call("linear", floats(*shape), floats(5, 4))
    yield call("linear", floats(3, 4), floats(4))
    yield call("bilinear", floats(3, 4), floats(3, 5), floats(6, 4, 5), floats(6))
    for equation, *shapes in [
        ("ij,jk->ik", (2, 3), (3, 4)), ("bij,bjk", (2, 3, 4), (2, 4, 5)), ("...i,oi->...o", (2, 3, 4), (5, 4)),
        ("i,j->ij", (2,), (3,)), ("ii->i", (3, 3)), ("ij->", (2, 3)), ("b...h,h...->b", (2, 3, 4), (4, 3)),
        ("ab,bc,cd->ad", (2, 3), (3, 4), (4, 5)), ("...ij,...jk", (2, 1, 3, 4), (5, 4, 2)),
        ("ij,ij->i", (2, 3), (2, 1)),
    ]:  # fmt: skip
        yield call("einsum", equation, [floats(*s) for s in shapes])
    for name in ("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft"):
        yield call(name, floats(3, 4))
        yield call(name, floats(3, 4), None, 0)
    for name in (f"fft_{kind}fft{rank}" for kind in ("", "i", "r", "ir") for rank in "2n"):
        yield call(name, floats(2, 3, 4), None, [-2, -1])
    for signal in (floats(16), floats(3, 16)):
        yield call("stft", signal, 6, 2, 4, floats(4), return_complex=True)
        yield call("stft", signal, 6, return_complex=False)
    grad = lambda x, g, w, mask: (g @ w, g.flatten(0, -2).T @ x.flatten(0, -2), g.flatten(0, -2).sum(0))
    for name in ("linear_backward", "mkldnn_linear_backward"):
        yield stand_in(name, grad, floats(2, 3, 4), floats(2, 3, 5), floats(5, 4), [True] * 3)
    grads = lambda g, a, b, mask: (g @ b.mT, (a.mT @ g).sum(0))
    yield stand_in("matmul_backward", grads, floats(2, 3, 5), floats(2, 3, 4), floats(4, 5), [True] * 2)
    yield stand_in("_scaled_mm", lambda a, b, *scales: a @ b, m, floats(4, 5), floats(1), floats(1))
    yield call("_grouped_mm", torch.randn(3, 2, 8).bfloat16(), torch.randn(3, 8, 16).bfloat16())
    yield call("_grouped_mm", torch.randn(6, 8).bfloat16(), torch.randn(3, 8, 16).bfloat16(),
               torch.tensor([2, 3, 6], dtype=torch.int32))  # fmt: skip
