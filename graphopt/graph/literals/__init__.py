"""Literals: the integers written into a graph, as expressions over axes."""

from graphopt.graph.literals.reading import Literal, literals
from graphopt.graph.literals.roles import Role

__all__ = ["Literal", "Role", "literals"]
