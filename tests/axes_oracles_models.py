"""Oracles that hold a graph and its axes against the model itself, and against another graph of it.

*Model*: in eval mode, given permuted parameters and buffers, it gives what it gave. *Batch*: a graph captured at one
batch size has, at another, the FLOPs, the bytes kept and the results of a graph captured there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.graph.axes import Axes, Axis
from graphopt.graph.batch import call_model, compute_loss, flatten, normalise
from graphopt.graph.training_graph import InputKind, TrainingGraph
from graphopt.verify import disagreement, run_graph
from tests.axes_oracles import agrees, cast, permuted
from tests.structures import load, tensors

__all__ = ["groups_of", "same_model", "wrong_at"]


def same_model(axes: Axes, model: nn.Module, batch: Any, orders: Mapping[Axis, Tensor], loss: Any = None) -> bool:
    """Whether the model itself, in eval mode, gives the same loss (or outputs) with permuted parameters and buffers.

    Only for axes that no constant of the graph carries.
    """
    batch = cast(normalise(batch))

    def outputs(given: nn.Module) -> list[Tensor]:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            found = call_model(given, batch) if loss is None else compute_loss(given, batch, loss)
        return [t.clone() for t in pytree.tree_leaves(found) if isinstance(t, Tensor)]

    before, after = (copy.deepcopy(model).eval() for _ in range(2))  # a model may keep what it computed
    load(after, permuted(axes, {n: t.detach().clone() for n, t in tensors(model).items()}, orders))
    return agrees(outputs(after), outputs(before))


def groups_of(axes: Axes) -> dict[str, tuple[Any, ...]]:
    """Names, sizes, kinds and places of parameters and buffers, and what is free: to compare two graphs of a model."""
    constants, batch = set(axes.graph.constants), axes.graph.input_nodes(InputKind.BATCH)
    found = {}
    for g in axes.groups():
        places = frozenset(p for p in g.places if p.name not in constants)
        if any(p.name not in batch for p in places):
            found[g.name] = (str(axes.graph.symbols.rename(g.size)), g.kind, places, g.free)
    return found


def wrong_at(graph: TrainingGraph, fresh: TrainingGraph, model: nn.Module, batch: Any) -> str | None:
    """How ``graph`` differs, at the size of ``batch``, from ``fresh``, which was captured on ``batch``; None if not."""
    sizes = {"batch": flatten(batch)[2]}
    if not graph.symbols.admits(sizes):
        return f"the guards do not admit {sizes}"
    numbers = {
        "FLOPs": (graph.flops(sizes), fresh.flops(sizes)),
        "bytes kept": (graph.bytes_kept(sizes), fresh.bytes_kept(sizes)),
    }
    for what, (ours, theirs) in numbers.items():
        if ours != theirs:
            return f"{ours} {what}, {theirs} in a fresh capture"
    return disagreement(run_graph(graph, model, batch), run_graph(fresh, model, batch), None)
