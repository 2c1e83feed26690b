"""`capture_forward`: forward and loss as one graph of whole operators, before autograd takes any of them apart.

What a model *means* is easiest to see here: a linear layer is one ``aten.linear``, attention one
``aten.scaled_dot_product_attention``. Rewrites that change sizes work on this graph; `with_backward` then derives the
joint graph from what they made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from graphopt.graph.capture import Captured, trainable_parameters
from graphopt.graph.exported import training_graph
from graphopt.graph.regions import flatten_regions
from graphopt.graph.step_module import autocast
from graphopt.graph.torch_internals import export_forward
from graphopt.graph.tracing import FreeSizes, check_arguments, trace
from graphopt.graph.training_graph import TrainingGraph


def capture_forward(
    model: nn.Module, batch: Any, *, loss: Callable[..., Any] | str | None = None, free: FreeSizes | None = None
) -> TrainingGraph:
    """Capture the forward pass (and the loss) of a model with its operators whole.

    Args:
        model: any `torch.nn.Module`; it is traced in its present train/eval mode and is not changed.
        batch: an example batch, as in `graphopt.capture`; its first dimension is symbolic unless it is 1.
        loss: ``loss(model(*inputs), target)``, ``"model"`` for a model that returns its own, or None for none: the
            model's outputs are the graph's.
        free: further sizes to keep free, as in `graphopt.capture`.

    Outputs that are neither tensors nor plain data (a cache of keys and values) are not in the graph.

    Returns:
        A functional graph of parameters, buffers and the batch, with the loss or the outputs and the new values of
        buffers. ``aten.detach`` stands where gradients stop, casts where autocast made them. ``signature.tree`` has
        ``requires_grad`` (names of parameters and batch tensors), ``no_grad`` (names of the nodes that detach what
        leaves a region without gradients) and ``own_backward`` (`torch.autograd.Function`s among the operators, whose
        backward is not in the graph).

    Raises:
        BatchError: the batch is empty or the model rejects it.
        CaptureError: the forward pass cannot become one graph; says where.
        LossError: backward could not start from the loss.

    Example:
        >>> import torch
        >>> from graphopt.graph.forward import capture_forward
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.LayerNorm(8))
        >>> graph = capture_forward(net, torch.randn(5, 4))
        >>> [str(n.target) for n in graph.nodes if n.op == "call_function"]
        ['aten.linear.default', 'aten.gelu.default', 'aten.layer_norm.default']
    """
    return capture_forward_call(model, batch, loss=loss, free=free).graph


def capture_forward_call(
    model: nn.Module, batch: Any, *, loss: Callable[..., Any] | str | None = None, free: FreeSizes | None = None
) -> Captured:
    """`capture_forward` with what it takes to call the graph: the layout of the batch and the nesting of outputs."""
    check_arguments(model, loss)
    traced = trace(
        export_forward, model, batch, loss=loss, trainable=trainable_parameters(model, "wanted"), batch_gradients=None,
        free=free, opaque=True,
    )  # fmt: skip
    module = traced.module
    with autocast(module.autocast, enabled=False):
        detached = flatten_regions(traced.exported)
    graph = training_graph(traced.exported, module, module.names, traced.sizes, requires_grad=module.required)
    tree = {**graph.signature.tree, "no_grad": detached, "own_backward": list(traced.exported.own_backward)}
    whole = TrainingGraph(graph.graph, replace(graph.signature, tree=tree), graph.constants)
    return Captured(whole, traced.layout, module.output_spec, tuple(module.output_constants), module.left_out)
