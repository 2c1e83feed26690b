"""Extracted subnets are the slices of the supernet bit for bit, and plain modules: saved, loaded, copied, exported."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt.elastic as elastic
from graphopt.elastic.saving import save
from graphopt.errors import ElasticError
from tests.elastic.subnets import call, check_extraction
from tests.elastic.test_structures import RIGID, batch_of, found
from tests.elastic.zoo_spaces import inputs, of_the_zoo
from tests.structures import STRUCTURES


@pytest.mark.parametrize("known", [s for s in STRUCTURES if s.name not in RIGID], ids=lambda s: s.name)
def test_structures(known):
    """Every structure: the smallest subnet in eval mode, a random one in train mode."""
    space, batch = found(known.name), batch_of(known)
    try:
        check_extraction(space, space.smallest, batch, training=False)
        check_extraction(space, space.sample(seed=1), batch, training=True)
    finally:
        space.model.eval()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("swin_small", "gpt2", "llama", "t5", "googlenet")]


@pytest.mark.parametrize("name", ["resnet18", "vit_small", "tied_lm", *SLOW])
def test_models(name):
    space, batch = of_the_zoo(name)
    module = check_extraction(space, space.sample(seed=2), batch, training=False)
    check_extraction(space, space.sample(seed=3), batch, training=True)
    assert set(module.state_dict()) <= set(space.model.state_dict())
    more = inputs(name, 5)  # a batch of another size
    space.model.eval()
    for a, b in zip(call(module.eval(), more), call(space.run, more, space.sample(seed=2)), strict=True):
        assert torch.equal(a, b)


class Net(nn.Module):
    """Dropout, batch norm, a constant, a tied weight, a buffer that is not saved, a nested output."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3))
        self.norm, self.drop, self.head = nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 5)[:, None], persistent=False)

    def forward(self, tokens, *, shift=None):
        x = self.table(tokens) * self.scale
        for layer in self.layers:
            x = x + self.drop(layer(x))
        x = x if shift is None else x + shift
        x = self.norm(x.mean(1)) + torch.tensor([0.25])
        return {"logits": self.head(x), "features": (x.mean(-1), 3)}


TOKENS = torch.randint(7, (4, 5))


@pytest.fixture(scope="module")
def space():
    torch.manual_seed(0)
    return elastic.space(Net(), TOKENS)


@pytest.fixture(scope="module")
def choice(space):
    return space.choice({"*.hidden": 0.5, "embed": 0.5, "layers.depth": (0, 2)})


def test_names_and_modes(space, choice):
    for training in (False, True):
        module = check_extraction(space, choice, (TOKENS,), training=training)
    shapes = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    layers = {f"layers.{i}.{n}": s for i in (0, 2) for n, s in {
        "0.weight": (6, 4), "0.bias": (6,), "2.weight": (4, 6), "2.bias": (4,)}.items()}  # fmt: skip
    norm = {f"norm.{n}": (4,) for n in ("weight", "bias", "running_mean", "running_var")}
    tied = {"table.weight": (7, 4), "head.weight": (7, 4)}
    assert shapes == {**layers, **norm, **tied, "norm.num_batches_tracked": ()}
    assert module.head.weight is module.table.weight
    result = module(TOKENS)
    assert list(result) == ["logits", "features"] and result["features"][1] == 3


def test_the_module_is_its_own(space, choice):
    before = {n: t.clone() for n, t in space.model.state_dict().items()}
    with torch.no_grad():
        for tensor in space.extract(choice).state_dict().values():
            tensor.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in space.model.state_dict().items())


def test_train_and_eval(space, choice):
    module = space.extract(choice)
    assert "_forward_in_" not in module.code  # one forward for both modes
    module.eval()
    assert torch.equal(module(TOKENS)["logits"], module(TOKENS)["logits"])
    assert int(module.norm.num_batches_tracked) == int(space.model.norm.num_batches_tracked)
    module.train()
    assert not torch.equal(module(TOKENS)["logits"], module(TOKENS)["logits"])
    assert int(module.norm.num_batches_tracked) == int(space.model.norm.num_batches_tracked) + 2
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    before = F.cross_entropy(module.eval()(TOKENS)["logits"], TOKENS[:, 0])
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(module.train()(TOKENS)["logits"], TOKENS[:, 0]).backward()
        optimizer.step()
    assert F.cross_entropy(module.eval()(TOKENS)["logits"], TOKENS[:, 0]) < before


@pytest.mark.parametrize("size", [1, 2, 9])
def test_any_batch_size(space, choice, size):
    tokens = torch.randint(7, (size, 5))
    module = space.extract(choice).eval()
    space.model.eval()
    for a, b in zip(call(module, (tokens,)), call(space.run, (tokens,), choice), strict=True):
        torch.testing.assert_close(a, b)


def test_copies_and_state_dicts(space, choice):
    module = space.extract(choice).eval()
    twin = copy.deepcopy(module)
    fresh = type(module)().eval()
    assert fresh.load_state_dict(module.state_dict()) == ([], [])
    with torch.no_grad():
        fresh.scale.copy_(module.scale)
        fresh.graph_constants.c0.copy_(module.graph_constants.c0)
    for other in (twin, fresh):
        assert torch.equal(other(TOKENS)["logits"], module(TOKENS)["logits"])


