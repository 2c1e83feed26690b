"""`resize_layer`: the numbers that PyTorch's own layers keep beside their weights, after their weights have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from graphopt.elastic.kernel_sizes import is_convolution
from graphopt.elastic.rebuilding.refusal import NotRebuilt
from graphopt.graph.op_rules.arguments import operand


def resize_layer(module: nn.Module, operators: Iterable[fx.Node]) -> None:
    """Give a layer the numbers that its weights and its operators in the subnet say. Other modules are left alone.

    Args:
        module: its parameters are those of the subnet already.
        operators: that the module is in the graphs of the subnet.

    Raises:
        NotRebuilt: it is called several times, with numbers that differ.
    """
    for classes, resize in _LAYERS:
        if isinstance(module, classes):
            resize(module, list(operators))
            return


def _linear(module: Any, operators: list[fx.Node]) -> None:
    module.out_features, module.in_features = module.weight.shape


def _bilinear(module: Any, operators: list[fx.Node]) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _embedding(module: Any, operators: list[fx.Node]) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _convolution(module: Any, operators: list[fx.Node]) -> None:
    nodes = [node for node in operators if is_convolution(node)]
    if not nodes:
        return
    module.groups = _one(module, nodes, "groups")
    rows, columns = module.weight.shape[:2]
    wide = columns * module.groups
    module.in_channels, module.out_channels = (rows, wide) if module.transposed else (wide, rows)
    module.kernel_size = tuple(module.weight.shape[2:])
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        padding = tuple(_one(module, nodes, "padding"))
        module.padding = padding * (len(module.kernel_size) // len(padding))


def _batch_norm(module: Any, operators: list[fx.Node]) -> None:
    like = module.weight if module.weight is not None else module.running_mean
    if like is not None:
        module.num_features = len(like)


def _layer_norm(module: Any, operators: list[fx.Node]) -> None:
    nodes = [node for node in operators if "normalized_shape" in _arguments(node)]
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif nodes:
        module.normalized_shape = tuple(_one(module, nodes, "normalized_shape"))


def _group_norm(module: Any, operators: list[fx.Node]) -> None:
    nodes = [node for node in operators if node.target is torch.ops.aten.group_norm.default]
    if nodes:
        module.num_groups = _one(module, nodes, "num_groups")
    if module.weight is not None:
        module.num_channels = len(module.weight)


def _prelu(module: Any, operators: list[fx.Node]) -> None:
    module.num_parameters = module.weight.numel()


def _attention(module: Any, operators: list[fx.Node]) -> None:
    inside = module.out_proj.weight.shape[1]
    module.embed_dim = module.out_proj.weight.shape[0]
    if module.in_proj_weight is not None:
        module.kdim = module.vdim = module.embed_dim
    else:
        module.kdim, module.vdim = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
    module.num_heads = inside // module.head_dim  # the size of heads is fixed by default


def _recurrent(module: Any, operators: list[fx.Node]) -> None:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    module.input_size = module.weight_ih_l0.shape[1]
    module.hidden_size = module.weight_ih_l0.shape[0] // gates
    if module.proj_size:
        module.proj_size = module.weight_hh_l0.shape[1]


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)  # fmt: skip

_LAYERS: tuple[tuple[Any, Callable[[Any, list[fx.Node]], None]], ...] = (
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (_CONVOLUTIONS, _convolution),
    (_BATCH_NORMS, _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.GroupNorm, _group_norm),
    (nn.PReLU, _prelu),
    (nn.MultiheadAttention, _attention),
    (nn.RNNBase, _recurrent),
)


def _one(module: nn.Module, nodes: list[fx.Node], argument: str) -> Any:
    """The argument that all calls of a layer have."""
    first, *rest = (operand(node, argument) for node in nodes)
    if any(other != first for other in rest):
        raise NotRebuilt(f"its {type(module).__name__} would need {argument}={first} in one call, {rest[0]} in another")
    return first


def _arguments(node: fx.Node) -> list[str]:
    schema = getattr(node.target, "_schema", None)
    return [argument.name for argument in schema.arguments] if schema is not None else []
