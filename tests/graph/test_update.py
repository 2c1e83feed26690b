"""The recorded update against torch's own `optimizer.step()`, bit for bit."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import fx, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from graphopt.errors import CaptureError, GraphoptError, OptimizerError
from graphopt.graph.hyper_parameters import ClipNorm, ClipValue, hyper_reader, parse_clip, structure_key
from graphopt.graph.torch_internals import FakeTensorMode
from graphopt.graph.training_graph import InputKind, OutputKind, Phase
from graphopt.graph.update import (
    check_ownership,
    initialize_state,
    splice,
    supported,
    trace_clip,
    trace_update,
)

STEPS = 5
LOOP, FOREACH, FUSED = {"foreach": False}, {"foreach": True}, {"fused": True}


class Net(nn.Module):
    """Parameters of several shapes, among them a scalar, an empty one, channels-last, tied and frozen ones."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.block = nn.ModuleDict({"fc": nn.Linear(5, 7), "tied": nn.Linear(5, 7)})
        self.block["tied"].weight = self.block["fc"].weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(2))
        self.to(dtype)


class Twin:
    """Two copies of a model, one stepped by its optimizers, one by the recorded graph."""

    def __init__(self, model, make):
        self.models = (model, copy.deepcopy(model))
        self.optimizers = tuple(make(m) for m in self.models)
        self.by_name = tuple(dict(m.named_parameters()) for m in self.models)
        self.names = {id(p): n for n, p in self.by_name[1].items()}
        self.trainable = [n for n, p in self.by_name[1].items() if p.requires_grad and n != "unused"]
        self.trace = None
        self.captures = 0

    def capture(self):
        for optimizer in self.optimizers[1]:
            assert supported(optimizer) is None
            initialize_state(optimizer, [self.by_name[1][n] for n in self.trainable])
        mode = FakeTensorMode()
        self.trace = trace_update(self.optimizers[1], self.names, mode, trainable=set(self.trainable))
        self.read = hyper_reader(self.optimizers[1], self.trace.inputs, self.trace.guards)
        self.captures += 1
        check_functional(self.trace)

    def step(self):
        gradients = {n: torch.randn_like(self.by_name[0][n]) for n in self.trainable}
        for name, gradient in gradients.items():
            gradient[(0,) * gradient.dim()] = -0.0
            self.by_name[0][name].grad = gradient.clone(memory_format=torch.preserve_format)
        for optimizer in self.optimizers[0]:
            optimizer.step()
        if self.trace is None or self.trace.first_step or self.read() is None:
            self.capture()
        run(self.trace, self.bind(gradients, self.read()), self.write)
        self.compare()

    def bind(self, gradients, hyper):
        hyper = iter(hyper)
        owner = {id(p): o for o in self.optimizers[1] for g in o.param_groups for p in g["params"]}
        parameters = self.by_name[1]
        for i in self.trace.inputs:
            if i.kind is InputKind.PARAMETER:
                yield parameters[i.name].detach()
            elif i.kind is InputKind.GRADIENT:
                yield gradients[i.name]
            elif i.kind is InputKind.STATE:
                yield owner[id(parameters[i.name])].state[parameters[i.name]][i.field]
            else:
                yield next(hyper)

    def write(self, output, value):
        p = self.by_name[1][output.name]
        if output.kind is OutputKind.PARAMETER:
            p.data.copy_(value)
        else:
            (optimizer,) = (o for o in self.optimizers[1] if any(p is q for g in o.param_groups for q in g["params"]))
            optimizer.state[p][output.field] = value

    def compare(self):
        for (name, p), q in zip(self.by_name[0].items(), self.by_name[1].values(), strict=True):
            assert_same(p.detach(), q.detach(), name)
        for mine, theirs in zip(self.optimizers[1], self.optimizers[0], strict=True):
            mine, theirs = mine.state_dict()["state"], theirs.state_dict()["state"]
            for key in mine.keys() | theirs.keys():
                fields = mine.get(key, {}).keys() | theirs.get(key, {}).keys()
                for field in fields:
                    assert_same(mine[key][field], theirs[key][field], f"{key}.{field}")


def assert_same(a, b, what):
    if a is None and b is None:
        return
    assert a.dtype == b.dtype and a.shape == b.shape, what
    assert torch.equal(torch.signbit(a), torch.signbit(b)), what
    assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), what


def run(trace, inputs, write):
    values = fx.Interpreter(fx.GraphModule(dict(trace.constants), trace.graph)).run(*inputs)
    for output, value in zip(trace.outputs, values, strict=True):
        write(output, value)


