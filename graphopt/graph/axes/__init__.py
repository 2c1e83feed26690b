"""Axes: every tensor dimension of a training graph has an identity. `analyse` finds them."""

from graphopt.graph.axes.analysis import Axes, Unknown, analyse
from graphopt.graph.axes.axis import Axis, Dim, Form, Kind, Place

__all__ = ["Axes", "Axis", "Dim", "Form", "Kind", "Place", "Unknown", "analyse"]
