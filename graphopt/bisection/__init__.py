"""Which pass breaks a step: `bisect` runs the passes one by one, with checks after each; ``graphopt bisect``."""

from graphopt.bisection.bisecting import bisect
from graphopt.bisection.location import Location, locate
from graphopt.bisection.report import Bisection, Tested
from graphopt.bisection.stage import Check, Stage

__all__ = ["Bisection", "Check", "Location", "Stage", "Tested", "bisect", "locate"]
