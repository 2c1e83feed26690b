"""Structures of attention with weights of their own for queries, keys and values: shared heads, rotation, tables.

Sizes of queries and keys (``qk``) differ from those of values wherever the operators allow it. The bias of keys has no
effect on a softmax over keys, and is left out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .truth import example, values

TOKENS = values(5, 7, 10)

SEPARATE = """
    q  heads*qk inputs
    k  heads*qk inputs
    v  heads*value inputs
    o  outputs heads*value
"""


class Separate(nn.Module):
    """Layers for queries, keys and values, and for what leaves. ``groups`` counts the heads of keys and values."""

    def __init__(self, inputs: int, heads: int, groups: int, qk: int, value: int, outputs: int, context: int = 0):
        super().__init__()
        self.heads, self.groups, self.qk, self.value = heads, groups, qk, value
        self.q, self.k = nn.Linear(inputs, heads * qk), nn.Linear(context or inputs, groups * qk, bias=False)
        self.v, self.o = nn.Linear(context or inputs, groups * value), nn.Linear(heads * value, outputs)

    def split(self, x, context=None):
        """Queries, keys and values ``[batch, tokens, heads, size]``."""
        context = x if context is None else context
        q = self.q(x).view(*x.shape[:2], self.heads, self.qk)
        k = self.k(context).view(*context.shape[:2], self.groups, self.qk)
        return q, k, self.v(context).view(*context.shape[:2], self.groups, self.value)

    def attend(self, q, k, v, **options):
        """Attention of ``[batch, tokens, heads, size]``, and the layer after it."""
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)
        return self.o(y.transpose(1, 2).flatten(2))


@example("attention, view with heads", TOKENS, SEPARATE)
class AttentionWithHeads(Separate):
    def __init__(self, inputs=10, heads=2, qk=3, value=4, outputs=11):
        super().__init__(inputs, heads, heads, qk, value, outputs)

    def forward(self, x):
        return self.attend(*self.split(x))


@example("attention, view with -1 heads", TOKENS, SEPARATE)
class AttentionInferredHeads(Separate):
    """The number of heads is left to the view, as transformers does it."""

    def __init__(self, inputs=10, heads=2, qk=3, value=4, outputs=11):
        super().__init__(inputs, heads, heads, qk, value, outputs)

    def forward(self, x):
        b, n, _ = x.shape
        q, k = self.q(x).view(b, n, -1, self.qk), self.k(x).view(b, n, -1, self.qk)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), self.v(x).view(b, n, -1, self.value).transpose(1, 2)
        )
        return self.o(y.transpose(1, 2).reshape(b, n, -1).contiguous())


@example("attention by matmul and softmax", TOKENS, "scale  heads 1 1" + SEPARATE)
class AttentionByMatmul(Separate):
    """With the size of a head in a number, and a learned scale per head."""

    def __init__(self, inputs=10, heads=2, qk=3, value=4, outputs=11):
        super().__init__(inputs, heads, heads, qk, value, outputs)
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x):
        q, k, v = (t.permute(0, 2, 1, 3) for t in self.split(x))
        weights = self.scale * (q @ k.transpose(-2, -1)) / math.sqrt(self.qk)
        return self.o((weights.softmax(-1) @ v).permute(0, 2, 1, 3).flatten(2))


@example(
    "attention by einsum",
    TOKENS,
    """
    q  inputs heads qk
    k  inputs heads qk
    v  inputs heads value
    o  heads value outputs
    """,
)
class AttentionByEinsum(nn.Module):
    """Weights with axes of their own for heads."""

    def __init__(self, inputs=10, heads=2, qk=3, value=4, outputs=11):
        super().__init__()
        self.q, self.k = nn.Parameter(torch.randn(inputs, heads, qk)), nn.Parameter(torch.randn(inputs, heads, qk))
        self.v = nn.Parameter(torch.randn(inputs, heads, value))
        self.o = nn.Parameter(torch.randn(heads, value, outputs))

    def forward(self, x):
        q, k, v = (torch.einsum("bnd,dhe->bhne", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhqe,bhke->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bhke,hed->bqd", weights, v, self.o)


def rotated(x, cos, sin):
    """Rotary positions by the half rotation of Llama: ``[batch, heads, tokens, size]``."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Rotary(Separate):
    """Attention with tables of angles, for a part of each head or all of it."""

    def __init__(self, inputs: int, tokens: int, heads: int, half: int, rest: int, value: int, outputs: int):
        super().__init__(inputs, heads, heads, 2 * half + rest, value, outputs)
        angles = torch.rand(tokens, half) * 6
        self.turned = 2 * half
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())


