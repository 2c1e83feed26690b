"""Saved graphs: what is loaded is what was saved, and a damaged or hostile file gives a LoadError."""

import json
import math
import operator
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import torch as safetensors
from torch import fx, nn
from torch.utils._sympy import functions as sizes

from graphopt.errors import GraphoptError, LoadError
from graphopt.graph.capture import capture
from graphopt.graph.encoding import FUNCTIONS, Reader, Writer
from graphopt.graph.expressions import read_expression, write_expression
from graphopt.graph.serialize import load, save
from graphopt.graph.sizes import Symbols
from graphopt.graph.torch_internals import Sizes
from graphopt.graph.training_graph import (
    Input,
    InputKind,
    Output,
    OutputKind,
    Phase,
    Signature,
    TrainingGraph,
)

aten = torch.ops.aten


class Net(nn.Module):
    """Convolution, batch norm, dropout, attention-like views and a table: many kinds of operators and arguments."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        h = self.drop(torch.relu(self.norm(self.conv(x)))).flatten(2).mean(2)
        return self.head(h) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]) / x.shape[0]


def training_graph() -> TrainingGraph:
    batch = (torch.randn(7, 3, 9, 9), torch.randint(5, (7,)))
    return capture(Net(), batch, loss=nn.functional.cross_entropy)


def elastic_graph(constants: dict[str, torch.Tensor] | None = None) -> TrainingGraph:
    """A small graph by hand, with every kind of argument, over two free sizes and a learning rate."""
    made = Sizes()
    names = {"batch": made.add_size("batch", 8), "seq": made.add_size("seq", 5)}
    assert made.assume(sympy.Eq(sizes.Mod(names["batch"], 2), 0))
    rate = made.number(made.add_number("rate", 0.1, float), float)
    batch, seq = (made.number(s, int) for s in names.values())
    x = made.empty((batch, seq, 4), (seq * 4, 4, 1), torch.float32, torch.device("cpu"))
    graph = fx.Graph()

    def node(op, target, *args, value=None, **kwargs):
        name = target if isinstance(target, str) else str(target.__name__).split(".")[0]
        made_node = graph.create_node(op, target, args, kwargs, name=name)
        made_node.meta = {"val": value, "phase": Phase.FORWARD, "module": "net.0", "source": "net.py:3"}
        return made_node

    def tensor(*shape, dtype=torch.float32):
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return made.empty(shape, stride, dtype, torch.device("cpu"))

    a = node("placeholder", "x", value=x)
    lr = node("placeholder", "lr", value=rate)
    size = node("call_function", aten.sym_size.int, a, 0, value=batch)
    half = node("call_function", operator.floordiv, size, 2, value=batch // 2)
    factor = node("call_function", torch.sym_float, half, value=torch.sym_float(batch // 2))
    decay = node("call_function", operator.mul, lr, factor, value=rate * torch.sym_float(batch // 2))
    less = node("call_function", operator.lt, half, 100, value=batch < 100)
    view = node("call_function", aten.view.default, a, [half, -1], value=tensor(batch // 2, 8 * seq))
    top = node("call_function", aten.topk.default, view, 3, value=(tensor(batch // 2, 3), tensor(3)))
    first = node("call_function", operator.getitem, top, 0, value=tensor(batch // 2, 3))
    scaled = node("call_function", aten.mul.Tensor, first, decay, value=tensor(batch // 2, 3))
    clamped = node("call_function", aten.clamp.default, scaled, -0.0, math.inf, value=tensor(batch // 2, 3))
    full = node(
        "call_function",
        aten.full.default,
        (half, 3),
        math.nan,
        value=tensor(batch // 2, 3, dtype=torch.float64),
        dtype=torch.float64,
        layout=torch.strided,
        device=torch.device("cpu"),
        pin_memory=False,
    )
    copied = node(
        "call_function", aten.clone.default, full, memory_format=torch.contiguous_format, value=full.meta["val"]
    )
    picked = node("call_function", operator.getitem, copied, (..., slice(0, None, 2)), value=tensor(batch // 2, 2))
    twisted = node("call_function", aten.mul.Tensor, clamped, 1 - 2j, value=tensor(3, dtype=torch.complex64))
    for name, constant in (constants or {}).items():
        node("get_attr", name, value=constant)
    graph.output((twisted, None, picked, less))
    signature = Signature(
        inputs=(Input(InputKind.BATCH, "0"), Input(InputKind.HYPER, "optimizer", "lr")),
        outputs=tuple(Output(OutputKind.OUTPUT, str(i)) for i in range(4)),
        symbols=Symbols(names, {"batch": 8, "seq": 5, "heads": 1}, (sympy.Eq(sizes.Mod(names["batch"], 2), 0),)),
        owned=frozenset({"b", "a"}),
        tree={"spec": ("x", [1, {"y": None}]), "clip": math.inf},
    )
    return TrainingGraph(graph, signature, constants)


def roundtrip(graph: TrainingGraph, folder: Path) -> TrainingGraph:
    save(graph, folder / "graph")
    return load(folder / "graph")


def repack(path: Path, change) -> None:
    """Change the JSON of a saved graph."""
    with zipfile.ZipFile(path) as archive:
        data, constants = json.loads(archive.read("graph.json")), archive.read("constants.safetensors")
    data = change(data) or data
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("graph.json", data if isinstance(data, (str, bytes)) else json.dumps(data))
        archive.writestr("constants.safetensors", constants)


@pytest.mark.parametrize("make", [training_graph, elastic_graph])
def test_loads_what_was_saved(make, tmp_path):
    graph = make()
    loaded = roundtrip(graph, tmp_path)
    assert loaded.text() == graph.text()
    assert loaded.hash() == graph.hash()
    assert replace(loaded.signature, symbols=None) == replace(graph.signature, symbols=None)
    assert loaded.symbols.hints == graph.symbols.hints
    for ours, theirs in zip(loaded.nodes, graph.nodes, strict=True):
        assert (ours.name, ours.op, ours.target) == (theirs.name, theirs.op, theirs.target)
        assert repr((ours.args, ours.kwargs)) == repr((theirs.args, theirs.kwargs))
        for key in ("phase", "module", "source"):
            assert (ours.meta.get(key) or "") == (theirs.meta.get(key) or "")


@pytest.mark.parametrize("make", [training_graph, elastic_graph])
def test_saving_again_gives_the_same_file(make, tmp_path):
    save(make(), tmp_path / "first")
    save(load(tmp_path / "first"), tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_runs_to_the_same_values(tmp_path):
    graph = training_graph()
    loaded = roundtrip(graph, tmp_path)
    inputs = [
        torch.randint(5, (7,))
        if n.meta["val"].dtype is torch.int64
        else torch.rand([int(s) for s in n.meta["val"].shape])
        for n in graph.placeholders
    ]

    def run(g):
        root = nn.Module()
        for name, constant in g.constants.items():
            setattr(root, name, constant)
        torch.manual_seed(3)
        return fx.Interpreter(fx.GraphModule(root, g.graph)).run(*inputs)

    for ours, theirs in zip(run(loaded), run(graph), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_sizes_stay_symbolic_and_passes_work_on_a_loaded_graph(tmp_path):
    loaded = roundtrip(training_graph(), tmp_path)
    x = loaded.input_nodes(InputKind.BATCH)["0"]
    assert x.meta["val"].shape[0].node.expr is loaded.symbols.symbols["batch"]
    draft = loaded.draft()
    added = draft.add(aten.cat.default, [draft.node(x), draft.node(x)], like=draft.output, phase=Phase.FORWARD)
    assert loaded.symbols.rename(added.meta["val"].shape[0]) == "2*batch"
    assert len(draft.finish()) == len(loaded) + 1


def test_equal_hints_stay_two_sizes(tmp_path):
    graph = elastic_graph()
    save(graph, tmp_path / "graph")
    repack(tmp_path / "graph", lambda d: d.update(sizes=[["batch", 8, True], ["seq", 8, True]]))
    shape = load(tmp_path / "graph").placeholders[0].meta["val"].shape
    assert shape[0].node.expr != shape[1].node.expr


@pytest.mark.parametrize(
    "constant",
    [
        torch.tensor(3.5),
        torch.arange(6).view(2, 3).t(),
        torch.ones(3, 1).expand(3, 4),
        torch.arange(10.0)[::2],
        torch.tensor([1 + 2j, 3j], dtype=torch.complex128),
        torch.tensor([1 + 2j, 3j]).conj(),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.tensor([1.5, math.inf, -0.0, math.nan], dtype=torch.bfloat16),
        nn.Parameter(torch.ones(2)),
    ],
)
def test_constants(constant, tmp_path):
    loaded = roundtrip(elastic_graph({"c": constant}), tmp_path).constants["c"]
    assert loaded.dtype is constant.dtype and not loaded.requires_grad
    torch.testing.assert_close(loaded, constant.detach().resolve_conj(), rtol=0, atol=0, equal_nan=True)
    if constant.is_contiguous() or 0 in constant.stride():
        assert loaded.stride() == constant.stride()


def test_constants_that_share_memory(tmp_path):
    base = torch.arange(4.0)
    loaded = roundtrip(elastic_graph({"a": base, "b": base[1:]}), tmp_path).constants
    assert loaded["a"].tolist() == base.tolist() and loaded["b"].tolist() == base[1:].tolist()


# -- expressions ----------------------------------------------------------------------------------------------------

SYMBOLS = {n: sympy.Symbol(f"s{i}", integer=True, positive=True) for i, n in enumerate(("batch", "seq", "heads"))}
RENAMED = {n: sympy.Symbol(f"s{9 - i}", integer=True, positive=True) for i, n in enumerate(SYMBOLS)}
TEXTS = {symbol: name for name, symbol in SYMBOLS.items()}


def combine(inner):
    """Expressions over expressions, by the operations that sizes meet."""
    pairs = st.tuples(inner, inner)
    constant = st.integers(1, 9)
    return st.one_of(
        pairs.map(lambda p: p[0] + p[1]),
        pairs.map(lambda p: p[0] * p[1]),
        pairs.map(lambda p: p[0] - 2 * p[1]),
        pairs.map(lambda p: sizes.Max(*p)),
        pairs.map(lambda p: sizes.Min(*p)),
        inner.map(lambda e: e**2),
        inner.map(lambda e: sympy.Rational(1, 2) * e),
        inner.map(lambda e: sizes.TruncToInt(sizes.IntTrueDiv(e, 3) * 0.5)),
        inner.map(lambda e: sizes.CeilToInt(sizes.OpaqueUnaryFn_cos(sizes.ToFloat(e)))),
        st.tuples(inner, constant).map(lambda p: sizes.FloorDiv(*p) if p[0].is_integer else p[0]),
        st.tuples(inner, constant).map(lambda p: sizes.PythonMod(*p) if p[0].is_integer else p[0]),
        st.tuples(inner, constant, constant).map(
            lambda p: sizes.ModularIndexing(*p) if p[0].is_integer and p[0].is_nonnegative else p[0]
        ),
    )


leaves = st.one_of(st.sampled_from(list(SYMBOLS.values())), st.integers(-50, 50).map(sympy.Integer))
expressions = st.recursive(leaves, combine, max_leaves=4)


@given(expressions, expressions, st.sampled_from([sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge]))
def test_expressions(left, right, relation):
    for expr in (left, relation(left, right), sympy.Or(relation(left, right), sympy.Eq(SYMBOLS["seq"], 4))):
        data = json.loads(json.dumps(write_expression(expr, TEXTS.__getitem__)))
        assert read_expression(data, SYMBOLS) == expr
        renamed = read_expression(data, RENAMED)
        assert write_expression(renamed, {s: n for n, s in RENAMED.items()}.__getitem__) == data


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        None,
        1.5,
        "unknown",
        ["exec", "print()"],
        ["Add", ["Add"] * 3000],
        ["Pow", 10, 10**9],
        ["Pow", ["Pow", ["Pow", 10, 64], 64], 64],
        ["Pow", 0, -1],
        ["FloorDiv", 1, 0],
        ["FloorDiv", 1],
        ["Rational", 1, 0],
        ["Float", float("nan")],
        ["Float", "1.0"],
        ["Float"],
        [["Add"], 1],
        ["Add", "batch", ["Eq", 1, 1]],
        10**30,
    ],
)
def test_what_is_no_expression_is_refused(data):
    with pytest.raises(LoadError):
        read_expression(data, SYMBOLS)


def test_an_expression_nested_too_deep_is_refused():
    data = "batch"
    for _ in range(5000):
        data = ["Identity", data]
    with pytest.raises(LoadError):
        read_expression(data, SYMBOLS)


# -- arguments ------------------------------------------------------------------------------------------------------

plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.complex_numbers(),
        st.text(),
        st.sampled_from([torch.float16, torch.int64, torch.strided, torch.channels_last, torch.device("cuda:1"), ...]),
        st.builds(slice, st.none() | st.integers(), st.integers(), st.none()),
    ),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(plain)
def test_arguments(value):
    data = json.loads(json.dumps(Writer({}).argument(value), allow_nan=False))
    assert repr(Reader(Sizes()).argument(data)) == repr(value)


def test_every_function_of_symbolic_numbers_can_be_saved():
    from torch.fx.experimental.sym_node import METHOD_TO_OPERATOR

    known = set(FUNCTIONS.values())
    missing = {name for name, function in METHOD_TO_OPERATOR.items() if function not in known}
    assert missing <= {"is_integer"}  # a lambda of torch's, never a node


# -- errors ---------------------------------------------------------------------------------------------------------


def test_what_a_file_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    graph = elastic_graph()
    next(n for n in graph.nodes if n.op == "call_function").target = lambda x, i: x
    with pytest.raises(GraphoptError, match=r"sym_size.*cannot save a call"):
        save(graph, tmp_path / "graph")
    graph = elastic_graph()
    graph.nodes[3].args = (graph.nodes[2], object())
    with pytest.raises(GraphoptError, match="floordiv: cannot save"):
        save(graph, tmp_path / "graph")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save(elastic_graph(), tmp_path / "graph")
    before = (tmp_path / "graph").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save(training_graph(), tmp_path / "graph")
    assert [p.name for p in tmp_path.iterdir()] == ["graph"]
    assert (tmp_path / "graph").read_bytes() == before


def test_no_such_file_no_zip_a_cut_zip_and_a_foreign_zip(tmp_path):
    path = tmp_path / "graph"
    with pytest.raises(LoadError, match=r"graph: there is no such file"):
        load(path)
    with pytest.raises(LoadError, match=r"there is no such file"):
        load(tmp_path)
    path.write_bytes(b"hello")
    with pytest.raises(LoadError, match=r"no zip file or is cut off .*save the graph anew"):
        load(path)
    save(elastic_graph(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LoadError, match=r"no zip file or is cut off"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x")
    with pytest.raises(LoadError, match=r"holds no constants.safetensors, graph.json"):
        load(path)


def node_of(data, name):
    return next(n for n in data["nodes"] if n["name"] == name)


CHANGES = {
    "has format 2, this release reads 1": lambda d: d.update(format=2),
    "has format None": lambda d: d.pop("format") and None,
    "was written by torch '1.4.0'": lambda d: d.update(torch="1.4.0"),
    "has format 'list'": lambda d: [d],
    "operator acme.fuse.default is not registered here": lambda d: node_of(d, "view").update(
        target="acme.fuse.default"
    ),
    "operator aten.view.nope is not registered": lambda d: node_of(d, "view").update(target="aten.view.nope"),
    "operator load_library.a.b is not registered": lambda d: node_of(d, "view").update(target="load_library.a.b"),
    "unknown function 'os.system'": lambda d: node_of(d, "view").update(target="os.system"),
    "unknown function 'builtins.eval'": lambda d: node_of(d, "view").update(target="builtins.eval"),
    r"unknown function \['a'\]": lambda d: node_of(d, "view").update(target=["a"]),
    "which no node before it has made": lambda d: d["nodes"].insert(2, d["nodes"].pop(5)),
    "an identifier": lambda d: node_of(d, "view").update(name="a; import os"),
    "found 'lambda', expected an identifier": lambda d: node_of(d, "view").update(name="lambda"),
    "a name that no other node": lambda d: node_of(d, "mul").update(name="view"),
    "a line of text": lambda d: node_of(d, "view").update(module="a\nimport os"),
    "no value; expected a tensor": lambda d: node_of(d, "view").pop("value") and None,
    "a guard that holds": lambda d: d.update(sizes=[["batch", 7, True], ["seq", 5, True]]),
    "expected a size": lambda d: d.update(sizes=[["batch", 1, True], ["seq", 5, True]]),
    "unknown symbol 'seq'": lambda d: d.update(sizes=[["batch", 8, True]]),
    "constant 'c': its values are missing": lambda d: d["constants"].append(["c", [[2], [1], "float32", "cpu"]]),
    "expected a constant of this file": lambda d: node_of(d, "view").update(op="get_attr", target="c", args=[]),
    "has 2 placeholders; expected 3": lambda d: d["inputs"].append(["batch", "1", ""]),
    "expected 2 before all other nodes": lambda d: d["nodes"].insert(2, d["nodes"].pop(1)),
    "has 3 results; expected 4": lambda d: d["nodes"][-1]["args"][0]["tuple"].pop() and None,
    "has 0 output nodes": lambda d: d["nodes"].pop() and None,
    "unknown dtype 'float31'": lambda d: d["nodes"][0].update(value={"tensor": [[2], [1], "float31", "cpu"]}),
    "unknown dtype 'load'": lambda d: d["nodes"][0].update(value={"tensor": [[2], [1], "load", "cpu"]}),
    "unknown device 'fridge'": lambda d: d["nodes"][0].update(value={"tensor": [[2], [1], "int8", "fridge"]}),
    "expected equal lengths": lambda d: d["nodes"][0].update(value={"tensor": [[2, 2], [1], "int8", "cpu"]}),
    "damaged": lambda d: d["nodes"][0].update(value={"tensor": [[-2], [1], "int8", "cpu"]}),
    "is no value": lambda d: d["nodes"][0].update(value={"pickle": "gASVFQ=="}),
    "RecursionError": lambda d: "[" * 200_000,
    "JSONDecodeError": lambda d: "{",
}


@pytest.mark.parametrize("message", CHANGES)
def test_hostile_and_foreign_content(message, tmp_path):
    path = tmp_path / "graph"
    save(elastic_graph(), path)
    repack(path, CHANGES[message])
    with pytest.raises(LoadError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, bytes, str]:
    path = tmp_path_factory.mktemp("fuzz") / "graph"
    graph = elastic_graph({"c": torch.arange(5.0)})
    save(graph, path)
    return path, path.read_bytes(), graph.text()


@given(st.data())
def test_damaged_bytes_give_a_load_error_or_the_same_graph(saved, data):
    path, content, text = saved
    damaged = bytearray(content)
    match data.draw(st.sampled_from(["flip", "cut", "insert", "zero"])):
        case "flip":
            for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
                damaged[at] ^= data.draw(st.integers(1, 255))
        case "cut":
            del damaged[data.draw(st.integers(0, len(content) - 1)) :]
        case "insert":
            at = data.draw(st.integers(0, len(content)))
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        case "zero":
            at = data.draw(st.integers(0, len(content) - 1))
            damaged[at : at + 64] = bytes(len(damaged[at : at + 64]))
    path.write_bytes(damaged)
    try:
        loaded = load(path)
    except LoadError:
        return
    assert loaded.text() == text


odd = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["batch", "Add", "FloorDiv", "node", "aten.mm.default", "inf", "x", "int", "tuple"]),
    lambda inner: st.lists(inner, max_size=3) 
    | st.dictionaries(st.sampled_from(["tuple", "node", "tensor", "x"]), inner),
    max_leaves=5,
)  # fmt: skip


@given(st.data())
def test_changed_json_gives_a_load_error_or_a_graph(saved, data):
    path, content, _ = saved
    path.write_bytes(content)

    def change(root):
        at, key, place = root, None, None
        while isinstance(at, (dict, list)) and at:
            keys = sorted(at) if isinstance(at, dict) else range(len(at))
            place, key = at, data.draw(st.sampled_from(list(keys)))
            at = place[key]
            if data.draw(st.integers(0, 5)) == 0:
                break
        place[key] = data.draw(odd)
        return root

    repack(path, change)
    try:
        loaded = load(path)
    except LoadError:
        return
    assert isinstance(loaded, TrainingGraph)


def test_constants_are_plain_safetensors(tmp_path):
    save(elastic_graph({"c": torch.arange(3.0)}), tmp_path / "graph")
    with zipfile.ZipFile(tmp_path / "graph") as archive:
        assert safetensors.load(archive.read("constants.safetensors"))["c"].tolist() == [0.0, 1.0, 2.0]
