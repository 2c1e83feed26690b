"""How benchmarks measure: time of candidates in turn, peak memory, bytes kept for backward; tables and JSON.

>>> rows = interleaved({"sum": lambda: sum(range(100)), "list": lambda: list(range(100))}, rounds=3)
>>> [row.name for row in rows], rows[0].ratio
(['sum', 'list'], 1.0)
"""

from __future__ import annotations

import gc
import json
import os
import platform
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from graphopt.cost_model.machine import available_cores, processor_name
from graphopt.graph.collector import no_garbage_collection

__all__ = [
    "Timing",
    "bytes_kept_by_compile",
    "bytes_kept_by_eager",
    "eager_step",
    "in_own_process",
    "in_words",
    "interleaved",
    "machine_description",
    "peak_bytes",
    "print_table",
    "time_limit",
    "write_json",
]

Result = TypeVar("Result")


# -- processes ------------------------------------------------------------------------------------------------------


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """The result of a function that is run in a new process: one that has trained another model before has another
    heap, and is slower. Raises what the function raised."""
    with ProcessPoolExecutor(1, get_context("spawn")) as one:
        return one.submit(function, *arguments).result()


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in a block that takes longer; in the main thread of a process."""

    def too_long(signum: int, frame: Any) -> None:
        raise TimeoutError("it took too long")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def in_words(error: Exception) -> str:
    """The type and the first line of an error, for a table."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


# -- time -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a candidate, and its ratio to the baseline (below 1: faster than it).

    ``seconds`` and ``ratio`` are medians over rounds, ``_low`` and ``_high`` the quartiles. A ratio is taken within
    each round, where both ran next to each other, so that a machine that slows down for a while does not move it.
    """

    name: str
    baseline: str
    seconds: float
    seconds_low: float
    seconds_high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int
    calls: int

    def summary(self) -> dict[str, Any]:
        """The row as `print_table` shows it."""
        return {
            "name": self.name,
            "seconds": self.seconds,
            "quartiles": f"{self.seconds_low * 1e3:.3f} to {self.seconds_high * 1e3:.3f}",
            f"ratio to {self.baseline}": self.ratio,
            "ratio quartiles": f"{self.ratio_low:.3f} to {self.ratio_high:.3f}",
        }


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    baseline: str | None = None,
    sample_seconds: float = 0.005,
    synchronize: Callable[[], None] | None = None,
) -> list[Timing]:
    """Time candidates in turn in this process.

    Args:
        candidates: by name, what to call. They must not share state that one leaves to the other.
        rounds: how often each is timed. The order is rotated, so that each comes first equally often.
        warmup: untimed calls of each before the first round (compilation, caches).
        baseline: the candidate that ratios refer to; the first by default.
        sample_seconds: candidates shorter than this are called several times in one sample.
        synchronize: called before each reading of the clock; `torch.cuda.synchronize` on a GPU.

    Returns:
        One row a candidate, in the order given.

    Raises:
        ValueError: there is no candidate, no round, or no candidate of the baseline's name.
    """
    names = list(candidates)
    if not names or rounds < 1 or (baseline is not None and baseline not in names):
        raise ValueError(f"interleaved: got candidates {names}, rounds={rounds}, baseline={baseline!r}")
    base = baseline or names[0]
    wait = synchronize or (lambda: None)

    def sample(name: str, calls: int) -> float:
        candidate = candidates[name]
        wait()
        start = perf_counter()
        for _ in range(calls):
            candidate()
        wait()
        return (perf_counter() - start) / calls

    calls = {}
    for name in names:
        seconds = [sample(name, 1) for _ in range(max(warmup, 1))]
        calls[name] = max(1, round(sample_seconds / max(min(seconds), 1e-9)))
    taken: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    with no_garbage_collection():
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                taken[name].append(sample(name, calls[name]))

    def timing(name: str) -> Timing:
        seconds = _quartiles(taken[name])
        ratios = _quartiles([s / b for s, b in zip(taken[name], taken[base], strict=True)])
        return Timing(name, base, *seconds, *ratios, rounds=rounds, calls=calls[name])

    return [timing(name) for name in names]


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return median(values), low, high


# -- memory ---------------------------------------------------------------------------------------------------------


def peak_bytes(step: Callable[[], Any], *, device: torch.device | str = "cpu") -> int:
    """The most bytes that one call of ``step`` held at once, of those it allocated itself.

    What was there before the call (parameters, optimizer state, the batch) does not count. On the CPU: tensors, as
    torch's allocator reports them to the profiler; scratch memory that oneDNN or MKL allocate on their own is not
    seen. On CUDA: `torch.cuda.max_memory_allocated` above what was allocated at the start. Call ``step`` before, so
    that what only a first call does is done.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = step()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet_stderr():
        with torch.autograd.profiler.profile(profile_memory=True) as profiler:
            result = step()
    del result
    return _peak(_allocations(profiler.kineto_results.experimental_event_tree()))


