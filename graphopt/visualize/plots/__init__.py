"""Figures of a training step: its time over batch sizes, its memory, its operators under the roofline, its prices.
And of subnets: what they cost and how good they are.

Needs matplotlib (``pip install 'graphopt[viz]'``). Each function gives a `matplotlib.figure.Figure` of its own; none
touches pyplot's state. In a notebook, ``%matplotlib inline`` shows what a cell ends with.
"""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("graphopt.visualize.plots needs matplotlib: pip install 'graphopt[viz]'") from error

from graphopt.visualize.plots.fronts import pareto
from graphopt.visualize.plots.graphs import memory, roofline
from graphopt.visualize.plots.plans import predicted_against_measured, step_times

__all__ = ["memory", "pareto", "predicted_against_measured", "roofline", "step_times"]
