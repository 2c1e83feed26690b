"""Elastic models: one set of weights, many sizes. `space` finds the dimensions of any model and runs its subnets.

space = graphopt.elastic.space(model, batch)
print(space)                                        # what is elastic, what is not and why
output = space.run(space.sample(seed=0), *inputs)   # gradients land in the model's own parameters
"""

from graphopt.elastic.choice import Choice
from graphopt.elastic.dimension import Dimension, Kind, Refused
from graphopt.elastic.extract import save
from graphopt.elastic.layers import KernelMatrices, draws
from graphopt.elastic.partial_reads import PassOutput, ReadInput
from graphopt.elastic.space import Space, space
from graphopt.elastic.transformations import Identity, InTurn, Linear, NonLinear, Own, Transformation

__all__ = [
    "Choice",
    "Dimension",
    "Identity",
    "InTurn",
    "KernelMatrices",
    "Kind",
    "Linear",
    "NonLinear",
    "Own",
    "PassOutput",
    "ReadInput",
    "Refused",
    "Space",
    "Transformation",
    "draws",
    "save",
    "space",
]
