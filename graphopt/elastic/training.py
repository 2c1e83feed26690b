"""`train`: a supernet trained stage by stage, with checkpoints, progress and a clean end at Ctrl-C."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.optim import Optimizer

from graphopt.elastic.checkpoints import Checkpoints, read
from graphopt.elastic.progressive import Stage, Watch, joint_mode
from graphopt.elastic.ranks import Norms
from graphopt.elastic.region import Region
from graphopt.elastic.sampler import Sampler
from graphopt.elastic.space import Space
from graphopt.elastic.step import ElasticStep
from graphopt.errors import ElasticError
from graphopt.graph.assemble import as_optimizers
from graphopt.schemes import Scheme
from graphopt.schemes.workers.interrupts import InterruptsWait

Scheduler = Callable[[Optimizer, int], Any]
"""``scheduler(optimizer, steps)`` gives a `torch.optim.lr_scheduler` for a stage of so many steps."""


@dataclass
class StageReport:
    """What became of one stage. ``losses``: of each step, in this process; ``converged``: it ended early."""

    name: str
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    converged: bool = False
    checkpoint: str | None = None


def train(
    space: Space,
    loader: Iterable[Any],
    loss: Callable[..., Any] | str,
    optimizer: Any,
    stages: int | Sequence[Stage],
    *,
    clip: Any = None,
    seed: int = 0,
    scheduler: Scheduler | None = None,
    restart: bool = True,
    schemes: str | Sequence[str | Scheme] | None = None,
    processors: int | None = None,
    batch_norm: Norms = "synchronized",
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 500,
    progress: bool = True,
) -> list[StageReport]:
    """Train the shared weights of a space, in place.

    Args:
        space: the supernet. Its model must be in train mode if that is what shall be trained.
        loader: gives batches, and is gone through again and again. Each is ``(inputs..., target)``, or a mapping.
        loss: ``loss(net(*inputs), target)``, or ``"model"`` for a model that returns its own.
        optimizer: of the model's parameters (and those of the space's transformations), or a list of them.
        stages: of `joint_mode` or `progressive_mode`, or any list of `Stage`; a number of steps means that
            many in joint mode.
        clip: largest norm of the gradient, as in `graphopt.optimize`.
        seed: of the draws; each stage has its own from it.
        scheduler: gives a scheduler of the learning rate for each stage, which starts from the rate of the first one.
        restart: False: one scheduler for the steps of all stages together, which does not begin anew with each. (A
            stage that has converged early leaves its remaining steps of the schedule out.)
        schemes, processors, batch_norm: as in `ElasticStep`. In a world of ranks each has a loader with its own rows.
        checkpoint: a folder. A checkpoint of each finished stage is kept there (`restore` reads it), and a running one,
            written every so many steps, from which a training that was killed goes on, in the stage and at the step it
            was in. In a world rank 0 writes, and all ranks read. A loader with ``state_dict`` goes on with its next
            batch, any other one begins anew.
        every: steps between two running checkpoints.
        progress: show a bar for each stage.

    Returns:
        A report of each stage.

    Raises:
        ElasticError, OptimizerError, GraphoptError: arguments that do not fit, before anything was trained.
        KeyboardInterrupt: Ctrl-C; the step at work was finished and the running checkpoint was written before.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
        >>> data = [(torch.randn(16, 8), torch.randint(3, (16,)))]
        >>> space = graphopt.elastic.space(net, data[0][0])
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> reports = train(space, data, torch.nn.functional.cross_entropy, sgd, 20, progress=False)
        >>> reports[0].losses[-1] < reports[0].losses[0]
        True
    """
    stages = joint_mode(stages) if isinstance(stages, int) else tuple(stages)
    if not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise ElasticError("stages: expected a number of steps or a sequence of Stage (joint_mode, progressive_mode)")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ElasticError(f"every: expected a positive number of steps, got {every!r}")
    shared = {"schemes": schemes, "processors": processors, "batch_norm": batch_norm}
    run = _Training(space, loader, loss, optimizer, stages, clip, seed, scheduler, restart, every, shared)
    run.checkpoints = Checkpoints(checkpoint, stages) if checkpoint is not None else None
    run.resume()
    try:
        with _bars() if progress and run.step.leads else nullcontext() as bars:
            return run.run(bars)
    finally:
        run.step.close()


def restore(space: Space, path: str | os.PathLike[str]) -> None:
    """Give a space the weights of a checkpoint that `train` wrote, such as that of an earlier stage.

    Raises ElasticError for a damaged file, or weights that do not fit; then nothing was changed.
    """
    _load_weights(space, read(path)["weights"])


def _bars() -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True))


class _Training:
    """A training at work: ``stage`` and ``watch.steps`` say where it is."""

    def __init__(
        self, space: Space, loader: Iterable[Any], loss: Any, optimizer: Any, stages: tuple[Stage, ...], clip: Any,
        seed: int, scheduler: Scheduler | None, restart: bool, every: int, shared: Mapping[str, Any],
    ):  # fmt: skip
        self.space, self.loader, self.stages, self.seed, self.every = space, loader, stages, seed, every
        self.optimizers = as_optimizers(optimizer)
        self.step = ElasticStep(space, loss, optimizer, clip=clip, seed=seed, **shared)
        self.samplers = [self._sampler(index) for index in range(len(stages))]  # errors in any stage come at once
        self.make_scheduler, self.restart = scheduler, restart
        self.schedulers: list[Any] = []
        self.rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.checkpoints: Checkpoints | None = None
        self.stage = 0
        self._start()

    def _sampler(self, index: int) -> Sampler:
        stage = self.stages[index]
        region = Region.of(self.space, any_runs=stage.any_runs).only(stage.dimensions)
        return Sampler(region, stage.strategy, stage.subnets, seed=self.seed + index)

    def _start(self) -> None:
        """At the beginning of a stage."""
        stage = self.stages[self.stage]
        self.watch = Watch()
        self.step.sampler = self.samplers[self.stage]
        self.step.combine, self.step.distillation = stage.combine, stage.distillation
        if self.make_scheduler is not None and (self.restart or not self.schedulers):
            steps = stage.steps if self.restart else sum(one.steps for one in self.stages)
            self.schedulers = []
            for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = group["initial_lr"] = rate
                self.schedulers.append(self.make_scheduler(optimizer, steps))

    def run(self, bars: Progress | None) -> list[StageReport]:
        """All stages from where it is."""
        reports = [StageReport(stage.name) for stage in self.stages]
        batches = _endless(self.loader)
        try:
            while self.stage < len(self.stages):
                self._run_stage(reports[self.stage], batches, bars)
                self._finish(reports[self.stage])
        except KeyboardInterrupt:
            self._save()
            raise
        return reports

    def _run_stage(self, report: StageReport, batches: Iterator[Any], bars: Progress | None) -> None:
        stage, began = self.stages[self.stage], perf_counter()
        task = bars.add_task(stage.name, total=stage.steps, completed=self.watch.steps, loss="") if bars else None
        while self.watch.steps < stage.steps and not report.converged:
            batch = next(batches)
            with InterruptsWait():  # so that what is counted is what was trained
                loss = float(self.step(batch))
                for scheduler in self.schedulers:
                    scheduler.step()
                report.losses.append(loss)
                report.converged = self.watch.add(loss, stage.until)
            if bars is not None and task is not None:
                bars.update(task, advance=1, loss=f"loss {self.watch.smooth:.4g}")
            if self.watch.steps % self.every == 0:
                self._save()
        report.steps, report.seconds = self.watch.steps, perf_counter() - began

    def _finish(self, report: StageReport) -> None:
        """Keep the checkpoint of the stage, then go to the next one: a kill between the two repeats its last steps."""
        if self.checkpoints is not None and self.step.leads:
            self.checkpoints.finish(self.stage, self._state())
            report.checkpoint = str(self.checkpoints.stage_path(self.stage))
        self.stage += 1
        if self.stage < len(self.stages):
            self._start()
        self._save()

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.checkpoints is not None and self.step.leads:
            self.checkpoints.save(self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "weights": _weights(self.space),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step.state_dict(),
            "watch": asdict(self.watch),
            "schedulers": [s.state_dict() for s in self.schedulers],
            "rates": self.rates,
            "random": torch.get_rng_state(),
            "loader": self.loader.state_dict() if hasattr(self.loader, "state_dict") else None,
        }

    def resume(self) -> None:
        """Go on where the running checkpoint was written, if there is one."""
        state = self.checkpoints.load() if self.checkpoints is not None else None
        if state is None:
            return
        if len(state["optimizers"]) != len(self.optimizers):
            raise ElasticError(
                f"checkpoint: it was written with {len(state['optimizers'])} optimizers, got {len(self.optimizers)}"
            )
        _load_weights(self.space, state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.stage, self.rates = state["stage"], state["rates"]
        if self.stage < len(self.stages):
            rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
            self._start()
            self.step.load_state_dict(state["step"])
            self.watch = Watch(**state["watch"])
            for scheduler, saved in zip(self.schedulers, state["schedulers"]):
                scheduler.load_state_dict(saved)
            for optimizer, each in zip(self.optimizers, rates, strict=True):  # a scheduler set those of its beginning
                for group, rate in zip(optimizer.param_groups, each, strict=True):
                    group["lr"] = rate
        torch.set_rng_state(state["random"])
        if state["loader"] is not None and hasattr(self.loader, "load_state_dict"):
            self.loader.load_state_dict(state["loader"])


def _weights(space: Space) -> dict[str, Any]:
    """Parameters and buffers of the model, and parameters of the space's transformations."""
    return {"model": space.model.state_dict(), "layers": space.layers.state_dict()}


def _load_weights(space: Space, weights: Mapping[str, Any]) -> None:
    for owner, mine in _weights(space).items():
        theirs = weights[owner]
        odd = sorted(set(mine) ^ set(theirs)) + [n for n in mine if n in theirs and mine[n].shape != theirs[n].shape]
        if odd:
            raise ElasticError(
                f"checkpoint: it is of another model; {odd[0]} differs" + f" and {len(odd) - 1} more" * (len(odd) > 1)
            )
    space.model.load_state_dict(weights["model"])
    space.layers.load_state_dict(weights["layers"])


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ElasticError("loader: it gave no batch; expected an iterable that can be gone through several times")