@example(
    "rotary attention",
    TOKENS,
    """
    q    heads*2*half inputs
    k    heads*2*half inputs
    v    heads*value inputs
    cos  tokens 2*half
    sin  tokens 2*half
    o    outputs heads*value
    """,
    frozen={"tokens": "input"},
)
class RotaryAttention(Rotary):
    """Both halves of a head are turned together: sizes shrink in pairs, and the tables with them."""

    def __init__(self, inputs=10, tokens=7, heads=2, half=3, value=4, outputs=11):
        super().__init__(inputs, tokens, heads, half, 0, value, outputs)

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.split(x))
        y = F.scaled_dot_product_attention(rotated(q, self.cos, self.sin), rotated(k, self.cos, self.sin), v)
        return self.o(y.transpose(1, 2).flatten(2))


@example(
    "partial rotary attention",
    TOKENS,
    """
    q    heads*(2*half+rest) inputs
    k    heads*(2*half+rest) inputs
    v    heads*value inputs
    cos  tokens 2*half
    sin  tokens 2*half
    o    outputs heads*value
    """,
    frozen={"tokens": "input"},
)
class PartialRotaryAttention(Rotary):
    """Only the first part of each head is turned: a product whose inner factor is a concatenation."""

    def __init__(self, inputs=10, tokens=7, heads=4, half=3, rest=2, value=9, outputs=11):
        super().__init__(inputs, tokens, heads, half, rest, value, outputs)

    def turn(self, x):
        turned, passed = x[..., : self.turned], x[..., self.turned :]
        return torch.cat([rotated(turned, self.cos, self.sin), passed], -1)

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.split(x))
        return self.o(F.scaled_dot_product_attention(self.turn(q), self.turn(k), v).transpose(1, 2).flatten(2))


GROUPED = """
    q  groups*repeats*qk inputs
    k  groups*qk inputs
    v  groups*value inputs
    o  outputs groups*repeats*value
"""


class GroupedQueries(Separate):
    """Several heads of queries share one head of keys and values."""

    def __init__(self, inputs: int, groups: int, repeats: int, qk: int, value: int, outputs: int):
        super().__init__(inputs, groups * repeats, groups, qk, value, outputs)
        self.repeats = repeats


@example("grouped queries by expand", TOKENS, GROUPED + "q_norm  qk\n k_norm  qk")
class GroupedQueriesByExpand(GroupedQueries):
    """Llama and its kind, with norms of queries and keys."""

    def __init__(self, inputs=10, groups=2, repeats=3, qk=4, value=6, outputs=11):
        super().__init__(inputs, groups, repeats, qk, value, outputs)
        self.q_norm, self.k_norm = nn.RMSNorm(qk), nn.RMSNorm(qk)

    def repeated(self, x):
        b, n, groups, size = x.shape
        return x[:, :, :, None, :].expand(b, n, groups, self.repeats, size).reshape(b, n, groups * self.repeats, size)

    def forward(self, x):
        q, k, v = self.split(x)
        return self.attend(self.q_norm(q), self.repeated(self.k_norm(k)), self.repeated(v))


