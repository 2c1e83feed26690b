"""What stands in a node (targets, arguments, values) as JSON data and back, for `graphopt.graph.serialize`.

None, booleans, integers, finite floats, strings and lists stand for themselves; everything else is an object
with one key that says what it is: ``{"tuple": [...]}``, ``{"dtype": "float32"}``, ``{"float": "inf"}``.
"""

from __future__ import annotations

import builtins
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.errors import GraphoptError, LoadError
from graphopt.graph.expressions import read_expression, short, write_expression
from graphopt.graph.sizes import expression
from graphopt.graph.torch_internals import Sizes, hint_of

_FUNCTIONS = {
    "operator": "getitem pos neg abs add sub mul truediv floordiv mod pow eq ne lt le gt ge and_ or_ xor not_ "
    "lshift rshift",
    "math": "ceil floor trunc sqrt pow exp log log2 log10 sin cos tan sinh cosh tanh asin acos atan",
    "builtins": "int float bool abs round max min",
    "torch": "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sum sym_sqrt _sym_cos _sym_cosh _sym_sin "
    "_sym_sinh _sym_tan _sym_tanh _sym_asin _sym_acos _sym_atan _sym_log2",
}
_MODULES: dict[str, Any] = {"operator": operator, "math": math, "builtins": builtins, "torch": torch}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module}.{name}": getattr(_MODULES[module], name)
    for module, names in _FUNCTIONS.items()
    for name in names.split()
    if hasattr(_MODULES[module], name)
}
"""The Python functions that a saved graph may call, on symbolic sizes, hyper-parameters and tuples."""

