"""What a net will need, from the cost model: its step is captured without data and priced.

The default predictor of the gate. A captured graph holds for all batch sizes, so nets are captured once each and priced
again for other hyper-parameters. Capturing takes some tenths of a second: only models about to be taken are priced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from graphopt.exploration.search_space import Elastic, ModelFunction

__all__ = ["PREDICTED", "CostModelPredictor", "for_trial"]

PREDICTED = ("step_seconds", "peak_bytes", "parameters", "flops")
"""What the cost model predicts: seconds of a step and its peak memory (with their interval), parameters and FLOPs."""

_KEPT = 64  # graphs


class CostModelPredictor:
    """Predicts `PREDICTED` of a net of ``space`` that is trained by ``trial``.

    Args:
        space: as in `graphopt.explore`.
        trial: says what the step is: ``loss``, ``optimizer``, ``options(hyper_parameters)`` and
            ``example(hyper_parameters)``, a batch; as `Training`.
        machine: a `graphopt.cost_model.Machine`; by default this one, which is measured once (at most a minute).
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
        # An update without momentum or decay has other operators; which momentum it is makes none.
        key = repr((sorted(sizes.items()), sorted((name, bool(value)) for name, value in options.items())))
        if key not in self._graphs:
            if len(self._graphs) >= _KEPT:
                self._graphs.pop(next(iter(self._graphs)))
            net = self._net(sizes)
            optimizer = self._trial.optimizer(net.parameters(), **options)
            graph = capture(net, batch, loss=self._trial.loss, optimizer=optimizer)
            self._graphs[key] = graph, sum(p.numel() for p in net.parameters())
        return self._graphs[key]

    def _net(self, sizes: Mapping[str, Any]) -> Any:
        if isinstance(self._space, ModelFunction):
            return self._space.extract(sizes)
        if isinstance(self._space, Elastic):
            return self._space.extract(self._space.choice(sizes))
        return self._space


def for_trial(space: Any, trial: Any) -> CostModelPredictor | None:
    """The default predictor; None where the trial does not say what its step is, or there is no net."""
    if space is None or not all(hasattr(trial, name) for name in ("loss", "optimizer", "options", "example")):
        return None
    return CostModelPredictor(space, trial)