def test_a_process_without_graphopt_loads_it(space, choice, tmp_path):
    module = space.extract(choice).eval()
    save(module, tmp_path, "small")
    torch.save((TOKENS, module(TOKENS)["logits"].detach()), tmp_path / "right.pt")
    code = """
        import sys
        sys.modules["graphopt"] = None  # an import of it raises
        import torch
        from small import load
        tokens, right = torch.load("right.pt")
        module = load().eval()
        assert torch.equal(module(tokens)["logits"], right)
        module.train()(tokens)["logits"].sum().backward()
        assert not [n for n in sys.modules if n.startswith("graphopt.")]
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr


class Auxiliary(nn.Module):
    """Train mode has another output, as the classifiers beside GoogLeNet: each mode needs a forward of its own."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        h = self.body(x).relu()
        return (self.head(h), self.aux(h)) if self.training else self.head(h)


def test_modes_with_other_code():
    x = torch.randn(3, 4)
    space = elastic.space(Auxiliary(), x)
    for training in (False, True):
        module = check_extraction(space, space.smallest, (x,), training=training)
    assert "_forward_in_training" in module.code
    assert isinstance(module.train()(x), tuple) and isinstance(module.eval()(x), torch.Tensor)


class Always(nn.Module):
    """Dropout and batch norm that do not ask for the mode."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x):
        h = F.dropout(self.body(x), 0.5, training=True)
        n = self.norm
        h = F.batch_norm(h, n.running_mean, n.running_var, n.weight, n.bias, training=False)
        return self.head(F.batch_norm(h, None, None, training=True))


def test_what_does_not_ask_for_the_mode():
    x = torch.randn(6, 4)
    space = elastic.space(Always(), x)
    for training in (False, True):
        check_extraction(space, space.smallest, (x,), training=training)


class Flagged(nn.Module):
    """Arguments by keyword, in a list, and a flag."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, others, flag=False, scale=None):
        h = self.body(x + others[0] + others[1]["y"])
        return self.head(-h if flag else h) * scale


def test_arguments():
    x, scale = torch.randn(3, 4), torch.randn(3, 1)
    batch = {"x": x, "others": [x + 1, {"y": x + 2}], "flag": True, "scale": scale}
    space = elastic.space(Flagged(), batch)
    module = space.extract(space.smallest)
    assert torch.equal(module(x, batch["others"], scale=scale), space.run(space.smallest, **batch))
    with pytest.raises(TypeError, match="flag"):
        module(x, batch["others"], flag=False, scale=scale)


def test_a_captured_batch_size_is_checked():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.body(x).relu())

    space = elastic.space(Fixed(), torch.randn(1, 4))
    with pytest.raises(ValueError, match="captured for batches of 1"):
        space.extract(space.smallest)(torch.randn(2, 4))


def test_save_takes_extracted_modules_only(tmp_path):
    with pytest.raises(ElasticError, match=r"expected one of Space\.extract, got Linear"):
        save(nn.Linear(2, 2), tmp_path)


class Sized(nn.Module):
    """Its code asks for the batch size, if ``asks``; a convolution's kernel is chosen by it in any case."""

    def __init__(self, asks):
        super().__init__()
        self.conv, self.head, self.asks = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), asks

    def forward(self, x):
        y = self.head(self.conv(x).mean((2, 3)))
        return y * 2 if self.asks and x.shape[0] > 8 else y


@pytest.mark.parametrize("asks", [False, True])
def test_code_that_depends_on_the_batch_size_is_checked(asks):
    x = torch.randn(4, 3, 6, 6)
    space = elastic.space(Sized(asks).eval(), x)
    module = space.extract(space.smallest)
    more = torch.randn(20, 3, 6, 6)
    if asks:
        with pytest.raises(ValueError, match="batch<=8"):
            module(more)
    else:
        assert torch.equal(module(more), space.run(space.smallest, more))


def test_batch_norms_that_are_frozen_stay_so():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    net.train()[1].eval()
    x = torch.randn(6, 4)
    space = elastic.space(net, x)
    small = space.extract({"0.hidden": 4}).train()
    for a, b in zip(call(small, (x,)), call(space.run, (x,), {"0.hidden": 4}), strict=True):
        assert torch.equal(a, b)
    assert int(net[1].num_batches_tracked) == 0 and not small.state_dict()["1.running_mean"].any()


class Alone(nn.Module):
    """Another function of a batch of 1, if ``other``; reshaped through axes of a batch of 1 in any case."""

    def __init__(self, other):
        super().__init__()
        self.other, self.up, self.norm, self.down = other, nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x):
        y = self.norm(self.up(x).relu())
        y = self.down(y.transpose(1, 2).reshape(-1, 3).view(x.size(0), 8, 3).transpose(1, 2))
        return y.exp() if self.other and x.size(0) == 1 else y


@pytest.mark.parametrize("other", [True, False])
def test_a_batch_of_one(other):
    torch.manual_seed(0)
    space = elastic.space(Alone(other).eval(), torch.randn(2, 3, 4))
    small, x = space.extract(space.smallest).eval(), torch.randn(1, 3, 4)
    if other:
        with pytest.raises(ValueError, match="for a batch of 1 the model runs other code"):
            small(x)
    else:
        assert torch.equal(small(x), space.run(space.smallest, x))


class _SharedModule(nn.Module):
    """One convolution that stands at two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 1)
        self.position = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.block = nn.Sequential(self.position, nn.ReLU())
        self.leave = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        return self.leave(self.block(x + self.position(x)))


def test_a_module_at_two_paths_keeps_its_weights():
    model, x = _SharedModule(), torch.randn(4, 3, 6, 6)
    before = {name: p.clone() for name, p in model.named_parameters()}
    space = elastic.space(model, x)
    small = space.extract(space.smallest)
    assert {n: p.device.type for n, p in model.named_parameters()} == dict.fromkeys(before, "cpu")
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    assert small(x).equal(space.run(space.smallest, x))
