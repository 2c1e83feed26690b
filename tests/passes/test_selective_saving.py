"""SelectiveSaving: fewer bytes kept for backward than eager keeps, and the same gradients bit for bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from benchmarks.measure import bytes_kept_by_eager
from graphopt.graph.batch import compute_loss
from graphopt.graph.training_graph import OutputKind, Phase
from graphopt.passes import GradientLiveness, SelectiveSaving
from graphopt.verify import run_graph
from tests.helpers import assert_rewrite, assert_same_bits, traced

aten = torch.ops.aten


def weighted_sum(output, target):
    """A loss whose backward keeps nothing but the target."""
    return (output * target).sum()


def eager(model, batch, loss=weighted_sum):
    """Loss and gradients by autograd, and the bytes that it keeps for backward."""
    model = copy.deepcopy(model)
    given = [*model.parameters(), *model.buffers(), *batch]
    torch.manual_seed(0)
    value = compute_loss(model, batch, loss)
    value.backward()
    found = {f"gradient {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": value.detach()}, bytes_kept_by_eager(lambda: compute_loss(model, batch, loss), given)


def assert_saves(model, batch, *, loss=weighted_sum, times=1.0, pack_masks=False):
    """The pass keeps at least ``times`` fewer bytes than eager does; loss and gradients are eager's, bit for bit."""
    values, kept = eager(model, batch, loss)
    graph = graphopt.capture(model, batch, loss=loss)
    result = SelectiveSaving(pack_masks)(graph)
    got = run_graph(result.graph, model, batch).values
    names = sorted(values)
    assert_same_bits([got[name] for name in names], [values[name] for name in names])
    assert result.saving.bytes_kept == graph.bytes_kept() - result.graph.bytes_kept()
    assert times * result.graph.bytes_kept() <= kept, f"{result.graph.bytes_kept()} kept, by eager {kept}"
    assert not SelectiveSaving(pack_masks)(result.graph).changed
    return result


def stack(*layers):
    """The layers, the first one trainable, all others frozen and in eval mode."""
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if "running" in name or "1.weight" in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
    model[0].requires_grad_(True)
    return model


def batch_for(model, *shape, channels_last=False):
    x = torch.randn(shape)
    if channels_last:
        x, _ = x.contiguous(memory_format=torch.channels_last), model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        return x, torch.randn_like(copy.deepcopy(model)(x))


# -- frozen stacks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack_masks, times", [(False, 8), (True, 20)])
def test_sixteen_frozen_blocks(pack_masks, times):
    blocks = [(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(16)]
    model = stack(*(layer for block in blocks for layer in block))
    assert_saves(model, batch_for(model, 2, 4, 8, 8), times=times, pack_masks=pack_masks)


GEOMETRIES = [
    {},
    {"stride": 2},
    {"padding": 2},
    {"dilation": 2},
    {"groups": 2},
    {"groups": 4},
    {"stride": 2, "padding": 1, "dilation": 2},
    {"stride": (1, 2), "padding": (0, 1), "groups": 2, "bias": False},
]
TRANSPOSED = [
    *GEOMETRIES,
    {"stride": 2, "output_padding": 1},
    {"dilation": 2, "output_padding": 1},
    {"stride": 2, "padding": 1, "output_padding": (1, 0), "groups": 2},
]
CONVOLUTIONS = [(nn.Conv2d, o) for o in GEOMETRIES] + [(nn.ConvTranspose2d, o) for o in TRANSPOSED]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind, options", CONVOLUTIONS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_frozen_convolution_keeps_no_input(kind, options, channels_last):
    model = stack(nn.Conv2d(4, 4, 1), kind(4, 4, 3, **options), nn.Conv2d(4, 3, 1))
    batch = batch_for(model, 1, 4, 9, 7, channels_last=channels_last)
    result = assert_saves(model, batch)
    assert result.graph.bytes_kept() == 0


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d, nn.Conv3d])
def test_other_dimensions(kind):
    space = 3 if kind is nn.Conv3d else 1
    first = (nn.Conv3d if space == 3 else nn.Conv1d)(2, 4, 1)
    model = stack(first, kind(4, 4, 3, stride=2, groups=2))
    assert assert_saves(model, batch_for(model, 3, 2, *[7] * space)).graph.bytes_kept() == 0


@pytest.mark.parametrize("size", [1, 3])
def test_a_symbolic_batch_is_as_good(size):
    model = stack(nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1), nn.BatchNorm2d(4))
    graph = SelectiveSaving()(graphopt.capture(model, batch_for(model, size, 2, 5, 5), loss=weighted_sum)).graph
    assert graph.bytes_kept() == 0
    batch = batch_for(model, size if size == 1 else 5, 2, 5, 5)
    values, _ = eager(model, batch)
    got = run_graph(graph, model, batch).values
    assert_same_bits([got[n] for n in values], list(values.values()))


# -- masks and indices -----------------------------------------------------------------------------------------------


def chain_of(module):
    """``module`` between frozen convolutions."""
    return stack(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3), module, nn.Conv2d(4, 4, 1))


