"""`bisect`: the first pass after which a step computes something else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn

from graphopt.bisection.location import Location, locate
from graphopt.bisection.report import CAPTURE, Bisection, Tested
from graphopt.bisection.stage import Check, Stage, ask
from graphopt.dumps import versions
from graphopt.errors import GraphoptError
from graphopt.graph.assemble import as_optimizers
from graphopt.graph.batch import ModelLoss, flatten
from graphopt.graph.hyper_parameters import parse_clip
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import Change, GradientLiveness, Pass, PassResult
from graphopt.schemes import Prepared, Scheme, Task, candidates
from graphopt.schemes.captured_step import capture_task, live
from graphopt.schemes.one_processor import OneProcessor
from graphopt.step import PASSES
from graphopt.verify import (
    SEEDS,
    as_in_a_step,
    check_graph,
    check_lowering,
    check_step,
    fresh_batch,
    joint_arguments,
    step_arguments,
)
from graphopt.verify_forms import check_form

log = logging.getLogger("graphopt")

Told = Callable[[str], None]
"""Is told the name of what is tried next."""


def bisect(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[..., Any] | str | None = None,
    optimizer: Any = None,
    clip: Any = None,
    accumulate: int = 1,
    passes: Sequence[Pass] | None = None,
    check: Check | None = None,
    verify: bool = True,
    precision: str | None = None,
    told: Told = lambda name: None,
) -> Bisection:
    """Find the first pass after which a training step computes something else, and where.

    The step is captured and its passes are run one by one, as `graphopt.optimize` runs them. After each, loss,
    gradients and new buffers are held against eager and a float64 reference, and all outputs of the whole step against
    those before the pass (`graphopt.verify`). Behind the last pass come the code that writes in place, and the other
    forms of the step (fused update, channels-last). Nothing is trained: model and random numbers stay as they are, and
    the optimizer gets the state that its first step would make.

    Args:
        model: in the mode in which it is trained.
        batch: an example batch, with its target.
        loss, optimizer, clip, accumulate, passes, precision: as for `graphopt.optimize`.
        check: a check of your own, asked after each pass: a function of a `Stage`; see `Check`.
        verify: whether the checks of the library are made; False: only ``check`` is asked.
        told: is called with the name of what is tried next.

    Raises:
        CaptureError, BatchError, LossError: the step cannot be captured.
        GraphoptError: arguments that make no sense.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batch = torch.randn(6, 4), torch.randint(2, (6,))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> found = graphopt.bisect(net, batch, loss=torch.nn.functional.cross_entropy, optimizer=sgd)
        >>> found.culprit is None, [one.name for one in found.tested][:3]
        (True, ['capture', 'gradient_liveness', 'no_ops'])
    """
    chosen = PASSES if passes is None else tuple(passes)
    if not all(isinstance(one, Pass) for one in chosen):
        raise GraphoptError(f"passes: expected objects of graphopt.passes.Pass, got {passes!r}")
    if check is not None and not callable(check):
        raise GraphoptError(f"check: expected a function of a Stage, got {type(check).__name__}")
    if check is None and not verify:
        raise GraphoptError("verify: without it there has to be a check of your own")
    if loss is None and optimizer is None:
        raise GraphoptError("loss: none was given, and no optimizer: there is no training step to check")
    task = Task(model, ModelLoss if loss is None else loss, as_optimizers(optimizer), parse_clip(clip), accumulate)
    search = _Search(task, batch, check, verify, told)
    if search.capture() and search.liveness() and all(map(search.run, chosen)) and verify:
        search.ends(precision)
    about = {"model": type(model).__name__, **versions()}
    return Bisection(tuple(search.tested), search.location, search.graphs, about)


class _Search:
    """A bisection at work. Each part of it says whether all was right."""

    def __init__(self, task: Task, batch: Any, check: Check | None, verify: bool, told: Told):
        self.task, self.batch, self.check, self.verify, self.told = task, batch, check, verify, told
        self.tested: list[Tested] = []
        self.location: Location | None = None
        self.graphs: tuple[TrainingGraph, TrainingGraph] | None = None
        step = capture_task(task, batch, ())
        self.stage = Stage(CAPTURE, task, batch, step.joint, replace(step.whole, graph=step.before))

    def capture(self) -> bool:
        """The step before any pass."""
        return self._tried(CAPTURE, lambda: self._against_eager(self.stage.joint))

    def liveness(self) -> bool:
        """Gradient liveness, which works on the whole step, by what the task reads of it."""
        return self._rewritten(GradientLiveness.name, lambda: (None, live(self.task, self.stage.whole)), ())

    def run(self, one: Pass) -> bool:
        """The next pass, on the joint graph and on the whole step."""
        return self._rewritten(one.name, lambda: (one(self.stage.joint), one(self.stage.graph)), (one,))

    def ends(self, precision: str | None) -> bool:
        """What schemes make of the step behind all passes: code that writes in place, and other forms."""
        code = lambda: check_lowering(self.stage.whole, self.task, self.batch)
        if not self._tried("lowering", code, asked=False):
            return False
        tensors, layout, size = flatten(self.batch)
        prepared = Prepared(self.task, layout, capture_task(self.task, self.batch, self.stage.passes))
        for scheme in _forms(prepared, size, precision):
            form = partial(check_form, scheme, prepared, tensors)
            if not self._tried(f"form: {scheme.name}", form, asked=False):
                return False
        return True

    # -- one trial --------------------------------------------------------------------------------------------------

    def _tried(self, name: str, wrong_with: Callable[[], str | None], *, asked: bool = True) -> bool:
        """Try one thing: by the library's own check, then, if ``asked``, by the user's."""
        self.told(name)
        began, wrong = perf_counter(), None
        try:
            wrong = wrong_with()
        except Exception as error:  # whatever a wrong pass provokes, in itself or when its graph is run
            wrong = f"{type(error).__name__}: {error}"
        if wrong is None and asked and self.check is not None:
            wrong = ask(self.check, self.stage)
        self.tested.append(Tested(name, perf_counter() - began, wrong))
        return wrong is None

    def _rewritten(
        self, name: str, rewrite: Callable[[], tuple[PassResult | None, PassResult]], passes: tuple[Pass, ...]
    ) -> bool:
        """Try what a pass makes of the joint graph (None: it leaves that alone) and of the whole step."""
        before, changes = self.stage, list[Change]()

        def wrong_with() -> str | None:
            joint, whole = rewrite()
            graph = before.joint if joint is None else joint.graph
            step = replace(before.whole, graph=whole.graph)
            self.stage = replace(before, name=name, joint=graph, whole=step, passes=before.passes + passes)
            changes.extend(whole.changes)
            wrong = self._against_eager(graph) if graph is not before.joint else None
            if wrong is None and self.verify and step.graph is not before.graph:
                wrong = check_step(step, before.whole, self.task, self.batch, SEEDS)
            return wrong

        right = self._tried(name, wrong_with)
        if not right and self.stage is not before:
            self._locate(before, self.stage, changes)
        return right

    def _against_eager(self, joint: TrainingGraph) -> str | None:
        assert self.task.loss is not None
        return check_graph(joint, self.task.model, self.batch, self.task.loss) if self.verify else None

    def _locate(self, before: Stage, after: Stage, changes: Sequence[Change]) -> None:
        """Where the difference is: in the joint graph, where eager was the judge, else in the whole step."""
        self.graphs = before.graph, after.graph
        for graphs, arguments in self._runs(before, after):
            for seed in SEEDS:
                try:
                    with as_in_a_step(self.task.model, self.batch, seed):
                        found = locate(*graphs, arguments(seed), changes, seed)
                except Exception as error:  # a graph that cannot be run: what is wrong says so
                    log.info("the place could not be found: %s", error)
                    return
                if found is not None:
                    self.location, self.graphs = found, graphs
                    return

    def _runs(
        self, before: Stage, after: Stage
    ) -> Iterator[tuple[tuple[TrainingGraph, TrainingGraph], Callable[[int], list[Any]]]]:
        """Pairs of graphs, with what they are given."""
        if after.joint is not before.joint:
            given = lambda seed: joint_arguments(after.joint, self.task.model, fresh_batch(self.batch, seed))
            yield (before.joint, after.joint), given
        if after.graph is not before.graph:
            yield (before.graph, after.graph), lambda seed: step_arguments(after.whole, self.task, self.batch, seed)


def _forms(prepared: Prepared, size: int, precision: str | None) -> list[Scheme]:
    """The schemes on one processor that run another form of the step."""
    found = candidates(prepared.task, prepared, threads=(torch.get_num_threads(),), precision=precision)
    return [
        scheme
        for scheme in found
        if isinstance(scheme, OneProcessor) and not scheme.compiles and scheme.options
        and scheme.why_not(prepared, size) is None
    ]  # fmt: skip