def _allocations(events: Iterable[Any]) -> list[tuple[int, int, int]]:
    """Time, address and bytes (negative: freed) of all allocations in the profiler's tree of events, by time."""
    found, stack = [], list(events)
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag.name == "Allocation" and event.extra_fields.device.type == "cpu":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return sorted(found, key=lambda allocation: allocation[0])


def _peak(allocations: Iterable[tuple[int, int, int]]) -> int:
    """The highest sum of live blocks. Freeing a block that is older than the events counts for nothing."""
    live: dict[int, int] = {}
    now = peak = 0
    for _, address, nbytes in allocations:
        if nbytes > 0:
            live[address] = nbytes
            now += nbytes
            peak = max(peak, now)
        else:
            now -= live.pop(address, 0)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's library writes to stderr, past ``sys.stderr``: a line at each start and stop, and a warning about
    the first block freed that is older than it."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def bytes_kept_by_eager(run_forward_loss: Callable[[], Tensor], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward: distinct storages of saved tensors, each counted whole.

    Args:
        run_forward_loss: computes the loss; called once.
        exclude: parameters, buffers and the batch, whose storages are there anyway.

    Tensors that a custom `torch.autograd.Function` keeps without ``save_for_backward`` are not seen.
    """
    return _kept(run_forward_loss, exclude)


def bytes_kept_by_compile(run_forward_loss: Callable[[], Tensor], exclude: Iterable[Tensor] = ()) -> int:
    """As `bytes_kept_by_eager`, for a forward and loss through `torch.compile`; called twice, the first to compile.

    Symbolic sizes that are kept are numbers, not memory.
    """
    run_forward_loss()
    return _kept(run_forward_loss, exclude)


def _kept(run_forward_loss: Callable[[], Tensor], exclude: Iterable[Tensor]) -> int:
    saved: list[Tensor] = []  # holds on to them: an address is used once only

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run_forward_loss()
    for node in _autograd_nodes(loss):
        # What a compiled function saves aside from `save_for_backward` passes by the hooks.
        saved.extend(t for t in getattr(node, "_tensors_no_vc_check", None) or () if isinstance(t, Tensor))
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    return sum(nbytes for address, nbytes in storages.items() if address not in excluded)


def _autograd_nodes(loss: Tensor) -> Iterator[Any]:
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
            yield node


# -- steps and reports ----------------------------------------------------------------------------------------------


def eager_step(
    model: nn.Module | Callable[..., Any], optimizer: torch.optim.Optimizer, loss: Callable[..., Tensor] | None
) -> Callable[..., Tensor]:
    """The training step that a user writes: ``step(*inputs, target)`` gives the loss after forward, backward, update.

    With ``loss=None``, ``step(**batch)`` or ``step(batch)`` calls a model by keyword that returns its own loss as
    ``.loss``. ``model`` may be what `torch.compile` returned.
    """

    def step(*batch: Any, **keywords: Any) -> Tensor:
        optimizer.zero_grad()
        if loss is None:
            value = model(**(keywords or batch[0])).loss
        else:
            *inputs, target = batch
            value = loss(model(*inputs), target)
        value.backward()
        optimizer.step()
        return value

    return step


def machine_description() -> dict[str, Any]:
    """What a reader of timings must know about this machine: processor, cores, memory, versions, threads, GPU."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": processor_name(),
        "cores": available_cores(),
        "memory_bytes": pages,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
    }


def print_table(rows: Sequence[Any], *, title: str | None = None, console: Console | None = None) -> None:
    """Print rows (`Timing`, or dicts or dataclasses of the same keys) as a table.

    A column is formatted by its name: ``...seconds...`` in milliseconds, ``...bytes...`` in MiB, other floats with
    three digits.
    """
    plain = [row.summary() if isinstance(row, Timing) else _plain(row) for row in rows]
    keys = list(dict.fromkeys(key for row in plain for key in row))
    table = Table(title=title)
    for key in keys:
        numeric = all(isinstance(row.get(key), (int, float, type(None))) for row in plain)
        unit = " (ms)" if "seconds" in key else " (MiB)" if "bytes" in key else ""
        table.add_column(key.replace("_", " ") + unit, justify="right" if numeric else "left")
    for row in plain:
        table.add_row(*(_cell(key, row.get(key)) for key in keys))
    (console or Console()).print(table)


def write_json(path: str | os.PathLike[str], rows: Any) -> None:
    """Write rows (any nesting of dicts, lists and dataclasses) with sorted keys, so that results can be diffed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(rows, indent=2, sort_keys=True, allow_nan=False, default=_plain) + "\n")


def _plain(row: Any) -> dict[str, Any]:
    if is_dataclass(row) and not isinstance(row, type):
        return asdict(row)
    return dict(row)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (str, bool)):
        return str(value)
    if "seconds" in key:
        return f"{value * 1e3:.3f}"
    if "bytes" in key:
        return f"{value / 2**20:.2f}"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