MASKED = [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1), nn.Hardtanh(-0.5, 0.5), nn.Hardsigmoid(), nn.Softshrink(0.2),
          nn.Hardshrink(0.2), nn.Threshold(0.1, 0.0)]  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("module", MASKED, ids=lambda module: type(module).__name__)
def test_relu_like_operators_keep_a_mask(module, channels_last):
    model = chain_of(module)
    batch = batch_for(model, 2, 2, 8, 8, channels_last=channels_last)
    elements = 2 * 4 * 6 * 6
    assert assert_saves(model, batch, times=4).graph.bytes_kept() == elements
    assert assert_saves(model, batch, times=32, pack_masks=True).graph.bytes_kept() == elements // 8


class Clamp(nn.Module):
    """`torch.clamp`, whose backward compares."""

    def forward(self, x):
        return x.clamp(-0.5, 0.5)


def test_clamp_keeps_a_mask():
    model = chain_of(Clamp())
    assert assert_saves(model, batch_for(model, 2, 2, 8, 8), times=4).graph.bytes_kept() == 2 * 4 * 6 * 6


def test_a_packed_mask_keeps_its_strides():
    """They decide the strides of the gradient, and so the order in which a bias gradient is summed."""
    model = nn.Sequential(nn.Conv2d(2, 7, 1), Clamp())
    batch = batch_for(model, 1, 2, 4, 5, channels_last=True)
    graph = graphopt.capture(model, batch, loss=weighted_sum)
    packed = SelectiveSaving(pack_masks=True)(graph).graph
    before, after = ([n for n in g.nodes if n.target is aten.where.self] for g in (graph, packed))
    values = [run_graph(g, model, batch).values["gradient 0.bias"] for g in (graph, packed)]
    assert "unpack_mask" in packed.text()
    assert [n.all_input_nodes[0].meta["val"].stride() for n in after] == [n.meta["val"].stride() for n in before]
    assert_same_bits(values[:1], values[1:])


def test_max_pool_keeps_its_indices():
    model = chain_of(nn.MaxPool2d(2))
    assert assert_saves(model, batch_for(model, 2, 2, 8, 8), times=3).graph.bytes_kept() == 8 * 2 * 4 * 3 * 3


def test_dropout_keeps_its_mask():
    model = chain_of(nn.Dropout(0.5))
    model[2].train()
    batch, elements = batch_for(model, 2, 2, 8, 8), 2 * 4 * 6 * 6
    assert assert_saves(model, batch).graph.bytes_kept() == elements
    assert assert_saves(model, batch, pack_masks=True).graph.bytes_kept() == elements // 8


def test_nan_and_infinities_pass_as_in_eager():
    model = chain_of(nn.ReLU())
    x, target = batch_for(model, 2, 2, 8, 8)
    x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert_saves(model, (x, target))


def test_a_mask_that_two_readers_share_is_kept_once():
    class Twice(nn.Module):
        def forward(self, x):
            y = F.relu(x)
            return F.threshold(y, 0.0, 0.0) + y

    model = chain_of(Twice())
    assert_saves(model, batch_for(model, 2, 2, 8, 8), times=2)


# -- what has to stay, with the reason -------------------------------------------------------------------------------


def test_refuses_what_a_weight_gradient_reads():
    """A trained convolution needs the ReLU's output, so that a mask would be kept beside it."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    result = assert_saves(model, batch_for(model, 2, 2, 8, 8))
    assert not result.changed
    assert [(r.what, r.why) for r in result.refusals] == [("%relu stays", "convolution_backward reads its values")]
    assert result.refusals[0].module == "1"


def test_refuses_the_input_of_a_norm_in_training():
    model = stack(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    model[2].train()
    result = assert_saves(model, batch_for(model, 2, 2, 4, 4))
    (refusal,) = result.refusals
    assert refusal.what == "%relu stays" and refusal.why == "native_batch_norm_backward reads its values"


def test_refuses_a_mask_that_is_not_smaller():
    """One element: two masks of a byte each would take the place of two bytes."""

    def two_thresholds(step, x, gradient):
        value = aten.exp.default(x)
        with step.phase(Phase.BACKWARD):
            return tuple(aten.threshold_backward.default(gradient, value, bound) for bound in (0, 1))

    half = torch.zeros(1, dtype=torch.float16)
    result = assert_rewrite(SelectiveSaving(), traced(two_thresholds, half, half), refused="would not be smaller")
    assert result.graph.bytes_kept() == 2


def test_gradient_liveness_makes_more_to_save():
    """A body that nobody trains needs its input gradients only: freezing by liveness frees the inputs as well."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
    graph = graphopt.capture(model, batch_for(model, 1, 2, 8, 8), loss=weighted_sum)
    assert SelectiveSaving()(graph).graph.bytes_kept() == graph.bytes_kept() > 0
    live = GradientLiveness(trainable=["0.weight"])(graph)
    assert SelectiveSaving()(live).graph.bytes_kept() == 0
    assert [o.name for o in live.graph.outputs if o.kind is OutputKind.GRADIENT] == ["0.weight"]
