"""`extract`: a subnet as a plain module of its own, written as Python code that needs PyTorch only.

The module has small weights of its own under the names that they have in the model, a forward of plain operators in
train and in eval mode, for any batch size, and can be trained, exported and saved like any module. `save` writes its
code and weights; who loads them needs no graphopt. What its layers compute is what the supernet's slice computes, bit
for bit: the same operators on the same values in the same memory order.

The code is written rather than a `torch.fx.GraphModule` made, because that cannot branch on ``self.training`` (its
forward is traced anew when it is unpickled, which would fix the mode in silence).
"""

from __future__ import annotations

import inspect
import keyword
import linecache
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphopt.elastic.choice import Choice
from graphopt.elastic.module_code import Body, Expression, Names, methods, nested
from graphopt.elastic.subnet import Subnet
from graphopt.elastic.transformations import PREPARES
from graphopt.errors import BatchError, CaptureError, ElasticError
from graphopt.graph.batch import BatchLayout, normalise
from graphopt.graph.forward import capture_forward
from graphopt.graph.lowering import binding
from graphopt.graph.sizes import expression
from graphopt.graph.storages import is_view
from graphopt.graph.storages import tensors as tensors_of
from graphopt.graph.training_graph import InputKind, OutputKind, TrainingGraph

if TYPE_CHECKING:
    from graphopt.elastic.space import Space

CONSTANTS = "graph_constants"
"""Where the module keeps tensors that the model's code made: buffers that are not saved with its state."""


def extract(space: Space, choice: Choice) -> nn.Module:
    """The subnet of ``choice`` as a module of its own.

    Parameters and buffers are copies of the slices, under the model's names; those of layers that are left out, or that
    the forward pass does not read, are not there. A transformed weight is stored as it is after the transformation.
    ``module.code`` is its Python source, `save` writes source and weights.

    Of the two modes that which the model is in is as it is, with single modules in another mode (frozen batch norms);
    the other one is what ``model.train()`` or ``model.eval()`` makes.

    Arguments that were no tensors when the space was made (flags, None) are as they were then, and no arguments any
    more. Tensors made in forward stay on the device of the capture.

    Raises:
        ElasticError: the choice is outside of the space, neither mode could be captured, or the model's output holds
            something that no code can make.

    Example:
        >>> import torch, graphopt.elastic
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))
        >>> space = graphopt.elastic.space(net, torch.randn(5, 4))
        >>> small = space.extract({"0.hidden": 4})
        >>> {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
        {'0.weight': (4, 4), '0.bias': (4,), '2.weight': (2, 4), '2.bias': (2,)}
        >>> x = torch.randn(3, 4)
        >>> torch.equal(small.eval()(x), space.run({"0.hidden": 4}, x)) if not net.eval().training else None
        True
    """
    states = {training: _State.of(subnet) for training, subnet in _subnets(space, choice).items()}
    tensors: dict[str, torch.Tensor] = {}
    for state in states.values():
        tensors.update(state.tensors)
    tree = _Tree(space.model, tensors, states)
    code = _code(space, choice, states, tree)
    return _made(code, tree)


def save(module: nn.Module, folder: str | Path, name: str = "subnet") -> None:
    """Write an extracted module to a folder: ``subnet.py``, its code, and ``subnet.safetensors``, its weights.

    ``from subnet import load; model = load()`` reads them, in any process that has PyTorch and safetensors. The weights
    are named as in the model; tensors that a state dict does not have (constants) are among them.

    Raises ElasticError for a module that `extract` did not make.
    """
    from safetensors.torch import save_file

    code = getattr(module, "code", None)
    if not isinstance(code, str) or type(module).__name__ != "Subnet":
        raise ElasticError(f"module: expected one of Space.extract, got {type(module).__name__}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    save_file({n: t.detach().contiguous() for n, t in tensors.items()}, str(folder / f"{name}.safetensors"))
    (folder / f"{name}.py").write_text(code)


def tensor_arguments(batch: Any) -> tuple[Any, ...] | dict[str, Any]:
    """The arguments that an extracted module takes, of a batch for the model: those with tensors."""
    batch = normalise(batch)
    held = lambda value: any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))
    if isinstance(batch, dict):
        return {name: value for name, value in batch.items() if held(value)}
    return tuple(value for value in batch if held(value))


# -- both modes ----------------------------------------------------------------------------------------------------


