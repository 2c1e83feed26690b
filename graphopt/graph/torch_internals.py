"""The one place where private parts of torch are imported. A new torch release is this file's work."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import sympy
import torch
import torch.fx.traceback as fx_traceback
from torch import fx, nn
from torch._decomp import decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.source import ConstantSource
from torch._functorch._aot_autograd import descriptors as aot
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors, aot_export_module
from torch._inductor.exc import InductorError
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.amp import autocast_mode
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.optim import optimizer as optimizer_module
from torch.utils import _foreach_utils, _python_dispatch
from torch.utils import _pytree as pytree

from graphopt.graph.stateless import functional_call


def fake_mode_of(values: Any) -> FakeTensorMode | None:
    """The fake tensor mode of the first fake tensor found in ``values`` (any nesting), None if there is none."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return None


@contextmanager
def without_guards(mode: FakeTensorMode) -> Iterator[None]:
    """Operators that run on fake tensors of ``mode`` leave its free sizes free, and composite ones (``aten.pad``) take
    their parts in Python as at capture: those in C++ ask for sizes as numbers."""
    with ExitStack() as stack:
        stack.enter_context(enable_python_dispatcher())
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.suppress_guards())
        yield


def fake_like(value: torch.Tensor, shape: Sequence[Any], strides: Sequence[Any]) -> torch.Tensor:
    """A fake tensor of this shape beside the fake tensor ``value``, made without running an operator on fakes. Sizes
    may be symbolic; call it inside of `without_guards`."""
    assert isinstance(value, FakeTensor)
    with disable_dispatch_modes():
        plain = torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")
    return FakeTensor(value.fake_mode, plain, value.device)


def symbolic(like: torch.Tensor, expr: sympy.Expr) -> torch.SymInt:
    """``expr`` as a symbolic size, of the symbols that the shape of the fake tensor ``like`` has."""
    size: Any = next(s for s in like.shape if isinstance(s, torch.SymInt))
    hint = expr.xreplace({s: sympy.sympify(hint_of(s, size)) for s in expr.free_symbols})
    return torch.SymInt(SymNode(expr, size.node.shape_env, int, int(hint)))


def preserve_node_meta() -> AbstractContextManager[None]:
    """While active, nodes made by a trace copy ``current_trace_meta()["custom"]``."""
    return fx_traceback.preserve_node_meta()


def current_trace_meta() -> dict[str, Any]:
    """The metadata that the next traced node receives."""
    return fx_traceback.current_meta


@dataclass(frozen=True)
class Exported:
    """A graph as AOTAutograd gives it, with its descriptors put into plain words.

    ``inputs``: ``(kind, name)`` of each placeholder: ``parameter``/``buffer`` with the attribute path, ``batch`` or
    ``tangent`` with an index. ``outputs``: ``(kind, name)`` of each result: ``buffer``/``batch`` (a new value),
    ``output`` with an index, ``parameter gradient`` with a path, ``batch gradient`` with an index.
    ``symbols``: those of the free sizes, but of such as the trace has fixed; ``guards``: what it assumed of them.
    ``own_backward``: the `torch.autograd.Function`s that a forward graph ran through, of which it holds only forward.
    """

    module: fx.GraphModule
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    symbols: Mapping[str, sympy.Symbol]
    guards: tuple[sympy.Basic, ...]
    own_backward: tuple[str, ...] = ()


def export_joint(
    module: nn.Module, tensors: Sequence[torch.Tensor], free: Sequence[Mapping[int, str]], *, compiling: bool
) -> Exported:
    """Trace forward and backward of ``module`` on flat tensors by `aot_export_joint_with_descriptors`.

    ``free`` names the dimensions of each tensor that are free: equal names are one symbol; ``guards`` are what the
    trace assumed of them. With ``compiling``, ``torch.compiler.is_compiling()`` is true meanwhile. Parameters of
    ``module`` and tensors that require grad get gradients; with none the graph is the forward alone. Source:
    torch/_functorch/aot_autograd.py.
    """
    fakes = _Fakes(tensors, free)
    fakes.adopt(module)
    with ExitStack() as stack:
        stack.enter_context(_compiling_flag(compiling))
        stack.enter_context(traced_as_in_eager())
        joint = aot_export_joint_with_descriptors(stack, module, tuple(fakes.tensors))
    graph = joint.graph_module.graph
    inputs = tuple(_input_words(n.meta["desc"]) for n in graph.nodes if n.op == "placeholder")
    outputs = tuple(_output_words(d) for d in graph.find_nodes(op="output")[0].meta["desc"])
    return Exported(joint.graph_module, inputs, outputs, fakes.symbols, fakes.guards())


