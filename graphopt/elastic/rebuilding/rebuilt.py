"""`rebuilt`: a subnet as a model of the class that it was cut from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from graphopt.elastic.choice import Choice
from graphopt.elastic.mode_states import ModeState
from graphopt.elastic.rebuilding.comparison import difference
from graphopt.elastic.rebuilding.configurations import from_configuration, has_configuration
from graphopt.elastic.rebuilding.copies import small_copy
from graphopt.elastic.rebuilding.refusal import NotRebuilt
from graphopt.elastic.space import Space


def rebuilt(space: Space, choice: Choice, states: Mapping[bool, ModeState], written: nn.Module) -> nn.Module:
    """The subnet of ``choice`` as a model of the class of ``space.model``, in the mode of that.

    Args:
        space, choice: the subnet.
        states: of the subnet, by mode.
        written: the same subnet as a written module, whose weights are copied. What is given computes the same bits
            with the same random numbers, in each of the modes, on the space's own batch and on a longer one.

    Raises:
        NotRebuilt: there is no such model.
    """
    made = from_configuration if has_configuration(space.model) else small_copy
    with torch.random.fork_rng():  # constructors draw weights
        model = made(space, choice, states, written)
    if why := difference(space, model, written, states):
        raise NotRebuilt(why)
    return model