def _subnets(space: Space, choice: Choice) -> dict[bool, Subnet]:
    """The subnet in train and in eval mode, as far as the model can be captured there."""
    found: dict[bool, Subnet] = {}
    reasons = []
    for training in (True, False):
        with _mode(space.model, training):
            try:
                found[training] = space.subnet(choice)
            except (CaptureError, BatchError) as error:
                reasons.append(str(error))
    if not found:
        raise ElasticError(f"extract: {'; '.join(reasons)}")
    return found


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        if model.training is not training:  # else single modules have modes of their own: frozen batch norms
            model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class _State:
    """A subnet in one mode: its tensors by name, and the nodes that have become parameters."""

    graph: TrainingGraph
    layout: BatchLayout
    outputs: Any  # nesting
    constants: tuple[tuple[int, Any], ...]  # of the output
    tensors: Mapping[str, torch.Tensor]
    folded: Mapping[fx.Node, str]

    @staticmethod
    def of(subnet: Subnet) -> _State:
        graph, captured = subnet.graph, subnet.origin.captured
        with torch.no_grad():
            tensors = {name: t.detach() for name, t in subnet.tensors().items()}
            folded = _fold(graph, tensors)
        written = {n for n in graph.output_nodes(OutputKind.BUFFER) if n not in tensors}
        if written:
            raise ElasticError(f"extract: {min(written)} gets a new value that depends on no old one")
        return _State(graph, captured.layout, captured.output_spec, captured.output_constants, tensors, folded)


def _fold(graph: TrainingGraph, tensors: dict[str, torch.Tensor]) -> dict[fx.Node, str]:
    """Compute the weights that transformations make, and let them be the parameters: by the node, with its name."""
    values = {
        node: tensors[given.name]
        for given, node in zip(graph.inputs, graph.placeholders, strict=True)
        if given.name in tensors and given.kind is InputKind.PARAMETER
    }
    prepared = [node for node in graph.nodes if PREPARES in node.meta]
    for node in prepared:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = binding(node.target)(*args, **kwargs)
    ends: dict[str, list[fx.Node]] = {}
    for node in prepared:
        if any(PREPARES not in user.meta for user in node.users):
            ends.setdefault(node.meta[PREPARES], []).append(node)
    folded: dict[fx.Node, str] = dict.fromkeys(prepared, "")
    for name, nodes in ends.items():
        weight = graph.input_nodes(InputKind.PARAMETER)[name]
        if len(nodes) > 1 or any(PREPARES not in user.meta for user in weight.users):
            raise ElasticError(f"extract: {name} is read before and behind its transformation")
        folded[nodes[0]] = name
        tensors[name] = values[nodes[0]].clone(memory_format=torch.preserve_format)
    for node in graph.placeholders:  # parameters of the transformations are in the weights now
        name = graph.inputs[graph.placeholders.index(node)].name
        if node.users and all(user in folded for user in node.users) and name not in ends:
            del tensors[name]
    return folded


# -- the tree of modules -------------------------------------------------------------------------------------------