def export_forward(
    module: nn.Module, tensors: Sequence[torch.Tensor], free: Sequence[Mapping[int, str]], *, compiling: bool
) -> Exported:
    """Trace forward of ``module`` before autograd and autocast by `aot_export_module`; arguments as `export_joint`.

    Operators that are made of others stay whole. Regions without gradients and of autocast stand between the markers
    `SET_GRAD_ENABLED`, `ENTER_AUTOCAST` and `EXIT_AUTOCAST`. Source: torch/_functorch/aot_autograd.py.
    """
    fakes = _Fakes(tensors, free)
    fakes.adopt(module)
    with (
        _compiling_flag(compiling),
        _upsampling_as_in_eager(),
        _dropout_as_in_eager(),
        _whole_dropout(),
        _noting_own_backward() as noted,
        fakes.mode,
    ):
        traced, _ = aot_export_module(module, tuple(fakes.tensors), trace_joint=False, pre_dispatch=True)
    assert isinstance(traced, fx.GraphModule)
    parameters, buffers = (list(dict(named)) for named in (module.named_parameters(), module.named_buffers()))
    flat = [("parameter", name) for name in parameters] + [("buffer", name) for name in buffers]
    flat += [("batch", str(index)) for index in range(len(tensors))]

    def words(descriptor: Any) -> tuple[str, str]:
        if isinstance(descriptor, aot.InputMutationAOTOutput):
            descriptor = descriptor.mutated_input
        return flat[descriptor.idx] if isinstance(descriptor, aot.PlainAOTInput) else _output_words(descriptor)

    inputs = tuple(words(n.meta["desc"]) for n in traced.graph.nodes if n.op == "placeholder")
    outputs = tuple(words(d) for d in traced.graph.find_nodes(op="output")[0].meta["desc"])
    return Exported(traced, inputs, outputs, fakes.symbols, fakes.guards(), tuple(noted))


SET_GRAD_ENABLED = torch._C._set_grad_enabled
ENTER_AUTOCAST = autocast_mode._enter_autocast
EXIT_AUTOCAST = autocast_mode._exit_autocast


def device_without_data(tensor: torch.Tensor) -> torch.device | None:
    """Where a tensor that has no data would be: a fake one on its device, one on ``meta`` on the CPU. None for a tensor
    with data."""
    device = tensor.device
    if device.type == "meta":
        return torch.device("cpu")
    return device if isinstance(tensor, FakeTensor) else None


