"""What every pass is: it takes a `TrainingGraph`, gives a `PassResult`, and is checked each time it runs.

A pass does not change the graph it is given. It says what it did (`Change`), what it left alone and why
(`Refusal`), and keeps the invariants of the IR, which are checked cheaply after every run (`check`): a broken
one is the pass's fault and raises a `PassError` with its name.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt import dumps
from graphopt.errors import PassError
from graphopt.graph.op_rules import is_random
from graphopt.graph.sizes import expression
from graphopt.graph.storages import storage_root, tensors
from graphopt.graph.training_graph import InputKind, TrainingGraph

log = logging.getLogger("graphopt")


class Tier(StrEnum):
    """How close the numbers of a rewritten graph are to those of the graph before."""

    EXACT = "exact"  # the same bits
    REORDERS = "reorders_arithmetic"  # the same mathematics in another order of rounding


@dataclass(frozen=True)
class Saving:
    """What a change saves in one step at the sizes of the capture; negative where it costs.

    ``flops``: floating point operations; ``bytes_moved``: bytes read and written by operators;
    ``bytes_kept``: bytes of distinct storages kept for backward.

    >>> Saving(flops=10, bytes_kept=4) + Saving(flops=-2)
    Saving(flops=8, bytes_moved=0, bytes_kept=4)
    """

    flops: int = 0
    bytes_moved: int = 0
    bytes_kept: int = 0

    def __add__(self, other: Saving) -> Saving:
        return Saving(
            self.flops + other.flops, self.bytes_moved + other.bytes_moved, self.bytes_kept + other.bytes_kept
        )


def place(node: fx.Node) -> tuple[str, str]:
    """Where in the user's model a node comes from: module path and source line, both may be empty."""
    return node.meta.get("module", ""), node.meta.get("source", "")


@dataclass(frozen=True)
class Change:
    """One thing a pass did: ``what`` in words, and where in the user's model (both may be empty).

    ``nodes``: names of the operators that went with it, where the pass keeps count of them.
    """

    pass_name: str
    what: str
    module: str = ""
    source: str = ""
    saving: Saving = Saving()
    nodes: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Refusal:
    """One thing a pass looked at and left alone, and ``why``."""

    pass_name: str
    what: str
    module: str = ""
    source: str = ""
    why: str = ""


