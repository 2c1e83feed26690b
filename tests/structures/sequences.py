"""Structures of tokens and time steps: embeddings, tables of positions, recurrence, mixing over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .truth import example, indices, values


@example(
    "tied embedding",
    indices(13, 5, 4),
    """
    embedding.weight  vocabulary stream
    norm              stream
    fc1               hidden stream
    fc2               stream hidden
    """,
    frozen={"vocabulary": ""},
)
class TiedEmbedding(nn.Module):
    """The table of the tokens is the last layer too: one parameter with two names."""

    def __init__(self, vocabulary=13, stream=8, hidden=7):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(vocabulary, stream), nn.LayerNorm(stream)
        self.fc1, self.fc2 = nn.Linear(stream, hidden), nn.Linear(hidden, stream)
        self.head = nn.Linear(stream, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.fc2(F.gelu(self.fc1(self.norm(x)))))


@example(
    "class token and positions",
    values(5, 3, 6, 8),
    """
    patches    stream inputs 2 2
    token      1 1 stream
    positions  1 13 stream
    norm       stream
    head       outputs stream
    """,
)
class ClassTokenAndPositions(nn.Module):
    """The stem of a vision transformer: patches, a token before them, and a table of positions."""

    def __init__(self, inputs=3, stream=7, outputs=9):
        super().__init__()
        self.patches = nn.Conv2d(inputs, stream, 2, stride=2)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, stream)), nn.Parameter(torch.randn(1, 13, stream))
        self.norm, self.head = nn.LayerNorm(stream), nn.Linear(stream, outputs)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(x).relu().mean(1))


class ScaledBlock(nn.Module):
    """A pre-norm block with a learned scale of its result."""

    def __init__(self, stream: int, hidden: int):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(stream), nn.Linear(stream, hidden), nn.Linear(hidden, stream)
        self.scale = nn.Parameter(torch.full((stream,), 0.1))

    def forward(self, x):
        return x + self.scale * self.fc2(F.gelu(self.fc1(self.norm(x))))


@example(
    "layer scale",
    values(5, 4, 6),
    """
    stem         stream inputs
    block.scale  stream
    block.norm   stream
    block.fc1    hidden stream
    block.fc2    stream hidden
    head         outputs stream
    """,
    depth="block",
)
class LayerScale(nn.Module):
    def __init__(self, inputs=6, stream=8, hidden=7, outputs=9):
        super().__init__()
        self.stem, self.head = nn.Linear(inputs, stream), nn.Linear(stream, outputs)
        self.block = ScaledBlock(stream, hidden)

    def forward(self, x):
        return self.head(self.block(self.stem(x)))


@example(
    "token mixing",
    values(5, 4, 6),
    """
    embed   stream inputs
    norm1   stream
    mix1    mixed tokens
    mix2    tokens mixed
    norm2   stream
    fc1     hidden stream
    fc2     stream hidden
    head    outputs stream
    """,
    frozen={"tokens": "input"},
)
class TokenMixing(nn.Module):
    """MLP-Mixer: a linear layer over tokens has the tokens of the input as an axis of its weight."""

    def __init__(self, inputs=6, tokens=4, stream=8, mixed=10, hidden=7, outputs=9):
        super().__init__()
        self.embed, self.head = nn.Linear(inputs, stream), nn.Linear(stream, outputs)
        self.norm1, self.mix1, self.mix2 = nn.LayerNorm(stream), nn.Linear(tokens, mixed), nn.Linear(mixed, tokens)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(stream), nn.Linear(stream, hidden), nn.Linear(hidden, stream)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.mix2(F.gelu(self.mix1(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x)


@example(
    "text cnn",
    indices(13, 5, 7),
    """
    embedding.weight  vocabulary width
    pairs             short width 2
    triples           long width 3
    head              outputs short+long
    """,
    frozen={"vocabulary": ""},
)
class TextCnn(nn.Module):
    """Convolutions over time with a maximum over what they find."""

    def __init__(self, vocabulary=13, width=8, short=6, long=10, outputs=9):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.pairs, self.triples = nn.Conv1d(width, short, 2), nn.Conv1d(width, long, 3)
        self.head = nn.Linear(short + long, outputs)

    def forward(self, tokens):
        x = self.embedding(tokens).transpose(1, 2)
        return self.head(torch.cat([self.pairs(x).relu().amax(2), self.triples(x).relu().max(2).values], 1))


@example(
    "lstm",
    values(5, 4, 6),
    """
    embed             width inputs
    lstm.weight_ih_l0 4*hidden width
    lstm.weight_hh_l0 4*hidden hidden
    lstm.bias_*       4*hidden
    head              outputs hidden
    """,
)
class Lstm(nn.Module):
    """The four gates are a fixed outer factor."""

    def __init__(self, inputs=6, width=8, hidden=7, outputs=9):
        super().__init__()
        self.embed, self.lstm = nn.Linear(inputs, width), nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.head(self.lstm(self.embed(x))[0][:, -1])


@example(
    "lstm of two layers, both ways",
    values(5, 4, 6),
    """
    lstm.weight_ih_l0* 4*hidden inputs
    lstm.weight_ih_l1* 4*hidden 2*hidden
    lstm.weight_hh_*   4*hidden hidden
    lstm.bias_*        4*hidden
    head               outputs 2*hidden
    """,
)
class LstmBothWays(nn.Module):
    """The operator has one hidden size, so that layers and directions are one group (permuted apart, they are four)."""

    def __init__(self, inputs=6, hidden=7, outputs=9):
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, outputs)

    def forward(self, x):
        return self.head(self.lstm(x)[0].mean(1))


@example(
    "gru",
    values(5, 4, 6),
    """
    gru.weight_ih_l0 3*hidden inputs
    gru.weight_hh_l0 3*hidden hidden
    gru.bias_*       3*hidden
    head             outputs hidden
    """,
)
class Gru(nn.Module):
    """The last state, not the last output, is read."""

    def __init__(self, inputs=6, hidden=7, outputs=9):
        super().__init__()
        self.gru, self.head = nn.GRU(inputs, hidden, batch_first=True), nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.head(self.gru(x)[1][-1])


@example(
    "patch merging",
    values(5, 4, 6, 3),
    """
    stem       width inputs
    norm       4*width
    reduction  merged 4*width
    head       outputs merged
    """,
)
class PatchMerging(nn.Module):
    """Swin: the four pixels of each patch side by side, by strided slices of space."""

    def __init__(self, inputs=3, width=7, merged=8, outputs=9):
        super().__init__()
        self.stem, self.norm = nn.Linear(inputs, width), nn.LayerNorm(4 * width)
        self.reduction, self.head = nn.Linear(4 * width, merged, bias=False), nn.Linear(merged, outputs)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.reduction(self.norm(x)).relu())


@example(
    "learned queries",
    values(5, 4, 6),
    """
    queries  count width
    q        qk width
    k        qk inputs
    v        value inputs
    head     outputs count*value
    """,
)
class LearnedQueries(nn.Module):
    """Tokens that are parameters ask the tokens of the input; their number is an axis like any other."""

    def __init__(self, inputs=6, count=3, width=8, qk=7, value=10, outputs=9):
        super().__init__()
        self.queries, self.q = nn.Parameter(torch.randn(count, width)), nn.Linear(width, qk)
        self.k, self.v = nn.Linear(inputs, qk, bias=False), nn.Linear(inputs, value)
        self.head = nn.Linear(count * value, outputs)

    def forward(self, x):
        weights = (self.q(self.queries) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.head((weights @ self.v(x)).flatten(1))