class _Tree:
    """The parameters and buffers of the module by path, and how code says them.

    ``parameters``, ``saved``, ``unsaved``: tensors by name (unsaved: buffers that no state dict has); ``aliases``:
    names of tied tensors, with the names that they stand for; ``frozen``: parameters that are not trained.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, torch.Tensor], states: Mapping[bool, _State]):
        trained = {n: p.requires_grad for n, p in model.named_parameters()}
        persistent = set(model.state_dict(keep_vars=True))
        self.parameters = {n: tensors[n] for n in trained if n in tensors}
        buffers = {n: tensors[n] for n, _ in model.named_buffers() if n in tensors}
        self.saved = {n: t for n, t in buffers.items() if n in persistent}
        self.unsaved = {n: t for n, t in buffers.items() if n not in persistent}
        self.frozen = [n for n in self.parameters if not trained[n]]
        if other := tensors.keys() - self.parameters.keys() - buffers.keys():
            raise ElasticError(f"extract: {min(other)} is no tensor of the model")
        self.constants: dict[tuple[bool, str], str] = {}
        for training, state in states.items():
            for node in state.graph.graph.find_nodes(op="get_attr"):
                self._constant(training, str(node.target), state.graph.constants[str(node.target)])
        first = {id(t): n for n, t in _all_tensors(model)}
        every = self.values()
        self.aliases = {}
        for name, tensor in _all_tensors(model, twice=True):
            if first[id(tensor)] != name and first[id(tensor)] in every:
                self.aliases[name] = first[id(tensor)]
        order = [n for n, _ in _all_tensors(model, twice=True)]
        names = [n for n in order if n in every or n in self.aliases] + [n for n in every if n not in set(order)]
        self.paths: list[str] = []
        for name in names:
            parts = name.split(".")[:-1]
            self.paths += [".".join(parts[: i + 1]) for i in range(len(parts))]
        self.paths = list(dict.fromkeys(self.paths))
        self.mappings = {p.rpartition(".")[0] for p in self.paths if not _attribute(p.rpartition(".")[2])}

    def _constant(self, training: bool, target: str, value: torch.Tensor) -> None:
        """A constant of a graph as a buffer; the same one in both modes where they are equal."""
        for name, known in self.unsaved.items():
            if name.startswith(f"{CONSTANTS}.") and known.dtype == value.dtype and torch.equal(known, value):
                self.constants[training, target] = name
                return
        taken = sum(name.startswith(f"{CONSTANTS}.") for name in self.unsaved)
        self.constants[training, target] = f"{CONSTANTS}.c{taken}"
        self.unsaved[f"{CONSTANTS}.c{taken}"] = value

    def expression(self, name: str) -> str:
        """How code says a tensor: ``self.layers["0"].weight``."""
        *path, last = name.split(".")
        where = self.module(".".join(path))
        return f"{where}.{last}" if _attribute(last) else f'getattr({where}, "{last}")'

    @staticmethod
    def module(path: str) -> str:
        """How code says a module."""
        return "self" + "".join(f".{p}" if _attribute(p) else f'["{p}"]' for p in path.split(".") if p)

    def init(self) -> list[str]:
        """The lines that make modules, parameters and buffers."""
        lines = [f"{self.module(path)} = {self._container(path)}" for path in self.paths]
        for name, tensor in self.parameters.items():
            rest = ", requires_grad=False" if name in self.frozen else ""
            lines.append(self._register("parameter", name, f"nn.Parameter({_empty(tensor)}{rest})"))
        for name, tensor in self.saved.items():
            lines.append(self._register("buffer", name, _empty(tensor)))
        for name, tensor in self.unsaved.items():
            lines.append(self._register("buffer", name, f"{_empty(tensor)}, persistent=False"))
        for name, first in self.aliases.items():
            kind = "parameter" if first in self.parameters else "buffer"
            lines.append(self._register(kind, name, self.expression(first)))
        return lines

    def _register(self, kind: str, name: str, value: str) -> str:
        path, _, last = name.rpartition(".")
        return f'{self.module(path)}.register_{kind}("{last}", {value})'

    def _container(self, path: str) -> str:
        return "nn.ModuleDict()" if path in self.mappings else "nn.Module()"

    @property
    def base(self) -> str:
        """The class of the module itself: one with names that are no identifiers is a mapping."""
        return "nn.ModuleDict" if "" in self.mappings else "nn.Module"

    def values(self) -> dict[str, torch.Tensor]:
        """All tensors by name, but aliases."""
        return {**self.parameters, **self.saved, **self.unsaved}


def _all_tensors(model: nn.Module, twice: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=not twice)
    yield from model.named_buffers(remove_duplicate=not twice)


def _attribute(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _empty(tensor: torch.Tensor) -> str:
    """Code of a tensor without values, in this memory order."""
    shape = tuple(tensor.shape)
    if tensor.is_contiguous() or 0 in tensor.stride():
        return f"torch.empty({shape}, dtype={tensor.dtype})"
    return f"torch.empty_strided({shape}, {tensor.stride()}, dtype={tensor.dtype})"


# -- code ----------------------------------------------------------------------------------------------------------


def _code(space: Space, choice: Choice, states: Mapping[bool, _State], tree: _Tree) -> str:
    """The source of a Python file with the class and a function that loads it."""
    first = next(iter(states.values()))
    signature, batch = _signature(space.model, first.layout)
    alone = _check_of_one(space, states, batch)
    bodies: dict[bool, tuple[Body, str]] = {}
    checks: dict[bool, list[str]] = {}
    imports: set[str] = set()
    for training, state in states.items():
        body = Body(state.graph, _names(state, tree, training, batch), training=training)
        body.lines[:0] = checks[training] = [*alone, *_checks(space, state, batch, training)]
        imports |= body.imports
        bodies[training] = body, _returned(state, body, imports)
    in_eval = None
    if len(states) == 2:
        in_eval = Body(states[True].graph, _names(states[True], tree, True, batch), training=True, in_eval=True)
        in_eval.lines[:0] = checks[True]
    name = type(space.model).__name__
    text = [
        f'"""A subnet of {name}, written by graphopt. It needs PyTorch only.',
        "",
        *(f"{d}: {v}" for d, v in choice.items() if d not in choice.inactive),
        '"""',
        "",
        *sorted({"import torch", *imports}, key=lambda line: (line.startswith("from"), line)),
        "from torch import nn",
        "from torch.nn import functional as F",
        "",
        "aten = torch.ops.aten",
        "",
        "",
        f"class Subnet({tree.base}):",
        "    def __init__(self):",
        "        super().__init__()",
        *(f"        {line}" for line in tree.init()),
        "",
        indent("\n".join(methods(signature, bodies, in_eval)), "    "),
    ]
    return "\n".join(text) + _LOAD


