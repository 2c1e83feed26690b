"""Subnets as models of the user's own class: the same bits as the written module, or a reason why not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt.elastic as elastic
from graphopt.elastic import ReadInput
from graphopt.elastic.mode_states import in_both_modes
from graphopt.elastic.rebuilding.comparison import difference
from graphopt.errors import ElasticError, GraphoptWarning
from tests.elastic.subnets import call, gradients, trained
from tests.elastic.supernets import attentive, convolutional
from tests.elastic.zoo_spaces import of_the_zoo


def check_rebuilt(space, choice, batch):
    """The subnet is a model of the same class: outputs and gradients of the written module, bit for bit, in both modes;
    the space's model is as it was. Returns it."""
    before = {n: t.clone() for n, t in space.model.state_dict().items()}
    modes = [m.training for m in space.model.modules()]
    choice = space.choice(choice)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraphoptWarning)
        model = space.extract(choice, rebuild=True)
    written = space.extract(choice)
    assert type(model) is type(space.model)
    assert set(dict(model.named_parameters())) == set(dict(written.named_parameters()))
    assert all(a.data_ptr() != b.data_ptr() for a in model.parameters() for b in space.model.parameters())
    for training in (False, True):
        ours, theirs = call(model.train(training), batch), call(written.train(training), batch)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        right = gradients(theirs, trained(written))
        for name, gradient in gradients(ours, trained(model)).items():
            torch.testing.assert_close(gradient, right[name], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(t, before[n]) for n, t in space.model.state_dict().items())
    assert modes == [m.training for m in space.model.modules()]
    return model


def reason(space, choice):
    """Why a choice is not rebuilt; what is given then is the written module."""
    with pytest.warns(GraphoptWarning, match="the subnet is no .* but plain code, because ") as caught:
        assert hasattr(space.extract(choice, rebuild=True), "code")
    return str(caught[0].message).partition("because ")[2]


# -- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [convolutional, attentive])
def test_small_models(make):
    space, x, _ = make()
    for choice in (space.smallest, space.sample(seed=1), space.sample(seed=5)):
        check_rebuilt(space, choice, (x,))


def test_numbers_beside_the_weights_follow():
    space, x, _ = attentive()
    model = check_rebuilt(space, {"*.heads": 2, "*.hidden": 12, "depth": (1,)}, (x,))
    assert [n for n, _ in model[1].named_children()] == ["1"]  # under its own name
    block = model[1].get_submodule("1")
    assert (block.heads, block.size) == (2, 4)
    assert (block.qkv.out_features, block.up.out_features, block.down.in_features) == (24, 12, 12)
    space, x, _ = convolutional()
    stem = check_rebuilt(space, space.smallest, (x,))[0]
    assert stem.out_channels == len(stem.weight) < 8


class Layers(nn.Module):
    """Layers that keep numbers beside their weights: a depthwise and a transposed convolution, a large kernel, norms of
    groups and of layers without weights, an embedding, PyTorch's own attention, a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.each = nn.Conv2d(3, 16, 5, padding=2), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm, self.act = nn.GroupNorm(4, 16), nn.PReLU(16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.table = nn.Embedding(5, 8)
        self.plain = nn.LayerNorm(8, elementwise_affine=False)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, tokens):
        y = self.up(self.act(self.norm(self.each(self.stem(x)))))
        y = self.plain(y.flatten(2).transpose(1, 2) + self.table(tokens))
        return self.head(y + self.attention(y, y, y, need_weights=False)[0])


def test_layers_of_many_kinds():
    torch.manual_seed(0)
    batch = torch.randn(3, 3, 4, 4), torch.randint(5, (3, 64))
    space = elastic.space(Layers(), batch)
    model = check_rebuilt(space, {d.name: d.smallest for d in space.dimensions if d.kind != "depth"}, batch)
    assert model.stem.kernel_size == (3, 3) and model.stem.padding == (1, 1)
    assert model.each.groups == model.each.in_channels == len(model.norm.weight) == model.norm.num_channels < 16
    assert model.up.in_channels == len(model.up.weight) and model.table.embedding_dim == model.plain.normalized_shape[0]


@pytest.mark.parametrize("name", ["resnet18", "vit_small"])
def test_models_of_torchvision(name):
    space, batch = of_the_zoo(name)
    halves = {d.name: 0.5 for d in space.dimensions if d.kind != "depth"}
    model = check_rebuilt(space, halves, batch)
    assert sum(p.numel() for p in model.parameters()) < 0.4 * sum(p.numel() for p in space.model.parameters())


class Frozen(nn.Module):
    """A parameter that is not trained, a tied one, a batch norm, a buffer."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.out = nn.Embedding(7, 8), nn.BatchNorm1d(8), nn.Linear(8, 7, bias=False)
        self.out.weight = self.table.weight
        self.shift = nn.Parameter(torch.randn(8), requires_grad=False)
        self.register_buffer("scale", torch.ones(8), persistent=False)

    def forward(self, tokens):
        return self.out(self.norm(self.table(tokens).mean(1) * self.scale + self.shift))