_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
_OPERATOR = re.compile(r"(\w+)\.(\w+)\.(\w+)", re.ASCII)
_TORCH_CONSTANTS = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def write_target(target: Any) -> str:
    """The name of an operator or function. Raises GraphoptError for a function that a file must not name."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise GraphoptError(
        f"cannot save a call of {target}: it is neither an ATen-like operator nor one of {[*FUNCTIONS]}"
    )


def read_target(name: Any) -> Callable[..., Any]:
    """The operator or function of this name. Raises LoadError where it does not exist here."""
    if isinstance(name, str) and name in FUNCTIONS:
        return FUNCTIONS[name]
    match = _OPERATOR.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise LoadError(f"unknown function {short(name)}; expected an operator such as 'aten.mm.default'")
    namespace, operator_name, overload = match.groups()
    found = getattr(torch.ops, namespace, None)
    if isinstance(found, torch._ops._OpNamespace):
        found = getattr(getattr(found, operator_name, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise LoadError(f"operator {name} is not registered here; import the library that defines it first")
    return found


class Writer:
    """Writes arguments and values of one graph. ``names``: the public sizes by symbol.

    Other symbols get names in the order they are met; `others` describes them.
    """

    def __init__(self, names: Mapping[sympy.Symbol, str]):
        self._names = dict(names)
        self.others: list[list[Any]] = []
        self._symbolic: Any = None

    def expression(self, expr: Any) -> Any:
        """A size or another symbolic number, see `write_expression`."""
        return write_expression(expr, self._name_of)

    def argument(self, value: Any) -> Any:
        """An argument of a node."""
        if isinstance(value, fx.Node):
            return {"node": value.name}
        return self._plain(value, self.argument)

    def value(self, value: Any) -> Any:
        """What a node gives: ``meta["val"]``."""
        if isinstance(value, torch.Tensor):
            return {"tensor": self.tensor(value)}
        for kind, type_ in _SYMBOLIC.items():
            if isinstance(value, type_):
                self._symbolic = value
                return {kind: self.expression(value.node.expr)}
        return self._plain(value, self.value)

    def tensor(self, tensor: torch.Tensor) -> list[Any]:
        """Shape, strides, dtype and device of a tensor. Raises GraphoptError where that is not all it is."""
        if tensor.layout is not torch.strided:
            raise GraphoptError(f"cannot save a tensor of layout {tensor.layout}; only strided tensors can be saved")
        lists = [[self._size(s) for s in sizes] for sizes in (tensor.shape, tensor.stride())]
        return [*lists, str(tensor.dtype).removeprefix("torch."), str(tensor.device)]

    def _size(self, size: Any) -> Any:
        self._symbolic = size
        return self.expression(expression(size))

    def _name_of(self, symbol: sympy.Symbol) -> str:
        if symbol not in self._names:
            hint = hint_of(symbol, self._symbolic)
            self._names[symbol] = f"%{len(self.others)}"
            self.others.append(["int" if symbol.is_integer else "float", self.value(hint)])
        return self._names[symbol]

    def _plain(self, value: Any, inner: Callable[[Any], Any]) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, complex):
            return {"complex": [self._plain(part, inner) for part in (value.real, value.imag)]}
        if isinstance(value, list):
            return [inner(v) for v in value]
        if isinstance(value, tuple):
            return {"tuple": [inner(v) for v in value]}
        if isinstance(value, Mapping):
            return {"dict": [[inner(k), inner(v)] for k, v in value.items()]}
        if isinstance(value, slice):
            return {"slice": [inner(part) for part in (value.start, value.stop, value.step)]}
        if value is Ellipsis:
            return {"ellipsis": None}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        for kind, type_ in _TORCH_CONSTANTS.items():
            if isinstance(value, type_):
                return {kind: str(value).removeprefix("torch.")}
        raise GraphoptError(f"cannot save {short(value)} of type {type(value).__name__} as part of a graph")


class Reader:
    """Reads what `Writer` wrote, onto new fake tensors and symbols. ``nodes``: those read so far, by name."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.nodes: dict[str, fx.Node] = {}

    def expression(self, data: Any) -> sympy.Basic:
        """A symbolic number over the new symbols."""
        return read_expression(data, self.sizes.symbols)

    def argument(self, data: Any) -> Any:
        """An argument of a node."""
        if isinstance(data, dict) and set(data) == {"node"}:
            name = data["node"]
            if not isinstance(name, str) or name not in self.nodes:
                raise LoadError(f"it reads {short(name)}, which no node before it has made; the order is broken")
            return self.nodes[name]
        return self._plain(data, self.argument)

    def value(self, data: Any) -> Any:
        """A fake tensor, a symbolic or plain number, or a nesting of those."""
        if isinstance(data, dict) and len(data) == 1:
            ((kind, content),) = data.items()
            if kind == "tensor":
                return self.tensor(content)
            if kind in _SYMBOLIC:
                return self.sizes.number(self.expression(content), _PYTHON_TYPES[kind])
        return self._plain(data, self.value)

    def tensor(self, data: Any) -> torch.Tensor:
        """A fake tensor of this shape, strides, dtype and device."""
        shape, stride, dtype, device = data
        if not isinstance(shape, list) or not isinstance(stride, list) or len(shape) != len(stride):
            raise LoadError(f"a tensor has shape {short(shape)} and strides {short(stride)}; expected equal lengths")
        sizes, strides = ([self._size(s) for s in each] for each in (shape, stride))
        return self.sizes.empty(sizes, strides, read_constant("dtype", dtype), read_device(device))

    def _size(self, data: Any) -> int | torch.SymInt:
        if type(data) is int:
            return data
        expr = self.expression(data)
        if not expr.is_integer:
            raise LoadError(f"the size {short(data)} is no integer")
        return int(expr) if isinstance(expr, sympy.Integer) else self.sizes.number(expr, int)

    def _plain(self, data: Any, inner: Callable[[Any], Any]) -> Any:
        if data is None or isinstance(data, (bool, int, float, str)):
            return data
        if isinstance(data, list):
            return [inner(d) for d in data]
        if not isinstance(data, dict) or len(data) != 1:
            raise LoadError(f"{short(data)} is no value; expected one key that says what it is")
        ((kind, content),) = data.items()
        if kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if kind == "complex":
            real, imaginary = (inner(part) for part in content)
            return complex(real, imaginary)
        if kind == "tuple" and isinstance(content, list):
            return tuple(inner(d) for d in content)
        if kind == "dict":
            return {inner(k): inner(v) for k, v in content}
        if kind == "slice":
            start, stop, step = (inner(part) for part in content)
            return slice(start, stop, step)
        if kind == "ellipsis":
            return ...
        if kind == "device":
            return read_device(content)
        if kind in _TORCH_CONSTANTS:
            return read_constant(kind, content)
        raise LoadError(f"{short(data)} is no value; was the file written by a newer release?")


_SYMBOLIC: dict[str, Any] = {"symint": torch.SymInt, "symfloat": torch.SymFloat, "symbool": torch.SymBool}
_PYTHON_TYPES = {"symint": int, "symfloat": float, "symbool": bool}


def read_constant(kind: str, name: Any) -> Any:
    """A dtype, layout or memory format by its name in ``torch``."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, _TORCH_CONSTANTS[kind]):
        raise LoadError(f"unknown {kind} {short(name)}; expected one of this torch {torch.__version__}")
    return found


def read_device(name: Any) -> torch.device:
    """A device by its name."""
    if not isinstance(name, str):
        raise LoadError(f"{short(name)} is no device; expected a name such as 'cpu' or 'cuda:0'")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise LoadError(f"unknown device {short(name)}; expected a name such as 'cpu' or 'cuda:0'") from error
