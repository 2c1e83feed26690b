"""Subnets of random models: outputs, gradients, buffers are those of the slices, in both modes, at any batch size."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.elastic import Kind, space
from graphopt.errors import BatchError, CaptureError, ElasticError
from graphopt.graph.training_graph import InputKind
from tests.elastic.oracles import assert_is_slice, outputs
from tests.random_models import cases


class Residual(nn.Module):
    """Convolutions with batch norm, squeeze-excite, a residual sum, a linear head."""

    def __init__(self, width=8, inner=12):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.a, self.norm_a, self.b = (
            nn.Conv2d(width, inner, 3, padding=1),
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, width, 1),
        )
        self.squeeze, self.excite, self.head = nn.Linear(inner, 4), nn.Linear(4, inner), nn.Linear(width, 2)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = self.norm_a(self.a(x)).relu()
        y = y * self.excite(self.squeeze(y.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        return self.head(self.drop((x + self.b(y)).mean((2, 3))))


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    model = Residual().double()
    return space(model, torch.randn(4, 3, 6, 6).double())


@settings(max_examples=8)
@given(case=cases(dtypes=(torch.float64,)), seed=st.integers(0, 99))
def test_random_models(case, seed):
    model = copy.deepcopy(case.model)
    x, _ = case.batch(3)
    try:
        found = space(model, x)
    except (ElasticError, CaptureError, BatchError):
        assume(False)
    model.requires_grad_(True)
    for mode in (True, False):
        model.train(mode)
        assert_is_slice(found, found.sample(seed=seed), (x,))
    untouched = copy.deepcopy(model)  # a call may change buffers in eval mode too
    with torch.no_grad():
        torch.manual_seed(0)
        got = outputs(found.run(found.full, x))
        torch.manual_seed(0)
        right = outputs(untouched(x))
    assert all(torch.allclose(a, b, 1e-9, 1e-9) for a, b in zip(got, right, strict=True))


def test_both_modes_any_batch(residual):
    for training in (True, False):
        residual.model.train(training)
        states = sum(map(len, residual._states.values()))
        for rows in (4, 2, 7):
            choice = residual.sample(seed=rows)
            assert_is_slice(residual, choice, (torch.randn(rows, 3, 6, 6).double(),))
        assert sum(map(len, residual._states.values())) == states, "a batch size or mode was captured anew"
    residual.model.eval()
    assert residual.run(residual.smallest, torch.randn(1, 3, 6, 6).double()).shape == (1, 2)


def test_running_statistics_are_written_into_the_slice(residual):
    model = residual.model.train()
    choice = residual.choice({d.name: d.size // 2 for d in residual.dimensions if d.size > 4})
    kept = residual.subnet(choice).slices["norm.running_mean"].rows[0][1]
    assert 0 < kept < 8
    before = {n: b.clone() for n, b in model.named_buffers()}
    x = torch.randn(4, 3, 6, 6).double()
    residual.run(choice, x)
    with torch.no_grad():
        right = F.conv2d(x, model.stem.weight[:kept], model.stem.bias[:kept], padding=1)
    mean, variance = right.mean((0, 2, 3)), right.transpose(0, 1).flatten(1).var(1)
    assert torch.allclose(model.norm.running_mean[:kept], 0.9 * before["norm.running_mean"][:kept] + 0.1 * mean)
    assert torch.allclose(model.norm.running_var[:kept], 0.9 * before["norm.running_var"][:kept] + 0.1 * variance)
    assert torch.equal(model.norm.running_mean[kept:], before["norm.running_mean"][kept:])
    assert torch.equal(model.norm.num_batches_tracked, before["norm.num_batches_tracked"] + 1)


def all_layers_at_their_smallest(found):
    return found.choice({d.name: d.smallest for d in found.dimensions if d.kind is not Kind.DEPTH})


def test_gradients_accumulate_in_the_models_own_parameters(residual):
    residual.model.train()
    x = torch.randn(4, 3, 6, 6).double()
    residual.model.zero_grad()
    narrow = all_layers_at_their_smallest(residual)
    for choice in (narrow, residual.full):
        torch.manual_seed(1)
        residual.run(choice, x).square().sum().backward()
    small, *_ = residual.subnet(narrow).slices["a.weight"].rows[0][1:]
    both = residual.model.a.weight.grad.clone()
    residual.model.zero_grad()
    torch.manual_seed(1)
    residual.run(residual.full, x).square().sum().backward()
    full = residual.model.a.weight.grad
    assert torch.equal(both[small:], full[small:]) and not torch.allclose(both[:small], full[:small])


def test_second_derivatives(residual):
    residual.model.eval()
    x = torch.randn(2, 3, 6, 6).double()
    weight = residual.model.stem.weight
    (first,) = torch.autograd.grad(residual.run(residual.smallest, x).square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    few = residual.smallest["embed"] if "embed" in residual.smallest else len(second) // 2
    assert second[:few].abs().sum() > 0 and not second[few:].any()


def test_slices_are_dense_in_the_memory_order_of_the_whole():
    torch.manual_seed(0)
    model = Residual().to(memory_format=torch.channels_last)
    found = space(model, torch.randn(4, 3, 6, 6).contiguous(memory_format=torch.channels_last))
    narrow = all_layers_at_their_smallest(found)
    weight = found.subnet(narrow).tensors()["a.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert weight.stride() == found.graph(narrow).input_nodes(InputKind.PARAMETER)["a.weight"].meta["val"].stride()


def test_keywords_and_nested_outputs():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x, scale):
            y = self.down(self.up(x).relu())
            return {"y": y * scale, "pair": (y.sum(), 3)}

    model = Named()
    batch = {"x": torch.randn(3, 4), "scale": torch.rand(3, 1)}
    found = space(model, batch)
    result = found.run(found.full, **batch)
    assert result["pair"][1] == 3 and torch.allclose(result["y"], model(**batch)["y"])
    assert set(found.run(found.smallest, **batch)) == {"y", "pair"}


def test_metadata_from_sizes_are_those_of_running_the_operators(residual):
    residual.model.train()
    for seed in range(4):
        choice = residual.sample(seed=seed)
        found = state_of(residual)
        quick, slow = found._make(choice, False).graph, found._make(choice, True).graph
        assert str(quick) == str(slow)
        for a, b in zip(quick.nodes, slow.nodes, strict=True):
            x, y = a.meta.get("val"), b.meta.get("val")
            if isinstance(x, torch.Tensor):
                assert (str(x.shape), str(x.stride()), x.dtype) == (str(y.shape), str(y.stride()), y.dtype), a


def state_of(found):
    return found._state(found.batch, None)
