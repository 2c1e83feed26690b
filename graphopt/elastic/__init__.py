"""Elastic models: one set of weights, many sizes. `space` finds the dimensions of any model and runs its subnets.

space = graphopt.elastic.space(model, batch)
print(space)                                        # what is elastic, what is not and why
output = space.run(space.sample(seed=0), *inputs)   # gradients land in the model's own parameters
"""

from graphopt.elastic.choice import Choice
from graphopt.elastic.dimension import Dimension, Kind, Refused
from graphopt.elastic.space import Space, space

__all__ = ["Choice", "Dimension", "Kind", "Refused", "Space", "space"]