def fake_mode_is_active() -> bool:
    """Whether tensors that are made now are fake ones."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


class _Fakes:
    """Fake tensors in place of a batch; dimensions with a name in ``free`` are symbols, equal names the same one."""

    def __init__(self, tensors: Sequence[torch.Tensor], free: Sequence[Mapping[int, str]]):
        self._env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self.tensors: list[torch.Tensor] = []
        self._sizes: dict[str, Any] = {}
        for tensor, names in zip(tensors, free, strict=True):
            dims = [DimDynamic.DYNAMIC if d in names else DimDynamic.STATIC for d in range(tensor.dim())]
            context: Any = StatelessSymbolicContext(dynamic_sizes=dims, constraint_sizes=[None] * tensor.dim())
            self.tensors.append(self._fake(tensor, context))
            for d, name in names.items():
                size = self.tensors[-1].shape[d]
                torch._check(size == self._sizes.setdefault(name, size))

    def adopt(self, module: nn.Module) -> None:
        """Put fake tensors in place of parameters and buffers without data: those on ``meta`` have no autograd, those
        of another fake tensor mode do not meet with ours."""
        for key, parameter in module._parameters.items():
            if parameter is not None and device_without_data(parameter) is not None:
                module._parameters[key] = nn.Parameter(self._fake(parameter, None), parameter.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None and device_without_data(buffer) is not None:
                module._buffers[key] = self._fake(buffer, None)

    def _fake(self, tensor: torch.Tensor, context: Any) -> torch.Tensor:
        device = device_without_data(tensor)
        if device is None:
            return self.mode.from_tensor(tensor, symbolic_context=context)
        size, stride = tuple(tensor.shape), tensor.stride()
        like = torch.empty_strided(size, stride, dtype=tensor.dtype, device="meta")
        if context is not None:
            sized = self.mode.from_tensor(like, symbolic_context=context)
            with self._env.suppress_guards():
                like = torch.empty_strided(sized.shape, sized.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self.mode, like, device).requires_grad_(tensor.requires_grad)

    @property
    def symbols(self) -> dict[str, sympy.Symbol]:
        """The symbols of the free sizes by name, without those that a trace has fixed."""
        found = {name: size.node.expr for name, size in self._sizes.items() if isinstance(size, torch.SymInt)}
        return {name: symbol for name, symbol in found.items() if isinstance(symbol, sympy.Symbol)}

    def guards(self) -> tuple[sympy.Basic, ...]:
        """What traces so far assumed of the symbols, without what always holds."""
        symbols = set(self.symbols.values())
        found: dict[sympy.Basic, None] = {}
        for guard in self._env.guards:
            expr = self._env.simplify(guard.expr)
            if expr is not sympy.true and expr.free_symbols and symbols.issuperset(expr.free_symbols):
                found[expr] = None
        for symbol in self.symbols.values():
            lower = self._env.var_to_range[symbol].lower
            if lower > 2:
                found[sympy.Ge(symbol, lower)] = None
        return tuple(found)


@contextmanager
def traced_as_in_eager() -> Iterator[None]:
    """Let a trace through autograd go to the kernels that eager calls where torch would decompose them."""
    with _recurrent_as_in_eager(), _upsampling_as_in_eager(), _dropout_as_in_eager():
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let ``owner.name`` be ``value`` meanwhile."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _whole_dropout() -> Iterator[None]:
    """Let dropout trace to one operator where it drops something, and to its operand itself where it does not.

    torch keeps both, and forbids to write into the result in place, as it cannot know which of the two it is. Source:
    torch/_subclasses/functional_tensor.py.
    """
    can_decompose = FunctionalTensorMode._can_decompose

    def unless_it_drops(self: FunctionalTensorMode, func: Any, args: Any, kwargs: Any) -> bool:
        if func is torch.ops.aten.dropout.default:
            given = dict(zip(("input", "p", "train"), args)) | kwargs
            return not given["train"] or given["p"] == 0
        return can_decompose(self, func, args, kwargs)

    unless_frozen = _replaced(torch, "_freeze_functional_tensor", lambda tensor: None)
    with _replaced(FunctionalTensorMode, "_can_decompose", unless_it_drops), unless_frozen:
        yield


@contextmanager
def _noting_own_backward() -> Iterator[dict[str, None]]:
    """The names of `torch.autograd.Function`s that are applied meanwhile: their backward is no derivative of their
    forward's operators. (Checkpointing applies one that does nothing; that of a custom operator goes with it.)"""
    noted: dict[str, None] = {}
    apply = vars(torch.autograd.Function)["apply"]

    def noting(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ not in ("torch.utils.checkpoint", "torch._library.autograd"):
            noted[f"{cls.__module__}.{cls.__qualname__}"] = None
        return apply.__get__(None, cls)(*args, **kwargs)

    with _replaced(torch.autograd.Function, "apply", classmethod(noting)):
        yield noted


@contextmanager
def _recurrent_as_in_eager() -> Iterator[None]:
    """Let recurrent layers trace to what eager computes, which torch's decompositions do not in two places.

    An LSTM whose input requires grad is unrolled (five times the operators, and other bits) where eager takes oneDNN's
    layer, and the dropout between layers is left out. Source: torch/_decomp/decompositions.py.
    """
    select = decompositions.select_one_layer_lstm_function

    def select_as_eager(input: torch.Tensor, hx: Any, params: Any) -> Any:
        return select(SimpleNamespace(device=input.device, dtype=input.dtype, requires_grad=False), hx, params)

    kernel = _replaced(decompositions, "select_one_layer_lstm_function", select_as_eager)
    with kernel, _replaced(decompositions, "_rnn_helper", _layers_with_dropout):
        yield


def _layers_with_dropout(
    input: torch.Tensor, hidden: Any, params: Any, has_biases: bool, num_layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool, layer_fn: Callable[..., Any],
) -> tuple[torch.Tensor, list[Any]]:  # fmt: skip
    """The layers of a recurrent network, with dropout between them; arguments as torch's ``_rnn_helper``, whose
    condition for dropout never holds. Source: `apply_layer_stack` in aten/src/ATen/native/RNN.cpp."""
    value = input.transpose(0, 1) if batch_first else input
    final_hiddens = []
    for i in range(num_layers):
        weights, state, *other_way = decompositions.params_hiddens(params, hidden, i, bidirectional)
        outputs, final = layer_fn(value, state, weights, has_biases)
        final_hiddens.append(final)
        if bidirectional:
            weights, state = other_way
            backwards, final = layer_fn(value, state, weights, has_biases, reverse=True)
            final_hiddens.append(final)
            outputs = torch.cat([outputs, backwards], outputs.dim() - 1)
        value = torch.dropout(outputs, dropout, train=True) if dropout and train and i < num_layers - 1 else outputs
    return value.transpose(0, 1) if batch_first else value, final_hiddens


_UPSAMPLING = [
    getattr(packet, overload)
    for name in [
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d",
        "_upsample_nearest_exact3d",
        "upsample_linear1d",
        "upsample_bilinear2d",
        "upsample_trilinear3d",
        "upsample_bicubic2d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
    ]
    for packet in (getattr(torch.ops.aten, name), getattr(torch.ops.aten, name + "_backward"))
    for overload in packet.overloads()
    if overload in ("default", "vec")
]


@contextmanager
def _upsampling_as_in_eager() -> Iterator[None]:
    """Let upsampling trace to its own forward and backward kernels, which eager takes.

    torch traces a decomposition into gathers, whose backward scatters in another order of additions. Source: the
    ``py_impl(DispatchKey.Autograd)`` of upsampling in torch/_decomp/decompositions.py.
    """
    decomposed = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)
    meta = torch._C.DispatchKey.Meta
    before = {op: dict(op.py_kernels) for op in _UPSAMPLING}
    for op in _UPSAMPLING:
        for key in decomposed:
            op.py_kernels.pop(key, None)
        if op._overloadname == "vec":  # torch's own would fix the batch size to ask for the output's
            op.py_kernels[torch._C.DispatchKey.CompositeImplicitAutograd] = partial(
                _upsample, op.overloadpacket.default
            )
        elif op._opname.endswith("_backward") and meta not in op.py_kernels:
            op.py_kernels[meta] = _upsample_backward_meta
        op._dispatch_cache.clear()
    try:
        yield
    finally:
        for op, kernels in before.items():
            op.py_kernels.clear()
            op.py_kernels.update(kernels)
            op._dispatch_cache.clear()


