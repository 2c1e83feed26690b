"""What a net will need, from the cost model: its step is captured without data and priced. The gate's predictors.

A captured graph holds for all batch sizes, so nets are captured once each and priced again for other hyper-parameters.
Capturing takes some tenths of a second: only models about to be taken are priced. Subnets of an elastic space are
priced from the one graph of the full net, in milliseconds: then every model that is looked at is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any, Literal

from graphopt.errors import ElasticError
from graphopt.exploration.search_space import net_with

__all__ = ["PREDICTED", "CostModelPredictor", "ElasticPredictor", "for_trial"]

PREDICTED = ("step_seconds", "peak_bytes", "parameters", "flops")
"""What the cost model predicts: seconds of a step and its peak memory (with their interval), parameters and FLOPs."""

ELASTIC = ("step_seconds", "parameters", "flops")
"""What is predicted of subnets from the graph of the full net."""

_KEPT = 64  # graphs


class CostModelPredictor:
    """Predicts `PREDICTED` of a net of ``space`` that is trained by ``trial``.

    Args:
        space: as in `graphopt.explore`.
        trial: says what the step is: ``loss``, ``optimizer``, ``options(hyper_parameters)`` and
            ``example(hyper_parameters)``, a batch; as `Training`.
        machine: a `graphopt.cost_model.Machine`; by default this one, which is measured once (about a minute).
        mode: how the step is run: ``eager`` or ``flat``.
    """

    cheap = False

    def __init__(self, space: Any, trial: Any, machine: Any = None, mode: Literal["eager", "flat"] = "eager"):
        if machine is None:
            from graphopt.cost_model import Machine

            machine = Machine.current()
        self._space, self._trial, self._machine, self._mode = space, trial, machine, mode
        self._graphs: dict[str, tuple[Any, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_graphs": {}}

    def __call__(self, sizes: Mapping[str, Any], hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
        """See `graphopt.exploration.gate.Predictor`. Raises CaptureError for a net that cannot be captured."""
        from graphopt.cost_model import estimate

        inputs, targets = self._trial.example(hyper_parameters)
        graph, parameters = self._captured(sizes, hyper_parameters, inputs, targets)
        price = estimate(graph, self._machine, {"batch": len(inputs)}, mode=self._mode)
        # The interval of the peak: the counts are exact, allocators round and keep a little.
        peak = float(price.peak_bytes)
        return {
            "step_seconds": (price.seconds, *price.interval),
            "peak_bytes": (peak, 0.9 * peak, 1.1 * peak),
            "parameters": float(parameters),
            "flops": float(price.flops),
        }

    def _captured(self, sizes: Mapping[str, Any], hyper_parameters: Mapping[str, Any], *batch: Any) -> tuple[Any, int]:
        from graphopt.graph.capture import capture

        options = self._trial.options(hyper_parameters)
        key = repr((sorted(sizes.items()), _kind_of_update(options)))
        if key not in self._graphs:
            if len(self._graphs) >= _KEPT:
                self._graphs.pop(next(iter(self._graphs)))
            net = net_with(self._space, sizes)
            optimizer = self._trial.optimizer(net.parameters(), **options)
            graph = capture(net, batch, loss=self._trial.loss, optimizer=optimizer)
            self._graphs[key] = graph, sum(p.numel() for p in net.parameters())
        return self._graphs[key]


class ElasticPredictor:
    """Predicts `ELASTIC` of the subnets of an elastic space, from one graph (`graphopt.elastic.prices.Prices`).

    Args:
        space: a `graphopt.elastic.Space`.
        trial, machine, mode: as for `CostModelPredictor`.
        wanted: names of what is to be predicted. Without seconds no machine is needed, and none is measured.
    """

    def __init__(
        self,
        space: Any,
        trial: Any,
        machine: Any = None,
        mode: Literal["eager", "flat"] = "eager",
        wanted: Set[str] = frozenset(ELASTIC),
    ):
        if machine is None and "step_seconds" in wanted:
            from graphopt.cost_model import Machine

            machine = Machine.current()
        self._space, self._trial, self._machine, self._mode, self._wanted = space, trial, machine, mode, wanted
        self._prices: dict[str, Any] = {}
        self._single: CostModelPredictor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prices": {}, "_single": None}

    def __call__(self, sizes: Mapping[str, Any], hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
        """See `graphopt.exploration.gate.Predictor`."""
        batch, choices = self._trial.example(hyper_parameters), [self._space.choice(sizes)]
        prices = self._of(batch, self._trial.options(hyper_parameters))
        found: dict[str, Any] = {"parameters": float(prices.of(choices, "parameters")[0])}
        try:
            if "flops" in self._wanted:
                found["flops"] = float(prices.step_flops(choices)[0])
            if "step_seconds" in self._wanted:
                seconds, spread = float(prices.of(choices, "step_seconds")[0]), self._machine.spread
                found["step_seconds"] = (seconds, seconds * math.exp(-spread), seconds * math.exp(spread))
        except ElasticError:  # sizes of axes do not tell what it costs: a layer that reads a part of its input
            if self._single is None:
                self._single = CostModelPredictor(self._space, self._trial, self._machine, self._mode)
            return self._single(sizes, hyper_parameters)
        return found

    def _of(self, batch: Any, options: Mapping[str, Any]) -> Any:
        """Prices of steps of this batch size and with such an update."""
        from graphopt.elastic.prices import Prices, Training

        rows = len(batch[0])
        key = repr((rows, _kind_of_update(options)))
        if key not in self._prices:
            optimizer = self._trial.optimizer(self._space.model.parameters(), **options)
            step = Training(batch, self._trial.loss, optimizer)
            self._prices[key] = Prices(self._space, self._machine, batch_size=rows, mode=self._mode, training=step)
        return self._prices[key]


def _kind_of_update(options: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """An update without momentum or decay has other operators; which momentum it is makes none."""
    return sorted((name, bool(value)) for name, value in options.items())


def for_trial(space: Any, trial: Any, wanted: Set[str], threads: int | None = None) -> Any:
    """The default predictor of ``wanted``, of steps with so many threads (None: with those of this process); None where
    the trial does not say what its step is, or there is no net."""
    if space is None or not all(hasattr(trial, name) for name in ("loss", "optimizer", "options", "example")):
        return None
    from graphopt.elastic import Space

    if isinstance(space, Space) and wanted <= set(ELASTIC):
        machine = _machine(threads) if "step_seconds" in wanted else None
        return ElasticPredictor(space, trial, machine, wanted=wanted)
    return CostModelPredictor(space, trial, _machine(threads))


def _machine(threads: int | None) -> Any:
    """This one, as it is with so many threads: trainers have other numbers of them than the process that asks."""
    import torch

    from graphopt.cost_model import Machine
    from graphopt.schemes.threads import thread_count

    with thread_count(threads or torch.get_num_threads()):
        return Machine.current()
