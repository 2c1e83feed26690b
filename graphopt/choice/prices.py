"""`Prices`: what candidates should take on this machine, where it was calibrated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import replace

from graphopt.cost_model import Estimate, Machine
from graphopt.cost_model.machine import kept
from graphopt.errors import CostModelError
from graphopt.schemes import Prepared, Scheme

log = logging.getLogger("graphopt")

UNCALIBRATED = (
    "this machine is not calibrated, so candidates have no prices; `graphopt calibrate` (a minute) gives some"
)
"""What a plan says then."""


class Prices:
    """Prices of schemes by batch size, each made once. Nothing is ever calibrated here.

    Args:
        machines: number of threads -> the calibration for so many, None if there is none; by default what
            ``graphopt calibrate`` has kept.
    """

    def __init__(self, machines: Callable[[int], Machine | None] = kept):
        self._find = machines
        self._machines: dict[int, Machine | None] = {}
        self._made: dict[Hashable, Estimate | None] = {}
        self._peaks: dict[Hashable, int | None] = {}

    def machine(self, threads: int) -> Machine | None:
        """The calibration for a number of threads; looked for once."""
        if threads not in self._machines:
            self._machines[threads] = self._find(threads)
        return self._machines[threads]

    def of(self, scheme: Scheme, prepared: Prepared, size: int) -> Estimate | None:
        """The price of one step, None where there is none."""
        key = (scheme.name, id(prepared), size)
        if key not in self._made:
            self._made[key] = _estimate(scheme, prepared, size, self._fitting(prepared))
        return self._made[key]

    def peak_bytes(self, scheme: Scheme, prepared: Prepared, size: int) -> int | None:
        """The most memory of one step, bytes; needs no calibration. None where it is not known."""
        priced = self.of(scheme, prepared, size)
        if priced is not None:
            return priced.peak_bytes
        key = (scheme.name, id(prepared), size)
        if key not in self._peaks:
            counted = _estimate(scheme, prepared, size, _any_machine)
            self._peaks[key] = None if counted is None else counted.peak_bytes
        return self._peaks[key]

    def _fitting(self, prepared: Prepared) -> Callable[[int], Machine | None]:
        """Calibrations of the kind of device that the batch is on."""

        def find(threads: int) -> Machine | None:
            machine = self.machine(threads)
            kinds = {device.type for device in prepared.layout.devices}
            return machine if machine is not None and machine.device in kinds else None

        return find


def _estimate(
    scheme: Scheme, prepared: Prepared, size: int, machines: Callable[[int], Machine | None]
) -> Estimate | None:
    if scheme.needs_graph and prepared.step is None:
        return None  # not captured yet
    try:
        return scheme.estimate(prepared, size, machines)
    except CostModelError as error:  # a dtype without a rate, a size outside of the guards
        log.info("no price of %s at batch size %d: %s", scheme.name, size, error)
        return None


def _any_machine(threads: int) -> Machine:
    """A machine for counting bytes, in which no speed plays a part."""
    return replace(Machine.named("A100"), device="cpu", fingerprint={"threads": threads})