def check_functional(trace):
    """No operator writes in place, every node has its metadata, and the metadata is what the operators give."""
    trace.graph.lint()
    for node in trace.graph.nodes:
        if node.op != "output":
            assert node.meta["source"] == "" and isinstance(node.meta["module"], str)
            assert node.meta["phase"] is (Phase.INPUT if node.op == "placeholder" else Phase.UPDATE)
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node
    for node in itertools.islice((n for n in trace.graph.nodes if n.op == "call_function"), 400):
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        if node.target is torch.ops.aten._local_scalar_dense.default or "fused" in node.name:
            continue
        expected = flat(node.target(*args, **kwargs))
        for got, want in zip(flat(node.meta["val"]), expected, strict=True):
            if isinstance(want, torch.Tensor):
                assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device), node
                assert got.stride() == want.stride(), node


def flat(value):
    return [x for v in value for x in flat(v)] if isinstance(value, (tuple, list)) else [value]


def schedule(optimizers, step):
    """Every number changes, as schedulers change them."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.7
            if group.get("momentum"):
                group["momentum"] *= 0.99
            if "betas" in group:
                group["betas"] = tuple(b * 0.999 if isinstance(b, float) else b for b in group["betas"])
            if group["weight_decay"]:
                group["weight_decay"] *= 1.1


OPTIONS = {
    SGD: [
        {}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.1}, {"momentum": 0.8, "weight_decay": 0.1, "maximize": True, "nesterov": True},
    ],
    Adam: [{}, {"weight_decay": 0.1}, {"amsgrad": True, "maximize": True}, {"betas": (0.0, 0.99)}],
    AdamW: [{}, {"weight_decay": 0.0}, {"amsgrad": True, "weight_decay": 0.3, "maximize": True}],
    RMSprop: [
        {}, {"momentum": 0.9}, {"centered": True}, {"centered": True, "momentum": 0.5, "weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.1},
    ],
    Adagrad: [{}, {"lr_decay": 0.1, "weight_decay": 0.1}, {"initial_accumulator_value": 0.5, "maximize": True}],
}  # fmt: skip
CASES = [
    pytest.param(kind, {**options, **implementation}, id=f"{kind.__name__}-{options}-{next(iter(implementation))}")
    for kind, choices in OPTIONS.items()
    for options in choices
    for implementation in (LOOP, FOREACH, *([FUSED] if kind is not RMSprop else []))
]


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("seed", range(2))
def test_same_bits_as_the_optimizer(kind, options, seed):
    torch.manual_seed(seed)
    twin = Twin(Net(), lambda m: [kind(m.parameters(), lr=0.05, **options)])
    for step in range(STEPS):
        twin.step()
        for optimizers in twin.optimizers:
            schedule(optimizers, step)
    assert twin.captures == (2 if options.get("dampening") else 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(OPTIONS))
@pytest.mark.parametrize("implementation", [LOOP, FOREACH, FUSED], ids=["loop", "foreach", "fused"])
def test_other_dtypes(kind, dtype, implementation):
    if implementation is FUSED and kind is RMSprop:
        pytest.skip("RMSprop has no fused implementation")
    twin = Twin(Net(dtype), lambda m: [kind(m.parameters(), lr=0.05, weight_decay=0.1, **implementation)])
    for _ in range(3):
        twin.step()


@pytest.mark.parametrize("implementation", [{}, FOREACH, FUSED], ids=["default", "foreach", "fused"])
def test_mixed_dtypes_and_groups_with_options_of_their_own(implementation):
    model = Net()
    model.conv.to(torch.bfloat16)
    model.scale.data = model.scale.data.double()

    def make(m):
        groups = [
            {"params": [m.conv.weight, m.scale], "weight_decay": 0.0},
            {"params": [m.block["fc"].weight, m.frozen], "lr": 0.5, "amsgrad": True},
            {"params": [m.conv.bias, m.block["fc"].bias, m.unused], "betas": (0.5, 0.5)},
            {"params": [m.block["tied"].bias], "maximize": True},
        ]
        return [AdamW(groups, lr=0.01, **implementation)]

    twin = Twin(model, make)
    for step in range(STEPS):
        twin.step()
        for optimizers in twin.optimizers:
            schedule(optimizers, step)
    assert twin.captures == 1


def test_several_optimizers():
    def make(m):
        rest = [p for n, p in m.named_parameters() if not n.startswith("conv")]
        return [SGD(m.conv.parameters(), lr=0.1, momentum=0.9), Adam(rest, lr=0.01)]

    twin = Twin(Net(), make)
    for _ in range(STEPS):
        twin.step()
    assert {i.name for i in twin.trace.inputs if i.kind is InputKind.HYPER} == {
        "optimizer 0 group 0", "optimizer 1 group 0",
    }  # fmt: skip


def test_schedulers_step_without_a_new_capture():
    twin = Twin(Net(), lambda m: [SGD(m.parameters(), lr=1, momentum=0.9)])
    warm_up = [torch.optim.lr_scheduler.LambdaLR(o[0], lambda step: step / 10) for o in twin.optimizers]
    for _ in range(STEPS):  # begins with a learning rate of zero, and of an int
        twin.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for scheduler in warm_up:
                scheduler.step()
    assert twin.captures == 1


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [(SGD, LOOP), (SGD, FOREACH), (SGD, FUSED), (Adam, LOOP), (Adam, {}), (Adam, FUSED), (AdamW, FUSED),
     (RMSprop, LOOP), (RMSprop, FOREACH), (Adagrad, LOOP), (Adagrad, FUSED)],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "vector"])
def test_tensor_learning_rate(kind, implementation, shape):
    twin = Twin(Net(), lambda m: [kind(m.parameters(), lr=torch.full(shape, 0.05), weight_decay=0.1, **implementation)])
    for _ in range(3):
        twin.step()
        for optimizers in twin.optimizers:
            optimizers[0].param_groups[0]["lr"].mul_(0.5)
    assert twin.captures == 1


def test_tensor_betas():
    betas = lambda: (torch.tensor(0.9), torch.tensor(0.99))
    twin = Twin(Net(), lambda m: [Adam(m.parameters(), betas=betas(), foreach=False)])
    for _ in range(3):
        twin.step()


def test_changed_options_ask_for_a_new_capture():
    twin = Twin(Net(), lambda m: [SGD(m.parameters(), lr=0.1, momentum=0.9)])
    twin.step()
    (optimizer,) = twin.optimizers[1]
    group = optimizer.param_groups[0]
    key = structure_key([optimizer])
    for field, value in [("weight_decay", 0.1), ("maximize", True), ("momentum", 0.0), ("lr", torch.tensor(0.1))]:
        before = group[field]
        group[field] = value
        assert twin.read() is None and structure_key([optimizer]) != key, field
        group[field] = before
    group["lr"] = 0.7
    assert twin.read() is not None and structure_key([optimizer]) == key
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert twin.read() is None and structure_key([optimizer]) != key


def test_state_is_made_as_the_optimizer_makes_it_and_nothing_else_changes():
    model = Net()
    optimizer = AdamW(model.parameters())
    model.scale.grad = kept = torch.tensor(3.0)
    initialize_state(optimizer, [model.conv.weight])
    assert set(optimizer.state) == {model.conv.weight}
    assert model.scale.grad is kept and model.conv.weight.grad is None
    assert optimizer.state[model.conv.weight]["exp_avg"].stride() == model.conv.weight.stride()
    before = dict(optimizer.state[model.conv.weight])
    initialize_state(optimizer, [model.conv.weight, model.scale])
    assert all(optimizer.state[model.conv.weight][k] is v for k, v in before.items())


def test_a_trace_leaves_the_optimizer_alone():
    twin = Twin(Net(), lambda m: [Adam(m.parameters())])
    (optimizer,) = twin.optimizers[1]
    initialize_state(optimizer, [twin.by_name[1][n] for n in twin.trainable])
    before = copy.deepcopy(optimizer.state_dict())
    group = dict(optimizer.param_groups[0])
    twin.capture()
    assert optimizer.param_groups[0] == group and optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert all(p.grad is None for p in twin.by_name[1].values())


def test_what_is_not_supported_says_why():
    p = lambda dtype=torch.float32: [nn.Parameter(torch.ones(2, dtype=dtype))]
    hooked, replaced, scheduled = SGD(p()), SGD(p()), SGD(p(), lr=0.1)
    hooked.register_step_pre_hook(lambda *_: None)
    replaced.step = lambda: None
    torch.optim.lr_scheduler.ConstantLR(scheduled)
    sparse = SGD(p())
    sparse.param_groups[0]["params"][0].grad = torch.ones(2).to_sparse()
    mine = type("Mine", (SGD,), {})(p())
    for optimizer, why in [
        (torch.optim.LBFGS(p()), "LBFGS is none of"), (mine, "Mine is none of"), (hooked, "hooks"),
        (replaced, "replaced"), (SGD(p(), differentiable=True), "differentiable"), (sparse, "sparse"),
        (Adam(p(), capturable=True), "capturable"), (SGD(p(torch.complex64)), "complex64"),
    ]:  # fmt: skip
        assert why in supported(optimizer)
    assert supported(scheduled) is None


def test_ownership():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    names = {id(a): "a", id(b): "b"}
    assert check_ownership([SGD([a]), SGD([b])], names) == {"a": 0, "b": 1}
    with pytest.raises(OptimizerError, match="'a' is owned by optimizer 0"):
        check_ownership([SGD([a]), SGD([b, a])], names)
    with pytest.raises(OptimizerError, match="owns no parameter"):
        check_ownership([SGD([nn.Parameter(torch.ones(1))])], names)


def test_a_state_of_another_dtype_is_refused():
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = RMSprop([p], foreach=False)
    initialize_state(optimizer, [p])
    optimizer.state[p]["square_avg"] = torch.zeros(2)
    with pytest.raises(CaptureError, match="bfloat16"):
        trace_update([optimizer], {id(p): "p"}, FakeTensorMode(), trainable={"p"})


CLIPS = [ClipNorm(0.5), ClipNorm(1e9), ClipNorm(0.5, float("inf")), ClipNorm(0.5, 1.0), ClipValue(0.3)]


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.float64)], ids=str)
def test_clipping_gives_the_same_bits_as_torch(clip, dtypes):
    shapes = [(3, 4), (), (5,), (2, 3, 3, 3)]
    gradients = {
        f"m.{i}": torch.randn(s, dtype=d) for i, (s, d) in enumerate(zip(shapes, itertools.cycle(dtypes), strict=False))
    }
    trace = trace_clip(clip, gradients, FakeTensorMode())
    check_functional(trace)
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients.values()]
    for p, g in zip(parameters, gradients.values(), strict=True):
        p.grad = g.clone()
    if isinstance(clip, ClipNorm):
        torch.nn.utils.clip_grad_norm_(parameters, clip.max_norm, clip.norm_type)
    else:
        torch.nn.utils.clip_grad_value_(parameters, clip.value)
    (bound,) = hyper_reader([], trace.inputs, clip=clip)()
    inputs = [bound if i.kind is InputKind.HYPER else gradients[i.name] for i in trace.inputs]
    got = {}
    run(trace, inputs, lambda o, v: got.update({o.name: v}))
    for p, name in zip(parameters, gradients, strict=True):
        assert_same(got[name], p.grad, name)


def test_parse_clip():
    assert parse_clip(None) is None
    assert parse_clip(2) == ClipNorm(2.0)
    assert parse_clip(ClipValue(1.0)) == ClipValue(1.0)
    for bad in ("norm", True, -1.0, float("nan"), ClipValue(-1.0)):
        with pytest.raises(GraphoptError, match="clip: expected"):
            parse_clip(bad)


def test_splice_behind_a_graph():
    model = nn.Sequential(nn.Linear(2, 3))
    optimizer = AdamW(model.parameters(), foreach=True)
    initialize_state(optimizer, list(model.parameters()))
    names = {id(p): n for n, p in model.named_parameters()}
    mode = FakeTensorMode()
    update = trace_update([optimizer], names, mode, trainable=set(names.values()))
    clip = trace_clip(ClipNorm(1.0), {n: p for n, p in model.named_parameters()}, mode)
    graph = fx.Graph()
    parameters = {n: graph.placeholder(f"p{i}") for i, n in enumerate(names.values())}
    gradients = {n: graph.call_function(torch.ops.aten.neg.default, (p,)) for n, p in parameters.items()}
    for p, g in zip(parameters.values(), gradients.values(), strict=True):
        p.meta["module"] = g.meta["module"] = ""
    constants = {"update_constant_0": torch.zeros(())}
    clip_inputs, clipped = splice(graph, clip, gradients=gradients, parameters=parameters, constants=constants)
    gradients = {o.name: n for o, n in clipped}
    inputs, outputs = splice(graph, update, gradients=gradients, parameters=parameters, constants=constants)
    graph.output(tuple(n for _, n in outputs))
    graph.lint()
    fx.GraphModule(constants, graph).recompile()
    targets = [n.target for n in graph.nodes if n.op == "placeholder"][2:]
    assert len(set(targets)) == len(targets) and all(t.isidentifier() for t in targets)
    kinds = [n.op for n in graph.nodes]
    assert kinds.index("call_function") > max(i for i, k in enumerate(kinds) if k == "placeholder")
    assert [str(i) for i, _ in clip_inputs] == ["hyper-parameter clip.max_norm"]
    assert [n for n in graph.nodes if n.op == "placeholder"][2:] == [n for _, n in clip_inputs + inputs]
    assert {i.kind for i, _ in inputs} == {InputKind.STATE, InputKind.HYPER}
    assert len(constants) == 2 and "update_constant_0_1" in constants
    new = next(n for o, n in outputs if o.kind is OutputKind.PARAMETER and o.name == "0.weight")
    assert new.meta["phase"] is Phase.UPDATE and new.meta["module"] == "0" and new.meta["val"].shape == (3, 2)
