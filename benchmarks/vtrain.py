"""The models of VIA-Research/vTrain's measurements, built without data, and their FLOPs beside Megatron-LM's formula.

    python -m benchmarks.vtrain ground_truth_single.csv     # every row; the exit code is 1 if one is off by over 1 %

The data are training iterations of GPT-like models by Megatron-DeepSpeed, fp16, vocabulary 51,200
(github.com/VIA-Research/vTrain, ``data/ground_truth_single.csv``). The formula is that of Narayanan et al. 2021,
"Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", section 5.1, without the second
forward pass of full recomputation: 72 in place of 96. It counts matrix products only, attention as if it were not
causal, and the layer of logits; so does `graphopt.capture(...).flops()`.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from benchmarks.measure import print_table

__all__ = ["VOCABULARY", "Row", "Shape", "Transformer", "capture", "loss", "megatron_flops", "read_rows"]

VOCABULARY = 51_200
TOLERANCE = 0.01


@dataclass(frozen=True)
class Shape:
    """What the work of one sequence depends on."""

    hidden_size: int
    attention_heads: int
    layers: int
    sequence_length: int


@dataclass(frozen=True)
class Row:
    """One measurement; the names are those of the columns. ``iteration_ms`` is the time of one training iteration."""

    gpus: int
    global_batch: int
    micro_batch: int
    hidden_size: int
    attention_heads: int
    layers: int
    sequence_length: int
    tensor_parallel: int
    data_parallel: int
    pipeline_parallel: int
    iteration_ms: float

    @property
    def shape(self) -> Shape:
        return Shape(self.hidden_size, self.attention_heads, self.layers, self.sequence_length)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a CSV file with the columns of `Row`; lines that begin with ``#`` are comments."""
    kinds = {"iteration_ms": float}
    with open(path, newline="") as file:
        read = csv.DictReader(line for line in file if not line.startswith("#"))
        return [Row(**{f.name: kinds.get(f.name, int)(row[f.name]) for f in fields(Row)}) for row in read]


class Transformer(nn.Module):
    """A GPT as Megatron trains it: learned positions, layer norm first, attention by its own matrix products, softmax
    and dropout, GELU, logits by the weight of the embedding. Tokens ``(batch, sequence)`` to logits."""

    def __init__(self, shape: Shape, vocabulary: int = VOCABULARY, dropout: float = 0.1):
        super().__init__()
        width = shape.hidden_size
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(shape.sequence_length, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(_Layer(width, shape.attention_heads, dropout) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(width)
        hidden = torch.ones(shape.sequence_length, shape.sequence_length, dtype=torch.bool).triu(1)
        self.register_buffer("hidden", hidden, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.tokens(tokens) + self.positions.weight)
        for layer in self.layers:
            x = layer(x, self.hidden)
        return F.linear(self.norm(x), self.tokens.weight)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        x = x + self.dropout(self.out(self.attention(self.before_attention(x), hidden)))
        return x + self.dropout(self.down(F.gelu(self.up(self.before_mlp(x)))))

    def attention(self, x: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        return (self.dropout(weights) @ v).transpose(1, 2).flatten(2)


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def capture(shape: Shape) -> graphopt.TrainingGraph:
    """Forward, loss and backward of the model of ``shape`` in fp16, without data. The batch is free."""
    with torch.device("meta"):
        model = Transformer(shape).half()
        tokens = torch.zeros(4, shape.sequence_length, dtype=torch.int64)
    return graphopt.capture(model, (tokens, tokens.clone()), loss=loss)


def megatron_flops(shape: Shape, batch: int, vocabulary: int = VOCABULARY) -> float:
    """FLOPs of one training iteration over ``batch`` sequences, without recomputation."""
    b, h, s = batch, shape.hidden_size, shape.sequence_length
    return 72 * b * s * shape.layers * h**2 * (1 + s / (6 * h)) + 6 * b * s * h * vocabulary


def check(rows: Iterable[Row]) -> float:
    """Print the FLOPs of all rows, one line a model, beside the formula. Returns the largest relative error."""
    graph_of = cache(capture)
    errors: dict[Shape, list[float]] = {}
    for row in rows:
        expected = megatron_flops(row.shape, row.global_batch)
        error = graph_of(row.shape).flops({"batch": row.global_batch}) / expected - 1
        errors.setdefault(row.shape, []).append(abs(error))
    shown = [
        asdict(shape) | {"rows": len(found), "largest_error": max(found)}
        for shape, found in sorted(errors.items(), key=lambda item: (item[0].hidden_size, item[0].layers))
    ]
    print_table(shown, title="FLOPs of captured steps against the formula of Megatron-LM")
    return max(error for of_shape in errors.values() for error in of_shape)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="the CSV file")
    return int(check(read_rows(parser.parse_args().path)) > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
