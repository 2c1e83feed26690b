"""`Several`: some subnets of a space as one model with one loss, which `graphopt.optimize` captures like any other.

The step of a set of subnets is then one graph: what does not depend on the choice is computed once, gradients of all
subnets are added up in it, and every scheme that runs steps of models runs it (flat code, compilers, data parallel).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.elastic.choice import Choice
from graphopt.elastic.space import Space
from graphopt.elastic.subnet import Shared, Subnet
from graphopt.graph.batch import TARGET_KEYS, check_loss, compute_loss, normalise, one_batch


class Several(nn.Module):
    """Subnets of a space, in the state that its model has now, as a model that returns their loss.

    Called with a whole batch (inputs and target), it gives ``{"loss": scalar}``: the mean or the sum of the subnets'
    losses. Its parameters and buffers are the model's own, and those of transformations.

    Args:
        space: the supernet.
        choices: the subnets; each is run on the batch.
        loss: as `graphopt.optimize` takes it.
        combine: ``"mean"`` or ``"sum"``.
        batch: an example, with the target.

    Attributes:
        losses: a buffer, ``[subnets]``: the loss of each in the last step.
    """

    losses: torch.Tensor

    def __init__(
        self, space: Space, choices: Sequence[Choice], loss: Callable[..., Any] | str, combine: str, batch: Any
    ):
        super().__init__()
        inputs = inputs_of(batch, loss)
        self.model, self.layers = space.model, space.layers
        self.loss, self.share = loss, 1.0 / len(choices) if combine == "mean" else 1.0
        self.subnets = [space.subnet(choice, batch=inputs) for choice in choices]
        paths = {id(p): path for path, p in space.layers.named_parameters()}
        own = {name: p for subnet in self.subnets for name, p in subnet.own.items()}
        self.own = {name: paths[id(p)] for name, p in own.items()}
        like = next(space.model.parameters())
        self.register_buffer("losses", torch.zeros(len(choices), dtype=like.dtype, device=like.device))

    def forward(self, *batch: Any, **keywords: Any) -> dict[str, torch.Tensor]:
        """The loss of all subnets on a whole batch."""
        given = one_batch(batch, keywords)
        shared: dict[str, torch.Tensor] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        if self.own:
            layers = dict(self.layers.named_parameters())
            shared |= {name: layers[path] for name, path in self.own.items()}
        losses = [
            check_loss(compute_loss(_Net(subnet, shared), given, self.loss)).reshape(())  # type: ignore[arg-type]
            for subnet in self.subnets
        ]
        self.losses.copy_(torch.stack([loss.detach() for loss in losses]))
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return {"loss": total * self.share if self.share != 1.0 else total}


class _Net:
    """A subnet as a callable, on given tensors in the place of the model's."""

    def __init__(self, subnet: Subnet, shared: Shared):
        self.subnet, self.shared = subnet, shared

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        leaves = pytree.tree_leaves(
            one_batch(inputs, keywords)
        )  # `flatten` would turn the free batch size into a number
        return self.subnet([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], self.shared)


def inputs_of(batch: Any, loss: Callable[..., Any] | str) -> Any:
    """What of a batch the model is called with, as `compute_loss` divides it."""
    given = normalise(batch)
    if isinstance(loss, str):
        return given
    if isinstance(given, dict):
        target = next((key for key in TARGET_KEYS if key in given), None)
        return {name: value for name, value in given.items() if name != target}
    return given[:-1] if len(given) > 1 else given