@dataclass(frozen=True)
class PassResult:
    """The graph after a pass, what changed, and what was left alone.

    ``graph`` is the very object given to the pass if nothing changed. ``before``: the graph that the first pass was
    given, None where no pass ran. ``removed``: names of its operators that are gone, each with the pass that took it.
    """

    graph: TrainingGraph
    changes: tuple[Change, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    before: TrainingGraph | None = field(default=None, repr=False, compare=False, kw_only=True)
    removed: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    @property
    def changed(self) -> bool:
        """Whether the pass did anything."""
        return bool(self.changes)

    @property
    def saving(self) -> Saving:
        """The sum of what the changes save."""
        return sum((change.saving for change in self.changes), Saving())


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite that keeps a graph's meaning.

    Subclasses are frozen dataclasses (their fields are the options), set ``name`` and ``tier``, and implement
    `rewrite`.

    ``drops_outputs``: the pass may leave outputs out, or give None for them. ``adds_inputs``: kinds of inputs that it
    may add behind those there are. ``resizes``: inputs and outputs may be parts of those before. ``drops_draws``:
    random operators may go, as the result is another function. All else that `check` lists is required of every pass.
    """

    name: ClassVar[str]
    tier: ClassVar[Tier]
    drops_outputs: ClassVar[bool] = False
    adds_inputs: ClassVar[frozenset[InputKind]] = frozenset()
    resizes: ClassVar[bool] = False
    drops_draws: ClassVar[bool] = False

    def __call__(self, graph: TrainingGraph | PassResult) -> PassResult:
        """Run the pass and check its result.

        Given the result of another pass, works on its graph and lists its changes and refusals first. Raises
        PassError if the pass breaks an invariant; the graph given is untouched.
        """
        before = graph if isinstance(graph, PassResult) else PassResult(graph)
        began = perf_counter()
        try:
            result = self.rewrite(before.graph)
            if result.graph is not before.graph:
                check(self, before.graph, result.graph)
        except Exception as error:
            if isinstance(error, PassError):
                error.pass_name = error.pass_name or self.name
            dumps.failed(self.name, before.graph, error)
            raise
        self._tell(before.graph, result, perf_counter() - began)
        return PassResult(
            result.graph,
            before.changes + result.changes,
            before.refusals + result.refusals,
            before=before.graph if before.before is None else before.before,
            removed={**before.removed, **_removed(self.name, before.graph, result.graph)},
        )

    def _tell(self, before: TrainingGraph, result: PassResult, seconds: float) -> None:
        """Say what was done to the log and, where somebody asked for it, to files (`graphopt.dumps`)."""
        dumps.ran(self.name, before, result, seconds)
        if log.isEnabledFor(logging.DEBUG):
            told = self.name, len(result.changes), len(before), len(result.graph), seconds
            log.debug("pass %s: %d changes, %d -> %d operators, %.3f s", *told)

    @abstractmethod
    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """The rewrite itself. Returns the same graph, ``PassResult(graph)``, where there is nothing to do."""


@dataclass(frozen=True)
class Pipeline(Pass):
    """Runs passes in order; a pipeline is itself a pass.

    Its tier is `Tier.REORDERS` if that of one of its passes is.
    """

    name: ClassVar[str] = "pipeline"
    passes: tuple[Pass, ...]

    def __init__(self, passes: Iterable[Pass]):
        """``passes``: any iterable of passes; they run in this order."""
        object.__setattr__(self, "passes", tuple(passes))

    @property
    def tier(self) -> Tier:  # type: ignore[override]
        """`Tier.EXACT` if every pass is exact."""
        return Tier.EXACT if all(p.tier is Tier.EXACT for p in self.passes) else Tier.REORDERS

    @property
    def drops_outputs(self) -> bool:  # type: ignore[override]
        """Whether one of the passes may drop outputs."""
        return any(p.drops_outputs for p in self.passes)

    @property
    def resizes(self) -> bool:  # type: ignore[override]
        """Whether one of the passes may give parts of inputs and outputs."""
        return any(p.resizes for p in self.passes)

    @property
    def drops_draws(self) -> bool:  # type: ignore[override]
        """Whether one of the passes may drop random operators."""
        return any(p.drops_draws for p in self.passes)

    @property
    def adds_inputs(self) -> frozenset[InputKind]:  # type: ignore[override]
        """The kinds of inputs that one of the passes may add."""
        return frozenset(kind for p in self.passes for kind in p.adds_inputs)

    def __call__(self, graph: TrainingGraph | PassResult) -> PassResult:
        """Run the passes; each is checked on its own, so nothing is left to check here."""
        result = graph if isinstance(graph, PassResult) else PassResult(graph)
        for one in self.passes:
            result = one(result)
        return result

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """Same as calling the pipeline."""
        return self(graph)


def check(rewriter: Pass, before: TrainingGraph, after: TrainingGraph) -> None:
    """Raise PassError if ``after`` breaks an invariant that every pass must keep.

    - the graph is well formed (fx's lint);
    - inputs are the same, in kind, name, order and type (and others behind them of kinds that the pass says it adds);
    - outputs are the same, in kind, name, order, shape, dtype, strides and device (or some of them, where the
      pass says that it drops outputs);
    - no output has become an alias of an input, of a constant or of another output;
    - random operators are the same ones in the same order: one less would shift every number drawn after it (or some
      of them, where the pass says that it drops draws).
    """

    def fail(message: str) -> None:
        raise PassError(message, pass_name=rewriter.name)

    try:
        after.graph.lint()
    except RuntimeError as error:
        fail(f"the rewritten graph is not well formed: {error}")
    of_type = _kind if rewriter.resizes else _type
    added_inputs = after.inputs[len(before.inputs) :]
    if after.inputs[: len(before.inputs)] != before.inputs or any(
        i.kind not in rewriter.adds_inputs for i in added_inputs
    ):
        fail("the inputs of the signature differ from those before the pass")
    for input_, old, new in zip(before.inputs, before.placeholders, after.placeholders):
        if of_type(old) != of_type(new):
            fail(f"{input_} was {_type(old)} and is {_type(new)}")
    old_results = dict(zip(before.outputs, before.results))
    if rewriter.drops_outputs:
        rest = iter(before.outputs)
        if not all(output in rest for output in after.outputs):
            fail("the outputs are not a part of those before the pass, in their order")
    elif after.outputs != before.outputs:
        fail("the outputs of the signature differ from those before the pass")
    for output, result in zip(after.outputs, after.results):
        was, now = of_type(old_results[output]), of_type(result)
        if was != now and not (rewriter.drops_outputs and result is None):
            fail(f"{output} was {was} and is {now}")
    added = _aliases(after) - _aliases(before)
    if added:
        fail(f"{' and '.join(map(str, sorted(added.pop())))} share memory, which they did not before the pass")
    drawn, draws = _random_operators(before), _random_operators(after)
    rest_of_draws = iter(drawn)
    if drawn != draws and not (rewriter.drops_draws and all(d in rest_of_draws for d in draws)):
        fail(f"the random operators were {drawn} and are {draws}")


def _removed(pass_name: str, before: TrainingGraph, after: TrainingGraph) -> dict[str, str]:
    """Operators that a pass took away. A draft keeps the names of the nodes that it copies."""
    if after is before:
        return {}
    left = {node.name: node.target for node in after.graph.nodes}
    return {node.name: pass_name for node in before.graph.nodes if left.get(node.name) != node.target}


def _type(node: fx.Node | None) -> Any:
    """Shape, dtype, strides and device of a node's value; its Python type if it is no tensor."""
    value = node.meta.get("val") if node is not None else None
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    shape = [expression(s) for s in value.shape]
    return value.dtype, shape, [expression(s) for s in value.stride()], value.device


def _kind(node: fx.Node | None) -> Any:
    """As `_type` without sizes and strides."""
    value = node.meta.get("val") if node is not None else None
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return value.dtype, value.dim(), value.device


def _aliases(graph: TrainingGraph) -> set[frozenset[str]]:
    """Pairs of an output and an input, a constant or another output that share a storage."""
    owners: dict[fx.Node, list[str]] = defaultdict(list)
    for input_, node in zip(graph.inputs, graph.placeholders):
        owners[node].append(f"input {input_}")
    pairs: set[frozenset[str]] = set()
    for output, result in zip(graph.outputs, graph.results):
        if result is None or not tensors(result.meta.get("val")):
            continue
        root, name = storage_root(result), f"output {output}"
        others = owners[root] + ([f"constant {root.target}"] if root.op == "get_attr" else [])
        pairs |= {frozenset((name, other)) for other in others}
        owners[root].append(name)
    return pairs


def _random_operators(graph: TrainingGraph) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function" and is_random(node)]
