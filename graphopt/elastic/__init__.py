"""Elastic models: one set of weights, many sizes. `space` finds the dimensions of any model and runs its subnets.

space = graphopt.elastic.space(model, batch)
print(space)                                        # what is elastic, what is not and why
output = space.run(space.sample(seed=0), *inputs)   # gradients land in the model's own parameters
graphopt.elastic.train(space, loader, loss, optimizer, 1000)
net = space.extract(space.select({"flops": 1e9}).choice)
"""

from graphopt.elastic.batch_norm_statistics import batch_norm_statistics, evaluate
from graphopt.elastic.choice import Choice
from graphopt.elastic.dimension import Dimension, Kind, Refused
from graphopt.elastic.distillation import InPlaceDistillation
from graphopt.elastic.layers import KernelMatrices
from graphopt.elastic.partial_reads import PassOutput, ReadInput
from graphopt.elastic.prices import Prices, Training
from graphopt.elastic.progressive import Convergence, Stage, joint_mode, progressive_mode
from graphopt.elastic.region import draws
from graphopt.elastic.sampler import Sampler, subnets_for
from graphopt.elastic.saving import save
from graphopt.elastic.select import Budget, Candidate, Selection
from graphopt.elastic.space import Space, space
from graphopt.elastic.step import ElasticStep
from graphopt.elastic.training import restore, train
from graphopt.elastic.transformations import Identity, InTurn, Linear, NonLinear, Own, Transformation

__all__ = [
    "Budget",
    "Candidate",
    "Choice",
    "Convergence",
    "Dimension",
    "ElasticStep",
    "Identity",
    "InPlaceDistillation",
    "InTurn",
    "KernelMatrices",
    "Kind",
    "Linear",
    "NonLinear",
    "Own",
    "PassOutput",
    "Prices",
    "ReadInput",
    "Refused",
    "Sampler",
    "Selection",
    "Space",
    "Stage",
    "Training",
    "Transformation",
    "batch_norm_statistics",
    "draws",
    "evaluate",
    "joint_mode",
    "progressive_mode",
    "restore",
    "save",
    "space",
    "subnets_for",
    "train",
]
