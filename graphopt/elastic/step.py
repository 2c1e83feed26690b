"""`ElasticStep`: one training step of a supernet: some of its subnets on one batch, one gradient, one update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from graphopt.elastic.choice import Choice
from graphopt.elastic.distillation import InPlaceDistillation
from graphopt.elastic.graph_steps import GraphSteps
from graphopt.elastic.ranks import Norms, Ranks
from graphopt.elastic.region import Region
from graphopt.elastic.sampler import FEWEST, Sampler
from graphopt.elastic.sampling import SANDWICH, Strategy
from graphopt.elastic.sized_code import Leaves, Runs
from graphopt.elastic.space import Space
from graphopt.elastic.subnet import batch_norm as plain_batch_norm
from graphopt.errors import ElasticError, GraphoptError, LossError
from graphopt.graph.assemble import as_optimizers
from graphopt.graph.batch import ModelLoss, check_loss, compute_loss, one_batch
from graphopt.graph.hyper_parameters import parse_clip
from graphopt.graph.step_module import active_autocast, autocast, device_types
from graphopt.plan import Plan
from graphopt.schemes import Scheme
from graphopt.schemes.eager import finish_eager
from graphopt.schemes.task import Task, clear_gradients
from graphopt.schemes.workers.interrupts import InterruptsWait
from graphopt.schemes.world.ranks import find_world

Combine: TypeAlias = Literal["mean", "sum"]
"""How the subnets of a step come together: gradients averaged over them, or losses summed."""


class ElasticStep:
    """A training step that a loop calls with each batch: ``loss = step(x, y)``.

    Each step draws some subnets, runs them on the batch one after the other, gathers their gradients in the shared
    weights and makes one update. The model and the optimizer stay the only owners of parameters and state.

    Weights that none of the subnets of a step reads keep ``grad=None`` or get zeros; an optimizer with momentum then
    moves the latter on. A strategy that always draws the largest net (`Sandwich`) leaves nothing out.

    Autograd runs subnets that are drawn anew. With ``schemes`` a set of subnets that comes again (`Fixed`, `Recurring`)
    is one graph from then on, with one update in it, run by any scheme of `graphopt.optimize`. Under torchrun, or where
    `torch.distributed` is initialised, all ranks take each step together, each with its own rows of the batch: by a
    divided graph or by autograd, the gradient is that of one processor on all rows, up to the order of sums. By
    autograd that holds for a loss that is a mean over rows.

    Args:
        space: the supernet.
        loss: ``loss(net(*inputs), target)``, or ``"model"`` for a model that returns its own.
        optimizer: a `torch.optim.Optimizer` of the model's parameters, or a list of them.
        strategy: which subnets a step trains.
        subnets: how many.
        combine: ``"mean"`` of the subnets' gradients, or ``"sum"`` of their losses (gradients so many times as large).
        distillation: how the other subnets learn from the largest one; not at all by default.
        clip: largest norm of the gradient (a float), `graphopt.ClipNorm` or `graphopt.ClipValue`.
        seed: of the draws; the same on all ranks.
        schemes: what runs sets of subnets that come again, as in `graphopt.optimize`; None: autograd runs all.
        processors: as in `graphopt.optimize`. Local workers run sets that are graphs; a world of ranks runs all.
        batch_norm: on several processors: ``"synchronized"`` takes the statistics of the whole batch, ``"local"`` of
            each processor's rows.

    Attributes:
        sampler: draws the subnets; another one may be set between steps.
        last: the subnets of the last step, each with its loss (detached; of the targets alone).
        plan: of the last step, where it was a graph; None where autograd ran it.

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
        schemes: str | Sequence[str | Scheme] | None = None,
        processors: int | None = None,
        batch_norm: Norms = "synchronized",
    ):
        if not isinstance(space, Space):
            raise ElasticError(f"space: expected graphopt.elastic.space(model, batch), got {type(space).__name__}")
        if not callable(loss) and loss != ModelLoss:
            raise ElasticError(f"loss: expected a callable or {ModelLoss!r}, got {loss!r}")
        if combine not in get_args(Combine):
            raise ElasticError(f"combine: expected 'mean' or 'sum', got {combine!r}")
        if batch_norm not in get_args(Norms):
            raise ElasticError(f"batch_norm: expected 'synchronized' or 'local', got {batch_norm!r}")
        if processors is not None and (type(processors) is not int or processors < 1):
            raise ElasticError(f"processors: expected a positive integer, got {processors!r}")
        optimizers = as_optimizers(optimizer)
        if not optimizers or any(isinstance(o, torch.optim.LBFGS) for o in optimizers):
            raise ElasticError("optimizer: expected one that needs no closure, or a list of such")
        self.space, self.combine, self.distillation = space, combine, distillation
        self.sampler = Sampler(Region.of(space), strategy, subnets, seed=seed)
        self.last: tuple[tuple[Choice, Tensor], ...] = ()
        self.plan: Plan | None = None
        world = find_world(space.model, processors)
        if world is None and (processors or 1) > 1 and schemes is None:
            raise ElasticError(
                f"processors: {processors} share steps that are graphs, or run as ranks of torch.distributed; give "
                "schemes='auto' too, or start the script by torchrun"
            )
        self._task = Task(space.model, loss, optimizers, parse_clip(clip), world=world)
        self._ranks = Ranks(world, self._task, batch_norm) if world is not None else None
        self._graphs: GraphSteps | None = None
        if schemes is not None:
            self._graphs = GraphSteps(space, self._task, schemes, processors, batch_norm)

    def __call__(self, *batch: Any, **keywords: Any) -> Tensor:
        """One step on a batch: ``step(x, y)``, ``step(batch)`` or ``step(**batch)``.

        Returns the mean (or the sum) of the subnets' losses, detached. Ctrl-C waits until the update is made. Where a
        subnet fails, no update is made, and the error is raised. In a world the batch is this rank's rows, and the loss
        that of all rows; RankError where ranks cannot take the step together.
        """
        if torch.is_inference_mode_enabled():
            raise GraphoptError("step: it was called in inference mode, in which nothing is trained")
        given = one_batch(batch, keywords)
        choices = self.sampler.draw()
        if self._ranks is not None:
            self._ranks.meet(given, choices, f"combine={self.combine}, teacher={self._teaching}")
        with InterruptsWait():
            losses = self._as_graph(choices, given)
            if losses is None:
                losses = self._by_autograd(choices, given)
        if self._ranks is not None:
            self._ranks.settle()
        self.last = tuple(zip(choices, losses, strict=True))
        together = torch.stack(losses)
        return together.mean() if self.combine == "mean" else together.sum()

    def _as_graph(self, choices: tuple[Choice, ...], batch: Any) -> list[Tensor] | None:
        """The step by `graphopt.optimize`; None where it has to run by autograd."""
        self.plan = None
        if self._graphs is None or self._teaching:
            return None
        found = self._graphs.of(choices, batch, self._task.loss or ModelLoss, self.combine)
        if found is None:
            return None
        model, step = found
        step(batch)
        self.plan = step.plan
        return list(model.losses.clone().unbind())

    def _by_autograd(self, choices: tuple[Choice, ...], batch: Any) -> list[Tensor]:
        """The step subnet by subnet."""
        clear_gradients(self._task)
        ranks = self._ranks
        before = [(b, b.clone()) for b in self.space.model.buffers()] if ranks is not None else []
        try:
            with torch.enable_grad(), ranks.world.reaching() if ranks is not None else nullcontext():
                losses = self._backward(choices, batch)
            if ranks is not None:
                losses = ranks.add(losses)
        except BaseException:
            clear_gradients(self._task)
            with torch.no_grad():
                for buffer, value in before:  # so that ranks stay equal
                    buffer.copy_(value)
            raise
        finish_eager(self._task)
        return losses

    @property
    def leads(self) -> bool:
        """Whether this process writes checkpoints: rank 0 of a world, for all ranks hold the same."""
        return self._ranks is None or self._ranks.world.rank == 0

    def close(self) -> None:
        """End the local workers, if there are any; the next step starts new ones."""
        self._task.pools.close()

    @property
    def _teaching(self) -> float:
        """The weight of the teacher in the step whose subnets were drawn last."""
        return self.distillation.at(self.sampler.step - 1) if self.distillation else 0.0

    def _backward(self, choices: tuple[Choice, ...], batch: Any) -> list[Tensor]:
        """The gradient of all subnets, in the weights; returns the loss of each."""
        share = 1.0 / len(choices) if self.combine == "mean" else 1.0
        share *= self._ranks.share if self._ranks is not None else 1.0
        weight = self._teaching
        if weight and choices[0] != self.sampler.region.full:
            raise ElasticError(
                "distillation: the largest net, which the others learn from, is not among the subnets of this step; "
                "use a strategy that always draws it (Sandwich)"
            )
        teacher: Any = None
        losses = []
        leaves = Leaves()
        runs = Runs(self.space, leaves, self._ranks.norm if self._ranks is not None else plain_batch_norm)
        regions = active_autocast(device_types(self.space.model, ()))
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
            with autocast(regions, enabled=False):  # they are for forward and loss
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
