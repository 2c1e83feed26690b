"""``torch.compile(model, backend=graphopt)`` with eager's kernels: eager's bits, whatever model and caller do."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graphopt.errors import GraphoptError
from graphopt.integrations import recording
from tests.integrations.twins import assert_like_eager, bytes_saved, compiled, total
from tests.training import Branching, Net, images, mlp

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


class Attention(nn.Module):
    """Embedding, attention with dropout, layer norm, weights that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        h = self.norm(h + self.out(mixed.transpose(1, 2).flatten(2)))
        return h @ self.embed.weight.T


class Upsampled(nn.Module):
    """Kernels that torch's traces decompose into others unless told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.interpolate(F.hardtanh(self.conv(x)), scale_factor=2.0, mode="bilinear")


class InPlace(nn.Module):
    """Writes into what it has computed, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.body(x).mul_(0.5)
        self.calls += 1
        h[:, 0] = h[:, 1] * self.calls
        h = F.relu_(h)
        return self.head(h), h.view(-1, 4)


class Broken(nn.Module):
    """Two pieces with code between them that Dynamo cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        torch._dynamo.graph_break()
        return torch.relu(self.second(h))


def frozen_convolutions() -> nn.Sequential:
    """One trained layer, then frozen ones whose inputs eager keeps and nobody reads."""
    layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(nn.Conv2d(4, 4, 1), *layers)


def rows(*sizes: int) -> list[tuple[torch.Tensor]]:
    return [(torch.randn(size, 4),) for size in sizes]


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (lambda: Net(0.3), lambda: (torch.randn(4, 2, 6, 6),)),
        (Attention, lambda: (torch.randint(11, (3, 5)),)),
        (Upsampled, images),
        (InPlace, lambda: (torch.randn(4, 4),)),
        (frozen_convolutions, lambda: (torch.randn(2, 4, 6, 6, requires_grad=True),)),
        (lambda: nn.LSTM(4, 6, num_layers=2, dropout=0.2), lambda: (torch.randn(5, 3, 4),)),
    ],
    ids=["images", "attention", "upsampling", "in place", "frozen", "recurrent"],
)  # fmt: skip
def test_several_steps_have_eagers_bits(make: Callable, batch: Callable) -> None:
    def loss(output: object) -> torch.Tensor:
        return total(output[0] if isinstance(make(), nn.LSTM) else output)

    assert_like_eager(make(), [batch() for _ in range(3)], loss)


def test_eval_mode_and_frozen_parameters_are_other_pieces() -> None:
    model = Net(0.3)
    model.norm.eval()
    model.conv.requires_grad_(False)
    (piece,) = assert_like_eager(model, [images()[:1]])
    assert "conv.weight" not in {o.name for o in piece.result.graph.outputs if o.kind == "gradient"}


def test_passes_keep_less_for_backward() -> None:
    model, x = frozen_convolutions(), torch.randn(2, 4, 6, 6)
    ours, known = compiled(copy.deepcopy(model)), [x]
    with recording() as pieces:
        ours(x)
    (piece,) = pieces
    before = bytes_saved(lambda: model(x), [*known, *model.parameters()])
    after = bytes_saved(lambda: ours(x), [*known, *ours.parameters()])
    assert after == piece.result.graph.bytes_kept()
    assert after < before / 2
    assert "selective_saving" in piece.explain()
    assert f"{piece.before.bytes_kept():,} -> {after:,} bytes kept" in piece.explain()


def test_graph_breaks_are_handled_piece_by_piece() -> None:
    pieces = assert_like_eager(Broken(), rows(5, 5, 5))
    assert len(pieces) == 2
    assert all(p.trains and p.result.changed for p in pieces)
    assert len({p.name for p in pieces}) == 2


def test_control_flow_on_data_breaks_the_graph() -> None:
    assert len(assert_like_eager(Branching(), rows(4, 4))) >= 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable) -> None:
    model = Net(0.3)
    model(images()[0])  # running statistics that are not the first ones
    for training in (False, True):
        twin, x = copy.deepcopy(model.train(training)), images()[0]
        ours = compiled(model)
        with recording() as pieces, mode():
            torch.manual_seed(1)
            output = ours(x)
            torch.manual_seed(1)
            assert torch.equal(output, twin(x))
        assert not pieces[0].trains and not output.requires_grad
        assert all(map(torch.equal, model.buffers(), twin.buffers()))


def test_gradients_and_none_in_turn() -> None:
    model = mlp()
    ours, x = compiled(model), torch.randn(4, 4)
    with torch.no_grad():
        assert torch.equal(ours(x), model(x))
    ours(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("make", [mlp, InPlace, Broken], ids=["mlp", "in place", "broken"])
def test_another_batch_size_makes_it_dynamic(make: Callable) -> None:
    pieces = assert_like_eager(make(), rows(4, 8, 6, 3, 8, 10, 2))
    names = [piece.name.split("/")[0] for piece in pieces]
    assert all(names.count(name) == 2 for name in names)  # the first size by itself, then all others at once


def test_marked_dynamic_sizes_make_one_piece() -> None:
    batches = [(torch.randn(size, 2, 6, 6),) for size in (4, 3, 7)]  # 3 and 4 are numbers of channels too
    model = Net(0.0)
    twin, ours = copy.deepcopy(model), compiled(model, fullgraph=True)
    with recording() as pieces:
        for (x,) in batches:
            torch._dynamo.mark_dynamic(x, 0)
            for call in (ours, twin):
                total(call(x)).backward()
            for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                assert torch.equal(mine.grad, theirs.grad)
    assert len(pieces) == 1
    assert pieces[0].result.graph.symbols.symbols


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast(where: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16) if where == "inside" else contextlib.nullcontext():
                return self.body(x)

    around = None if where == "inside" else lambda: torch.autocast("cpu", torch.bfloat16)
    pieces = assert_like_eager(Mixed(), rows(4, 4, 4), lambda output: total(output.float()), around=around)
    assert len(pieces) == 1
    assert "torch.bfloat16" in str(pieces[0].result.graph) or "bf16" in str(pieces[0].result.graph)


def test_saved_tensor_hooks_see_what_is_kept() -> None:
    packed = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    def hooks() -> object:
        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    assert_like_eager(frozen_convolutions(), [(torch.randn(2, 4, 6, 6),)] * 2, around=hooks)
    assert packed


def test_checkpointing_of_a_compiled_module() -> None:
    class Outer(nn.Module):
        def __init__(self, body: nn.Module):
            super().__init__()
            self.body = body

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    model = Net(0.3)
    twin = copy.deepcopy(model)
    for side in (Outer(compiled(model)), Outer(twin)):
        torch.manual_seed(3)
        total(side(torch.ones(4, 2, 6, 6))).backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_a_checkpointed_region_is_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(checkpoint(lambda h: torch.relu(self.first(h)).sin(), x, use_reentrant=False))

    with caplog.at_level(logging.WARNING, "graphopt"):
        pieces = assert_like_eager(Inner(), rows(4, 4))
    assert pieces[0].result is None and "checkpointed region" in pieces[0].explain()
    assert "checkpointed region" in caplog.text
    with pytest.raises(GraphoptError, match="checkpointed region"):
        pieces[0].show()


def test_backward_runs_twice() -> None:
    model = frozen_convolutions()
    ours = compiled(model)
    total(ours(torch.randn(2, 4, 6, 6))).backward()  # the first backward of a piece decides for others
    model.zero_grad()
    loss = total(ours(torch.randn(2, 4, 6, 6)))
    loss.backward(retain_graph=True)
    once = model[0].weight.grad.clone()
    loss.backward()
    assert torch.equal(model[0].weight.grad, 2 * once)


def test_an_input_that_is_overwritten_is_read_as_it_was() -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = x.clone() * weight  # backward reads the copy
        x.mul_(3.0)
        return y + x

    def gradients(call: Callable) -> list[torch.Tensor]:
        leaf, weight = torch.ones(4, requires_grad=True), torch.full((4,), 2.0, requires_grad=True)
        x = leaf * 5.0
        call(x, weight).sum().backward()
        return [leaf.grad, weight.grad, x.detach()]

    for ours, eagers in zip(gradients(compiled(function)), gradients(function), strict=True):
        assert torch.equal(ours, eagers)


def test_unused_parameters_and_outputs_without_gradient() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
            h = self.used(x)
            return h, h.argmax(1), 7

    assert_like_eager(Part(), rows(4, 4), lambda output: total(output[0]))
