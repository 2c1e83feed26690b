"""Calls of views and copies."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.graph.axis_examples._calls import call, floats
from tests.graph.axis_rule_oracle import Call


def views() -> Iterator[Call]:
    x = floats(4, 6, 10)
    for shape in (
        [24, 10],
        [240],
        [2, 2, 3, 2, 5, 2],
        [4, 60],
        [-1, 5, 2],
        [8, 3, 10],
        [4, 2, 3, 10],
        [24, 2, 5],
        [1, 4, 6, 10, 1],
    ):
        yield call("view", x, shape)
        yield call("reshape", x, shape)
    yield call("view", floats(6, 4), [3, 8])
    yield call("view", floats(2, 3), [3, 2])
    yield call("_unsafe_view", x, [24, 10])
    yield call("_reshape_alias", x, [24, 10], [10, 1])
    yield call("flatten.using_ints", x, 1, -1)
    yield call("unflatten.int", x, 1, [2, 3])
    yield call("view_as", x, floats(24, 10))
    yield call("reshape_as", x, floats(24, 10))
    yield call("view.dtype", x, torch.float32)
    yield call("view.dtype", x, torch.int64)
    yield call("permute", x, [2, 0, 1])
    yield call("permute", x, [-1, 0, -2])
    yield call("t", x[0])
    yield call("t", x[0, 0])
    for name in ("transpose.int", "swapaxes", "swapdims"):
        yield call(name, x, 0, -1)
    for name in ("mT", "mH", "adjoint", "numpy_T"):
        yield call(name, x[0] if name == "numpy_T" else x)
    for name in ("movedim", "moveaxis"):
        yield call(f"{name}.int", x, 0, -1)
        yield call(f"{name}.intlist", x, [0, 2], [1, 0])
    thin = floats(1, 4, 1, 5)
    yield call("squeeze", thin)
    yield call("squeeze.dim", thin, 0)
    yield call("squeeze.dim", thin, 1)
    yield call("squeeze.dims", thin, [0, 2])
    for dim in (0, 2, -1):
        yield call("unsqueeze", x, dim)
    yield call("expand", thin, [3, 4, 2, 5])
    yield call("expand", thin, [2, -1, 4, 6, -1])
    yield call("expand_as", thin, floats(3, 4, 2, 5))
    yield call("broadcast_to", floats(4, 1), [3, 4, 5])
    for name in ("sym_size.int", "sym_stride.int"):
        yield call(name, x, 0)
    for name in ("sym_numel", "sym_storage_offset", "sym_is_contiguous"):
        yield call(name, x)
    yield call("item", x[0, 0, 0])
    yield call("_local_scalar_dense", x[0, 0, 0])
    yield call("broadcast_tensors", [floats(4, 1), floats(5), floats(3, 1, 1)])
    for dim, index in ((0, 0), (1, -1), (2, 5)):
        yield call("select.int", x, dim, index)
    for dim, start, end, step in [(0, 1, 3, 1), (2, 0, 10, 2), (2, 1, 10, 2), (2, 3, 9, 1), (1, None, -1, 1),
                                  (2, 0, 10, 3), (1, 0, 6, 1), (2, 0, 0, 1), (1, 2, 6, 2), (2, -4, 99, 1),
                                  (2, 4, 5, 1)]:  # fmt: skip
        yield call("slice.Tensor", x, dim, start, end, step)
    yield call("narrow", x, 1, 2, 3)
    yield call("narrow", x, 1, -2, 2)
    for name in ("split.Tensor", "unsafe_split.Tensor"):
        yield call(name, x, 4, 2)
    for name in ("chunk", "unsafe_chunk"):
        yield call(name, x, 3, 2)
    yield call("split_with_sizes", x, [2, 5, 3], 2)
    yield call("unsafe_split_with_sizes", x, [2, 5, 3], 2)
    yield call("ravel", x)
    yield call("split_with_sizes", x, [2, 0, 8], 2)
    yield call("split.sizes", x, [1, 3], 0)
    yield call("tensor_split.sections", x, 3, -1)
    yield call("tensor_split.indices", x, [2, 3], 1)
    yield call("unbind.int", x, 1)
    yield call("unfold", x, 2, 5, 5)
    yield call("unfold", x, 2, 4, 3)
    yield call("unfold_copy", x, 1, 2, 2)
    yield call("diagonal", x)
    yield call("diagonal", floats(4, 4, 3), 1)
    yield call("as_strided", x, [4, 6, 10], [60, 10, 1])
    yield call("as_strided", x, [6, 4], [10, 60])
    yield call("view_as_real", torch.randn(3, 4, dtype=torch.complex128))
    yield call("view_as_complex", floats(3, 4, 2))
    for name in ("_conj", "conj", "_neg_view", "resolve_conj", "resolve_neg"):
        yield call(name, torch.randn(3, 4, dtype=torch.complex128))
    for dim in (0, -1):
        parts = [floats(2, 4), floats(2, 4)] if dim else [floats(1, 4), floats(3, 4), floats(2, 4)]
        yield call("cat", parts, dim)
        yield call("concat", parts, dim)
        yield call("concatenate", parts, dim)
        yield call("stack", parts[:1] * 2, dim)
    yield call("cat", [floats(0), floats(2, 4)], 1)
    for name, first, second in (("hstack", (2, 3), (2, 4)), ("vstack", (3, 2), (4, 2)), ("row_stack", (3, 2), (4, 2)),
                                ("dstack", (2, 3, 1), (2, 3, 4)), ("hstack", (3,), (4,))):  # fmt: skip
        yield call(name, [floats(*first), floats(*second)])
    yield call("stack", [floats(3, 4), floats(3, 4), floats(3, 4)], 1)
    yield call("constant_pad_nd", x, [1, 2])
    yield call("constant_pad_nd", x, [0, 0, -1, 2, 1, 0], 3.0)
    yield call("constant_pad_nd", x, [-2, -3])
    yield call("pad", x, [1, 2, 0, 1])
    yield call("pad", x, [1, 2], "reflect")
    yield call("flip", x, [1, 2])
    yield call("roll", x, [1, 2], [0, 2])
    yield call("roll", floats(4, 5), [3])
    yield call("tril", x)
    yield call("triu", x, 1)
    yield call("repeat", floats(3, 4), [2, 1, 5])
    yield call("tile", floats(3, 4), [2])
    yield call("repeat_interleave.self_int", floats(3, 4), 2, 1)
    yield call("repeat_interleave.self_int", floats(3, 4), 2)
    for indexing in ("ij", "xy"):
        yield call("meshgrid.indexing", [floats(3), floats(4), floats(2)], indexing=indexing)
    yield call("meshgrid", [floats(3), floats(4)])
