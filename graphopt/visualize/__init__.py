"""Pictures of training steps: `show` makes a page, `graphopt.visualize.plots` figures, `timeline` a trace."""

from graphopt.visualize.page import Page
from graphopt.visualize.show import show
from graphopt.visualize.timeline import timeline

__all__ = ["Page", "show", "timeline"]
