"""`Prices`: what the subnets of a space cost, thousands of them a second, before any of them exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from graphopt.cost_model.machine import Machine
from graphopt.cost_model.work import Mode
from graphopt.elastic.choice import Choice
from graphopt.elastic.counted import CountedGraph
from graphopt.elastic.dimension import Kind
from graphopt.elastic.joint import layered
from graphopt.elastic.kept import Kept
from graphopt.elastic.left_out import LeftOut, without
from graphopt.elastic.modes import evaluating
from graphopt.elastic.space import Space
from graphopt.elastic.update_prices import UpdatePrices
from graphopt.errors import ElasticError
from graphopt.graph.batch import flatten
from graphopt.graph.capture import capture
from graphopt.graph.differentiate import with_backward

_SECONDS = ("latency_seconds", "step_seconds")
METRICS = ("flops", "parameters", "peak_bytes", *_SECONDS)
"""What a subnet can be priced by.

``flops``: of a forward pass of the batch in eval mode, a multiply-add counts two. ``parameters``: how many numbers they
hold. ``peak_bytes``: the most memory of that forward pass, parameters and batch included. ``latency_seconds``: its
time.
``step_seconds``: the time of a training step: forward, backward and, where an optimizer was given, update.
"""


@dataclass(frozen=True)
class Training:
    """What a training step is made of, for its price. ``batch``: an example, with its target; ``loss``, ``optimizer``:
    as in `graphopt.optimize`."""

    batch: Any
    loss: Callable[..., Any] | str
    optimizer: torch.optim.Optimizer | None = None


@dataclass(frozen=True)
class Correction:
    """What measured times say of predicted ones: a factor for each prediction.

    Between measured points it is linear in logarithms, beyond them constant; one point is one factor for all. So a
    machine that others use, or a way to run that the cost model is off for by half, moves all predictions alike.

    >>> twice = Correction.of(predicted=[1.0, 4.0], measured=[2.0, 8.0])
    >>> twice(np.array([0.5, 3.0])).tolist()
    [1.0, 6.0]
    """

    predicted: tuple[float, ...]
    factors: tuple[float, ...]

    @staticmethod
    def of(predicted: Sequence[float], measured: Sequence[float]) -> Correction:
        """The correction through these points, in seconds."""
        pairs = sorted((p, m / p) for p, m in zip(predicted, measured, strict=True))
        return Correction(tuple(p for p, _ in pairs), tuple(f for _, f in pairs))

    def __call__(self, seconds: np.ndarray) -> np.ndarray:
        """Predicted seconds, corrected."""
        logs = np.interp(np.log(seconds), np.log(self.predicted), np.log(self.factors))
        corrected: np.ndarray = seconds * np.exp(logs)
        return corrected


class Prices:
    """Prices of the subnets of a space, from the cost models: nothing is run.

    Graphs of the full model are compiled once, at the first question that needs them, with a free symbol for each size;
    a price then is arithmetic (`graphopt.cost_model.many_sizes`). FLOPs and parameters are exact; peak memory is exact
    for sizes and nearly so where layers are left out; seconds are what `graphopt.cost_model.estimate` gives for the
    extracted module. (A step on slices of the shared weights also copies them, and updates whole tensors.) A pattern of
    layers that cannot be taken out of the full net's step (`graphopt.elastic.left_out`) is traced and compiled once.

    Args:
        space: in a state that the prices are for; it may be trained on.
        machine: for seconds; by default `Machine.current()`, measured once, at the first question that needs it.
        batch_size: of the forward pass and the step; by default that of the space's own example.
        mode: ``"flat"`` (straight-line code) or ``"eager"``, for steps and forward passes.
        training: for ``step_seconds``.

    Example:
        >>> import torch, graphopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> space = graphopt.elastic.space(net, torch.randn(16, 8))
        >>> prices = Prices(space)
        >>> prices.of([space.full, space.smallest], "parameters").tolist()
        [420, 108]
    """

    def __init__(
        self,
        space: Space,
        machine: Machine | None = None,
        *,
        batch_size: int | None = None,
        mode: Mode = "flat",
        training: Training | None = None,
    ):
        if mode not in ("flat", "eager"):
            raise ElasticError(f"mode: expected 'flat' or 'eager', got {mode!r}")
        if batch_size is not None and (
            isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
        ):
            raise ElasticError(f"batch_size: expected a positive integer, got {batch_size!r}")
        self.space, self.mode, self.training = space, mode, training
        self.batch_size = batch_size if batch_size is not None else flatten(space.batch)[2]
        self._machine = machine
        self._forward: dict[int | None, CountedGraph] = {}  # by threads
        self._step: CountedGraph | None = None
        self._patterns: Kept[CountedGraph] = Kept()
        self._update: UpdatePrices | None = None
        self._corrections: dict[str, Correction] = {}  # by metric

    @property
    def machine(self) -> Machine:
        """The machine that seconds are of."""
        if self._machine is None:
            self._machine = Machine.current()
        return self._machine

    def corrected(self, metric: str, measured: Mapping[Choice, float]) -> Prices:
        """The same prices, but seconds of ``metric`` pass through those that were measured of some choices: often of
        the full and the smallest net, which puts right what all predictions of a model have in common.

        Args:
            metric: ``latency_seconds`` or ``step_seconds``.
            measured: seconds by choice, at least of one.

        Raises:
            ElasticError: another metric, no choice, or seconds that are not positive.
        """
        if metric not in _SECONDS or not measured or not all(s > 0 for s in measured.values()):
            raise ElasticError(
                f"corrected: expected one of {', '.join(_SECONDS)} and positive seconds of some choices, got "
                f"{metric!r} and {list(measured.values())}"
            )
        found = copy(self)
        found._corrections = {name: known for name, known in self._corrections.items() if name != metric}
        predicted = found.of(list(measured), metric)
        found._corrections[metric] = Correction.of(predicted.tolist(), list(measured.values()))
        return found

    def of(self, choices: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray:
        """One price of each choice, ``(count,)``: int64 counts, float64 seconds. Choices are those of the space.

        Raises ElasticError for an unknown metric, or ``step_seconds`` without ``training``.
        """
        return self.table(choices, [metric])[metric]

    def table(self, choices: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, np.ndarray]:
        """Several prices of each choice, by metric; see `of`."""
        if unknown := [m for m in metrics if m not in METRICS]:
            raise ElasticError(f"metric: expected some of {', '.join(METRICS)}, got {unknown[0]!r}")
        found: dict[str, np.ndarray] = {}
        if not choices:
            return {metric: np.zeros(0) for metric in metrics}
        if "parameters" in metrics:
            found["parameters"] = np.sum(list(self._forward_graph().parameters(choices).values()), axis=0)
        if {"flops", "peak_bytes", "latency_seconds"} & set(metrics):
            machine = self.machine if "latency_seconds" in metrics else None
            counted = self._forward_graph()
            priced = counted.prices(choices, self._sizes(counted), machine=machine, peak="peak_bytes" in metrics)
            found |= {"flops": priced.flops, "peak_bytes": priced.peak_bytes, "latency_seconds": priced.seconds}
        if "step_seconds" in metrics:
            found["step_seconds"] = self._step_seconds(choices)
        for metric, correction in self._corrections.items():
            if metric in metrics:
                found[metric] = correction(found[metric])
        return {metric: found[metric] for metric in metrics}

    def step_flops(self, choices: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """FLOPs of a training step of each choice, int64 ``(count,)``; its update counts 0 (docs/flops.md). Needs no
        machine. Raises ElasticError without ``training``."""
        found = np.zeros(len(choices), np.int64)
        for counted, at in self._steps_of(choices):
            found[at] = counted.prices([choices[i] for i in at], self._sizes(counted), machine=None, peak=False).flops
        return found

    def _sizes(self, counted: CountedGraph) -> dict[str, int]:
        if "batch" not in counted.graph.symbols.symbols:
            return {}
        if not counted.graph.symbols.admits({"batch": self.batch_size}):
            raise ElasticError(
                f"batch_size: the graph does not hold for {self.batch_size}; give the space an example of that size"
            )
        return {"batch": self.batch_size}

    def _forward_graph(self) -> CountedGraph:
        """The forward graph for the threads of the machine; without one for those of torch here, which `machine` would
        have too: what was asked first must not matter."""
        threads = self._threads
        if threads not in self._forward:
            with evaluating(self.space.model):
                subnet = self.space.subnet(self.space.full)
            origin = subnet.origin
            self._forward[threads] = CountedGraph(
                origin.graph, origin, self.space.dimensions, partial(without, origin.graph), self.mode, threads
            )
        return self._forward[threads]

    # -- training steps -------------------------------------------------------------------------------------------

    def _step_seconds(self, choices: Sequence[Mapping[str, Any]]) -> np.ndarray:
        found = np.zeros(len(choices))
        for counted, at in self._steps_of(choices):
            some = [choices[i] for i in at]
            priced = counted.prices(some, self._sizes(counted), machine=self.machine, peak=False)
            found[at] = priced.seconds + self._update_seconds(some, counted)
        return found

    def _steps_of(self, choices: Sequence[Mapping[str, Any]]) -> list[tuple[CountedGraph, list[int]]]:
        """The joint graphs that price these choices, each with the places of those that it prices: that of the full
        net, and one for each pattern of layers that are not to be told from the others in that."""
        whole = self._step_graph()
        found: dict[int, tuple[CountedGraph, list[int]]] = {}
        for i, choice in enumerate(choices):
            counted = whole if whole.absent(choice) is not None else self._pattern_graph(choice)
            found.setdefault(id(counted), (counted, []))[1].append(i)
        return list(found.values())

    @property
    def _threads(self) -> int | None:
        """Of kernels; see `_forward_graph`."""
        return self._machine.threads if self._machine is not None else torch.get_num_threads()

    def _step_graph(self) -> CountedGraph:
        """The joint graph of the full net; for which threads, see `_forward_graph`."""
        if self.training is None:
            raise ElasticError(
                "step_seconds: what a step is made of is not known; give Prices(space, training=Training(batch, loss, "
                "optimizer))"
            )
        if self._step is None:
            given = self.training
            subnet = self.space.subnet(self.space.full, loss=given.loss, batch=given.batch)
            joint = layered(subnet)
            self._step = CountedGraph(
                joint.graph, subnet.origin, self.space.dimensions, joint.without, self.mode, self._threads
            )
        return self._step

    def _pattern_graph(self, choice: Mapping[str, Any]) -> CountedGraph:
        """The joint graph of a choice with all sizes full."""
        assert self.training is not None
        origin = self.space.subnet(self.space.full, loss=self.training.loss, batch=self.training.batch).origin
        depths = {d.name: choice[d.name] for d in self.space.dimensions if d.kind is Kind.DEPTH}
        pattern = self.space.choice(depths)
        if pattern.key() not in self._patterns:
            joint = with_backward(origin.subnet(pattern).graph)
            active = [d for d in self.space.dimensions if d.kind is not Kind.DEPTH and d.name not in pattern.inactive]
            self._patterns[pattern.key()] = CountedGraph(
                joint, origin, active, lambda runs: LeftOut(frozenset(), {}, ()), self.mode, self._threads
            )
        return self._patterns[pattern.key()]

    def _update_seconds(self, choices: Sequence[Mapping[str, Any]], counted: CountedGraph) -> np.ndarray:
        """Seconds of the optimizer's update of the parameters that each choice has."""
        given = self.training
        if given is None or given.optimizer is None:
            return np.zeros(len(choices))
        if self._update is None:
            whole = capture(self.space.model, given.batch, loss=given.loss, optimizer=given.optimizer)
            self._update = UpdatePrices(whole, self.mode, self._threads)
        return self._update.seconds(self.machine, counted.parameters(choices))
