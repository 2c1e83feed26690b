"""`Estimate`: the price of one training step, with its reasons."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from graphopt.cost_model.memory import Peak
from graphopt.cost_model.work import Counts, Mode, Work
from graphopt.errors import CostModelError

TERMS = ("compute", "memory", "launch", "allocation", "optimizer", "communication", "bubble")
"""What the seconds of a step consist of. ``compute`` and ``memory``: kernels bound by their FLOPs or their bytes;
``launch``: of the host, where kernels do not hide it; ``allocation``: memory that the operating system gives anew;
``optimizer``: all of the update; ``communication``: what no computation hides; ``bubble``: waiting in a pipeline."""

Sort = Literal["seconds", "flops", "bytes", "order"]


@dataclass(frozen=True, repr=False)
class Estimate:
    """The price of one training step at certain sizes on a machine, made by `graphopt.cost_model.estimate`.

    Attributes:
        seconds: of one step.
        interval: seconds (low, high) between which 90 % of measurements are expected.
        terms: seconds by term (`TERMS`); their sum is ``seconds``.
        compile_seconds: to be paid once before the first step: 0 where nothing is compiled.
        flops: of one step, a multiply-add counts two, in the conventions of ``torch.utils.flop_counter``.
        bytes_moved: read and written by all operators, each operand once.
        bytes_kept: for backward: storages made by forward and read by backward, without inputs.
        peak_bytes: the most memory at a time: parameters, gradients, optimizer state, batch, activations, workspace.
        sizes: the free sizes it was made for.
        machine: name of the processor.
        mode: how the graph is run.
        precision: that products were priced in, None for that of their dtypes.
        node_seconds: of each operator in ``work.nodes``, float64; without ``allocation`` and the binding of inputs.
    """

    seconds: float
    interval: tuple[float, float]
    terms: Mapping[str, float]
    compile_seconds: float
    flops: int
    bytes_moved: int
    bytes_kept: int
    sizes: Mapping[str, int]
    machine: str
    mode: Mode
    peak: Peak
    node_seconds: np.ndarray
    work: Work
    counts: Counts
    precision: str | None = None

    @property
    def peak_bytes(self) -> int:
        """The most memory that is in use at a time, bytes; ``peak`` says where and by what."""
        return self.peak.total

    @cached_property
    def by_module(self) -> dict[str, dict[str, float]]:
        """Seconds, FLOPs and bytes of each module path, itself and what lies below it; ``""`` is the whole step."""
        found: dict[str, dict[str, float]] = {}
        for i, node in enumerate(self.work.nodes):
            path = str(node.meta.get("module", ""))
            parts = path.split(".") if path else []
            for end in range(len(parts) + 1):
                row = found.setdefault(".".join(parts[:end]), {"seconds": 0.0, "flops": 0, "bytes": 0, "operators": 0})
                row["seconds"] += float(self.node_seconds[i])
                row["flops"] += int(self.counts.flops[i])
                row["bytes"] += int(self.counts.bytes[i])
                row["operators"] += 1
        return found

    def explain(
        self, by: Literal["node", "module", "family"] = "node", *, sort: Sort = "seconds", top: int = 20
    ) -> str:
        """The price as text: terms, memory, and a table of what takes most.

        Args:
            by: a line for each operator (with its source line), module path or family of kernels.
            sort: by which column, the largest first; ``order`` keeps the order of execution.
            top: how many lines; the rest is summed up in one.

        Raises:
            CostModelError: an unknown column or kind of line.
        """
        if by not in ("node", "module", "family") or sort not in ("seconds", "flops", "bytes", "order") or top < 1:
            raise CostModelError(
                f"explain: expected by node, module or family, sort by seconds, flops, bytes or order, and top >= 1; "
                f"got by={by!r}, sort={sort!r}, top={top!r}"
            )
        low, high = self.interval
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items()) or "fixed sizes"
        lines = [
            f"{self.mode} step at {sizes} on {self.machine}: {_time(self.seconds)} ({_time(low)} to {_time(high)})",
            "  " + ", ".join(f"{name} {_time(s)}" for name, s in self.terms.items() if s > 0),
            f"  {self.flops:,} FLOPs, {_bytes(self.bytes_moved)} moved, {_bytes(self.bytes_kept)} kept for backward",
            f"  peak memory {_bytes(self.peak_bytes)}: "
            + ", ".join(f"{name} {_bytes(n)}" for name, n in self.peak.parts.items() if n),
        ]
        if self.compile_seconds:
            lines.append(f"  and {_time(self.compile_seconds)} once to compile")
        return "\n".join(lines) + "\n" + _render(self._table(by, sort, top))

    def _rows(self, by: str) -> list[dict[str, Any]]:
        if by == "module":
            return [{"what": path or "(all)", **row} for path, row in self.by_module.items()]
        rows: dict[str, dict[str, Any]] = {}
        first = dict(zip(reversed(self.work.node_of.tolist()), reversed(self.work.kernels)))
        for i, node in enumerate(self.work.nodes):
            if by == "node" and self.node_seconds[i] == 0:
                continue
            kernel = first.get(i)
            key = node.name if by == "node" else str(kernel.family if kernel else "none")
            row = rows.setdefault(key, {"what": key, "seconds": 0.0, "flops": 0, "bytes": 0, "operators": 0})
            row["seconds"] += float(self.node_seconds[i])
            row["flops"] += int(self.counts.flops[i])
            row["bytes"] += int(self.counts.bytes[i])
            row["operators"] += 1
            if by == "node":
                row |= {key: node.meta.get(key, "") for key in ("phase", "module", "source")}
        return list(rows.values())

    def _table(self, by: str, sort: str, top: int) -> Table:
        rows = self._rows(by)
        if sort != "order":
            rows.sort(key=lambda row: -row[sort])
        table = Table(box=None, pad_edge=False)
        names = ["what", "seconds", "share", "flops", "bytes", *(["phase", "module", "source"] if by == "node" else [])]
        for name in names:
            numeric = name in ("seconds", "share", "flops", "bytes")
            table.add_column({"what": by}.get(name, name), justify="right" if numeric else "left", no_wrap=True)
        whole = self.seconds or 1.0
        for row in rows[:top]:
            cells = [row["what"], _time(row["seconds"]), f"{row['seconds'] / whole:.1%}", f"{row['flops']:,}",
                     _bytes(row["bytes"])]  # fmt: skip
            table.add_row(*cells, *(str(row.get(name, "")) for name in names[5:]))
        if rest := rows[top:]:
            seconds = sum(row["seconds"] for row in rest)
            share = "" if by == "module" else f"{seconds / whole:.1%}"  # modules hold each other
            table.add_row(f"... {len(rest)} more", _time(seconds) if share else "", share)
        return table

    def to_dict(self) -> dict[str, Any]:
        """The price as plain data (JSON-able), without the single operators."""
        return {
            "seconds": self.seconds, "interval": list(self.interval), "terms": dict(self.terms),
            "compile_seconds": self.compile_seconds, "flops": self.flops, "bytes_moved": self.bytes_moved,
            "bytes_kept": self.bytes_kept, "peak_bytes": self.peak_bytes, "peak_parts": dict(self.peak.parts),
            "sizes": dict(self.sizes), "machine": self.machine, "mode": self.mode,
        }  # fmt: skip

    def __repr__(self) -> str:
        low, high = self.interval
        return (f"Estimate({_time(self.seconds)} ({_time(low)} to {_time(high)}), {self.flops:,} FLOPs, "
                f"peak {_bytes(self.peak_bytes)})")  # fmt: skip


def _render(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=200, no_color=True, force_jupyter=False, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns" if seconds else "0 s"


def _bytes(number: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"
