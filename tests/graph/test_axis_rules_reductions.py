"""What operators reduce: by hand for the kinds, and by execution: parts of an axis, reduced apart and joined."""

from typing import Any

import pytest
import torch

from graphopt.graph.axes import Dim, Form
from graphopt.graph.op_rules import Reduction, reductions
from tests.graph.axis_examples import calls
from tests.graph.axis_examples._calls import below, call, floats, positive
from tests.graph.axis_rule_oracle import Call, Seen, analysed, permutable

f = floats
IMAGE, VECTOR, PLAIN = f(3, 4, 5, 2), f(4), ([1, 1], [0, 0], [1, 1], False, [0, 0])
PLACES = (("self", 0), ("self", 2), ("self", 3))


def R(
    kind: str, *places: tuple[str, int], result: int = 0, kept: bool = False, count: str = "", groups: int = 1
) -> Any:
    return Reduction(kind, places, result, kept, count, groups)


BY_HAND: list[tuple[Call, list[Reduction] | None]] = [
    (call("mm", f(2, 3), f(3, 4)), [R("sum", ("self", 1), ("mat2", 0))]),
    (call("addmm", f(4), f(2, 3), f(3, 4)), [R("sum", ("mat1", 1), ("mat2", 0))]),
    (call("addbmm", f(2, 4), f(5, 2, 3), f(5, 3, 4)),
     [R("sum", ("batch1", 0), ("batch1", 2), ("batch2", 0), ("batch2", 1))]),
    (call("linear", f(6, 2, 3), f(4, 3)), [R("sum", ("input", 2), ("weight", 1))]),
    (call("einsum", "bh,oh->bo", [f(2, 4), f(3, 4)]), [R("sum", ("tensors.0", 1), ("tensors.1", 1))]),
    (call("einsum", "b...h->h...", [f(2, 3, 5, 4)]), [R("sum", ("tensors.0", 0))]),
    (call("outer", f(2), f(3)), []),
    (call("sum.dim_IntList", f(2, 3), [-1]), [R("sum", ("self", 1))]),
    (call("mean.dim", f(2, 3), [0]), [R("mean", ("self", 0), count="indices")]),
    (call("amax", f(2, 3), [0]), [R("max", ("self", 0))]),
    (call("max.dim", f(2, 3), 1), [R("max", ("self", 1)), R("argmax", ("self", 1), result=1)]),
    (call("logsumexp", f(2, 3), [1]), [R("logsumexp", ("self", 1))]),
    (call("_softmax", f(2, 3), -1, False), [R(k, ("self", 1), kept=True) for k in ("max", "sum")]),
    (call("_softmax_backward_data", f(2, 3), f(2, 3), 1, torch.float64), [R("sum", ("grad_output", 1), kept=True)]),
    (call("native_layer_norm", f(2, 3), [3], None, None, 1e-5),
     [*(R(k, ("input", 1), kept=True, count="indices") for k in ("mean", "variance")),
      *(R(k, ("input", 1), result=i, count="indices") for i, k in ((1, "mean"), (2, "variance")))]),
    (call("layer_norm", f(2, 3), [3]), [R(k, ("input", 1), kept=True, count="indices") for k in ("mean", "variance")]),
    (call("batch_norm", IMAGE, VECTOR, VECTOR, VECTOR, positive(4), True, 0.1, 1e-5, False),
     [R(k, ("input", 0), ("input", 2), ("input", 3), kept=True, count="indices") for k in ("mean", "variance")]),
    (call("batch_norm", IMAGE, VECTOR, VECTOR, VECTOR, positive(4), False, 0.1, 1e-5, False), []),
    (call("_native_batch_norm_legit_no_training", IMAGE, VECTOR, VECTOR, VECTOR, positive(4), 0.1, 1e-5), []),
    (call("group_norm", f(3, 4, 5), 2),
     [R(k, ("input", 1), ("input", 2), kept=True, count="indices", groups=2) for k in ("mean", "variance")]),
    (call("mse_loss", f(2, 3), f(2, 3), 1), [R("mean", ("self", 0), ("self", 1), count="indices")]),
    (call("mse_loss", f(2, 3), f(2, 3), 2), [R("sum", ("self", 0), ("self", 1))]),
    (call("mse_loss", f(2, 3), f(2, 3), 0), []),
    (call("nll_loss_forward", f(3, 5), below(5, 3), None, 1, -100),
     [R("mean", ("self", 0), ("target", 0), count="data"), R("sum", ("target", 0), result=1)]),
    (call("nll_loss_forward", f(3, 5), below(5, 3), None, 0, -100), []),
    (call("cross_entropy_loss", f(3, 5), below(5, 3)),
     [R("logsumexp", ("self", 1)), R("mean", ("self", 0), ("target", 0), count="data")]),
    (call("convolution", f(2, 4, 5, 6), f(6, 4, 3, 3), None, *PLAIN, 1), [R("sum", ("input", 1), ("weight", 1))]),
    (call("convolution", f(2, 4, 5, 6), f(6, 2, 3, 3), None, *PLAIN, 2),
     [R("sum", ("input", 1), ("weight", 1), groups=2)]),
    (call("adaptive_avg_pool2d", f(2, 3, 4, 5), [1, 1]), [R("mean", ("self", 2), ("self", 3), count="indices")]),
    (call("embedding", f(5, 3), below(5, 2)), []),
    (call("embedding_dense_backward", f(2, 3), below(5, 2), 5, -1, False),
     [R("sum", ("grad_output", 0), ("indices", 0))]),
    (call("scaled_dot_product_attention", f(2, 4, 5, 6), f(2, 4, 7, 6), f(2, 4, 7, 3)),
     [R("sum", ("query", 3), ("key", 3), kept=True), R("max", ("key", 2)), R("sum", ("key", 2), ("value", 2))]),
    (call("relu", f(2)), []),
    (call("view", f(6), [2, 3]), []),
    (call("scatter_add", f(4, 5), 1, below(5, 4, 3), f(4, 3)), None),
    (call("linalg_inv_ex", f(3, 3)), None),
]  # fmt: skip


