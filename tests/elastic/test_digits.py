"""A short training on real digits: subnets of one supernet against the same nets trained alone, with one seed.

The bound is loose, as the training is short; `benchmarks/elastic_training.py` measures at full length.
"""

import pytest

pytest.importorskip("sklearn")

from torch.nn import functional as F

from benchmarks.digit_supernets import Batches, accuracy_of, adamw, alone, cosine, space_of
from graphopt.elastic.progressive import joint_mode
from graphopt.elastic.training import train

STEPS = 80


def test_subnets_of_a_supernet_are_nearly_as_good_as_nets_trained_alone():
    space = space_of("resnet", 0)
    optimizer = adamw(space.model.parameters())
    train(space, Batches(0), F.cross_entropy, optimizer, joint_mode(STEPS), scheduler=cosine, progress=False)
    for choice in (space.full, space.smallest):
        together, by_itself = accuracy_of(space, choice), alone("resnet", choice, 0, STEPS)
        assert by_itself > 70  # the data can be learnt in so few steps
        assert together > by_itself - 12