def _upsample(op: Any, input: torch.Tensor, output_size: Any, *options: Any) -> torch.Tensor:
    """Upsampling to a size or by factors (the last option) as upsampling to a size."""
    *others, factors = options
    size = decompositions.upsample_compute_output_size(input.size(), output_size, factors)
    return op(input, size, *others, *(factors or [None] * (input.dim() - 2)))


def _upsample_backward_meta(grad_output: torch.Tensor, output_size: Any, input_size: Any, *rest: Any) -> torch.Tensor:
    like = grad_output.new_empty(input_size)
    return like.to(memory_format=suggest_memory_format(grad_output)) if like.dim() == 4 else like


@contextmanager
def _dropout_as_in_eager() -> Iterator[None]:
    """Let dropout trace to what eager does in two places where torch's decomposition does something else.

    Dropout of 16-bit floats on the CPU is a product with noise in the tensor's dtype; `native_dropout` scales in
    float32: other bits. Dropout that drops nothing is its operand itself, not a copy: a write into it reaches the
    operand. Source: `_dropout` in aten/src/ATen/native/Dropout.cpp.
    """
    operator = torch.ops.aten.dropout.default
    before = dict(operator.py_kernels)
    operator.py_kernels.update(dict.fromkeys(before, _dropout))
    operator._dispatch_cache.clear()
    try:
        yield
    finally:
        operator.py_kernels.update(before)
        operator._dispatch_cache.clear()


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    if not train or p == 0:
        return input
    if p == 1 or input.device.type != "cpu" or input.dtype not in (torch.float16, torch.bfloat16):
        return decompositions.dropout(input, p, train)
    # The mask of `native_dropout`: a functional `bernoulli` would draw in contiguous order, whatever the strides are.
    return input * (torch.ops.aten.native_dropout.default(input.detach(), p, True)[1].to(input.dtype) / (1 - p))


