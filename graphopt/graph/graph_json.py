"""A training graph as JSON data and constants, and back: the content of the files of `graphopt.graph.serialize`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from keyword import iskeyword
from typing import Any

import torch
from torch import fx

from graphopt.errors import GraphoptError, LoadError
from graphopt.graph.encoding import Reader, Writer, read_constant, read_device, read_target, write_target
from graphopt.graph.expressions import short
from graphopt.graph.sizes import Symbols
from graphopt.graph.torch_internals import Sizes
from graphopt.graph.training_graph import Input, InputKind, Output, OutputKind, Phase, Signature, TrainingGraph


def graph_to_data(graph: TrainingGraph) -> dict[str, Any]:
    """What JSON can hold of a graph: all but the values of its constants.

    Raises GraphoptError, with the node's name, for what a file cannot hold.
    """
    symbols, signature = graph.symbols, graph.signature
    writer = Writer({symbol: name for name, symbol in symbols.symbols.items()})
    nodes = []
    for node in graph.nodes:
        with _naming(node.name, GraphoptError):
            nodes.append(_write_node(node, writer))
            if node.op != "output":
                nodes[-1]["axes"] = _axis_names(graph.axes.of(node))
    with _naming("signature", GraphoptError):
        return {
            "sizes": [[name, hint, name in symbols.symbols] for name, hint in symbols.hints.items()],
            "guards": [writer.expression(guard) for guard in symbols.guards],
            "inputs": [[str(i.kind), i.name, i.field] for i in signature.inputs],
            "outputs": [[str(o.kind), o.name, o.field] for o in signature.outputs],
            "owned": None if signature.owned is None else sorted(signature.owned),
            "tree": writer.argument(dict(signature.tree)),
            "constants": [[name, writer.tensor(_storable(t))] for name, t in graph.constants.items()],
            "nodes": nodes,
            "numbers": writer.others,
        }


def _write_node(node: fx.Node, writer: Writer) -> dict[str, Any]:
    data: dict[str, Any] = {"op": node.op, "name": node.name}
    data["target"] = write_target(node.target) if node.op == "call_function" else str(node.target)
    data["args"] = [writer.argument(a) for a in node.args]
    if node.kwargs:
        data["kwargs"] = {name: writer.argument(a) for name, a in node.kwargs.items()}
    if "val" in node.meta:
        data["value"] = writer.value(node.meta["val"])
    for key in ("phase", "module", "source"):
        if node.meta.get(key):
            data[key] = str(node.meta[key])
    return data


def _axis_names(dims: Any) -> Any:
    """The dimensions of a node as text, for whoever reads the file; a loaded graph finds them by itself."""
    return [_axis_names(d) if isinstance(d, tuple) else str(d) for d in dims]


def _storable(constant: torch.Tensor) -> torch.Tensor:
    """The constant without gaps between its elements, which a file would not keep."""
    constant = constant.detach()
    return constant if _span(constant.shape, constant.stride()) <= constant.numel() else constant.contiguous()


def constants_to_store(constants: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The constants as contiguous real tensors on the CPU, complex ones with a last dimension of two."""
    plain = {}
    for name, tensor in constants.items():
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        plain[name] = tensor.clone(memory_format=torch.contiguous_format)
    return plain


def _span(shape: Any, stride: Any) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


def graph_from_data(data: Mapping[str, Any], constants: Mapping[str, torch.Tensor]) -> TrainingGraph:
    """The graph that `graph_to_data` and `constants_to_store` were made from, on new fake tensors and symbols.

    Raises LoadError with the place in the file; on hostile data any other exception too.
    """
    sizes = Sizes()
    hints, free = {}, {}
    for name, hint, is_free in data["sizes"]:
        hints[_text(name)] = _checked(hint, type(hint) is int and hint >= (2 if is_free else 0), "a size")
        if is_free:
            free[name] = sizes.add_size(name, hint)
    reader = Reader(sizes)
    for position, (kind, hint) in enumerate(data["numbers"]):
        _checked(kind, kind in ("int", "float"), "int or float")
        sizes.add_number(f"%{position}", reader.value(hint), int if kind == "int" else float)
    guards = tuple(reader.expression(guard) for guard in data["guards"])
    for guard, text in zip(guards, data["guards"]):
        _checked(text, sizes.assume(guard), f"a guard that holds at {hints}")
    restored = {}
    for name, description in data["constants"]:
        with _naming(f"constant {short(name)}"):
            restored[_text(name)] = _read_constant(description, constants.get(name))
    graph = fx.Graph()
    for position, described in enumerate(data["nodes"]):
        with _naming(f"node {position} {short(described.get('name'))}"):
            _read_node(graph, described, reader, restored)
    signature = Signature(
        inputs=tuple(Input(InputKind(kind), _text(n), _text(f)) for kind, n, f in data["inputs"]),
        outputs=tuple(Output(OutputKind(kind), _text(n), _text(f)) for kind, n, f in data["outputs"]),
        symbols=Symbols(symbols=free, hints=hints, guards=guards),
        owned=None if data["owned"] is None else frozenset(_text(name) for name in data["owned"]),
        tree=reader.argument(data["tree"]),
    )
    _check_ends(graph, signature)
    return TrainingGraph(graph, signature, restored)


