"""Extracted subnets leave PyTorch: `torch.export` with a free batch size, ONNX files that onnxruntime runs."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import graphopt.elastic as elastic
from graphopt.elastic.forward_arguments import tensor_arguments
from tests.elastic.supernets import attentive, convolutional
from tests.elastic.test_extract import TOKENS, Net
from tests.elastic.zoo_spaces import inputs, of_the_zoo

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime write and run its files, and are not all installed",
)


class Logits(Net):
    """One tensor: in an output that holds numbers torch's exporter to ONNX fails, whatever the model."""

    def forward(self, tokens):
        return super().forward(tokens)["logits"]


def net():
    torch.manual_seed(0)
    space = elastic.space(Logits(), TOKENS)
    return space, space.choice({"*.hidden": 0.5, "embed": 0.5, "layers.depth": (0, 2)}), (torch.randint(7, (6, 5)),)


def small(make):
    space, x, _ = make()
    return space, space.sample(seed=4), (torch.cat([x, x[:3]]),)


def real(name):
    space, _ = of_the_zoo(name)
    return space, space.sample(seed=1), tensor_arguments(inputs(name, 5))


CASES = {
    "all sorts": net,
    "convolutions": lambda: small(convolutional),
    "attention": lambda: small(attentive),
    "gpt2": lambda: real("gpt2"),
}


@pytest.fixture(params=CASES, scope="module")
def extracted(request):
    """A module in eval mode, arguments like those of the capture, others of another batch size, and which dimensions
    are free."""
    space, choice, more = CASES[request.param]()
    module = space.extract(choice).eval()
    batch = torch.export.Dim("batch", min=2)
    given = tensor_arguments(space.batch)
    free = pytree.tree_map(lambda t: {0: batch}, given)
    return module, given, more, free


def arguments(given):
    return ((), given) if isinstance(given, dict) else (given, {})


def tensors(result):
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def test_torch_export(extracted):
    module, given, more, free = extracted
    args, kwargs = arguments(given)
    exported = torch.export.export(module, args, kwargs, dynamic_shapes=free)
    args, kwargs = arguments(more)
    pairs = zip(tensors(exported.module()(*args, **kwargs)), tensors(module(*args, **kwargs)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@needs_onnx
def test_onnx(extracted, tmp_path):
    import onnxruntime

    module, given, more, free = extracted
    args, kwargs = arguments(given)
    path = tmp_path / "small.onnx"
    torch.onnx.export(module, args, path, kwargs=kwargs, dynamic_shapes=free, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (given, more):
        args, kwargs = arguments(batch)
        leaves = tensors((args, kwargs))
        fed = {slot.name: leaf.numpy() for slot, leaf in zip(session.get_inputs(), leaves, strict=True)}
        found = session.run(None, fed)
        right = tensors(module(*args, **kwargs))
        assert len(found) == len(right)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b.detach(), rtol=1e-3, atol=1e-5)


class Gated(nn.Module):
    """Train mode has another output, so that the written module has a forward for each mode."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.aux = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        h = self.up(x).relu()
        return (self.down(h), self.aux(h)) if self.training else self.down(h)


def test_each_mode_is_exported_as_it_is():
    x = torch.randn(3, 4)
    module = elastic.space(Gated(), x).extract({"up.hidden": 4})
    for training, count in ((False, 1), (True, 2)):
        exported = torch.export.export(module.train(training), (x,))
        assert len(tensors(exported.module()(x))) == count
