"""`WorldStep`: a training step that all ranks of `torch.distributed` take together."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Number
from typing import Any

import torch

from graphopt.choice import Choice, Records
from graphopt.choice.records import Row
from graphopt.errors import CaptureError, GraphoptWarning, RankError
from graphopt.graph.batch import BatchLayout, flatten, one_batch
from graphopt.passes import Pass
from graphopt.schemes import ModelWatch, Runner, Task
from graphopt.schemes.world.ranks import World
from graphopt.schemes.world.sameness import Touched, equalise
from graphopt.settings import Settings
from graphopt.situation import Situation
from graphopt.training_step import CANNOT_RUN, TrainingStep, check_mode, quick_key


@dataclass(frozen=True)
class _Known:
    """What is known of a kind of batch before ranks meet: all that does not depend on the other ranks' rows."""

    layout: BatchLayout
    rows: int
    key: tuple[Hashable, BatchLayout]
    text: str
    shared: tuple[int, ...]  # tensors without rows, which must be the same on all ranks


class WorldStep(TrainingStep):
    """A training step of every rank of a world, called by all of them, each with its own rows of the batch.

    All ranks go the same way: what decides (batch sizes, seconds, what cannot run) is exchanged before it is decided
    on, and nothing is taken from a rank's own calibration or records. Batch sizes are those of the whole batch. Ranks
    whose models differ get the parameters, buffers and optimizer state of rank 0, before the first step and whenever
    one was written to from outside.
    """

    def __init__(self, task: Task, batch_shape: Any, settings: Settings, passes: Sequence[Pass], *, verify: bool):
        super().__init__(
            task, batch_shape, settings, passes, verify=verify, machines=lambda _: None, records=_NoRecords()
        )
        assert task.world is not None
        self._world: World = task.world
        self._known: dict[Hashable, _Known] = {}
        self._touched: Touched | None = None
        self._model_text = ""

    def __call__(self, *batch: Any, **keywords: Any) -> torch.Tensor:
        """One training step on the rows of all ranks; the loss of the whole batch, the same on all ranks.

        Raises RankError where ranks cannot take it together; then this rank's model is that before the step.
        """
        loss = super().__call__(*batch, **keywords)
        assert self._touched is not None
        self._touched.settle()
        return loss

    # -- before a step ----------------------------------------------------------------------------------------------

    def _planned(
        self, batch: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> tuple[Situation, Choice, Sequence[torch.Tensor]]:
        """See `TrainingStep`. Ranks meet: they are in the same state, and know each other's rows."""
        try:
            tensors, known = self._own(batch, keywords)
            text = f"{known.text}\n{self._shared(known, tensors)}\n{self._options()}"
            assert self._touched is not None
            touched = self._touched.now()
        except Exception as error:
            self._world.refuse(error)
            raise
        state = zlib.crc32(text.encode(), zlib.crc32(self._model_text.encode()))
        meeting = self._world.meet(known.rows, state, lambda: f"{self._model_text}\n{text}", touched=touched)
        if meeting.touched:
            self._equalise()
        situation = self._situations.get(known.key)
        choice = None if situation is None else situation.choices.get(meeting.total)
        if situation is None or choice is None or not choice.fresh():
            self._known.clear()  # what is said of the situation is no longer so
            situation, choice = self._choose(tensors, known.layout, meeting.total)
        return situation, choice, tensors

    def _own(self, batch: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Sequence[torch.Tensor], _Known]:
        """This rank's tensors, and what is known of their kind."""
        check_mode()
        if self._watch is None or not self._watch.same():
            self._known.clear()
            self._watch = ModelWatch(self.task.model, self.task.loss)
            self._model_text = _text_of_model(self.task)
            self._touched = Touched(self.task)
        quick = quick_key(batch, keywords)
        known = self._known.get(quick) if quick is not None else None
        if known is not None:
            situation = self._situations.get(known.key)
            if situation is not None and situation.fresh():
                return batch if not keywords else tuple(keywords.values()), known
        tensors, layout, rows = flatten(one_batch(batch, keywords))
        key = self._key(layout)
        found = self._situations.get(key)
        number = list(self._situations).index(key) if found is not None and found.fresh() else "a new one"
        shared = tuple(i for i, batched in enumerate(layout.batched) if not batched)
        known = _Known(layout, rows, key, f"{_text_of_layout(layout)}\nplans: {number}", shared)
        if quick is not None and found is not None:
            self._known[quick] = known
        return tensors, known

    def _shared(self, known: _Known, tensors: Sequence[torch.Tensor]) -> str:
        """Checksums of the batch's tensors that have no rows."""
        sums = {known.layout.names[i]: zlib.crc32(_bytes(tensors[i])) for i in known.shared}
        return f"checksums of tensors without rows: {sums}"

    def _options(self) -> str:
        """The options of the optimizers."""
        groups = [group for optimizer in self.task.optimizers for group in optimizer.param_groups]
        return "\n".join(
            f"options of group {k}: " + ", ".join(f"{n}={_plain(v)}" for n, v in group.items() if n != "params")
            for k, group in enumerate(groups)
        )

    def _equalise(self) -> None:
        if differing := equalise(self._world, self.task):
            listed = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
            warnings.warn(
                f"ranks differed in {listed}: all have the values of rank 0 now", GraphoptWarning, stacklevel=5
            )
        assert self._touched is not None
        self._touched.compared()

    # -- planning and deciding, together ----------------------------------------------------------------------------

    def _plan_size(self, situation: Situation, tensors: Sequence[torch.Tensor], size: int) -> None:
        """See `TrainingStep`: for the whole batch, and the same plan on all ranks."""
        try:
            super()._plan_size(situation, _whole(situation.layout, tensors, size), size)
        except Exception as error:
            self._world.failure(f"{type(error).__name__}: {error}")
            raise
        if failed := self._world.failure(None):
            del situation.choices[size]
            self._world.give_up(failed)
        plan, index = situation.choices[size].plan, situation.admitting(size)
        rows = " + ".join(map(str, self._world.meeting.rows))
        plan.notes.append(f"rows of ranks when it was planned: {rows}; candidates have no prices in a world")
        said = [f"graph: {None if index is None else situation.steps[index].graph.hash()}"]
        said += [f"candidate {c.scheme}: {c.why_not or 'feasible'}" for c in plan.candidates]
        try:
            self._world.check_same("\n".join(said))
        except RankError:  # the next step at this size is planned anew, and compared again
            del situation.choices[size]
            raise
        reasons = [c.why_not for c in plan.candidates if c.why_not and c.scheme != situation.eager.name]
        if situation.eager.name in situation.choices[size].schemes and reasons and not situation.failed:
            self._warn(f"the step runs in eager mode, as by DistributedDataParallel: {reasons[0]}")

    def _runner(self, choice: Choice) -> Runner:
        """See `TrainingStep`. What one rank cannot build no rank runs."""
        if choice.built:
            return choice.runner()
        try:
            runner = choice.runner()
        except CANNOT_RUN as error:
            raise CaptureError(self._world.failure(str(error))) from error
        except Exception as error:
            self._world.failure(f"{type(error).__name__}: {error}")
            raise
        if failed := self._world.failure(None):
            raise CaptureError(failed)
        return runner

    def _agreed(self, seconds: float) -> float:
        """See `TrainingStep`: those of the slowest rank."""
        return self._world.slowest(seconds)


class _NoRecords(Records):
    """Nothing is kept between processes: ranks would read different things."""

    def read(self, graph: str) -> list[Row]:
        """None."""
        return []

    def keep(self, graph: str, rows: Iterable[Row]) -> None:
        """Forget them."""


def _whole(layout: BatchLayout, tensors: Sequence[torch.Tensor], size: int) -> list[torch.Tensor]:
    """A batch of the size of the whole one, made of the rows of this rank."""
    made = layout.example(size)
    with torch.no_grad():
        for whole, own, batched in zip(made, tensors, layout.batched, strict=True):
            rows = own.detach()
            whole.copy_(rows[torch.arange(size, device=own.device) % own.shape[0]] if batched else rows)
    return made


def _text_of_model(task: Task) -> str:
    """What a graph depends on in a model, the same text in every process."""
    parameters = [
        f"{n}: {p.dtype} {tuple(p.shape)} requires_grad={p.requires_grad}" for n, p in task.model.named_parameters()
    ]
    modes = sorted({name for name, module in task.model.named_modules() if module.training})
    optimizers = ", ".join(type(o).__name__ for o in task.optimizers)
    rest = f"clip={task.clip}, accumulate={task.accumulate}, keep_grads={task.keep_grads}"
    return "\n".join([*parameters, f"in train mode: {modes}", f"optimizers: {optimizers}", rest])


def _text_of_layout(layout: BatchLayout) -> str:
    lines = zip(layout.names, layout.dtypes, layout.devices, layout.shapes, layout.requires_grad, strict=True)
    found = [f"batch {n}: {t} {d.type} {shape} requires_grad={flag}" for n, t, d, shape, flag in lines]
    return "\n".join([*found, f"constants of the batch: {_plain(layout.constants)}"])


_WRITTEN = (Number, str, bytes, type(None), torch.dtype, torch.device, Enum)
"""Types of values whose text is the same in every process."""


def _plain(value: Any) -> Any:
    """A value as one whose text is the same in every process: of an object that has no such text, its type.

    >>> _plain({"betas": (0.9, torch.tensor(0.5)), "decay": print, "names": {"b", "a"}, "of": object()})
    {'betas': [0.9, 0.5], 'decay': 'print', 'names': ["'a'", "'b'"], 'of': 'a builtins.object'}
    """
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, _WRITTEN):
        return value
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(_plain(key)): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_plain(each)) for each in value)
    named = getattr(value, "__qualname__", None)
    return named if isinstance(named, str) else f"a {type(value).__module__}.{type(value).__qualname__}"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
