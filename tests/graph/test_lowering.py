"""Lowered code runs exactly the graph's operators, writes new values in place, and frees memory early."""

import copy
import traceback
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import eager_step, peak_bytes
from graphopt import capture, optimize
from graphopt.graph import lowering
from graphopt.graph.in_place import decide
from graphopt.graph.lowering import lower
from graphopt.graph.training_graph import InputKind
from tests.helpers import assert_same_bits, traced
from tests.helpers import run as interpret
from tests.training import Net, cross_entropy, images, mlp, rows

aten = torch.ops.aten
FORMS = [{"foreach": False}, {"foreach": True}, {"fused": True}]


class Log(TorchDispatchMode):
    """The ATen operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func] += 1
        return func(*args, **(kwargs or {}))


def arguments(graph, model, optimizer, batch, hyper=0.01):
    """Copies of all that a captured step reads, so that a run changes nothing real."""
    by_name = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = []
    for i in graph.inputs:
        if i.kind is InputKind.BATCH:
            found.append(batch[int(i.name)])
        elif i.kind is InputKind.STATE:
            found.append(optimizer.state[by_name[i.name]][i.field].clone())
        elif i.kind is InputKind.HYPER:
            found.append(hyper)
        else:
            found.append(by_name[i.name].detach().clone())
    return found


def logged(run, given):
    """What `run` dispatches."""
    with torch.no_grad(), Log() as log:
        run(*given)
    return log.seen


def expected_operators(graph, decisions=None):
    """The operators that running ``graph`` should dispatch."""
    calls = decisions.calls if decisions else {}
    targets = [calls.get(n, n.target) for n in graph.nodes if n.op == "call_function"]
    return Counter(as_run(t) for t in targets if isinstance(t, torch._ops.OpOverload) and t is not aten.sym_size.int)


def as_run(target):
    """Python's bindings make a number a tensor without dimensions before `add` and the like, as their scalar overloads
    do: the same kernel, the same bits."""
    number = target._overloadname == "Scalar" and str(target).split(".")[1] in {"add", "sub", "mul", "div", "mul_"}
    return target.overloadpacket.Tensor if number else target


def steps():
    """A model with its optimizer for each form of update, and the step as a graph."""
    for make in (SGD, Adam, AdamW, RMSprop, Adagrad):
        for form in FORMS:
            if not (make is RMSprop and "fused" in form):
                yield pytest.param(make, form, id=f"{make.__name__} {form}")


def captured(make, form, model=None, **options):
    model = model or Net(0.5)
    momentum = {"momentum": 0.9} if make in (SGD, RMSprop) else {}
    optimizer = make(model.parameters(), lr=0.01, **momentum, **form)
    batch = images() if isinstance(model, Net) else rows()
    return model, optimizer, batch, capture(model, batch, loss=cross_entropy, optimizer=optimizer, **options)


# -- operators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, form", list(steps()))
def test_every_update_is_written_in_place(make, form):
    graph = captured(make, form)[-1]
    assert decide(graph).copies == []


@pytest.mark.parametrize("make, form", [(SGD, FORMS[0]), (Adam, FORMS[0]), (AdamW, FORMS[1]), (AdamW, FORMS[2])])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_lowered_code_dispatches_the_graphs_operators(make, form, clip):
    model, optimizer, batch, graph = captured(make, form, clip=clip)
    given = arguments(graph, model, optimizer, batch)
    assert logged(lower(graph).run, given) == expected_operators(graph, decide(graph))
    given = arguments(graph, model, optimizer, batch)
    assert logged(lower(graph, in_place=False).run, given) == expected_operators(graph)


@pytest.mark.parametrize("make, form", [(SGD, FORMS[0]), (Adam, FORMS[1]), (AdamW, FORMS[2])])
def test_in_place_and_functional_code_give_the_same_bits(make, form):
    model, optimizer, batch, graph = captured(make, form)
    values = []
    for in_place in (True, False):
        given = arguments(graph, model, optimizer, batch)
        lowered = lower(graph, in_place=in_place)
        torch.manual_seed(1)
        with torch.no_grad():
            results = dict(zip(lowered.outputs, lowered.run(*given), strict=True))
        after = dict(zip(graph.inputs, given, strict=True))
        names = {(i.kind.value, i.name, i.field): v for i, v in after.items()}
        values.append(
            [results[o] if o in results else names[o.kind.removeprefix("new "), o.name, o.field] for o in graph.outputs]
        )
    assert_same_bits(*values)


@pytest.mark.parametrize("name", sorted(lowering._IN_TORCH | lowering._IN_TENSOR))
def test_bindings_exist(name):
    owner = torch if name in lowering._IN_TORCH else torch.Tensor
    assert callable(getattr(owner, name)) and hasattr(aten, name)
    assert not (name in lowering._IN_TORCH and name in lowering._IN_TENSOR)


a, v, i = torch.randn(3, 4), torch.randn(4), torch.tensor([0, 2])
m, n, b = torch.randn(3, 3), torch.randn(3, 3), torch.randn(2, 3, 3)
image, weight = torch.randn(2, 4, 5, 5), torch.randn(4, 4, 3, 3)
CALLS = {
    aten._log_softmax.default: (a, 1, False), aten._softmax.default: (a, 1, False), aten.abs.default: (a,),
    aten.add.Tensor: (a, v), aten.add.Scalar: (a, 2), aten.addmm.default: (m, m, n), aten.addcdiv.default: (m, m, n),
    aten.addcmul.default: (m, m, n), aten.baddbmm.default: (b, b, b), aten.bernoulli.default: (torch.rand(3),),
    aten.bernoulli.p: (a, 0.5), aten.bmm.default: (b, b), aten.clone.default: (a,),
    aten.convolution.default: (image, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    aten.cos.default: (a,), aten.div.Tensor: (a, v), aten.div.Scalar: (a, 2.0),
    aten.embedding.default: (a, i, -1, False, False), aten.erf.default: (a,), aten.exp.default: (a,),
    aten.expand.default: (v, [3, 4]), aten.full.default: ([2, 3], 1.0), aten.full_like.default: (a, 1.0),
    aten.gt.Scalar: (a, 0), aten.gt.Tensor: (a, v), aten.le.Scalar: (a, 0), aten.le.Tensor: (a, v),
    aten.lerp.Scalar: (m, n, 0.5), aten.lerp.Tensor: (m, n, n), aten.log.default: (a,), aten.lt.Scalar: (a, 0),
    aten.lt.Tensor: (a, v), aten.mm.default: (m, n), aten.mul.Tensor: (a, v), aten.mul.Scalar: (a, 2),
    aten.native_dropout.default: (a, 0.5, True),
    aten.native_group_norm.default: (image, None, None, 2, 4, 25, 2, 1e-5),
    aten.native_layer_norm.default: (a, [4], None, None, 1e-5), aten.neg.default: (a,),
    aten._native_batch_norm_legit.default: (image, None, None, torch.zeros(4), torch.ones(4), True, 0.1, 1e-5),
    aten._native_batch_norm_legit.no_stats: (image, None, None, True, 0.1, 1e-5),
    aten.permute.default: (a, [1, 0]), aten.pow.Tensor_Scalar: (a, 2), aten.pow.Tensor_Tensor: (a, v),
    aten.pow.Scalar: (2, a), aten.relu.default: (a,), aten.rsqrt.default: (a,), aten.select.int: (a, 0, 1),
    aten.sigmoid.default: (a,), aten.sin.default: (a,), aten.sqrt.default: (a,), aten.sub.Tensor: (a, v),
    aten.sub.Scalar: (a, 2), aten.sum.default: (a,), aten.sum.dim_IntList: (a, [0], True), aten.t.default: (a,),
    aten.tanh.default: (a,), aten.transpose.int: (a, 0, 1), aten.unsqueeze.default: (a, 0),
    aten.view.default: (a, [4, 3]), aten.where.self: (a > 0, a, v),
    aten.zeros_like.default: (a,), aten.add_.Tensor: (a, v), aten.addcdiv_.default: (m, m, n),
    aten.addcmul_.default: (m, m, n), aten.div_.Tensor: (a, v), aten.lerp_.Scalar: (m, n, 0.5),
    aten.mul_.Tensor: (a, v), aten.mul_.Scalar: (a, 2), aten.sqrt_.default: (a.abs(),), aten.sub_.Tensor: (a, v),
}  # fmt: skip


@pytest.mark.parametrize("target", CALLS, ids=str)
def test_bindings_dispatch_the_overload_of_the_graph(target):
    with torch.no_grad(), Log() as log:
        lowering.binding(target)(*CALLS[target])
    assert log.seen == {as_run(target): 1}


def test_operators_without_operands_in_common_names():
    """Names, overloads and literals that could confuse generated code."""

    def step(s, x, out):
        inf = aten.clamp(s.call(aten.full.default, [2, 2], float("inf")), -1e30, float("inf"))
        nan = s.call(aten.full.default, [2, 2], float("nan"))
        cast = s.call(aten._to_copy.default, aten.add.Tensor(x, out), dtype=torch.float64)
        return aten.add.Tensor(inf, nan), cast, None, x

    graph = traced(step, (2, 2), (2, 2))
    given = [torch.randn(2, 2), torch.randn(2, 2)]
    with torch.no_grad():
        assert_same_bits(lower(graph).run(*given), interpret(graph, given))


# -- memory ---------------------------------------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    """How many results of operators are alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = weakref.WeakSet()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        self.alive.update(r for r in results if r is not None and not isinstance(r, nn.Parameter))
        self.most = max(self.most, len(self.alive))
        return result


