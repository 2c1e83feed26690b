"""Structures of attention that cuts queries, keys and values out of one weight."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .attention import TOKENS
from .truth import example, values


@example(
    "fused qkv by unbind",
    TOKENS,
    """
    qkv  3*heads*size inputs
    o    outputs heads*size
    """,
)
class FusedByUnbind(nn.Module):
    """ViT. In the product 3 x heads x size, queries, keys and values have one size."""

    def __init__(self, inputs=10, heads=2, size=4, outputs=11):
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.o = nn.Linear(inputs, 3 * heads * size), nn.Linear(heads * size, outputs)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, self.heads * self.size))


@example(
    "fused qkv by equal split, causal",
    TOKENS,
    """
    qkv   heads*qk+heads*qk+heads*value inputs
    mask  1 1 tokens tokens
    o     outputs heads*value
    """,
    frozen={"tokens": "input"},
    same_size="qk value",
)
class FusedBySplit(nn.Module):
    """GPT-2: three parts side by side, of equal size only because of ``split``."""

    def __init__(self, inputs=10, tokens=7, heads=2, qk=4, value=4, outputs=11):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(inputs, heads * (qk + qk + value))
        self.register_buffer("mask", torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril())
        self.o = nn.Linear(heads * value, outputs)

    def forward(self, x):
        b, n, _ = x.shape
        parts = self.qkv(x).split(self.o.in_features, dim=-1)
        q, k, v = (p.view(b, n, self.heads, p.shape[-1] // self.heads).transpose(1, 2) for p in parts)
        weights = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        weights = weights.masked_fill(~self.mask[:, :, :n, :n], -math.inf).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).contiguous().view(b, n, self.o.in_features))


@example(
    "fused qkv by unequal split",
    TOKENS,
    """
    qkv  heads*qk+heads*qk+heads*value inputs
    o    outputs heads*value
    """,
)
class FusedByUnequalSplit(nn.Module):
    def __init__(self, inputs=10, heads=2, qk=3, value=4, outputs=11):
        super().__init__()
        self.heads, self.sizes = heads, [heads * qk, heads * qk, heads * value]
        self.qkv, self.o = nn.Linear(inputs, sum(self.sizes)), nn.Linear(heads * value, outputs)

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.qkv(x).split(self.sizes, -1))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@example(
    "interleaved qkv by chunk",
    TOKENS,
    """
    qkv  heads*(qk+qk+value) inputs
    o    outputs heads*value
    """,
    same_size="qk value",
)
class InterleavedByChunk(nn.Module):
    """GPT-NeoX: queries, keys and values of the first head, then those of the second, of equal size by ``chunk``."""

    def __init__(self, inputs=10, heads=2, qk=4, value=4, outputs=11):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(inputs, heads * (qk + qk + value))
        self.o = nn.Linear(heads * value, outputs)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, self.heads, -1).transpose(1, 2).chunk(3, -1)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


@example(
    "interleaved qkv by select",
    TOKENS,
    """
    qkv  heads*3*size inputs
    o    outputs heads*size
    """,
)
class InterleavedBySelect(nn.Module):
    """BLOOM: the fixed factor is in the middle."""

    def __init__(self, inputs=10, heads=2, size=4, outputs=11):
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.o = nn.Linear(inputs, heads * 3 * size), nn.Linear(heads * size, outputs)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, self.heads, 3, self.size).transpose(1, 2)
        y = F.scaled_dot_product_attention(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :])
        return self.o(y.transpose(1, 2).reshape(b, n, self.heads * self.size))


@example(
    "nn.MultiheadAttention",
    TOKENS,
    """
    stem                 stream inputs
    attn.in_proj_weight  3*heads*size stream
    attn.in_proj_bias    3*heads*size
    attn.out_proj        stream heads*size
    head                 outputs stream
    """,
    rebuilds=False,
)
class TorchAttention(nn.Module):
    """The class wants the stream as wide as all heads together; in the graph they are different axes."""

    def __init__(self, inputs=10, stream=6, heads=2, size=3, outputs=11):
        super().__init__()
        self.stem, self.head = nn.Linear(inputs, stream), nn.Linear(stream, outputs)
        self.attn = nn.MultiheadAttention(stream, heads, batch_first=True)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.attn(x, x, x, need_weights=False)[0])


@example(
    "attention windows",
    values(5, 4, 4, 10),
    """
    stem   stream inputs
    norm   stream
    qkv    3*heads*size stream
    table  9 heads
    index  4 4
    proj   stream heads*size
    head   outputs stream
    """,
)
class AttentionWindows(nn.Module):
    """Swin: shifted windows of 2 x 2 pixels, and a table of biases by relative position and head."""

    def __init__(self, inputs=10, stream=13, heads=3, size=6, outputs=11):
        super().__init__()
        self.heads, self.size = heads, size
        self.stem, self.norm = nn.Linear(inputs, stream), nn.LayerNorm(stream)
        self.qkv, self.proj = nn.Linear(stream, 3 * heads * size), nn.Linear(heads * size, stream)
        self.table, self.head = nn.Parameter(torch.randn(9, heads)), nn.Linear(stream, outputs)
        row, column = torch.arange(4) // 2, torch.arange(4) % 2
        self.register_buffer("index", (row[:, None] - row + 1) * 3 + column[:, None] - column + 1)

    def forward(self, x):
        x = self.stem(x)
        b, h, w, c = x.shape
        y = self.norm(x).roll((-1, -1), (1, 2))
        y = y.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(y).reshape(-1, 4, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        weights = (q * self.size**-0.5 @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        y = self.proj((weights @ v).transpose(1, 2).reshape(-1, 4, self.heads * self.size))
        y = y.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.head(x + y.roll((1, 1), (1, 2)))
