"""Random small layers: modules that torch.nn does not have, and `layer`, which draws one that fits a shape."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import reject
from hypothesis import strategies as st
from torch import nn

Shape = tuple[int, ...]
"""Sizes of a value without the batch: ``(features)``, ``(channels or tokens, length or features)`` or an image."""


# -- modules that torch.nn does not have -----------------------------------------------------------------------------


class Residual(nn.Module):
    """``x + inner(x)``."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Concat(nn.Module):
    """``x`` and ``inner(x)`` side by side in dimension 1."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.cat([x, self.inner(x)], 1)


class Split(nn.Module):
    """Dimension 1 in two parts, one of them through an activation, put together the other way round."""

    def __init__(self, first: int):
        super().__init__()
        self.first = first

    def forward(self, x):
        a, b = x.split([self.first, x.shape[1] - self.first], 1)
        return torch.cat([b.tanh(), a], 1)


class Attention(nn.Module):
    """Self-attention of tokens ``[batch, tokens, features]`` through torch's fused operator."""

    def __init__(self, features: int, heads: int, dropout: float, causal: bool):
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)

    def forward(self, x):
        n, tokens, features = x.shape
        heads = self.qkv(x).view(n, tokens, 3, self.heads, features // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(*heads.unbind(0), dropout_p=dropout, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(n, tokens, features))


class Tied(nn.Module):
    """A bottleneck whose way out is the transpose of its way in: one weight, used twice."""

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.into = nn.Linear(features, hidden)

    def forward(self, x):
        return F.linear(self.into(x).relu(), self.into.weight.t())


class TwoNames(nn.Module):
    """Two layers that share one parameter under two names."""

    def __init__(self, features: int):
        super().__init__()
        self.first, self.second = nn.Linear(features, features), nn.Linear(features, features)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Counting(nn.Module):
    """Buffers that change: a counter in place, and a running mean that is assigned anew."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.steps.add_(1)
        self.mean = self.mean * 0.5 + x.detach().mean() * 0.5
        return x - self.mean


class Noise(nn.Module):
    """Adds random numbers."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Function(nn.Module):
    """A function by its name in `FUNCTIONS`."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x):
        return FUNCTIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu, "gelu": F.gelu, "silu": F.silu,
    "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "sigmoid": torch.sigmoid, "softplus": F.softplus,
    "elu": F.elu, "clamp": lambda x: x.clamp(-0.5, 0.5), "clamp_min": lambda x: x.clamp(min=0.1),
    "abs": torch.abs, "square": lambda x: x * x, "minimum": lambda x: torch.minimum(x, -x),
    "softmax": lambda x: x.softmax(-1), "normalise": lambda x: x / (x.std(-1, keepdim=True, correction=0) + 1.0),
    "no_grad": lambda x: x * x.detach().exp(), "where": lambda x: torch.where(x > 0, x, x * 0.3),
    "flip": lambda x: x.flip(1), "twice": lambda x: x.sin() + x.sin() * 1.0,
    "to_float": lambda x: x.float().to(x.dtype),
}  # fmt: skip
"""Elementwise functions and others that keep the shape."""


# -- layers ----------------------------------------------------------------------------------------------------------


def _function(draw, shape: Shape) -> nn.Module:
    return Function(draw(st.sampled_from(sorted(FUNCTIONS))))


def _relu(draw, shape: Shape) -> nn.Module:
    return nn.ReLU(inplace=draw(st.booleans()))


def _dropout(draw, shape: Shape) -> nn.Module:
    kind = nn.Dropout2d if len(shape) == 3 and draw(st.booleans()) else nn.Dropout
    return kind(draw(st.sampled_from([0.0, 0.3, 0.5])))


def _linear(draw, shape: Shape) -> nn.Module:
    return nn.Linear(shape[-1], draw(st.integers(1, 5)), bias=draw(st.booleans()))


def _same_linear(draw, shape: Shape) -> nn.Module:
    return nn.Linear(shape[-1], shape[-1])


def _convolution(draw, shape: Shape) -> nn.Module:
    space = len(shape) - 1
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([g for g in (1, 2, shape[0]) if shape[0] % g == 0]))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    options: dict[str, Any] = {
        "stride": stride, "dilation": dilation, "groups": groups, "padding": draw(st.integers(0, 2)),
        "bias": draw(st.booleans()),
    }  # fmt: skip
    if transposed:
        options["output_padding"] = draw(st.integers(0, max(stride, dilation) - 1))
    kind = {(1, False): nn.Conv1d, (1, True): nn.ConvTranspose1d, (2, False): nn.Conv2d, (2, True): nn.ConvTranspose2d}
    out = groups * draw(st.integers(1, 2))
    return kind[space, transposed](shape[0], out, draw(st.integers(1, 3)), **options)


def _same_convolution(draw, shape: Shape) -> nn.Module:
    kind = nn.Conv1d if len(shape) == 2 else nn.Conv2d
    return kind(shape[0], shape[0], 3, padding=1, bias=draw(st.booleans()))


def _norm(draw, shape: Shape) -> nn.Module:
    channels = shape[0]
    kinds: list[Callable[[], nn.Module]] = [lambda: nn.LayerNorm(shape[draw(st.integers(0, len(shape) - 1)) :])]
    if len(shape) > 1:
        groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
        instance = nn.InstanceNorm1d if len(shape) == 2 else nn.InstanceNorm2d
        tracks = draw(st.booleans())
        kinds += [lambda: nn.GroupNorm(groups, channels)]
        kinds += [lambda: instance(channels, affine=True, track_running_stats=tracks)]
    batch = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
    affine = draw(st.booleans())
    kinds += [lambda: batch(channels, affine=affine)] * 2
    made = draw(st.sampled_from(kinds))()
    return made.train(draw(st.booleans()))


def _pool(draw, shape: Shape) -> nn.Module:
    one = len(shape) == 2
    adaptive = draw(st.integers(1, 2))
    window, stride = draw(st.integers(2, 3)), draw(st.integers(1, 2))
    return draw(st.sampled_from([
        (nn.MaxPool1d if one else nn.MaxPool2d)(window, stride, padding=draw(st.integers(0, 1))),
        (nn.AvgPool1d if one else nn.AvgPool2d)(window, stride, ceil_mode=draw(st.booleans())),
        (nn.AdaptiveAvgPool1d if one else nn.AdaptiveAvgPool2d)(adaptive),
        (nn.AdaptiveMaxPool1d if one else nn.AdaptiveMaxPool2d)(adaptive),
        nn.Upsample(scale_factor=2, mode="nearest"),
    ]))  # fmt: skip


def _attention(draw, shape: Shape) -> nn.Module:
    features = shape[1]
    heads = draw(st.sampled_from([h for h in (1, 2) if features % h == 0]))
    dropout, causal = draw(st.sampled_from([0.0, 0.2])), draw(st.booleans())
    return Attention(features, heads, dropout, causal)


def _tied(draw, shape: Shape) -> nn.Module:
    return draw(st.sampled_from([Tied(shape[-1], 3), TwoNames(shape[-1])]))


def _state(draw, shape: Shape) -> nn.Module:
    return draw(st.sampled_from([Counting(), Noise()]))


def _residual(draw, shape: Shape) -> nn.Module:
    return Residual(_same_shape(draw, shape))


def _concat(draw, shape: Shape) -> nn.Module:
    return Concat(_same_shape(draw, shape))


def _split(draw, shape: Shape) -> nn.Module:
    return Split(draw(st.integers(1, max(1, shape[0] - 1))))


def _reshape(draw, shape: Shape) -> nn.Module:
    if len(shape) == 1:
        return nn.Unflatten(1, (1, shape[0]))
    return draw(st.sampled_from([nn.Flatten(), nn.Flatten(2)]))


_KEEP_SHAPE = (_function, _relu, _dropout, _norm, _same_linear, _tied)
_ANY = (_function, _relu, _dropout, _linear, _norm, _tied, _state, _residual, _concat, _split, _reshape)
_LAYERS = {
    1: _ANY,
    2: (*_ANY, _convolution, _pool, _attention, _attention),
    3: (*_ANY, _convolution, _convolution, _norm, _pool),
}
"""Kinds of layers by the number of dimensions (without the batch) of what they take."""


def _same_shape(draw, shape: Shape) -> nn.Module:
    kinds = _KEEP_SHAPE if len(shape) == 1 else (*_KEEP_SHAPE, _same_convolution)
    return draw(st.sampled_from(kinds))(draw, shape)


def layer(draw, shape: Shape) -> tuple[nn.Module, Shape]:
    """A layer for values of ``shape``, and the shape of what it gives. Rejects one that does not fit."""
    module = draw(st.sampled_from(_LAYERS[len(shape)]))(draw, shape)
    try:
        with torch.no_grad():
            shape = tuple(copy.deepcopy(module).eval()(torch.zeros(2, *shape)).shape[1:])
    except (RuntimeError, ValueError):
        reject()
    return (module, shape) if 0 < torch.Size(shape).numel() <= 600 else reject()