_LOAD = '''


def load(file=None):
    """The subnet with its weights, from a file of safetensors, by default the one beside this file."""
    from pathlib import Path

    from safetensors.torch import load_file

    subnet = Subnet()
    tensors = load_file(file or Path(__file__).with_suffix(".safetensors"))
    with torch.no_grad():
        for name, tensor in [*subnet.named_parameters(), *subnet.named_buffers()]:
            tensor.copy_(tensors[name])
    return subnet
'''


def _names(state: _State, tree: _Tree, training: bool, batch: list[str]) -> Names:
    said = {name: tree.expression(name) for name in state.tensors}
    for (mode, target), name in tree.constants.items():
        if mode is training:
            said[target] = tree.expression(name)
    return Names(said, batch, state.folded)


def _returned(state: _State, body: Body, imports: set[str]) -> str:
    leaves: list[Any] = [Expression(result) for result in body.results]
    if state.outputs is None:
        return str(leaves[0])
    for position, value in state.constants:
        leaves.insert(position, value)
    return nested(pytree.tree_unflatten(leaves, state.outputs), imports)


def _checks(space: Space, state: _State, batch: list[str], training: bool) -> list[str]:
    """Lines that refuse batch sizes for which the model would run other code."""
    symbols, layout = state.graph.symbols, state.layout
    if True not in layout.batched:
        return []
    size = f"{batch[layout.batched.index(True)]}.size(0)"
    if "batch" not in symbols.symbols:
        only = symbols.hints["batch"]
        return [f"if {size} != {only}:", f'    raise ValueError("the model was captured for batches of {only}")']
    guards = [g for g in symbols.guards if g.free_symbols == {symbols.symbols["batch"]}]
    other = next((n for n in range(2, _PROBED) if not symbols.admits({"batch": n})), None)
    if other is None or _same_code(space, layout, other, training):
        return []  # the guards are torch's own: which kernel it would choose
    text = " and ".join(symbols.rename(g) for g in guards)
    if "(" in text or not guards:
        raise ElasticError(f"extract: the code of the model depends on its batch size: {text}")
    return [
        f"batch = {size}",
        f"if not ({text}):",
        f'    raise ValueError("the model was captured for batches where {text}")',
    ]


def _check_of_one(space: Space, states: Mapping[bool, _State], batch: list[str]) -> list[str]:
    """Lines that refuse a batch of 1 in the modes in which the model would run other code for it; the same in both, so
    that both can still be one function."""
    layout = next(iter(states.values())).layout
    refused = [
        training
        for training, state in states.items()
        if True in layout.batched
        and "batch" in state.graph.symbols.symbols
        and not state.graph.symbols.admits({"batch": 1})
        and not _same_code(space, layout, 1, training)
    ]
    if not refused:
        return []
    mode = "" if len(refused) == len(states) else " and self.training" if refused[0] else " and not self.training"
    return [
        f"if {batch[layout.batched.index(True)]}.size(0) == 1{mode}:",
        '    raise ValueError("for a batch of 1 the model runs other code")',
    ]


_PROBED = 130
"""Up to which batch size it is asked whether a guard excludes one."""


def _same_code(space: Space, layout: BatchLayout, size: int, training: bool) -> bool:
    """Whether the model has the same graph for batches of another size; asked once for each mode."""
    with _mode(space.model, training):
        here = space.subnet(space.full).origin.graph
        if ("same code", size) not in here.derived:
            try:
                there = capture_forward(space.model, layout.restore(layout.example(size)), free=space.free)
            except (BatchError, CaptureError):
                here.derived["same code", size] = False
            else:
                same = here.hash() == there.hash() if size > 1 else _operators(here) == _operators(there)
                here.derived["same code", size] = same
        return bool(here.derived["same code", size])