def _read_node(graph: fx.Graph, data: dict[str, Any], reader: Reader, constants: Mapping[str, Any]) -> None:
    op = _checked(data["op"], data["op"] in ("placeholder", "get_attr", "call_function", "output"), "a kind of node")
    name = _identifier(data["name"])
    target = data["target"]
    if op == "get_attr":
        _checked(target, target in constants, "a constant of this file")
    elif op == "placeholder":
        _identifier(target)
    args = tuple(reader.argument(a) for a in data["args"])
    kwargs = {_identifier(k): reader.argument(v) for k, v in data.get("kwargs", {}).items()}
    node = graph.create_node(op, read_target(target) if op == "call_function" else target, args, kwargs, name=name)
    _checked(name, node.name == name and name not in reader.nodes, "a name that no other node and no builtin has")
    reader.nodes[name] = node
    if "value" in data:
        node.meta["val"] = reader.value(data["value"])
    elif op not in ("output", "get_attr"):
        raise LoadError("it has no value; expected a tensor or a number")
    if op == "call_function" or "phase" in data:
        node.meta["phase"] = Phase(data["phase"])
    node.meta["module"], node.meta["source"] = _text(data.get("module", "")), _text(data.get("source", ""))


def _read_constant(data: Any, found: torch.Tensor | None) -> torch.Tensor:
    shape, stride, dtype_name, device = data
    dtype = read_constant("dtype", dtype_name)
    if found is None:
        raise LoadError("its values are missing in the file; save the graph anew")
    if dtype.is_complex:
        found = torch.view_as_complex(found)
    if list(found.shape) != shape or found.dtype is not dtype or _span(shape, stride) > found.numel():
        raise LoadError(
            f"is {found.dtype} {list(found.shape)} in the file, its description says {dtype} {short(shape)}"
        )
    restored = torch.empty_strided(shape, stride, dtype=dtype)
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in stride)  # broadcast: stored once
    restored[once].copy_(found[once])
    return restored.to(read_device(device))


def _check_ends(graph: fx.Graph, signature: Signature) -> None:
    kinds = [n.op for n in graph.nodes]
    count = len(signature.inputs)
    if kinds.count("placeholder") != count or kinds[:count] != ["placeholder"] * count:
        raise LoadError(f"has {kinds.count('placeholder')} placeholders; expected {count} before all other nodes")
    if kinds.count("output") != 1 or kinds[-1] != "output":
        raise LoadError(f"has {kinds.count('output')} output nodes; expected one, the last")
    args = next(iter(reversed(graph.nodes))).args
    results = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else None
    if results is None or not all(r is None or isinstance(r, fx.Node) for r in results):
        raise LoadError("its output is no tuple of nodes")
    if len(results) != len(signature.outputs):
        raise LoadError(f"has {len(results)} results; expected {len(signature.outputs)}")


def _identifier(name: Any) -> str:
    """Names end up in generated code: nothing but identifiers may pass."""
    fits = isinstance(name, str) and name.isascii() and name.isidentifier() and not iskeyword(name)
    return _checked(name, fits, "an identifier")


def _text(text: Any) -> str:
    """Texts end up in comments of generated code: nothing that ends a line may pass."""
    return _checked(text, isinstance(text, str) and (text.isprintable() or not text), "a line of text")


def _checked(value: Any, fits: bool, expected: str) -> Any:
    if not fits:
        raise LoadError(f"found {short(value)}, expected {expected}; the file is damaged or was changed by hand")
    return value


@contextmanager
def _naming(place: str, kind: Callable[[str], GraphoptError] = LoadError) -> Iterator[None]:
    """Puts the place in the file before the message of an error inside."""
    try:
        yield
    except GraphoptError as error:
        raise kind(f"{place}: {error}") from error.__cause__
