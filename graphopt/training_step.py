"""`TrainingStep`: what `optimize` returns, called once a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch

from graphopt.capturing import Capturing
from graphopt.choice import Choice, Prices, Records
from graphopt.cost_model import Machine
from graphopt.cost_model.machine import kept
from graphopt.errors import (
    CaptureError,
    GraphoptError,
    GraphoptWarning,
    PassError,
    VerificationError,
    WorkerError,
)
from graphopt.graph.batch import BatchLayout, flatten, one_batch
from graphopt.graph.batch_shape import check_dimensions, dimensions
from graphopt.graph.hyper_parameters import structure_key
from graphopt.graph.update import supported
from graphopt.many_shapes import Shapes
from graphopt.passes import Pass
from graphopt.plan import Candidate, Plan
from graphopt.probe_safety import Before, first_line, out_of_memory
from graphopt.schemes import ModelWatch, Runner, Task
from graphopt.schemes.base import Stale, fitting
from graphopt.schemes.data_parallel import threads_of_each
from graphopt.settings import Settings
from graphopt.situation import CaptureNow, Situation

CANNOT_RUN = (CaptureError, PassError, VerificationError, WorkerError)
"""What a runner raises that cannot run, before anything was changed: another candidate takes the batch."""


class TrainingStep:
    """A training step of one model; made by `optimize`. Call it with a batch, get the loss (detached).

    Args:
        task: what is trained.
        batch_shape: see `optimize`.
        settings: which schemes, and what bounds them.
        passes: run on each captured step.
        verify: check captured steps.
        clock: gives seconds.
        machines: number of threads -> calibration, None where there is none.
        records: measured steps between processes.
    """

    def __init__(
        self,
        task: Task,
        batch_shape: Any,
        settings: Settings,
        passes: Sequence[Pass],
        *,
        verify: bool = False,
        clock: Callable[[], float] = perf_counter,
        machines: Callable[[int], Machine | None] = kept,
        records: Records | None = None,
    ):
        self.task = task
        self._settings = settings
        self._capturing = Capturing(task, passes, verify, self._warn)
        self._dimensions = dimensions(batch_shape)
        self._situations: dict[tuple[Hashable, BatchLayout], Situation] = {}
        self._quick: dict[Hashable, tuple[Situation, Choice]] = {}
        self._watch: ModelWatch | None = None
        self._plan: Plan | None = None
        self._warned: set[str] = set()
        self._clock, self._machines = clock, machines
        self._records = records if records is not None else Records()
        self._run_before = 0
        self._paying: set[tuple[BatchLayout, int]] = set()  # batches for which a capture is known to pay back
        if task.world is None and (settings.processors or 1) > 1:  # they start while the first step is captured
            task.pools.of(settings.processors or 1, threads_of_each(settings.processors or 1))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are refused: a step belongs to its model and its optimizers."""
        raise GraphoptError("a step cannot be copied or pickled; copy model and optimizer, and call optimize() again")

    def __getattr__(self, name: str) -> Any:
        """Raises AttributeError, which says where to look for what the model, an optimizer or the plan has."""
        known = self.__dict__
        owners: dict[str, Any] = {}
        if "_plan" in known and not name.startswith("_"):
            owners = {"step.plan": known["_plan"] or Plan, "model": self.task.model}
            if self.task.optimizers:
                owners["optimizer"] = self.task.optimizers[0]
        has = [f"{owner}.{name}" for owner, it in owners.items() if hasattr(it, name)]
        where = f"; use {' or '.join(has)}" if has else ""
        raise AttributeError(f"a training step has no {name!r}{where}", name=name, obj=self)

    @property
    def plan(self) -> Plan:
        """The plan of the last batch. Raises GraphoptError before the first one."""
        if self._plan is None:
            raise GraphoptError("plan: no batch was run yet; the first one is planned when it comes")
        return self._plan

    @property
    def plans(self) -> list[Plan]:
        """The plans of all kinds of batches so far (sizes, shapes, modes of the model); most steps first."""
        every = (choice for situation in self._situations.values() for choice in situation.choices.values())
        return [choice.plan for choice in sorted(every, key=lambda choice: -choice.steps)]

    @property
    def situation(self) -> Situation:
        """What is known of the model in its present state. Raises GraphoptError before the first batch."""
        for situation in self._situations.values():
            if any(choice.plan is self._plan for choice in situation.choices.values()):
                return situation
        raise GraphoptError("situation: no batch was run yet; the first one is planned when it comes")

    def close(self) -> None:
        """Give back what schemes hold (processes, recordings), and write what was measured. The step may be called
        again; it then plans anew."""
        for situation in self._situations.values():
            situation.close()
        self._run_before = self.run_so_far()
        self.task.pools.close()
        self._situations.clear()
        self._quick.clear()
        self._records.flush()

    def __call__(self, *batch: Any, **keywords: Any) -> torch.Tensor:
        """One training step on a batch: ``step(x, y)``, ``step(batch)`` or ``step(**batch)``.

        Returns the loss, detached. Raises BatchError if the batch does not fit; then nothing was changed.
        """
        situation, choice, tensors = self._planned(batch, keywords)
        self._plan = choice.plan
        if choice.run is None:
            return self._decide(situation, choice, tensors)
        clock = self._clock
        start = clock()
        try:
            loss = choice.run(tensors)
        except CANNOT_RUN as error:
            self._leave_out(situation, choice, error)
            return self._decide(situation, choice, tensors)
        except Stale:
            situation, choice = self._renewed(situation, choice, tensors)
            return self._decide(situation, choice, tensors)
        seconds = clock() - start
        if choice.runs_user_code and self._watch is not None:
            self._watch.absorb()
        if choice.pace.add(seconds):
            choice.pace.seconds = self._agreed(choice.pace.seconds or 0.0)
            choice.look()
        return loss

    def _planned(
        self, batch: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> tuple[Situation, Choice, Sequence[torch.Tensor]]:
        """What is known of a batch's kind, who runs its size, and its tensors."""
        check_mode()
        if self._watch is None or not self._watch.same():
            self._quick.clear()
            self._watch = ModelWatch(self.task.model, self.task.loss)
        key = quick_key(batch, keywords)
        known = self._quick.get(key) if key is not None else None
        if known is not None:
            situation, choice = known
            tensors: Sequence[torch.Tensor] = batch if not keywords else tuple(keywords.values())
        else:
            tensors, layout, size = flatten(one_batch(batch, keywords))
            situation, choice = self._choose(tensors, layout, size)
            if key is not None:
                self._quick[key] = situation, choice
        if not choice.fresh():  # options or groups of an optimizer changed
            self._quick.clear()
            tensors, layout, size = flatten(one_batch(batch, keywords))
            situation, choice = self._choose(tensors, layout, size)
        return situation, choice, tensors

    def _runner(self, choice: Choice) -> Runner:
        """The runner whose turn it is."""
        return choice.runner()

    def _agreed(self, seconds: float) -> float:
        """Seconds to decide by."""
        return seconds

    def _decide(self, situation: Situation, choice: Choice, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Run one real step by the candidate whose turn it is, and tell the choice how long it took."""
        while True:
            before = Before(self.task)
            _synchronise(tensors)
            start = self._clock()
            try:
                loss = fitting(self._runner(choice))(tensors)
            except Stale:
                situation, choice = self._renewed(situation, choice, tensors)
                continue
            except CaptureNow:
                situation, choice = self._capture_now(situation, choice, tensors)
                continue
            except CANNOT_RUN as error:
                self._leave_out(situation, choice, error)
                continue
            except (RuntimeError, MemoryError) as error:
                alone = self.task.world is None  # other ranks are amid the step
                if not alone or not choice.has_others or not out_of_memory(error) or not before.restored():
                    raise
                self._leave_out(situation, choice, CaptureError(f"it ran out of memory: {first_line(error)}"))
                continue
            _synchronise(tensors)
            seconds = self._clock() - start
            if not choice.needs_graph and self._watch is not None:
                self._watch.absorb()
            choice.ran(self._agreed(seconds))
            return loss

    def _leave_out(self, situation: Situation, choice: Choice, error: GraphoptError) -> None:
        """The candidate whose turn it was cannot run; nothing was run. Eager stands in for the last one."""
        name = choice.turn
        if choice.schemes[name].required or (not choice.needs_graph and not choice.has_others):
            raise error
        # a candidate that nobody asked for is not missed where it just does not exist
        if self._settings.schemes is not None or isinstance(error, (VerificationError, WorkerError)):
            self._warn(f"scheme {name!r} is left out: {error}")
        situation.discard(name)
        if not choice.fail(name, str(error)):
            eager = situation.eager
            if eager.name not in {candidate.scheme for candidate in choice.plan.candidates}:
                choice.plan.candidates.append(Candidate(eager.name))
            choice.replace(eager)

    # -- planning -----------------------------------------------------------------------------------------------

    def _choose(self, tensors: Sequence[torch.Tensor], layout: BatchLayout, size: int) -> tuple[Situation, Choice]:
        assert self._watch is not None
        key = self._key(layout)
        situation = self._situations.get(key)
        if situation is None or not situation.fresh():
            if situation is not None:
                situation.close()
                self._run_before += sum(choice.steps for choice in situation.choices.values())
            prices = Prices(self._machines)
            situation = Situation(
                self.task, self._watch, layout, self._settings, self._records, prices, self.run_so_far
            )
            self._situations[key] = situation
        if size not in situation.choices:
            self._plan_size(situation, tensors, size)
        return situation, situation.choices[size]

    def _key(self, layout: BatchLayout) -> tuple[Hashable, BatchLayout]:
        """What a situation is known by: the state of model and optimizers, and what the batch looks like."""
        assert self._watch is not None
        check_dimensions(self._dimensions, layout)
        outside = tuple(supported(o) for o in self.task.optimizers)
        model = self._watch.key(buffers_are_looked_up=True)
        return (model, structure_key(self.task.optimizers), outside), layout

    def _plan_size(self, situation: Situation, tensors: Sequence[torch.Tensor], size: int) -> None:
        """A choice for a batch size that is new in this situation."""
        wanted = self._settings.schemes is None or any(s.needs_graph for s in self._settings.schemes)
        if wanted and not situation.failed and situation.admitting(size) is None:
            self._look_at_shapes(situation)
            pays = (situation.layout, size) in self._paying or self._capturing.verify
            situation.waiting = not pays and situation.has_to_pay()
            if not situation.waiting:
                self._capturing.capture(situation, tensors, size)
        situation.choose(size).plan.ranked = lambda: self.plans

    def _look_at_shapes(self, situation: Situation) -> None:
        """Where batches come in many shapes, say so, and let the capture for one more wait until it pays back."""
        state = self._key(situation.layout)[0]
        shapes = Shapes.of(situation, [s for (known, _), s in self._situations.items() if known == state])
        if shapes.many:
            waits = situation.may_wait and not self._capturing.verify
            situation.capture_seconds = shapes.seconds if waits else None
            self._warn(shapes.warning(waits), about="shapes")

    def _capture_now(
        self, situation: Situation, choice: Choice, tensors: Sequence[torch.Tensor]
    ) -> tuple[Situation, Choice]:
        """The choice for the same batch size, with the step as a graph."""
        self._paying.add((situation.layout, choice.size))
        self._run_before += choice.steps
        del situation.choices[choice.size]
        return self._renewed(situation, choice, tensors)

    def _renewed(
        self, situation: Situation, choice: Choice, tensors: Sequence[torch.Tensor]
    ) -> tuple[Situation, Choice]:
        """The choice for the same batch, planned anew."""
        self._quick.clear()
        situation, choice = self._choose(tensors, situation.layout, choice.size)
        self._plan = choice.plan
        return situation, choice

    def run_so_far(self) -> int:
        """How many steps were run, up to a few at each batch size."""
        every = (choice for situation in self._situations.values() for choice in situation.choices.values())
        return self._run_before + sum(choice.steps for choice in every)

    def _warn(self, message: str, about: str = "") -> None:
        """Say it once; ``about``: once of all that is about this."""
        if (about or message) not in self._warned:
            self._warned.add(about or message)
            warnings.warn(message, GraphoptWarning, stacklevel=7)


def check_mode() -> None:
    """Raise GraphoptError in inference mode, in which nothing is trained."""
    if torch.is_inference_mode_enabled():
        raise GraphoptError("step: it was called in inference mode, in which nothing is trained")


def _synchronise(tensors: Sequence[torch.Tensor]) -> None:
    if any(t.is_cuda for t in tensors):
        torch.cuda.synchronize()


def quick_key(batch: tuple[Any, ...], keywords: Mapping[str, Any]) -> Hashable:
    """A key of a batch that consists of tensors only, None for any other."""
    parts: list[Any] = list(keywords)
    for tensor in batch or keywords.values():
        if type(tensor) is not torch.Tensor:
            return None
        parts += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
    return tuple(parts)
