"""Python numbers whose arithmetic is recorded: hyper-parameters and step counts while an update is traced."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from graphopt.errors import CaptureError

COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


@dataclass(frozen=True)
class Guard:
    """A fact about a hyper-parameter that a graph relies on: whether ``value comparison bound`` holds."""

    name: str
    field: str
    comparison: str
    bound: float
    holds: bool

    def admits(self, value: float) -> bool:
        """Whether the graph is valid for ``value``."""
        return COMPARISONS[self.comparison](value, self.bound) == self.holds

    def __str__(self) -> str:
        return f"{'' if self.holds else 'not '}{self.name}.{self.field} {self.comparison} {self.bound}"


class NumberRecorder(Protocol):
    """Who records what is done with a `TracedNumber`."""

    def number(self, op: Callable[..., Any], *operands: Any) -> TracedNumber: ...

    def decide(self, number: TracedNumber, comparison: str, bound: float) -> bool: ...


class NumberNode:
    """What torch's argument parser carries from a `TracedNumber` to the operator."""

    def __init__(self, recorder: NumberRecorder, node: fx.Node, hint: Any):
        self.recorder, self.node, self.hint = recorder, node, hint

    def is_float(self) -> bool:
        return True

    def is_int(self) -> bool:
        return False

    is_bool = is_constant = is_nested_int = is_int

    def guard_float(self, file: str, line: int) -> float:
        raise CaptureError(f"the value of %{self.node.name} is asked for while tracing, not only computed with")


class TracedNumber(torch.SymFloat):
    """A Python number whose arithmetic is recorded. Operators take it wherever they take a ``torch.SymFloat``."""

    node: NumberNode

    def __neg__(self) -> TracedNumber:
        return self.node.recorder.number(operator.neg, self)

    def __bool__(self) -> bool:
        return self.node.recorder.decide(self, "!=", 0)

    def __float__(self) -> float:
        return self.node.guard_float("", 0)

    __int__ = __float__  # type: ignore[assignment]
    __hash__ = object.__hash__


def _arithmetic(op: Callable[..., Any], *, reflected: bool) -> Callable[..., Any]:
    def method(self: TracedNumber, other: Any) -> Any:
        if not isinstance(other, (int, float, torch.SymFloat)):
            return NotImplemented
        return self.node.recorder.number(op, *((other, self) if reflected else (self, other)))

    return method


def _comparison(symbol: str) -> Callable[..., Any]:
    def method(self: TracedNumber, other: Any) -> Any:
        return self.node.recorder.decide(self, symbol, other) if isinstance(other, (int, float)) else NotImplemented

    return method


for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(TracedNumber, f"__{_name}__", _arithmetic(getattr(operator, _name), reflected=False))
    setattr(TracedNumber, f"__r{_name}__", _arithmetic(getattr(operator, _name), reflected=True))
for _symbol, _function in COMPARISONS.items():
    setattr(TracedNumber, f"__{_function.__name__}__", _comparison(_symbol))
