"""`optimize`: run a training step by the scheme that is best for the batch at hand."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from graphopt.errors import (
    BatchError,
    CaptureError,
    GraphoptError,
    GraphoptWarning,
    LossError,
    PassError,
    StaleGraphError,
)
from graphopt.graph.assemble import as_optimizers
from graphopt.graph.batch import BatchLayout, ModelLoss, flatten, one_batch
from graphopt.graph.batch_shape import check_dimensions, dimensions
from graphopt.graph.hyper_parameters import parse_clip, structure_key
from graphopt.graph.update import check_ownership, supported
from graphopt.passes import (
    CommonSubexpressions,
    ConstantFolding,
    DeadCode,
    NoOps,
    Pass,
    SelectiveSaving,
)
from graphopt.plan import Candidate, GraphFacts, Plan
from graphopt.schemes import AUTO, SCHEMES, ModelWatch, Prepared, Runner, Scheme, Task
from graphopt.schemes.flat import CapturedStep, capture_task
from graphopt.verify import drop_failing

log = logging.getLogger("graphopt")

PASSES: tuple[Pass, ...] = (NoOps(), CommonSubexpressions(), ConstantFolding(), SelectiveSaving(), DeadCode())
"""What `optimize` runs after gradient liveness: passes of the exact tier."""

ROUNDS = 4
"""Steps by which each candidate is measured at a new batch size; one more before them warms up."""

MARGIN = 0.03
"""A scheme is left for another one only if that is faster by more than this share."""


def optimize(
    model: nn.Module,
    batch_shape: Any,
    *,
    loss: Callable[..., Any] | str | None = None,
    optimizer: Any = None,
    clip: Any = None,
    accumulate: int = 1,
    schemes: str | Sequence[str | Scheme] = "auto",
    processors: int | None = None,
    steps: int | None = None,
    precision: str | None = None,
    batch_norm: str = "synchronized",
    memory: int | None = None,
    verify: bool = False,
    keep_grads: bool = False,
) -> Any:
    """A training step (or a drop-in module) that runs by the fastest scheme for each batch it is given.

    With a loss or an optimizer the result is a `TrainingStep`: ``loss = step(x, y)`` makes forward, backward, clipping
    and update. Without both it is a drop-in module: call it, then ``.backward()``. The model and the optimizer stay
    the only owners of parameters and state; checkpoints, schedulers and a return to eager work at any moment.

    Args:
        model: the model to train, in any mode; a change of mode, ``requires_grad`` or optimizer groups is planned anew.
        batch_shape: the shape of the model's first input (a tuple of ints), a nested structure of shapes, or an example
            batch. Batches of another size choose their scheme anew; only the number of dimensions must stay.
        loss: ``loss(model(*inputs), target)``. None with an optimizer: the model returns its own loss.
        optimizer: a `torch.optim.Optimizer` or a list of them.
        clip: largest gradient norm (a float), `ClipNorm` or `ClipValue`.
        accumulate: batches per update; the loss of each is divided by it, gradients so far lie in ``.grad``.
        schemes: ``"auto"``, or names and `Scheme` objects to choose from.
        processors, steps, precision, batch_norm, memory: of schemes on several processors, of compilation and of
            low precision; this version has one processor, full precision and no memory limit.
        verify: check each captured step against eager and a float64 reference before it runs; a pass that fails is
            left out and the plan says so.
        keep_grads: leave gradients in ``.grad`` after the step (None otherwise).

    Raises:
        BatchError, OptimizerError, GraphoptError: before anything was changed.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Linear(4, 2)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> step = graphopt.optimize(net, (8, 4), loss=torch.nn.functional.cross_entropy, optimizer=sgd)
        >>> x, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> before = step(x, y)
        >>> bool(step(x, y) < before)
        True
    """
    if not isinstance(model, nn.Module):
        raise GraphoptError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, value, only in (
        ("processors", processors, (None, 1)), ("precision", precision, (None, "fp32")), ("memory", memory, (None,)),
        ("batch_norm", batch_norm, ("synchronized", "local")),
    ):  # fmt: skip
        if value not in only:
            raise GraphoptError(f"{name}: expected one of {only}, got {value!r}; nothing else is supported yet")
    for name, value in (("accumulate", accumulate), ("steps", 1 if steps is None else steps)):
        if not isinstance(value, int) or value < 1:
            raise GraphoptError(f"{name}: expected a positive integer, got {value!r}")
    for name, value in (("verify", verify), ("keep_grads", keep_grads)):
        if not isinstance(value, bool):
            raise GraphoptError(f"{name}: expected True or False, got {value!r}")
    if loss is not None and loss != ModelLoss and not callable(loss):
        raise GraphoptError(f"loss: expected a callable, None or {ModelLoss!r}, got {loss!r}")
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise GraphoptError("model: TorchScript hides its operators; give the module it was made from")
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise GraphoptError(f"model: {lazy[0]} is not initialized; call the model once on a batch before")
    chosen = _schemes(schemes)
    optimizers = as_optimizers(optimizer)
    if loss is None and not optimizers:
        if clip is not None or accumulate > 1:
            raise GraphoptError("clip and accumulate: they need a loss or an optimizer; a drop-in module has neither")
        from graphopt.drop_in import DropIn

        return DropIn(model, PASSES)
    check_ownership(optimizers, {id(p): name for name, p in model.named_parameters()})
    task = Task(model, ModelLoss if loss is None else loss, optimizers, parse_clip(clip), accumulate, keep_grads)
    return TrainingStep(task, batch_shape, chosen, PASSES, verify=verify)


def _schemes(schemes: str | Sequence[str | Scheme]) -> tuple[Scheme, ...]:
    if isinstance(schemes, str):
        schemes = AUTO if schemes == "auto" else (schemes,)
    found = []
    for one in schemes if isinstance(schemes, Iterable) else (schemes,):
        if not isinstance(one, (str, Scheme)):
            raise GraphoptError(f"schemes: expected names or Scheme objects, got {one!r}")
        if isinstance(one, str) and one not in SCHEMES:
            raise GraphoptError(f"schemes: unknown name {one!r}; expected 'auto', {', '.join(SCHEMES)}, or a Scheme")
        found.append(SCHEMES[one] if isinstance(one, str) else one)
    if not found:
        raise GraphoptError("schemes: got none; expected 'auto' or at least one")
    return tuple(found)


@dataclass
class _Situation:
    """All that is known for one state of model and optimizers and one batch layout."""

    watch: ModelWatch
    layout: BatchLayout
    steps: list[CapturedStep] = field(default_factory=list)
    runners: dict[tuple[str, int], Runner] = field(default_factory=dict)
    plans: dict[int, _Choice] = field(default_factory=dict)
    failed: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Choice:
    """A plan under way: the runners of its feasible candidates, and how many steps were run to measure them."""

    plan: Plan
    runners: dict[str, Runner]
    measuring: bool
    steps_run: int = 0

    def fresh(self) -> bool:
        """Whether every runner still fits the optimizers."""
        return all(runner.fresh() for runner in self.runners.values())


class TrainingStep:
    """A training step of one model; made by `optimize`. Call it with a batch, get the loss (detached)."""

    def __init__(
        self, task: Task, batch_shape: Any, schemes: Sequence[Scheme], passes: Sequence[Pass], *, verify: bool
    ):
        self.task = task
        self._schemes = tuple(schemes)
        self._passes = tuple(passes)
        self._verify = verify
        self._dimensions = dimensions(batch_shape)
        self._situations: dict[Hashable, _Situation] = {}
        self._quick: dict[Hashable, tuple[_Situation, _Choice]] = {}
        self._watch: ModelWatch | None = None
        self._names = set(_names(task.model))
        self._plan: Plan | None = None
        self._warned: set[str] = set()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are refused: a step belongs to its model and its optimizers."""
        raise GraphoptError("a step cannot be copied or pickled; copy model and optimizer, and call optimize() again")

    @property
    def plan(self) -> Plan:
        """The plan of the last batch. Raises GraphoptError before the first one."""
        if self._plan is None:
            raise GraphoptError("plan: no batch was run yet; the first one is planned when it comes")
        return self._plan

    def __call__(self, *batch: Any, **keywords: Any) -> torch.Tensor:
        """One training step on a batch: ``step(x, y)``, ``step(batch)`` or ``step(**batch)``.

        Returns the loss, detached. Raises BatchError if the batch does not fit; then nothing was changed.
        """
        if torch.is_inference_mode_enabled():
            raise GraphoptError("step: it was called in inference mode, in which nothing is trained")
        if self._watch is None or not self._watch.same():
            self._quick.clear()
            self._watch = ModelWatch(self.task.model, self.task.loss)
        key = _quick_key(batch, keywords)
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
        self._plan = choice.plan
        while True:
            try:
                if choice.measuring:
                    return self._measure(choice, tensors)
                return self._run(choice, choice.plan.chosen, tensors)
            except CaptureError as error:  # a compiler refused the graph at its first run; nothing was run
                if self._turn(choice) == "eager":
                    raise
                self._drop(choice, error)

    def _run(self, choice: _Choice, scheme: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        loss = choice.runners[scheme](tensors)
        if scheme.partition(",")[0] == "eager" and self._watch is not None:
            self._watch.absorb()
        return loss

    # -- planning -----------------------------------------------------------------------------------------------

    def _choose(self, tensors: Sequence[torch.Tensor], layout: BatchLayout, size: int) -> tuple[_Situation, _Choice]:
        assert self._watch is not None
        check_dimensions(self._dimensions, layout)
        outside = tuple(supported(o) for o in self.task.optimizers)
        model = self._watch.key(buffers_are_looked_up=True)
        key = (model, layout, structure_key(self.task.optimizers), outside)
        situation = self._situations.get(key)
        if situation is None or not all(choice.fresh() for choice in situation.plans.values()):
            situation = self._situations[key] = _Situation(self._watch, layout)
        if size not in situation.plans:
            situation.plans[size] = self._new_choice(situation, tensors, size)
        return situation, situation.plans[size]

    def _new_choice(self, situation: _Situation, tensors: Sequence[torch.Tensor], size: int) -> _Choice:
        step = self._captured(situation, tensors, size)
        prepared = Prepared(self.task, situation.layout, step)
        candidates, runners = [], {}
        for scheme in self._schemes:
            why_not = situation.failed if scheme.needs_graph and step is None else scheme.why_not(prepared, size)
            candidates.append(Candidate(scheme.name, why_not))
            if why_not is None:
                index = situation.steps.index(step) if step is not None else -1
                place = (scheme.name, index if scheme.needs_graph else -1)
                if place not in situation.runners:
                    situation.runners[place] = scheme.build(prepared)
                runners[scheme.name] = situation.runners[place]
        if not runners:
            eager = SCHEMES["eager"]
            candidates.append(Candidate(eager.name))
            runners[eager.name] = situation.runners.setdefault(("eager", -1), eager.build(prepared))
        first = next(iter(runners))
        reason = "measuring" if len(runners) > 1 else "the only feasible candidate"
        plan = Plan(size, candidates, first, reason, notes=list(situation.notes))
        if step is not None:
            plan.facts = GraphFacts.of(step.before, step.graph, size, step.seconds)
            plan.passes = step.result
            plan.valid_where = tuple(step.graph.symbols.rename(g) for g in step.graph.symbols.guards)
        return _Choice(plan, runners, measuring=len(runners) > 1)

    def _captured(self, situation: _Situation, tensors: Sequence[torch.Tensor], size: int) -> CapturedStep | None:
        """A captured step that is valid at ``size``, made now if there is none; None where eager has to run."""
        for step in situation.steps:
            if step.admits(size):
                return step
        if not any(scheme.needs_graph for scheme in self._schemes) or situation.failed:
            return None
        if reason := self._eager_only(situation.watch):
            situation.failed = reason
            self._warn(f"the step runs in eager mode: {reason}")
            return None
        if situation.watch.forward_hooks:
            kinds = ", ".join(sorted(set(situation.watch.forward_hooks)))
            note = f"forward hooks (on {kinds}) run once, at capture; their effects outside the graph are not repeated"
            situation.notes.append(note)
            self._warn(note)
        batch = situation.layout.restore(list(tensors))
        log.info("capturing the step of %s at batch size %d", type(self.task.model).__name__, size)
        try:
            if self._verify:
                step, notes = drop_failing(self.task, batch, self._passes)
                situation.notes += notes
                for note in notes:
                    self._warn(note)
            else:
                step = capture_task(self.task, batch, self._passes)
        except (BatchError, LossError) as error:
            self._check_tensors(error)
            raise
        except (CaptureError, PassError) as error:
            self._check_tensors(error)
            situation.failed = str(error)
            self._warn(f"the step runs in eager mode: {error}")
            return None
        situation.steps.append(step)
        return step

    def _eager_only(self, watch: ModelWatch) -> str | None:
        """Why this step cannot be a graph although its model could."""
        if self.task.needs_closure:
            return "the optimizer evaluates the loss several times a step (LBFGS)"
        if watch.tensor_hooks:
            return "a hook is registered on a parameter; it has to see the gradient when autograd computes it"
        if watch.backward_hooks:
            return "a module has backward hooks, which only autograd calls"
        return None

    def _check_tensors(self, error: GraphoptError) -> None:
        """Say which parameter or buffer is gone where that is why the model cannot run any more."""
        gone = sorted(self._names - set(_names(self.task.model)))
        if gone:
            raise StaleGraphError(
                f"model: it has lost {', '.join(gone[:3])} since optimize() was called and does not run without; "
                "restore it, or call optimize() on the new model"
            ) from error

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, GraphoptWarning, stacklevel=4)

    # -- measuring ----------------------------------------------------------------------------------------------

    def _measure(self, choice: _Choice, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Run one real step by the candidate whose turn it is; after the last round the fastest is chosen."""
        names = list(choice.runners)
        accumulate = self.task.accumulate  # a whole step by one scheme
        turn = self._turn(choice)
        _synchronise(tensors)
        start = perf_counter()
        loss = self._run(choice, turn, tensors)
        _synchronise(tensors)
        choice.steps_run += 1
        if choice.steps_run > len(names) * accumulate:  # the first round warms up
            choice.plan.candidate(turn).seconds.append(perf_counter() - start)
        if choice.steps_run >= (ROUNDS + 1) * len(names) * accumulate:
            self._decide(choice)
        return loss

    def _drop(self, choice: _Choice, error: CaptureError) -> None:
        """Leave out the candidate whose turn it was; eager stands in for the last one."""
        turn = self._turn(choice)
        choice.plan.candidate(turn).why_not = str(error)
        del choice.runners[turn]
        self._warn(f"scheme {turn!r} is left out: {error}")
        if not choice.runners:
            situations = self._situations.values()
            layout = next(s.layout for s in situations if any(c is choice for c in s.plans.values()))
            prepared = Prepared(self.task, layout)
            choice.runners["eager"] = SCHEMES["eager"].build(prepared)
            choice.plan.candidates.append(Candidate("eager"))
        choice.plan.chosen = next(iter(choice.runners))
        choice.steps_run = 0
        if choice.measuring and len(choice.runners) == 1:
            choice.measuring = False
            choice.plan.reason = "the only feasible candidate"

    def _turn(self, choice: _Choice) -> str:
        """The candidate that runs next."""
        if not choice.measuring:
            return choice.plan.chosen
        return list(choice.runners)[choice.steps_run // self.task.accumulate % len(choice.runners)]

    def _decide(self, choice: _Choice) -> None:
        choice.measuring = False
        plan = choice.plan
        medians = {name: plan.candidate(name).median_seconds or 0.0 for name in choice.runners}
        first = next(iter(choice.runners))
        best = min(medians, key=medians.__getitem__)
        if medians[best] < (1 - MARGIN) * medians[first]:
            plan.chosen, plan.reason = best, f"measured fastest: {medians[first] / medians[best]:.2f} times {first}"
        else:
            others = [f"{n} takes {medians[n] / medians[first]:.2f} times as long" for n in medians if n != first]
            plan.chosen, plan.reason = first, f"measured: {', '.join(others)}"
        log.info("batch size %d: %s, %s", plan.batch_size, plan.chosen, plan.reason)


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]


def _synchronise(tensors: Sequence[torch.Tensor]) -> None:
    if any(t.is_cuda for t in tensors):
        torch.cuda.synchronize()


def _quick_key(batch: tuple[Any, ...], keywords: Mapping[str, Any]) -> Hashable:
    """A key of a batch that consists of tensors only, None for any other."""
    parts: list[Any] = list(keywords)
    for tensor in batch or keywords.values():
        if type(tensor) is not torch.Tensor:
            return None
        parts += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
    return tuple(parts)
