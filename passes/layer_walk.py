"""The walk over layers of the source document on gradient simplification, and its two sets of operator types.

"Going through the backward operators in the order of the layers from the first one": the prefix is the set of operators
all of whose ancestors hold no trained weight (the batch counts as weightless, on every path). In it, operators without
a weight and operators that only copy are targets whose gradient computation is removed; weight-holding operators at
its border keep their weight gradient and lose their input gradient; the walk ends behind them. `GradientLiveness` is
the general form; this walk classifies the layers in the document's own words.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from operator import getitem
from typing import Any, Literal

import torch
from torch import fx

from graphopt.graph.storages import tensors
from graphopt.graph.training_graph import InputKind, Phase, TrainingGraph


def _packets(names: str) -> frozenset[Any]:
    found = (getattr(torch.ops.aten, name, None) for name in names.split())
    return frozenset(packet for packet in found if packet is not None)


WEIGHTLESS: frozenset[Any] = _packets(
    """relu threshold hardtanh clamp leaky_relu elu gelu silu mish softplus hardswish hardsigmoid sigmoid tanh erf exp
    log log_sigmoid_forward sqrt rsqrt reciprocal abs neg sin cos pow square add sub mul div rsub maximum minimum where
    masked_fill sum mean amax amin var var_mean prod cumsum max_pool2d_with_indices max_pool3d_with_indices
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d native_dropout
    bernoulli rand_like _softmax _safe_softmax _log_softmax mm bmm baddbmm matmul convolution embedding addmm
    native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit_functional _fused_rms_norm
    _native_batch_norm_legit_no_training upsample_nearest2d upsample_bilinear2d upsample_bicubic2d grid_sampler_2d
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention mse_loss nll_loss_forward
    nll_loss2d_forward binary_cross_entropy smooth_l1_loss huber_loss eq ne lt le gt ge logical_not logical_and
    logical_or bitwise_not bitwise_and bitwise_or isnan isinf sign sgn floor ceil round log1p expm1 log2 full zeros ones
    full_like zeros_like ones_like arange scalar_tensor empty new_zeros new_ones new_full topk sort argmax fmod
    remainder floor_divide mkldnn_rnn_layer glu polar view_as_complex view_as_real"""
)
"""Types of operators that hold no weight of their own: parameters come to them, if at all, as operands, and an
operator of this set that has one counts as weight-holding. A set, so extend it by ``WEIGHTLESS | {my_operator}``."""

COPIES: frozenset[Any] = _packets(
    """view _unsafe_view reshape expand expand_as t transpose permute numpy_T squeeze unsqueeze flatten select slice
    split split_with_sizes chunk narrow unbind cat stack clone contiguous _to_copy detach alias lift_fresh_copy copy
    index index_select gather roll flip repeat constant_pad_nd reflection_pad2d replication_pad2d pixel_shuffle
    pixel_unshuffle unfold im2col col2im as_strided tril triu masked_select slice_scatter select_scatter
    channel_shuffle native_channel_shuffle diagonal movedim repeat_interleave"""
)
"""Types of operators that only move or copy elements."""

Decision = Literal["removed", "input gradient dropped", "kept"]


@dataclass(frozen=True)
class LayerDecision:
    """What the walk decides for one forward operator, and why."""

    operator: str
    module: str
    source: str
    decision: Decision
    why: str


def walk_layers(
    graph: TrainingGraph,
    live: Collection[str],
    weightless: Collection[Any] = WEIGHTLESS,
    copies: Collection[Any] = COPIES,
) -> tuple[LayerDecision, ...]:
    """Classify the forward operators of ``graph`` in order. ``live``: parameters and batch tensors whose gradient is
    read. Operators on parameters alone (a transposed weight) belong to the operator that uses them."""
    live = set(live)
    held: dict[fx.Node, set[str]] = {}  # parameters alone: a weight, or a view or cast of one
    trained: dict[fx.Node, bool] = {}  # data: whether a trained weight (or a batch gradient) lies before it
    for input_, node in zip(graph.inputs, graph.placeholders, strict=True):
        if input_.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            held[node] = {input_.name}
        else:
            trained[node] = input_.name in live
    decisions = []
    for node in graph.nodes:
        if node.op != "call_function" or node.meta.get("phase") != Phase.FORWARD:
            continue
        operands = node.all_input_nodes
        weights = {name for o in operands for name in held.get(o, ())}
        data = [o for o in operands if o in trained]
        if operands and not data:
            held[node] = weights
            continue
        before = any(trained[o] for o in data)
        holds = weights & live
        trained[node] = before or bool(holds)
        if node.target is getitem or not tensors(node.meta.get("val")):
            continue
        decision, why = _decide(node, before, bool(holds), bool(weights), weightless, copies)
        operator = str(node.target).removeprefix("aten.").removesuffix(".default")
        decisions.append(
            LayerDecision(operator, node.meta.get("module", ""), node.meta.get("source", ""), decision, why)
        )
    return tuple(decisions)


def _decide(
    node: fx.Node, before: bool, holds: bool, has_weights: bool, weightless: Collection[Any], copies: Collection[Any]
) -> tuple[Decision, str]:
    if before:
        return "kept", "a trained weight lies before it"
    if holds:
        return "input gradient dropped", "first trained weight on its path: only the weight gradient is needed"
    if _is_in(node.target, copies):
        return "removed", "copies, and no trained weight lies before it"
    if has_weights and _is_in(node.target, weightless):
        return "removed", "its weight is frozen, and no trained weight lies before it"
    if _is_in(node.target, weightless):
        return "removed", "holds no weight, and no trained weight lies before it"
    return "kept", "its type is neither in WEIGHTLESS nor in COPIES"


def _is_in(target: Any, types: Collection[Any]) -> bool:
    return target in types or getattr(target, "overloadpacket", None) in types
