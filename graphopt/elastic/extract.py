"""`extract`: a subnet as a plain module of its own, that needs PyTorch only.

The module has small weights of its own under the names that they have in the model. By default it is written as Python
code (`module_source`), with a forward of plain operators in train and in eval mode, for any batch size; it can be
trained, exported and saved like any module. `save` writes its code and weights; who loads them needs no graphopt. What
its layers compute is what the supernet's slice computes, bit for bit: the same operators on the same values in the same
memory order.

With ``rebuild=True`` it is a model of the user's own class (`rebuilding`), where there is one that computes the same.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from graphopt.elastic.choice import Choice
from graphopt.elastic.mode_states import in_both_modes
from graphopt.elastic.module_source import made_from, source_of
from graphopt.elastic.module_tree import Tree
from graphopt.elastic.rebuilding import NotRebuilt, rebuilt
from graphopt.errors import GraphoptWarning

if TYPE_CHECKING:
    from graphopt.elastic.space import Space


def extract(space: Space, choice: Choice, *, rebuild: bool = False) -> nn.Module:
    """The subnet of ``choice`` as a module of its own.

    Parameters and buffers are copies of the slices, under the model's names; those of layers that are left out, or that
    the forward pass does not read, are not there. A transformed weight is stored as it is after the transformation.

    Args:
        space: the space.
        choice: one of its choices.
        rebuild: whether to give a model of the class of ``space.model``, with its methods and all its arguments: a copy
            of the model with smaller layers, or for a Hugging Face model one of a smaller configuration. It is given
            only if it computes the bits that the written module computes, in both modes. Where the class cannot say
            what the subnet is (layers that differ where there is one number for all of them), a warning says why, and
            the written module is given.

    Returns:
        Without ``rebuild`` a module whose ``code`` is its Python source; `save` writes source and weights. Of the two
        modes that which the model is in is as it is, with single modules in another mode (frozen batch norms); the
        other one is what ``model.train()`` or ``model.eval()`` makes. Arguments that were no tensors when the space was
        made (flags, None) are as they were then, and no arguments any more. Tensors made in forward stay on the device
        of the capture.

    Raises:
        ElasticError: the choice is outside of the space, neither mode could be captured, or the model's output holds
            something that no code can make.

    Example:
        >>> import torch, graphopt.elastic
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))
        >>> space = graphopt.elastic.space(net, torch.randn(5, 4))
        >>> small = space.extract({"0.hidden": 4})
        >>> {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
        {'0.weight': (4, 4), '0.bias': (4,), '2.weight': (2, 4), '2.bias': (2,)}
        >>> x = torch.randn(3, 4)
        >>> torch.equal(small.eval()(x), space.run({"0.hidden": 4}, x)) if not net.eval().training else None
        True
        >>> space.extract({"0.hidden": 4}, rebuild=True)
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): Dropout(p=0.1, inplace=False)
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    states = in_both_modes(space, choice)
    tensors: dict[str, torch.Tensor] = {}
    for state in states.values():
        tensors.update(state.tensors)
    tree = Tree(space.model, tensors, states)
    written = made_from(source_of(space, choice, states, tree), tree)
    if not rebuild:
        return written
    try:
        return rebuilt(space, choice, states, written)
    except NotRebuilt as why:
        name = type(space.model).__name__
        warnings.warn(f"extract: the subnet is no {name} but plain code, because {why}", GraphoptWarning, stacklevel=3)
        return written
