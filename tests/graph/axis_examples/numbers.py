"""Calls of random operators and factories."""

from __future__ import annotations

from collections.abc import Iterator

from tests.graph.axis_examples._calls import call, floats, positive
from tests.graph.axis_rule_oracle import Call


def random() -> Iterator[Call]:
    x = positive(3, 4)
    for args in ((0.5, True), (0.5, False)):
        yield call("native_dropout", x, *args)
        yield call("dropout", x, *args)
        yield call("alpha_dropout", x, *args)
        yield call("feature_dropout", floats(2, 3, 4), *args)
        yield call("feature_alpha_dropout", floats(2, 3, 4), *args)
    yield call("native_dropout_backward", x, x > 0.5, 2.0)
    for name in ("rand_like", "randn_like", "zeros_like", "ones_like", "empty_like", "bernoulli", "poisson"):
        yield call(name, x)
    yield call("randint_like", x, 5)
    yield call("bernoulli.p", x, 0.5)
    yield call("full_like", x, 2.0)
    for name in ("uniform", "normal_functional", "exponential", "geometric", "cauchy", "log_normal", "random"):
        yield call(name, x, *([0.5] if name == "geometric" else []))
    yield call("normal.Tensor_float", x)
    yield call("normal.Tensor_Tensor", x, positive(3, 4))
    yield call("multinomial", x, 2)
    yield call("zero", x)
    yield call("fill.Scalar", x, 1.0)
    yield call("copy", x, floats(4))
    for name in ("new_zeros", "new_ones", "new_empty"):
        yield call(name, x, [2, 5])
    yield call("new_full", x, [2, 5], 1.0)
    yield call("new_empty_strided", x, [2, 5], [5, 1])
    for name in ("arange", "eye", "randperm"):
        yield call(name, 5)
    yield call("linspace", 0, 1, 5)
    yield call("logspace", 0, 1, 5)
    yield call("tril_indices", 3, 4)
    yield call("triu_indices", 3, 4)
    for name in ("zeros", "ones", "rand", "randn"):
        yield call(name, [2, 5])
    yield call("empty.memory_format", [2, 5])
    yield call("empty_strided", [2, 5], [5, 1])
    yield call("full", [2, 5], 1.0)
    yield call("randint", 5, [2, 5])
    yield call("scalar_tensor", 1.0)
