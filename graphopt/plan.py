"""`Plan`: what `optimize` decided for one batch size, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from graphopt.cost_model import Estimate
from graphopt.cost_model.measured import Measurement
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import LivenessResult, PassResult

if TYPE_CHECKING:
    from graphopt.choice import Landscape
    from graphopt.visualize.page import Page


class Crossover(NamedTuple):
    """From batch ``size`` on, ``after`` is the best scheme; up to it ``before`` was."""

    size: int
    before: str
    after: str


@dataclass
class Candidate:
    """One scheme: what its step should take, what it took, and why it does not run.

    Attributes:
        scheme: its name.
        why_not: why it cannot run.
        seconds: of its timed steps so far.
        measurement: median, interval and number of steps, those of an earlier process included; None before.
        predicted: seconds, low and high that were expected of a step, and the source (``priced``, ``interpolated``,
            ``stored``); None where nothing was known.
        estimate: the price by the cost model, with its terms.
        start_seconds: what its first step took, with building and compiling.
        lost: why another one was preferred.
        break_even: steps after which its start is paid back, where that decides.
    """

    scheme: str
    why_not: str | None = None
    seconds: list[float] = field(default_factory=list)
    measurement: Measurement | None = None
    predicted: tuple[float, float, float, str] | None = None
    estimate: Estimate | None = field(default=None, repr=False, compare=False)
    start_seconds: float | None = None
    lost: str = ""
    break_even: float | None = None

    @property
    def median_seconds(self) -> float | None:
        """Median seconds of a step, None before it was measured."""
        if self.measurement is not None:
            return self.measurement.seconds
        return median(self.seconds) if self.seconds else None

    def row(self, chosen: bool) -> tuple[str, ...]:
        """Cells of a table for a person: mark, scheme, measured seconds, interval and steps, price, why it lost."""
        took = self.median_seconds
        measured = "not measured" if took is None else duration(took)
        spread = ""
        if self.measurement is not None:
            m = self.measurement
            spread = f"{duration(m.low)} to {duration(m.high)}, {_count(m.runs, 'step')}"
        expected = "" if self.predicted is None else f"{duration(self.predicted[0])} {self.predicted[3]}"
        why = f"left out, {self.why_not}" if self.why_not else self.lost
        if self.why_not and took is None:
            measured = ""
        return "->" if chosen else "  ", self.scheme, measured, spread, expected, why

    def terms(self) -> str:
        """The price by term, for a person; empty without one."""
        if self.estimate is None:
            return ""
        parts = [f"{name} {duration(seconds)}" for name, seconds in self.estimate.terms.items() if seconds > 0]
        if self.estimate.compile_seconds:
            parts.append(f"once to compile {duration(self.estimate.compile_seconds)}")
        return f"{self.scheme}: {duration(self.estimate.seconds)} = {' + '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data (JSON-able)."""
        return {
            "scheme": self.scheme,
            "why_not": self.why_not,
            "seconds": list(self.seconds),
            "median_seconds": self.median_seconds,
            "interval": None if self.measurement is None else [self.measurement.low, self.measurement.high],
            "runs": 0 if self.measurement is None else self.measurement.runs,
            "predicted": None if self.predicted is None else list(self.predicted),
            "estimate": None if self.estimate is None else self.estimate.to_dict(),
            "start_seconds": self.start_seconds,
            "lost": self.lost,
            "break_even": self.break_even,
        }


@dataclass(frozen=True)
class GraphFacts:
    """Exact figures of a captured step before and after the passes, at one batch size."""

    operators: tuple[int, int]
    flops: tuple[int, int]
    bytes_kept: tuple[int, int]
    capture_seconds: float

    @classmethod
    def of(cls, before: TrainingGraph, after: TrainingGraph, size: int, seconds: float) -> GraphFacts:
        """The figures of two graphs at batch ``size``."""
        at = {"batch": size}
        return cls(
            (len(before), len(after)),
            (before.flops(at), after.flops(at)),
            (before.bytes_kept(at), after.bytes_kept(at)),
            seconds,
        )