def test_ties_and_flags_are_kept():
    tokens = torch.randint(7, (4, 5))
    space = elastic.space(Frozen(), tokens)
    model = check_rebuilt(space, space.smallest, (tokens,))
    assert model.out.weight is model.table.weight and not model.shift.requires_grad and model.norm.weight.requires_grad
    assert list(model.state_dict()) == list(space.model.state_dict())


def test_frozen_batch_norms_stay_so():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    net.train()[1].eval()
    x = torch.randn(6, 4)
    model = elastic.space(net, x).extract({"0.hidden": 4}, rebuild=True)
    assert model.training and not model[1].training


# -- why not --------------------------------------------------------------------------------------------------------


class Held(nn.Module):
    """Keeps a tensor that is no parameter, or a layer that forward does not read, or leaves its layer out by hand."""

    def __init__(self, what):
        super().__init__()
        self.what, self.up, self.body, self.down = what, nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.mask = torch.linspace(0.5, 1.5, 8)
        if what == "unread":
            self.unread = nn.Linear(8, 8)

    def forward(self, x):
        y = self.up(x) * (self.mask if self.what == "mask" else 1)
        return self.down(y + self.body(y).relu())


@pytest.mark.parametrize(
    ("what", "choice", "words"),
    [
        ("mask", {"embed": 4}, "its forward does not run at these sizes: RuntimeError"),
        ("unread", {"embed": 4}, "nothing reads unread.weight"),
        ("layer", {"*depth": 0}, "body is no element of a Sequential or ModuleList"),
    ],
)
def test_what_the_class_cannot_say(what, choice, words):
    space = elastic.space(Held(what), torch.randn(3, 4))
    assert words in reason(space, space.choice(choice))


def test_partial_reads_are_no_layers():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    space = elastic.space(net, torch.randn(3, 4), layers={"2": ReadInput(0.5)})
    assert "does not run" in reason(space, {"2.read": 4})


def test_the_comparison_sees_what_differs():
    space, _, _ = convolutional()
    choice = space.smallest
    states, written = in_both_modes(space, choice), space.extract(choice)
    model = space.extract(choice, rebuild=True)
    assert not difference(space, model, written, states)

    def seen(change):
        other = copy.deepcopy(model)
        with torch.no_grad():
            change(other)
        return difference(space, other, written, states)

    assert "computes other numbers" in seen(lambda m: m[-1].bias.add_(1e-6))
    assert "gives 1.running" in seen(lambda m: setattr(m[1], "momentum", 0.2))
    assert "(in train mode)" in seen(lambda m: setattr(m[4], "p", 0.4))
    assert "bias would be missing" in seen(lambda m: setattr(m[-1], "bias", None))
    assert "would be tied" in seen(lambda m: setattr(m[3][0].middle, "weight", m[3][0].middle.bias))


def test_ties_are_compared():
    tokens = torch.randint(7, (4, 5))
    space = elastic.space(Frozen(), tokens)
    model = space.extract(space.smallest, rebuild=True)
    model.out.weight = nn.Parameter(model.table.weight.detach().clone())
    states = in_both_modes(space, space.smallest)
    assert difference(space, model, space.extract(space.smallest), states) == "other parameters of it would be tied"


def test_only_written_modules_are_saved(tmp_path):
    space, _, _ = convolutional()
    with pytest.raises(ElasticError, match=r"expected one of Space\.extract"):
        elastic.save(space.extract(space.smallest, rebuild=True), tmp_path)


# -- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2():
    return of_the_zoo("gpt2")


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_hugging_face_models_are_saved_and_loaded(name, tmp_path):
    space, batch = of_the_zoo(name)
    model = check_rebuilt(space, halves(space), batch)
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for a, b in zip(call(loaded, batch), call(model, batch), strict=True):
        assert torch.equal(a, b)
    assert loaded.config.num_hidden_layers == 1


def halves(space):
    """Half of everything but head sizes; the first layers."""
    kinds = {"width": 0.5, "heads": 0.5, "embedding": 0.5, "depth": 0.5}
    return {d.name: kinds[d.kind] for d in space.dimensions if d.kind in kinds}


def test_layers_that_differ_have_no_configuration(gpt2):
    space, _ = gpt2
    one = next(d.name for d in space.dimensions if d.kind == "width")
    assert "where its configuration has one n_inner" in reason(space, {one: 0.5})


def test_only_first_layers_have_a_configuration(gpt2):
    space, _ = gpt2
    depth = next(d for d in space.dimensions if d.kind == "depth")
    assert "other names" in reason(space, {depth.name: (1,)})


def test_a_loss_of_the_model_is_kept(gpt2):
    """All arguments of the class are there, not those of the example alone."""
    space, batch = gpt2
    model = space.extract(halves(space), rebuild=True).eval()
    logits = model(input_ids=batch["input_ids"]).logits
    loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
    right = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    torch.testing.assert_close(loss, right)


def test_numbers_that_a_configuration_leaves_open(gpt2):
    """Without ``n_inner`` GPT-2 has four times the width: another share of the hidden features is said."""
    space, _ = gpt2
    inner = {d.name: 0.75 for d in space.dimensions if d.kind == "width"}
    model = space.extract({**halves(space), **inner}, rebuild=True)
    before = space.model.config
    assert (
        before.n_inner is None
        and model.config.n_inner == 3 * before.n_embd
        and before.n_embd == 2 * model.config.n_embd
    )
