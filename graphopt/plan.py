"""`Plan`: what `optimize` decided for one batch size, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes import LivenessResult, PassResult


@dataclass
class Candidate:
    """One scheme: why it cannot run, or the seconds of its steps so far."""

    scheme: str
    why_not: str | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def median_seconds(self) -> float | None:
        """Median seconds of a step, None before it was measured."""
        return median(self.seconds) if self.seconds else None

    def line(self, chosen: bool) -> str:
        """One line for a person."""
        mark = "->" if chosen else "  "
        if self.why_not:
            return f"{mark} {self.scheme}: left out, {self.why_not}"
        if not self.seconds:
            return f"{mark} {self.scheme}: not measured"
        low, high = min(self.seconds), max(self.seconds)
        measured = (
            f"{_time(median(self.seconds))} a step (median of {len(self.seconds)}, {_time(low)} to {_time(high)})"
        )
        return f"{mark} {self.scheme}: {measured}"


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
    """The decision for one batch size: every candidate, what was measured, which runs and why, what passes did.

    ``explain()`` prints it for a person, ``to_dict()`` gives it to a program.
    """

    batch_size: int
    candidates: list[Candidate]
    chosen: str
    reason: str
    facts: GraphFacts | None = None
    passes: PassResult | None = None
    valid_where: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def candidate(self, scheme: str) -> Candidate:
        """The candidate of that name. Raises KeyError if there is none."""
        for candidate in self.candidates:
            if candidate.scheme == scheme:
                return candidate
        raise KeyError(scheme)

    def explain(self, *, layers: bool = False) -> str:
        """The plan as text. With ``layers``: also what gradient liveness decided for each forward operator."""
        lines = [f"batch size {self.batch_size}: {self.chosen} ({self.reason})", "candidates:"]
        lines += [f"  {c.line(c.scheme == self.chosen)}" for c in self.candidates]
        if self.facts is not None:
            f = self.facts
            lines += [
                "the step as a graph, captured -> after passes:",
                f"     operators      {f.operators[0]:,} -> {f.operators[1]:,}",
                f"     FLOPs          {f.flops[0]:,} -> {f.flops[1]:,}",
                f"     bytes kept     {f.bytes_kept[0]:,} -> {f.bytes_kept[1]:,} for backward",
                f"     captured and rewritten in {_time(f.capture_seconds)}",
            ]
        if self.valid_where:
            lines.append(f"     valid for batch sizes with {' and '.join(self.valid_where)}")
        if self.passes is not None:
            lines += _pass_lines(self.passes)
            if layers and isinstance(self.passes, LivenessResult):
                lines.append("layers, from the first one:")
                lines += [f"     {d.operator} {d.module}: {d.decision} ({d.why})" for d in self.passes.layers]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data (JSON-able)."""
        passes = self.passes
        return {
            "batch_size": self.batch_size,
            "chosen": self.chosen,
            "reason": self.reason,
            "candidates": [{**asdict(c), "median_seconds": c.median_seconds} for c in self.candidates],
            "facts": asdict(self.facts) if self.facts else None,
            "changes": [asdict(c) for c in passes.changes] if passes else [],
            "refusals": [asdict(r) for r in passes.refusals] if passes else [],
            "layers": [asdict(d) for d in passes.layers] if isinstance(passes, LivenessResult) else [],
            "valid_where": list(self.valid_where),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return self.explain()


def _pass_lines(result: PassResult, most: int = 4) -> list[str]:
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


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
