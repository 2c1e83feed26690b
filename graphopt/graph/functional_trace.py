"""Records torch code that writes in place as a functional graph.

The code runs once on fake tensors. A dispatch mode sees each ATen operator; one that writes in place is recorded by
its functional overload, and what it would have written becomes the current value of the tensor. Python numbers that
may differ from step to step (`TracedNumber`) are followed through arithmetic, and what the code asks of them is kept
as guards. No operator is run: nearly all are elementwise, so that their results look like their operands, which
makes this a few times faster than `make_fx` and needs no symbolic shapes.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.errors import CaptureError
from graphopt.graph.torch_internals import FakeTensor, FakeTensorMode, device_without_data, disable_dispatch_modes
from graphopt.graph.traced_number import COMPARISONS, Guard, NumberNode, TracedNumber
from graphopt.graph.training_graph import Input, InputKind, Phase

aten = torch.ops.aten
OpOverload = torch._ops.OpOverload

_ELEMENTWISE = frozenset(
    {"add", "sub", "mul", "div", "neg", "sqrt", "lerp", "addcmul", "addcdiv", "maximum", "reciprocal"}
    | {"clamp", "clamp_min", "clamp_max", "clone"}
)
"""Operators whose result has shape, strides, dtype and device of operands that agree in them; `_foreach_` too."""

_ROUNDS_FIRST = (aten._foreach_mul_.Scalar, aten._foreach_mul_.ScalarList)

_STEP_HINT = 2.0  # stands for numbers that are read from tensors (step counts) while tracing


@dataclass(frozen=True)
class _Form:
    """How an operator is recorded: its functional overload, the positions or names of what it writes, its family."""

    functional: OpOverload
    writes: tuple[int | str, ...]
    returns: bool
    elementwise: bool


@cache
def _form(op: OpOverload) -> _Form:
    """The functional form of ``op``: ``add_.Tensor -> add.Tensor``, ``maximum.out -> maximum.default``."""
    schema = op._schema
    name, overload = schema.name.removeprefix("aten::"), op._overloadname
    writes: list[int | str] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes.append(argument.name if argument.kwarg_only else position)
    functional: OpOverload | None = op
    if writes:
        overload = "default" if overload == "out" else overload.removesuffix("_out")
        name = name.removesuffix("_")
        functional = getattr(getattr(aten, name, None), overload, None)
        if op is not aten.copy_.default and (
            functional is None or len(functional._schema.returns) != len(writes) or functional._schema.is_mutable
        ):
            raise CaptureError(f"{op} writes in place and has no functional form")
    elementwise = name.removeprefix("_foreach_") in _ELEMENTWISE
    assert functional is not None or op is aten.copy_.default
    return _Form(functional or op, tuple(writes), bool(schema.returns), elementwise)


class Recorder:
    """A functional graph under construction. Make the inputs, run code within `recording`, read the `value` of
    tensors, then write the output node and `drop_dead`.

    ``markers``: plain floats that stand for a number where the code insists on floats (it calls ``float(x)``).
    """

    def __init__(self, fake_mode: FakeTensorMode):
        self.graph = fx.Graph()
        self.constants: dict[str, torch.Tensor] = {}
        self.guards: dict[Guard, None] = {}
        self.markers: dict[float, fx.Node] = {}
        self._fake_mode = fake_mode
        self._inputs: dict[fx.Node, Input] = {}
        self._values: dict[int, fx.Node | tuple[fx.Node, int]] = {}  # by id; a pair is an element not yet taken out
        self._layouts: dict[int, tuple[Any, ...]] = {}
        self._owners: dict[int, str | None] = {}  # module of the parameter that a tensor belongs to
        self._viewed: set[int] = set()
        self._aliases: dict[int, torch.Tensor] = {}
        self._alive: list[torch.Tensor] = []  # ids stay unique
        self._numbers: dict[tuple[Any, ...], TracedNumber] = {}

    # -- inputs and outputs -------------------------------------------------------------------------------------

    def tensor_input(self, input_: Input, like: torch.Tensor, module: str = "") -> torch.Tensor:
        """A placeholder for a tensor that looks like ``like`` (real or fake); returns the fake tensor for it."""
        fake = self._fake(like)
        node = self._placeholder(input_, fake, module)
        self._values[id(fake)] = node
        self._owners[id(fake)] = module
        return fake

    def number_input(self, input_: Input, hint: float) -> TracedNumber:
        """A placeholder for a Python number."""
        return self._number(self._placeholder(input_, float(hint), ""), float(hint))

    def value(self, tensor: torch.Tensor) -> fx.Node:
        """The node of the current value of ``tensor``, which is a constant if the code made it itself."""
        tensor = self._aliases.get(id(tensor), tensor)
        value = self._values.get(id(tensor))
        if value is None:
            return self._constant(tensor)
        if isinstance(value, tuple):
            source, position = value
            node = self._emit(operator.getitem, (source, position), {}, source.meta["val"][position])
            node.meta["module"] = self._owners.get(id(tensor))
            self._values[id(tensor)] = value = node
        return value

    def drop_dead(self) -> tuple[Input, ...]:
        """Erase what the output does not depend on; returns the inputs that are left, in order."""
        for node in reversed(self.graph.nodes):
            node.meta["module"] = node.meta.get("module") or ""
            if not node.users and node.op != "output":
                self.graph.erase_node(node)
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        self.constants = {name: tensor for name, tensor in self.constants.items() if name in used}
        return tuple(self._inputs[n] for n in self.graph.nodes if n.op == "placeholder")

    # -- recording ----------------------------------------------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, operators on this recorder's fake tensors are recorded."""
        with torch.no_grad(), _FunctionMode(self), _DispatchMode(self):
            yield

    def record(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Record one operator and return what the code that called it goes on with."""
        if op is aten._local_scalar_dense.default:
            return self.item(args[0])
        if op is torch.ops.prim.device.default:
            return args[0].fake_device
        if op is aten.detach.default:
            return self._alias(args[0])
        if op is aten.lift_fresh.default:
            return args[0]
        if op in _ROUNDS_FIRST:
            op, args = self._rounded(op, args)
        form = _form(op)
        if not form.writes:
            return self._record_functional(op, form, args, kwargs)
        written = [args[w] if isinstance(w, int) else kwargs[w] for w in form.writes]
        kwargs = {k: v for k, v in kwargs.items() if k not in form.writes}
        for tensor in (t for w in written for t in (w if isinstance(w, (list, tuple)) else [w])):
            if id(tensor) in self._viewed:
                raise CaptureError(f"{op} writes to a tensor that has views")
        if op is aten.copy_.default:
            self._copy(*args[:2])
            return args[0]
        if form.elementwise:
            self._check_promotion(op, written[0], args)
        results = [self._results_like(w) for w in written]
        node = self._emit(form.functional, args, kwargs, results[0] if len(results) == 1 else tuple(results))
        for k, (target, result) in enumerate(zip(written, results, strict=True)):
            part = node
            if len(results) > 1:
                part = self._emit(operator.getitem, (node, k), {}, result)
            self._assign(target, part)
        return written[0] if form.returns else None

    def item(self, tensor: torch.Tensor) -> TracedNumber:
        """``tensor.item()`` as a number."""
        return self._number(self._emit(aten._local_scalar_dense.default, (tensor,), {}, _STEP_HINT), _STEP_HINT)

    def number(self, op: Callable[..., Any], *operands: Any) -> TracedNumber:
        """Arithmetic on numbers; what was computed once is not computed again."""
        key = (op, *((o.node.node if isinstance(o, torch.SymFloat) else (type(o), o)) for o in operands))
        known = self._numbers.get(key)
        if known is None:
            hint = op(*(o.node.hint if isinstance(o, torch.SymFloat) else o for o in operands))
            known = self._numbers[key] = self._number(self._emit(op, operands, {}, hint), hint)
        return known

    def decide(self, number: TracedNumber, comparison: str, bound: float) -> bool:
        """The answer to a comparison, remembered as a guard."""
        holds = COMPARISONS[comparison](number.node.hint, bound)
        input_ = self._inputs.get(number.node.node)
        if input_ is None:
            raise CaptureError(f"the code branches on %{number.node.node.name}, a number computed at each step")
        self.guards[Guard(input_.name, input_.field, comparison, bound, holds)] = None
        return holds

    def _rounded(self, op: OpOverload, args: Sequence[Any]) -> tuple[OpOverload, Sequence[Any]]:
        """In half precision on a CPU `_foreach_mul_` rounds a number to the tensor's dtype and then multiplies,
        `_foreach_mul` does not. So that no bit differs, the number becomes a tensor of that dtype."""
        tensors, numbers = args
        if not any(t.dtype in (torch.float16, torch.bfloat16) and t.fake_device.type == "cpu" for t in tensors):
            return op, args
        if op is aten._foreach_mul_.Scalar:
            return aten._foreach_mul_.Tensor, (tensors, self._rounded_number(numbers, tensors[0]))
        rounded = [self._rounded_number(n, t) for n, t in zip(numbers, tensors, strict=True)]
        return aten._foreach_mul_.List, (tensors, rounded)

    def _rounded_number(self, number: Any, like: torch.Tensor) -> torch.Tensor:
        result = self._fake(torch.empty((), dtype=like.dtype))
        kwargs = {"dtype": like.dtype, "device": torch.device("cpu")}
        self._assign(result, self._emit(aten.scalar_tensor.default, (number,), kwargs, result))
        return result

    def _record_functional(self, op: Any, form: _Form, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        alike = form.elementwise and self._alike(args)
        result = self._results_like(args[0]) if alike else self._run_fake(op, args, kwargs)
        if any(r.alias_info is not None for r in op._schema.returns):
            self._viewed |= {id(result), id(args[0])}
        node = self._emit(op, args, kwargs, result)
        self._assign(result, node)
        if isinstance(result, (list, tuple)) and isinstance(args[0], (list, tuple)):
            self._owners.update({id(r): self._owners.get(id(a)) for r, a in zip(result, args[0], strict=False)})
        return result

    # -- values and their metadata ------------------------------------------------------------------------------

    def _placeholder(self, input_: Input, val: Any, module: str) -> fx.Node:
        words = ("grad" if input_.kind is InputKind.GRADIENT else "", input_.name, input_.field)
        node = self.graph.placeholder(re.sub(r"\W+", "_", "_".join(filter(None, words))))
        node.target = node.name  # unique and an identifier
        node.meta.update(val=val, phase=Phase.INPUT, module=module, source="")
        self._inputs[node] = input_
        return node

    def _emit(self, target: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], val: Any) -> fx.Node:
        args = tuple(self._argument(a) for a in args)
        kwargs = {k: self._argument(v) for k, v in kwargs.items()}
        name = target._schema.name.removeprefix("aten::") if isinstance(target, OpOverload) else target.__name__
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        modules = {m for n in node.all_input_nodes if (m := n.meta["module"]) is not None}
        module = modules.pop() if len(modules) == 1 else None
        node.meta.update(val=val, phase=Phase.UPDATE, module=module, source="")
        return node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.value(value)
        if isinstance(value, torch.SymFloat):
            return value.node.node
        if isinstance(value, (list, tuple)):
            return [self._argument(v) for v in value]
        if type(value) is float and value in self.markers:
            return self.markers[value]
        return value

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        if isinstance(tensor, FakeTensor):
            raise CaptureError("the code reads a fake tensor that is no input of the trace")
        name = f"update_constant_{len(self.constants)}"
        self.constants[name] = tensor
        node = self.graph.create_node("get_attr", name)
        node.meta.update(val=self._fake(tensor), phase=Phase.UPDATE, module=None, source="")
        self._values[id(tensor)] = node
        self._alive.append(tensor)
        return node

    def _number(self, node: fx.Node, hint: Any) -> TracedNumber:
        return TracedNumber(NumberNode(self, node, hint))

    def _fake(self, like: torch.Tensor) -> torch.Tensor:
        layout = self._layout(like)
        size, stride, dtype, device = layout
        fake = FakeTensor(
            self._fake_mode, torch.empty_strided(size, stride, dtype=dtype, device="meta"), torch.device(device)
        )
        self._layouts[id(fake)] = layout
        self._alive.append(fake)
        return fake

    def _layout(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        known = self._layouts.get(id(tensor))
        device = device_without_data(tensor) or tensor.device
        return known or (tuple(tensor.shape), tensor.stride(), tensor.dtype, device)

    def _results_like(self, value: Any) -> Any:
        return [self._fake(v) for v in value] if isinstance(value, (list, tuple)) else self._fake(value)

    def _assign(self, target: Any, node: fx.Node) -> None:
        """``node`` is the value of ``target``, a tensor or a list of tensors."""
        if isinstance(target, torch.Tensor):
            self._set(target, node)
        elif isinstance(target, (list, tuple)):
            for i, element in enumerate(target):
                self._set(element, (node, i))

    def _set(self, tensor: torch.Tensor, value: fx.Node | tuple[fx.Node, int]) -> None:
        self._values[id(self._aliases.get(id(tensor), tensor))] = value
        self._alive.append(tensor)

    def _alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """Another tensor object with the same storage: they have one value."""
        alias = self._fake(tensor)
        self._aliases[id(alias)] = self._aliases.get(id(tensor), tensor)
        return alias

    def _alike(self, args: Sequence[Any]) -> bool:
        """Whether all tensors agree with the first operand in layout (position by position in lists)."""
        first = args[0]
        if isinstance(first, torch.Tensor):
            layout = self._layout(first)
            return all(self._layout(a) == layout for a in args[1:] if isinstance(a, torch.Tensor))
        lists = [a for a in args[1:] if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor)]
        if any(isinstance(a, torch.Tensor) for a in args[1:]):
            return False
        return all(self._layout(t) == self._layout(u) for a in lists for t, u in zip(first, a, strict=True))

    def _check_promotion(self, op: Any, written: Any, args: Sequence[Any]) -> None:
        """In place the result is cast to what is written; a functional operator would promote. Refuse to differ."""
        targets = written if isinstance(written, (list, tuple)) else [written]
        for argument in args[1:]:
            operands = argument if isinstance(argument, (list, tuple)) else [argument] * len(targets)
            for target, operand in zip(targets, operands, strict=False):
                if not isinstance(operand, torch.Tensor) or operand.dtype == target.dtype:
                    continue
                if operand.dim() > 0 or target.dim() == 0:
                    raise CaptureError(f"{op} writes {operand.dtype} values to a {target.dtype} tensor")

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self._layout(target)[::2] != self._layout(source)[::2] or target.device != source.device:
            raise CaptureError("copy_ between tensors of different shape, dtype or device")
        self._set(target, self.value(source))

    def _run_fake(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result on fake tensors, for operators that are not elementwise or whose operands differ."""

        def concrete(value: Any) -> Any:
            if isinstance(value, torch.SymFloat):
                return value.node.hint
            if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
                return self._fake(value)
            return [concrete(v) for v in value] if isinstance(value, (list, tuple)) else value

        with self._fake_mode:
            return op(*(concrete(a) for a in args), **{k: concrete(v) for k, v in kwargs.items()})


class _DispatchMode(TorchDispatchMode):
    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.record(func, args, kwargs or {})


_FUSED = (torch._fused_sgd_, torch._fused_adam_, torch._fused_adamw_, torch._fused_adagrad_)


class _FunctionMode(TorchFunctionMode):
    """Catches calls that would turn a number into a plain float before the dispatcher sees it."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.item:
            return self._recorder.item(args[0])
        if func in _FUSED:
            overload = "tensor_lr" if isinstance(kwargs["lr"], torch.Tensor) else "default"
            with disable_dispatch_modes():
                return self._recorder.record(getattr(getattr(aten, func.__name__), overload), args, kwargs)
        return func(*args, **kwargs)