def test_values_are_freed_after_their_last_use():
    def step(s, x):
        for _ in range(20):
            x = aten.exp.default(aten.neg.default(x))
        return x

    graph = traced(step, (3,))
    given = torch.randn(3)
    with torch.no_grad(), Watching() as watching:
        result = lower(graph).run(given)
    assert watching.most <= 2 and len(watching.alive) == 1 and len(result) == 1


def test_a_boxed_function_frees_inputs_too():
    def step(s, x, y):
        kept = aten.exp.default(x)
        return aten.mul.Tensor(aten.neg.default(kept), y)

    graph = traced(step, (3,), (3,))
    given = [torch.randn(3), torch.randn(3)]
    expected = given[0].exp().neg() * given[1]
    alive = weakref.WeakSet(given)
    held = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            del args
            held.append(len(alive))
            return result

    with torch.no_grad(), Counting():
        (result,) = lower(graph, boxed=True).run(given)
    assert given == [] and torch.equal(result, expected)
    assert held[-2] == 1 and not alive  # the first is gone when the second operator runs, both are at the end


@pytest.mark.parametrize("form", FORMS)
def test_a_step_needs_no_more_memory_than_eager(form):
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(128, 128), nn.ReLU())))
    again, batch = copy.deepcopy(model), (torch.randn(64, 128), torch.randint(128, (64,)))
    eager = eager_step(again, AdamW(again.parameters(), **form), cross_entropy)
    optimizer = AdamW(model.parameters(), **form)
    ours = optimize(model, (64, 128), loss=cross_entropy, optimizer=optimizer, schemes="flat")
    peaks = []
    for step in (eager, ours):
        for _ in range(2):
            step(*batch)
        peaks.append(peak_bytes(lambda step=step: step(*batch)))
    assert peaks[1] <= peaks[0]


def test_nothing_of_a_step_stays_alive():
    model = mlp()
    step = optimize(model, (5, 4), loss=cross_entropy, optimizer=SGD(model.parameters(), lr=0.1), schemes="flat")
    batch = rows()
    step(*batch)
    with Watching() as watching:
        loss = step(*batch)
        del loss
    assert len(watching.alive) == 0


# -- code -----------------------------------------------------------------------------------------------------------


def test_the_code_is_readable():
    lowered = lower(captured(SGD, FORMS[0], mlp())[-1])
    lines = lowered.code.splitlines()
    assert lines[0].startswith("def step(_0_weight, _0_bias, ") or lines[0].startswith("def step(")
    assert any(line.strip().startswith("del ") for line in lines) and lines[-1].strip().startswith("return (")


def test_tracebacks_show_the_line_of_generated_code():
    model, optimizer, batch, graph = captured(SGD, FORMS[0], mlp())
    given = arguments(graph, model, optimizer, (torch.randn(5, 9), batch[1]))
    with torch.no_grad(), pytest.raises(RuntimeError) as raised:
        lower(graph).run(*given)
    text = "".join(traceback.format_exception(raised.value))
    assert "<graphopt step" in text and "= addmm" in text