def _compiling_flag(value: bool) -> AbstractContextManager[None]:
    return _replaced(torch.compiler, "_is_compiling_flag", value or torch.compiler._is_compiling_flag)


def _input_words(descriptor: Any) -> tuple[str, str]:
    if isinstance(descriptor, aot.ParamAOTInput):
        return "parameter", descriptor.target
    if isinstance(descriptor, aot.BufferAOTInput):
        return "buffer", descriptor.target
    if isinstance(descriptor, aot.PlainAOTInput):
        return "batch", str(descriptor.idx)
    if isinstance(descriptor, aot.TangentAOTInput):
        return "tangent", _output_words(descriptor.output)[1]
    raise NotImplementedError(f"input {descriptor}")


def _output_words(descriptor: Any) -> tuple[str, str]:
    if descriptor is None:  # the place of a gradient that an input without requires_grad does not have
        return "none", ""
    if isinstance(descriptor, aot.InputMutationAOTOutput):
        return _input_words(descriptor.mutated_input)
    if isinstance(descriptor, aot.PlainAOTOutput):
        return "output", str(descriptor.idx)
    if isinstance(descriptor, aot.GradAOTOutput):
        kind, name = _input_words(descriptor.grad_of)
        return f"{kind} gradient", name
    raise NotImplementedError(f"output {descriptor}")


def fails_on_fakes(module: nn.Module, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether ``module(*tensors)`` raises on fake tensors for a reason of its own (not for being fake)."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(t.detach()) for t in tensors]
    state: dict[str, torch.Tensor] = {
        k: mode.from_tensor(v.detach()) for k, v in [*module.named_parameters(), *module.named_buffers()]
    }
    try:
        with mode, torch.no_grad():
            functional_call(module, state, tuple(fakes))
    except _FAKE_ONLY:
        return False
    except Exception:  # the answer itself: the model's own code raised
        return True
    return False


_FAKE_ONLY = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedOperatorException,
)


def new_size(values: Any, name: str, hint: int) -> torch.SymInt:
    """A new free size, at least 2 as in a capture, among those of the first fake tensor in ``values``."""
    mode = fake_mode_of(values)
    assert mode is not None and mode.shape_env is not None, "fake tensors without free sizes"
    symbol = mode.shape_env.create_symbol(hint, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC, positive=True)
    return torch.SymInt(SymNode(symbol, mode.shape_env, int, hint))