@pytest.mark.parametrize("example, expected", BY_HAND, ids=[str(e[0].operator) for e in BY_HAND])
def test_reductions(example: Call, expected: list[Reduction] | None) -> None:
    found = reductions(analysed(example).node)
    assert (found if found is None else list(found)) == expected


JOINED = {
    "sum": lambda a, b, n, m: a + b,
    "mean": lambda a, b, n, m: (n * a + m * b) / (n + m),
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
    "any": torch.logical_or,
    "all": torch.logical_and,
    "logsumexp": lambda a, b, n, m: torch.logaddexp(a, b),
    "norm": lambda a, b, n, m: (a**2 + b**2) ** 0.5,
}


def joins(seen: Seen, reduction: Reduction) -> bool:
    """Whether the reduction of each axis is the joined reductions of two parts of it, all other axes as they are."""
    names = [a.name for a in seen.call.operator._schema.arguments]
    given: dict[str, Any] = dict(zip(names, seen.node.args)) | dict(seen.node.kwargs)
    given |= {f"{n}.{i}": v for n, listed in given.items() if isinstance(listed, list) for i, v in enumerate(listed)}
    nodes = [n for n in seen.node.graph.nodes if n.op == "placeholder"]
    for name, d in reduction.places:
        dim: Dim = seen.operands[nodes.index(given[name])][d]
        size = dim.count({})
        if dim.form is not Form.AXIS or size < 2 or not all(map(permutable, dim.axes())):
            continue  # positions of windows reach over the border
        halves = [_results(seen, dim, part)[reduction.result] for part in (slice(0, 1), slice(1, size))]
        if reduction.kind in ("max", "min") or reduction.kind in ("product", "any", "all"):
            whole = JOINED[reduction.kind](*halves)
        else:
            whole = JOINED[reduction.kind](*halves, 1, size - 1)
        if not torch.allclose(whole, seen.values[reduction.result], 1e-6, 1e-8, equal_nan=True):
            return False
    return True


def _results(seen: Seen, dim: Dim, part: slice) -> list[torch.Tensor]:
    tensors = []
    for tensor, dims in zip(seen.call.tensors(), seen.operands, strict=True):
        where = tuple(part if d == dim else slice(None) for d in dims)
        tensors.append(tensor[where].contiguous())
    found = seen.call.run(tensors)
    return list(found) if isinstance(found, (tuple, list)) else [found]


SKIPPED = ("bernoulli", "nanmean", "cross_entropy", "fused", "layer_norm", "group_norm")


@pytest.mark.parametrize("subject", ["products", "convolutions", "normalisation", "losses", "reductions", "gathers"])
def test_parts_reduced_apart_are_joined_by_the_kind(subject: str) -> None:
    """Reductions that are gone in the result, except where an operand is added, or data say what counts."""
    checked = 0
    for example in calls(subject):
        if any(word in str(example.operator) for word in SKIPPED) or example.kernel is not None:
            continue
        seen = analysed(example)
        for r in reductions(seen.node) or ():
            added = {"bias", "self"} & {a.name for a in example.operator._schema.arguments} and _adds(example)
            if r.kind in JOINED and not r.kept and r.count != "data" and r.groups == 1 and not added:
                assert joins(seen, r), (str(example.operator), r, [tuple(t.shape) for t in example.tensors()])
                checked += 1
    assert checked > 4


def _adds(example: Call) -> bool:
    """Whether a bias or a matrix is added to the product."""
    arguments = dict(zip((a.name for a in example.operator._schema.arguments), example.args))
    return arguments.get("bias") is not None or example.operator._opname.startswith(("add", "badd"))