@example("grouped queries by repeat_interleave", TOKENS, GROUPED)
class GroupedQueriesByRepeat(GroupedQueries):
    def __init__(self, inputs=10, groups=2, repeats=3, qk=4, value=6, outputs=11):
        super().__init__(inputs, groups, repeats, qk, value, outputs)

    def forward(self, x):
        q, k, v = self.split(x)
        return self.attend(q, k.repeat_interleave(self.repeats, 2), v.repeat_interleave(self.repeats, 2))


@example("grouped queries by sdpa", TOKENS, GROUPED)
class GroupedQueriesBySdpa(GroupedQueries):
    """The number of repeats is written nowhere."""

    def __init__(self, inputs=10, groups=2, repeats=3, qk=4, value=6, outputs=11):
        super().__init__(inputs, groups, repeats, qk, value, outputs)

    def forward(self, x):
        return self.attend(*self.split(x), enable_gqa=True)


@example(
    "multi-query attention",
    TOKENS,
    """
    q  heads*qk inputs
    k  qk inputs
    v  value inputs
    o  outputs heads*value
    """,
)
class MultiQuery(Separate):
    """One head of keys and values, broadcast to all heads of queries."""

    def __init__(self, inputs=10, heads=3, qk=4, value=6, outputs=11):
        super().__init__(inputs, heads, 1, qk, value, outputs)

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.split(x))
        weights = (q @ k.transpose(-2, -1) * self.qk**-0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


@example(
    "cross-attention",
    (TOKENS, values(5, 8, 9)),
    """
    q  heads*qk inputs
    k  heads*qk context
    v  heads*value context
    o  outputs heads*value
    """,
    frozen={"context": "input"},
)
class CrossAttention(Separate):
    def __init__(self, inputs=10, context=9, heads=2, qk=3, value=4, outputs=11):
        super().__init__(inputs, heads, heads, qk, value, outputs, context)

    def forward(self, x, context):
        return self.attend(*self.split(x, context))


@example(
    "attention with slopes",
    TOKENS,
    """
    slopes    heads
    distance  tokens tokens
    """
    + SEPARATE,
    frozen={"tokens": "input"},
)
class AttentionWithSlopes(Separate):
    """ALiBi: a buffer with one number a head."""

    def __init__(self, inputs=10, tokens=7, heads=2, qk=3, value=4, outputs=11):
        super().__init__(inputs, heads, heads, qk, value, outputs)
        place = torch.arange(float(tokens))
        self.register_buffer("slopes", torch.rand(heads))
        self.register_buffer("distance", -(place[:, None] - place[None, :]).abs())

    def forward(self, x):
        return self.attend(*self.split(x), attn_mask=self.slopes[:, None, None] * self.distance)


@example("linear attention", TOKENS, SEPARATE)
class LinearAttention(Separate):
    """Without a softmax: keys and values meet first."""

    def __init__(self, inputs=10, heads=2, qk=3, value=4, outputs=11):
        super().__init__(inputs, heads, heads, qk, value, outputs)

    def forward(self, x):
        q, k, v = self.split(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = torch.einsum("bnhe,bhed->bnhd", q, torch.einsum("bnhe,bnhd->bhed", k, v))
        return self.o((y / torch.einsum("bnhe,bhe->bnh", q, k.sum(1)).unsqueeze(-1)).flatten(2))


@example(
    "attention over channels",
    TOKENS,
    """
    q  rows inputs
    k  columns inputs
    v  columns inputs
    o  outputs rows
    """,
    frozen={"columns": "softmax"},
)
class AttentionOverChannels(nn.Module):
    """XCiT: the softmax runs over the channels of keys and values. Those of the queries are free, and leave."""

    def __init__(self, inputs=10, rows=4, columns=6, outputs=11):
        super().__init__()
        self.q, self.k = nn.Linear(inputs, rows, bias=False), nn.Linear(inputs, columns)
        self.v, self.o = nn.Linear(inputs, columns), nn.Linear(rows, outputs)

    def forward(self, x):
        weights = (self.q(x).transpose(1, 2) @ self.k(x)).softmax(-1)
        return self.o((weights @ self.v(x).transpose(1, 2)).transpose(1, 2))