class Sizes:
    """Symbolic sizes and other symbolic numbers made anew, and fake tensors over them (for a loaded graph).

    ``symbols`` maps names to sympy symbols. Each is backed by its hint; one without a hint is unbacked.
    """

    def __init__(self) -> None:
        self._shape_env = ShapeEnv(duck_shape=False)
        self._mode = FakeTensorMode(shape_env=self._shape_env, allow_non_fake_inputs=True)
        self.symbols: dict[str, sympy.Symbol] = {}
        self._hints: dict[sympy.Symbol, sympy.Number] = {}

    def add_size(self, name: str, hint: int) -> sympy.Symbol:
        """A new size symbol, at least 2 as in a capture."""
        return self._add(name, hint, positive=True)

    def add_number(self, name: str, hint: float | None, python_type: type[int] | type[float]) -> sympy.Symbol:
        """A new symbol that is no size (a step count, a hyper-parameter); without a hint data decides it."""
        if hint is not None:
            return self._add(name, python_type(hint), positive=None)
        env = self._shape_env
        made = env.create_unbacked_symint() if python_type is int else env.create_unbacked_symfloat()
        self.symbols[name] = made.node.expr
        return self.symbols[name]

    def _add(self, name: str, hint: float, positive: bool | None) -> sympy.Symbol:
        symbol = self._shape_env.create_symbol(
            hint,
            ConstantSource(name),
            dynamic_dim=DimDynamic.DYNAMIC,
            positive=positive,
            do_not_specialize_zero_one=positive is None,
        )
        self.symbols[name] = symbol
        self._hints[symbol] = sympy.sympify(hint)
        return symbol

    def assume(self, guard: sympy.Basic) -> bool:
        """Let operators on these sizes rely on ``guard``. False where it does not hold for the hints."""
        if guard.xreplace(self._hints) is not sympy.true:
            return False
        self._shape_env.evaluate_expr(guard)
        return True

    def number(self, expr: sympy.Basic, python_type: type) -> Any:
        """``expr`` as a `torch.SymInt`, `torch.SymFloat` or `torch.SymBool`."""
        value = expr.xreplace(self._hints)
        hint = python_type(value) if not value.free_symbols else None
        node = SymNode(expr, self._shape_env, python_type, hint)
        return {int: torch.SymInt, float: torch.SymFloat, bool: torch.SymBool}[python_type](node)

    def empty(
        self, shape: Sequence[Any], stride: Sequence[Any], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A fake tensor over these sizes. Makes no guard."""
        with self._shape_env.suppress_guards():
            return FakeTensor(self._mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)


def hint_of(symbol: sympy.Symbol, number: Any) -> float | None:
    """What ``symbol`` was at capture, as a symbolic number knows that it occurs in; None if data decides it."""
    env = number.node.shape_env
    hints = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # torch < 2.13
    value = hints.get(symbol)
    return None if value is None else (int(value) if value.is_integer and symbol.is_integer else float(value))


def default_to_fused_or_foreach(parameters: Sequence[torch.Tensor], *, differentiable: bool) -> tuple[bool, bool]:
    """``(fused, foreach)``: the implementation that an optimizer without preference takes for ``parameters``."""
    return optimizer_module._default_to_fused_or_foreach(list(parameters), differentiable, use_fused=False)


def device_has_foreach_support(device: torch.device) -> bool:
    """Whether gradient clipping takes foreach kernels on ``device`` by default."""
    return _foreach_utils._device_has_foreach_support(device)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks run before or after ``optimizer.step``, registered on it or on all optimizers."""
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return any((*own, optimizer_module._global_optimizer_pre_hooks, optimizer_module._global_optimizer_post_hooks))


def name_process_group(name: str, group: Any) -> None:
    """Let functional collectives find a process group by ``name``, whatever torch called it."""
    from torch._C import _distributed_c10d

    _distributed_c10d._register_process_group(name, group)  # type: ignore[attr-defined, arg-type]


def disable_dispatch_modes() -> AbstractContextManager[Any]:
    """While active, no dispatch mode sees operators (as inside ``__torch_dispatch__``)."""
    return _python_dispatch._disable_current_modes()


def in_grad_mode(operator: Callable[..., Any]) -> Callable[..., Any]:
    """``operator`` for calls under `torch.no_grad` whose kernel asks for the grad mode; autograd records nothing."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            return operator(*args, **kwargs)

    return call


COMPILE_ERRORS = (TorchDynamoException, InductorError)
"""What ``torch.compile`` raises when it cannot compile a function."""


def join_processes(file: str, processor: int, processors: int, name: str, connect: float, timeout: float) -> Any:
    """Connect this process to others by gloo over the loopback device; functional collectives find them by ``name`` as
    long as the group that is returned is kept.

    ``file``: where the processes meet, the same for all; ``connect`` and ``timeout``: seconds to wait for the others
    and for a collective. The default group of `torch.distributed`, the user's, stays as it is. Raises RuntimeError
    where the others do not come. Source: ``_gloo_factory`` in torch/distributed/_dist2.py.
    """
    from torch.distributed import FileStore, ProcessGroup, ProcessGroupGloo
    from torch.distributed import _functional_collectives as _  # noqa: F401  (their shapes, for graphs made here)

    store = FileStore(file, processors)
    store.set_timeout(timedelta(seconds=connect))
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=connect)
    backend = ProcessGroupGloo(store, processor, processors, options)
    backend._set_default_timeout(timedelta(seconds=timeout))
    group = ProcessGroup(store, processor, processors)
    group._set_default_backend(ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, backend)
    group._set_group_name(name)  # type: ignore[arg-type]
    name_process_group(name, group)
    return group


def leave_processes(name: str) -> None:
    """Free the name of a group made by `join_processes`; its connections close when it is dropped."""
    torch._C._distributed_c10d._unregister_process_group(name)  # type: ignore[arg-type]


def unwaited_collectives() -> int:
    """How many functional collectives of this process nobody has waited for: each keeps its tensors."""
    return torch._C._distributed_c10d._get_work_registry_size()


def keep_for_ever(value: Any) -> None:
    """Never destroy ``value``, not even when the interpreter ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
