"""`capture`: a model's training step as one `TrainingGraph`.

Route: `torch._functorch.aot_autograd.aot_export_joint_with_descriptors` traces forward, loss and backward of the
user's own Python into one functional ATen graph. Chosen over `torch.func.grad_and_value` with `make_fx` on evidence:
it functionalises buffers that change, keeps autograd's own order of gradient additions (so results are eager's bit
for bit), and describes every input and output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from graphopt.errors import CaptureError
from graphopt.graph.assemble import with_update
from graphopt.graph.batch import BatchLayout, ModelLoss
from graphopt.graph.exported import training_graph
from graphopt.graph.torch_internals import export_joint
from graphopt.graph.tracing import FreeSizes, check_arguments, trace
from graphopt.graph.training_graph import TrainingGraph


@dataclass(frozen=True)
class Captured:
    """A captured graph with what it takes to call it: the layout of its batch and the nesting of its outputs.

    ``left_out``: outputs that are no tensors and no plain data, for which None stands: by name, of which type.
    """

    graph: TrainingGraph
    layout: BatchLayout
    output_spec: Any = None
    output_constants: tuple[tuple[int, Any], ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


def capture(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[..., Any] | str | None = None,
    optimizer: Any = None,
    backward: bool = True,
    gradients: str | Collection[str] = "wanted",
    clip: Any = None,
    accumulate: int = 1,
    free: FreeSizes | None = None,
) -> TrainingGraph:
    """Capture forward, loss, backward and (with an optimizer) update of one training step.

    Args:
        model: any `torch.nn.Module`; it is traced in its present train/eval mode and is not changed. One without data
            gives the same graph, so that a step can be priced that is too big for this machine: build model, batch
            and optimizer under ``torch.device("meta")`` (a graph for the CPU), or in a `FakeTensorMode` (for the
            devices they are on there).
        batch: an example batch: a tensor, a tuple ``(inputs..., target)``, or a dict for models called by keyword.
            Its first dimension is captured symbolically unless it is 1, which is a regime of its own.
        loss: ``loss(model(*inputs), target)``, a scalar. ``"model"``, or None with an optimizer: the model returns
            its own loss. None otherwise: the outputs' tangents become inputs.
        optimizer: a `torch.optim.Optimizer` or a list of them, whose update becomes part of the graph (SGD, Adam,
            AdamW, RMSprop, Adagrad; any other leaves gradients as outputs). State that the optimizer would make at
            its first step is made now.
        backward: False captures the forward graph alone.
        gradients: ``"wanted"``: of parameters and batch tensors that require grad; ``"all"``: of every floating-point
            parameter and batch tensor, whatever their flags; or the names of the parameters wanted.
        clip: maximal norm (a float), `ClipNorm` or `ClipValue`: gradients are clipped before the update.
        accumulate: the loss is divided by it and gradients are added to those accumulated so far, which become inputs.
        free: further sizes to keep free, by name, each with the dimensions of batch tensors that have it:
            ``{"seq": {"input_ids": 1, "labels": 1}}`` (tensors of a tuple are named ``"0"``, ``"1"`` ...). A size that
            the model turns into a number is fixed (``graph.symbols`` tells).

    Returns:
        The graph. Its range of validity is ``graph.symbols`` (free sizes and guards).

    Raises:
        BatchError: the batch is empty or the model rejects it.
        CaptureError: the step cannot become one graph (data-dependent control flow ...); says where.
        LossError: backward cannot start from the loss (no scalar, detached ...).
        OptimizerError: an optimizer owns no parameter of the model, or two own the same one.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batch = (torch.randn(5, 4), torch.randint(2, (5,)))
        >>> graph = graphopt.capture(net, batch, loss=torch.nn.functional.cross_entropy)
        >>> [str(o) for o in graph.outputs][:2]
        ['loss loss', 'gradient 0.weight']
        >>> graph.flops({"batch": 10}) == 2 * graph.flops({"batch": 5})
        True
    """
    captured = capture_step(
        model, batch, loss=loss if loss is not None or optimizer is None else ModelLoss, backward=backward,
        gradients=gradients, accumulate=accumulate, free=free,
    )  # fmt: skip
    if optimizer is None and clip is None and accumulate == 1:
        return captured.graph
    return with_update(captured.graph, model, optimizer, clip=clip, accumulated=accumulate > 1).graph


def capture_step(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[..., Any] | str | None = None,
    backward: bool = True,
    gradients: str | Collection[str] = "wanted",
    accumulate: int = 1,
    free: FreeSizes | None = None,
) -> Captured:
    """`capture` without the update: the joint graph and how to call it. Arguments as there."""
    check_arguments(model, loss, accumulate)
    traced = trace(
        export_joint, model, batch, loss=loss, accumulate=accumulate, free=free,
        trainable=trainable_parameters(model, gradients) if backward else (),
        batch_gradients=False if not backward else True if gradients == "all" else None,
    )  # fmt: skip
    module = traced.module
    graph = training_graph(traced.exported, module, module.names, traced.sizes, requires_grad=module.required)
    return Captured(graph, traced.layout, module.output_spec, tuple(module.output_constants))


def trainable_parameters(model: nn.Module, gradients: str | Collection[str]) -> set[str]:
    """Names of the parameters whose gradients are wanted. Raises CaptureError for what names none."""
    parameters = dict(model.named_parameters())
    if gradients == "wanted":
        return {name for name, p in parameters.items() if p.requires_grad}
    if gradients == "all":
        return {name for name, p in parameters.items() if p.is_floating_point() or p.is_complex()}
    if isinstance(gradients, str):
        raise CaptureError(f"gradients: expected 'wanted', 'all' or names of parameters, got {gradients!r}")
    if unknown := set(gradients) - set(parameters):
        raise CaptureError(f"gradients: {sorted(map(str, unknown))} are no parameters of the model")
    return set(gradients)