@dataclass
class Plan:
    """The decision for one batch size: every candidate, what was measured, which was chosen and why, what passes did.

    ``explain()`` prints it for a person, ``to_dict()`` gives it to a program, ``crossovers()`` looks over batch sizes.

    ``landscape``: what is known of all candidates over batch sizes, where there is a choice.

    ``ranked`` gives all plans of the training step that this one belongs to, those that ran most steps first.

    ``graph`` may be a function that counts the figures of `facts` when they are asked for: counting takes longer than
    deciding.
    """

    batch_size: int
    candidates: list[Candidate]
    chosen: str
    reason: str
    graph: GraphFacts | Callable[[], GraphFacts] | None = field(default=None, repr=False, compare=False)
    passes: PassResult | None = None
    valid_where: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    over_sizes: Callable[[], list[Crossover]] | None = field(default=None, repr=False, compare=False)
    landscape: Landscape | None = field(default=None, repr=False, compare=False)
    ranked: Callable[[], Sequence[Plan]] | None = field(default=None, repr=False, compare=False)

    @property
    def facts(self) -> GraphFacts | None:
        """Figures of the captured step, None where it was not captured."""
        if callable(self.graph):
            self.graph = self.graph()
        return self.graph

    def candidate(self, scheme: str) -> Candidate:
        """The candidate of that name. Raises KeyError if there is none."""
        for candidate in self.candidates:
            if candidate.scheme == scheme:
                return candidate
        raise KeyError(scheme)

    def crossovers(self) -> list[Crossover]:
        """Batch sizes at which the best scheme changes, from what is priced and measured so far: (size, before, after).

        At batch sizes that were decided on it is the decision that counts, between them the least expected seconds.
        """
        return [] if self.over_sizes is None else self.over_sizes()

    def show(self, path: str | PathLike[str] | None = None, **options: Any) -> Page:
        """The plan and its step as a page to look at and to search; see `graphopt.show`."""
        from graphopt.visualize.show import show

        return show(self, path, **options)

    def explain(self, *, layers: bool = False) -> str:
        """The plan as text. With ``layers``: also what gradient liveness decided for each forward operator."""
        lines = [f"batch size {self.batch_size}: {self.chosen} ({self.reason})", *self._beside(), "candidates:"]
        lines += [f"  {line}" for line in _aligned([c.row(c.scheme == self.chosen) for c in self.candidates])]
        if terms := [line for line in (c.terms() for c in self.candidates) if line]:
            lines += ["prices by term:", *(f"     {line}" for line in terms)]
        if crossovers := self.crossovers():
            changes = ", ".join(f"{c.after} instead of {c.before} from {c.size} on" for c in crossovers)
            lines.append(f"over batch sizes: {changes}")
        if self.facts is not None:
            f = self.facts
            lines += [
                "the step as a graph, captured -> after passes:",
                f"     operators      {f.operators[0]:,} -> {f.operators[1]:,}",
                f"     FLOPs          {f.flops[0]:,} -> {f.flops[1]:,}",
                f"     bytes kept     {f.bytes_kept[0]:,} -> {f.bytes_kept[1]:,} for backward",
                f"     captured and rewritten in {duration(f.capture_seconds)}",
            ]
        if self.valid_where:
            lines.append(f"     valid for batch sizes with {' and '.join(self.valid_where)}")
        if self.passes is not None:
            lines += pass_lines(self.passes)
            if layers and isinstance(self.passes, LivenessResult):
                lines.append("layers, from the first one:")
                lines += [f"     {d.operator} {d.module}: {d.decision} ({d.why})" for d in self.passes.layers]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _beside(self) -> list[str]:
        """Where the plans of other batches are: this one may be that of a short last batch."""
        plans = [] if self.ranked is None else self.ranked()
        if not any(plan is not self for plan in plans):
            return []
        first = plans[0]
        if first is self:
            others = _count(len(plans) - 1, "plan")
            return [f"  most steps so far had such batches; step.plans[1:]: {others} for others"]
        other = "" if first.landscape is self.landscape else " and another shape or mode"
        return [f"  most steps so far had batch size {first.batch_size}{other}: {first.chosen}; see step.plans[0]"]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data (JSON-able)."""
        passes = self.passes
        return {
            "batch_size": self.batch_size,
            "chosen": self.chosen,
            "reason": self.reason,
            "candidates": [c.to_dict() for c in self.candidates],
            "crossovers": [list(c) for c in self.crossovers()],
            "facts": asdict(self.facts) if self.facts else None,
            "changes": [asdict(c) for c in passes.changes] if passes else [],
            "refusals": [asdict(r) for r in passes.refusals] if passes else [],
            "layers": [asdict(d) for d in passes.layers] if isinstance(passes, LivenessResult) else [],
            "valid_where": list(self.valid_where),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return self.explain()


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines with aligned columns; columns without text are left out."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths) if width).rstrip() for row in rows]


def pass_lines(result: PassResult, most: int = 4) -> list[str]:
    """What passes did, a few lines a pass: what saves most first, the rest counted."""
    lines = ["passes:"] if result.changes or result.refusals else []
    names = dict.fromkeys([c.pass_name for c in result.changes] + [r.pass_name for r in result.refusals])
    for name in names:
        changes = [c for c in result.changes if c.pass_name == name]
        refusals = Counter(r.why for r in result.refusals if r.pass_name == name)
        flops = sum(c.saving.flops for c in changes)
        kept = sum(c.saving.bytes_kept for c in changes)
        saved = [f"{flops:,} FLOPs"] * bool(flops) + [f"{kept:,} bytes kept"] * bool(kept)
        lines.append(f"  {name}: {_count(len(changes), 'change')}{', saves ' + ' and '.join(saved) if saved else ''}")
        changes.sort(key=lambda c: (-c.saving.flops, -c.saving.bytes_kept))
        for change in changes[:most]:
            where = "  ".join(w for w in (change.module, change.source) if w)
            lines.append(f"     {change.what}{f'  [{where}]' if where else ''}")
        if len(changes) > most:
            lines.append(f"     ... and {len(changes) - most} more")
        for why, count in refusals.most_common(2):
            lines.append(f"     left alone {count} times: {why}")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds for a person.

    >>> duration(0.0123)
    '12.3 ms'
    """
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
