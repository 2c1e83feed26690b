"""Channels-last memory: images in it make convolutions compute and hand on in it.

Only the images of the batch are converted. Convolutions follow the layout of their input, so weights, gradients
(autograd brings them into the layout of their parameters) and optimizer state stay as they are: to change to this
scheme and back costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from graphopt.errors import CaptureError
from graphopt.graph.batch import BatchLayout, ModelLoss
from graphopt.graph.op_rules import flops
from graphopt.graph.provenance import Provenance
from graphopt.graph.sizes import expression
from graphopt.graph.step_module import StepModule, unchanged
from graphopt.graph.torch_internals import fails_on_fakes
from graphopt.graph.training_graph import InputKind, Phase, TrainingGraph
from graphopt.schemes.base import Prepared, Runner
from graphopt.schemes.task import Task

_CONVOLUTION = torch.ops.aten.convolution.default


def image_positions(layout: BatchLayout) -> tuple[int, ...]:
    """Which tensors of a batch are images that lie in memory in another way: floating-point, 4-D, more than one channel
    and pixel."""
    return tuple(
        i
        for i, (shape, stride, dtype) in enumerate(zip(layout.shapes, layout.strides, layout.dtypes, strict=True))
        if len(shape) == 4 and dtype.is_floating_point and stride[1] != 1 and shape[1] != 1 and shape[2:] != (1, 1)
    )


def why_not_channels_last(prepared: Prepared) -> str | None:
    """Why images cannot be in channels-last memory, None if they can (as far as is known without a try)."""
    layout, step = prepared.layout, prepared.step
    positions = image_positions(layout)
    if not positions:
        return "the batch holds no images (4-D, floating-point, several channels) in another memory format"
    if any(layout.requires_grad[i] for i in positions):
        return "the images require a gradient, which would have their new layout"
    if step is None:
        found = any(isinstance(m, nn.Conv2d) for m in prepared.task.model.modules())
    else:
        names = {layout.names[i] for i in positions}
        found = any(True for _ in convolutions(step.before, names))
    return None if found else "no 2-D convolution reads the images"


def convolutions(graph: TrainingGraph, names: set[str]) -> Sequence[fx.Node]:
    """The 2-D convolutions in the forward pass of ``graph`` that depend on the batch tensors ``names``."""
    reached = {
        node for given, node in zip(graph.inputs, graph.placeholders, strict=True)
        if given.kind is InputKind.BATCH and given.name in names
    }  # fmt: skip
    found = []
    for node in graph.nodes:
        if node.meta.get("phase") == Phase.FORWARD and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            if node.target is _CONVOLUTION and node.args[0] in reached and len(node.meta["val"].shape) == 4:
                found.append(node)
    return found


def matters(graph: TrainingGraph, names: set[str], size: int) -> bool:
    """Whether 2-D convolutions of several output pixels do most of the forward pass's FLOPs: worth a try."""
    at = {"batch": size}
    found = [n for n in convolutions(graph, names) if expression(n.args[0].meta["val"].shape[1]) != 1]  # type: ignore[union-attr]
    work = sum(graph.symbols.evaluate(flops(n), at) for n in found)
    return 2 * work >= graph.flops(at, phase=Phase.FORWARD)


class ChannelsLastImages:
    """A runner that is given the images of a batch in channels-last memory."""

    def __init__(self, runner: Runner, layout: BatchLayout):
        self._runner, self._positions = runner, image_positions(layout)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """One batch."""
        return self._runner(converted(tensors, self._positions))

    def fresh(self) -> bool:
        """See `Runner`."""
        return self._runner.fresh()

    def close(self) -> None:
        """See `Runner`."""
        self._runner.close()


def converted(tensors: Sequence[torch.Tensor], positions: Sequence[int]) -> list[torch.Tensor]:
    """The tensors, with those at ``positions`` in channels-last memory."""
    given = list(tensors)
    for i in positions:
        given[i] = given[i].contiguous(memory_format=torch.channels_last)
    return given


def check_model(task: Task, layout: BatchLayout, size: int) -> None:
    """Raise CaptureError if the model or the loss rejects images in channels-last memory (``view`` on features does).

    They are run on fake tensors: nothing is computed.
    """
    tensors = converted(layout.example(size), image_positions(layout))
    module = StepModule(task.model, layout, task.loss or ModelLoss, (), Provenance(task.model))
    with unchanged(task.model, task.loss):
        if fails_on_fakes(module, tensors):
            raise CaptureError("the model rejects images in channels-last memory (reshape in place of view helps)")