def _operators(graph: TrainingGraph) -> list[Any]:
    """What a graph computes for a batch of 1: operators but views and copies, with their numbers and shapes, and the
    shapes of results. (Which views and copies there are depends on strides, which a dimension of 1 leaves open.)"""
    batch = graph.symbols.symbols.get("batch")

    def number(value: Any) -> Any:
        found = expression(value)
        found = found if isinstance(found, int) or batch is None else found.subs(batch, 1)
        return int(found) if isinstance(found, int) or found.is_number else "free"

    def argument(value: Any) -> Any:
        value = value.meta["val"] if isinstance(value, fx.Node) else value
        if isinstance(value, (bool, float, str)) or not isinstance(value, (int, torch.SymInt)):
            return "tensor" if isinstance(value, (torch.Tensor, tuple, list)) else repr(value)
        return number(value)

    found: list[Any] = []
    for node in graph.nodes:
        moves = is_view(node) or node.target in _COPIES
        if node.op == "call_function" and not moves and not isinstance(node.meta["val"], torch.SymInt):
            arguments = [argument(a) for a in pytree.tree_leaves((node.args, node.kwargs))]
            found.append((node.target, arguments, [[number(s) for s in t.shape] for t in tensors_of(node.meta["val"])]))
    results = [r.meta["val"].shape for r in graph.results if r is not None]
    return [*found, [[number(s) for s in shape] for shape in results]]


_COPIES = {torch.ops.aten.clone.default, torch.ops.aten.contiguous.default, torch.ops.aten._unsafe_view.default}


def _signature(model: nn.Module, layout: BatchLayout) -> tuple[str, list[str]]:
    """The arguments of forward behind ``self``, and the expressions of the batch's tensors in order."""
    given = layout.restore([_Leaf(i) for i in range(len(layout.names))])  # type: ignore[misc]
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    expressions: dict[int, str] = {}
    if isinstance(given, dict):
        keys = [key for key, value in given.items() if _leaves(value)]
        positional = [a for a, b in zip(named, keys) if a == b]
        positional = positional[: next((i for i, (a, b) in enumerate(zip(named, keys)) if a != b), len(positional))]
        arguments = [*positional, *(["*"] if len(keys) > len(positional) else []), *keys[len(positional) :]]
        pairs = [(key, given[key]) for key in keys]
    else:
        names = [named[i] if i < len(named) else f"input{i}" for i in range(len(given))]
        pairs = [(name, value) for name, value in zip(names, given) if _leaves(value)]
        arguments = [name for name, _ in pairs]
    for name, value in pairs:
        _expressions(name, value, expressions)
    return "".join(f", {a}" for a in arguments), [expressions[i] for i in range(len(layout.names))]


@dataclass(frozen=True)
class _Leaf:
    """Stands for a tensor of the batch."""

    index: int


def _leaves(value: Any) -> bool:
    return any(isinstance(leaf, _Leaf) for leaf in pytree.tree_leaves(value))


def _expressions(said: str, value: Any, found: dict[int, str]) -> None:
    """How code says each tensor in an argument."""
    if isinstance(value, _Leaf):
        found[value.index] = said
    elif isinstance(value, (tuple, list)):
        for i, inside in enumerate(value):
            _expressions(f"{said}[{i}]", inside, found)
    elif isinstance(value, dict):
        for key, inside in value.items():
            _expressions(f"{said}[{key!r}]", inside, found)
    elif _leaves(value):
        raise ElasticError(
            f"extract: the argument {said} is a {type(value).__name__}; expected tensors in lists or dicts"
        )


_numbers = count()


def _made(code: str, tree: _Tree) -> nn.Module:
    """The class of ``code`` with its tensors."""
    name = f"<graphopt subnet {next(_numbers)}>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)  # readable tracebacks
    namespace: dict[str, Any] = {"__name__": "subnet"}
    exec(compile(code, name, "exec"), namespace)
    module: nn.Module = namespace["Subnet"]()
    tensors = tree.values()
    tensors.update({name: tensors[first] for name, first in tree.aliases.items()})
    devices = {t.device for t in tensors.values()}
    if len(devices) == 1:
        module.to(devices.pop())
    with torch.no_grad():
        for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tensor.copy_(tensors[path])
    module.code = code  # type: ignore[assignment]
    return module
