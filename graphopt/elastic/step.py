"""`ElasticStep`: one training step of a supernet: some of its subnets on one batch, one gradient, one update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from graphopt.elastic.choice import Choice
from graphopt.elastic.distillation import InPlaceDistillation
from graphopt.elastic.region import Region
from graphopt.elastic.sampler import FEWEST, Sampler
from graphopt.elastic.sampling import SANDWICH, Strategy
from graphopt.elastic.sized_code import Leaves, Runs
from graphopt.elastic.space import Space
from graphopt.errors import ElasticError, GraphoptError, LossError
from graphopt.graph.assemble import as_optimizers
from graphopt.graph.batch import ModelLoss, check_loss, compute_loss, one_batch
from graphopt.graph.hyper_parameters import parse_clip
from graphopt.graph.step_module import active_autocast, autocast, device_types
from graphopt.schemes.eager import finish_eager
from graphopt.schemes.task import Task, clear_gradients
from graphopt.schemes.workers.interrupts import InterruptsWait

Combine: TypeAlias = Literal["mean", "sum"]
"""How the subnets of a step come together: gradients averaged over them, or losses summed."""


class ElasticStep:
    """A training step that a loop calls with each batch: ``loss = step(x, y)``.

    Each step draws some subnets, runs them on the batch one after the other, gathers their gradients in the shared
    weights and makes one update. The model and the optimizer stay the only owners of parameters and state.

    Weights that none of the subnets of a step reads keep ``grad=None`` or get zeros; an optimizer with momentum then
    moves the latter on. A strategy that always draws the largest net (`Sandwich`) leaves nothing out.

    Args:
        space: the supernet.
        loss: ``loss(net(*inputs), target)``, or ``"model"`` for a model that returns its own.
        optimizer: a `torch.optim.Optimizer` of the model's parameters, or a list of them.
        strategy: which subnets a step trains.
        subnets: how many.
        combine: ``"mean"`` of the subnets' gradients, or ``"sum"`` of their losses (gradients so many times as large).
        distillation: how the other subnets learn from the largest one; not at all by default.
        clip: largest norm of the gradient (a float), `graphopt.ClipNorm` or `graphopt.ClipValue`.
        seed: of the draws.

    Attributes:
        sampler: draws the subnets; another one may be set between steps.
        last: the subnets of the last step, each with its loss (detached; of the targets alone).

    Raises:
        ElasticError, OptimizerError, GraphoptError: arguments that do not fit.
    """

    def __init__(
        self,
        space: Space,
        loss: Callable[..., Any] | str,
        optimizer: Any,
        *,
        strategy: Strategy = SANDWICH,
        subnets: int = FEWEST,
        combine: Combine = "mean",
        distillation: InPlaceDistillation | None = None,
        clip: Any = None,
        seed: int = 0,
    ):
        if not isinstance(space, Space):
            raise ElasticError(f"space: expected graphopt.elastic.space(model, batch), got {type(space).__name__}")
        if not callable(loss) and loss != ModelLoss:
            raise ElasticError(f"loss: expected a callable or {ModelLoss!r}, got {loss!r}")
        if combine not in get_args(Combine):
            raise ElasticError(f"combine: expected 'mean' or 'sum', got {combine!r}")
        optimizers = as_optimizers(optimizer)
        if not optimizers or any(isinstance(o, torch.optim.LBFGS) for o in optimizers):
            raise ElasticError("optimizer: expected one that needs no closure, or a list of such")
        self.space, self.combine, self.distillation = space, combine, distillation
        self.sampler = Sampler(Region.of(space), strategy, subnets, seed=seed)
        self.last: tuple[tuple[Choice, Tensor], ...] = ()
        self._task = Task(space.model, loss, optimizers, parse_clip(clip))

    def __call__(self, *batch: Any, **keywords: Any) -> Tensor:
        """One step on a batch: ``step(x, y)``, ``step(batch)`` or ``step(**batch)``.

        Returns the mean (or the sum) of the subnets' losses, detached. Ctrl-C waits until the update is made. Where a
        subnet fails, no update is made, and the error is raised.
        """
        if torch.is_inference_mode_enabled():
            raise GraphoptError("step: it was called in inference mode, in which nothing is trained")
        given = one_batch(batch, keywords)
        choices = self.sampler.draw()
        with InterruptsWait():
            clear_gradients(self._task)
            try:
                with torch.enable_grad():
                    losses = self._backward(choices, given)
            except BaseException:
                clear_gradients(self._task)
                raise
            finish_eager(self._task)
        self.last = tuple(zip(choices, losses, strict=True))
        together = torch.stack(losses)
        return together.mean() if self.combine == "mean" else together.sum()

    def _backward(self, choices: tuple[Choice, ...], batch: Any) -> list[Tensor]:
        """The gradient of all subnets, in the weights; returns the loss of each."""
        share = 1.0 / len(choices) if self.combine == "mean" else 1.0
        weight = self.distillation.at(self.sampler.step - 1) if self.distillation else 0.0
        if weight and choices[0] != self.sampler.region.full:
            raise ElasticError(
                "distillation: the largest net, which the others learn from, is not among the subnets of this step; "
                "use a strategy that always draws it (Sandwich)"
            )
        teacher: Any = None
        losses = []
        leaves = Leaves()
        runs = Runs(self.space, leaves)
        for choice in choices:
            net = _Net(runs, choice)
            own = check_loss(compute_loss(net, batch, self._task.loss or ModelLoss))  # type: ignore[arg-type]
            if not own.requires_grad:
                raise LossError("loss: it does not depend on any parameter that requires grad; is it detached?")
            value = own
            if weight and self.distillation is not None:
                if teacher is None:
                    teacher = net.output
                else:
                    value = self.distillation.loss(net.output, teacher, own, self.sampler.step - 1)
            with autocast(active_autocast(device_types(self.space.model, [value])), enabled=False):
                value.backward(torch.full_like(value, share))
            leaves.add_gradients()
            losses.append(own.detach().reshape(()))
        return losses

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside model and optimizer: the state of the draws."""
        return {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        """Go on from a checkpoint. Raises ElasticError for one that is damaged."""
        if not isinstance(state, dict) or "sampler" not in state:
            raise ElasticError(f"state: it is no state of an elastic step: {state!r}")
        self.sampler.load_state_dict(state["sampler"])


class _Net:
    """A subnet as a callable; ``output``: what it gave last."""

    def __init__(self, runs: Runs, choice: Choice):
        self.runs, self.choice = runs, choice
        self.output: Any = None

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        self.output = self.runs(self.choice, *inputs, **keywords)
        return self.output
