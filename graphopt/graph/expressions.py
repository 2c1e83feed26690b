"""Sympy expressions as JSON and back: sizes, guards and other symbolic numbers of a saved graph.

An expression is a nested list ``[head, argument, ...]`` over a fixed set of heads; integers stand for
themselves, strings name symbols: ``["Mul", 2, "batch"]``. Nothing is parsed as code: an unknown head is an error.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import sympy
from torch.utils._sympy import functions as torch_functions

from graphopt.errors import GraphoptError, LoadError

MAX_NODES, MAX_DEPTH = 2000, 100
"""An expression with more nodes or of more levels than this is refused: real ones have tens."""

_UNARY = ("sqrt", "exp", "log", "log2", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh")
_TORCH_HEADS = (
    *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "Max", "Min", "Identity"),
    *("CeilToInt", "FloorToInt", "TruncToInt", "TruncToFloat", "RoundToInt", "RoundDecimal", "ToFloat"),
    *("PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator"),
    *(f"OpaqueUnaryFn_{name}" for name in _UNARY),
    *(f"BitwiseFn_bitwise_{name}" for name in ("and", "or", "xor")),
)

_HEADS: dict[str, Callable[..., sympy.Basic]] = {
    **{n: getattr(torch_functions, n) for n in _TORCH_HEADS if hasattr(torch_functions, n)},
    "Add": sympy.Add,
    "Mul": sympy.Mul,
    "Pow": sympy.Pow,
    "Eq": sympy.Eq,
    "Ne": sympy.Ne,
    "Lt": sympy.Lt,
    "Le": sympy.Le,
    "Gt": sympy.Gt,
    "Ge": sympy.Ge,
    "And": sympy.And,
    "Or": sympy.Or,
    "Not": sympy.Not,
    "sympy.Mod": sympy.Mod,
    "sympy.Max": sympy.Max,
    "sympy.Min": sympy.Min,
}
_NAMES = {head: name for name, head in _HEADS.items()}

_UNORDERED = {"Add", "Mul", "And", "Or", "Max", "Min", "sympy.Max", "sympy.Min"}
"""Sympy orders the arguments of these by the names of symbols; here they are ordered by their text."""

_LOGICAL = {"And", "Or", "Not", "Eq", "Ne", "Where"}

_MAX_BITS = 4096
_MAX_EXPONENT = 64


def write_expression(expr: Any, name_of: Callable[[sympy.Symbol], str]) -> Any:
    """``expr`` (int or sympy) as JSON data; ``name_of`` gives the text of a symbol.

    Raises GraphoptError for a kind of expression that cannot be saved.
    """
    if isinstance(expr, (bool, sympy.logic.boolalg.BooleanAtom)):
        return bool(expr)
    if isinstance(expr, (int, sympy.Integer)):
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return name_of(expr)
    if isinstance(expr, sympy.Float):
        return ["Float", float(expr)]
    if isinstance(expr, sympy.Rational):
        return ["Rational", int(expr.p), int(expr.q)]
    head = _NAMES.get(type(expr))
    if head is None:
        raise GraphoptError(f"cannot save the expression {expr}: {type(expr).__name__} is none of {sorted(_HEADS)}")
    arguments = [write_expression(a, name_of) for a in expr.args]
    return [head, *(sorted(arguments, key=json.dumps) if head in _UNORDERED else arguments)]


def read_expression(data: Any, symbols: Mapping[str, sympy.Symbol]) -> sympy.Basic:
    """The sympy expression that `write_expression` made ``data`` from, over ``symbols`` by their text.

    Raises LoadError for anything else: unknown heads and symbols, and what is too large to be a size.
    """
    budget = [MAX_NODES]
    try:
        return _read(data, symbols, budget, 0)
    except LoadError:
        raise
    except Exception as error:  # sympy and torch's functions raise whatever they like on odd arguments
        raise LoadError(f"the expression {short(data)} cannot be built: {error}") from error


def _read(data: Any, symbols: Mapping[str, sympy.Symbol], budget: list[int], depth: int) -> sympy.Basic:
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_DEPTH:
        raise LoadError(f"an expression has more than {MAX_NODES} nodes or {MAX_DEPTH} levels")
    if isinstance(data, bool):
        return sympy.true if data else sympy.false
    if isinstance(data, int):
        return sympy.Integer(_small(data))
    if isinstance(data, str):
        if data not in symbols:
            raise LoadError(f"unknown symbol {short(data)}, expected one of {sorted(symbols)}")
        return symbols[data]
    if not isinstance(data, list) or not data or not isinstance(data[0], str):
        raise LoadError(f"{short(data)} is no expression; expected an integer, a symbol or [head, arguments...]")
    head, arguments = data[0], data[1:]
    if head == "Float":
        (number,) = arguments
        if not isinstance(number, float) or number - number != 0:
            raise LoadError(f"Float of {short(number)}; expected a finite float")
        return sympy.Float(number)
    if head == "Rational":
        numerator, denominator = arguments
        if denominator == 0:
            raise LoadError("Rational with denominator 0")
        return sympy.Rational(_small(numerator), _small(denominator))
    if head not in _HEADS:
        raise LoadError(f"unknown expression {short(head)}; was the file written by a newer release?")
    values = [_read(a, symbols, budget, depth + 1) for a in arguments]
    if head not in _LOGICAL and not all(isinstance(v, sympy.Expr) for v in values):
        raise LoadError(f"{head} of a truth value in {short(data)}; expected numbers")
    if head == "Pow" and all(v.is_number for v in values) and not abs(values[1]) <= _MAX_EXPONENT:
        raise LoadError(f"the exponent in {short(data)} is too large for a size")
    result = _HEADS[head](*values)
    if not isinstance(result, sympy.Basic) or result in (sympy.nan, sympy.zoo):
        raise LoadError(f"the expression {short(data)} has no value")
    if isinstance(result, sympy.Rational) and max(abs(int(result.p)), int(result.q)).bit_length() > _MAX_BITS:
        raise LoadError("an expression holds a number that is too large for a size")
    return result


def _small(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number.bit_length() > 64:
        raise LoadError(f"{short(number)} in an expression; expected an integer of at most 64 bits")
    return number


def short(data: Any) -> str:
    """A value as text of at most 80 characters, for messages; however large or deep it is, this is quick."""
    text = _REPR.repr(data)
    return text if len(text) <= 80 else text[:77] + "..."


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 80, 80, 80
