"""`small_copy`: a copy of a model with small tensors in the place of its large ones.

Modules keep their class. Numbers in them that are sizes follow: those of PyTorch's own layers by what they mean, those
of other modules (``self.num_heads``) by the graph. It knows for each number in the code of a module what it becomes in
the subnet; an attribute that equals such a number follows it, if all equal numbers of that module become the same.
Attributes that forward does not use keep their values.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from graphopt.elastic.choice import Choice
from graphopt.elastic.depths import Depth
from graphopt.elastic.handles import Handle, Tied
from graphopt.elastic.mode_states import ModeState
from graphopt.elastic.module_tree import all_tensors
from graphopt.elastic.rebuilding.layer_sizes import resize_layer
from graphopt.elastic.rebuilding.refusal import NotRebuilt
from graphopt.elastic.space import Space
from graphopt.elastic.subnet import Subnet
from graphopt.graph.axes import Kind as AxisKind
from graphopt.graph.literals import literals


def small_copy(space: Space, choice: Choice, states: Mapping[bool, ModeState], written: nn.Module) -> nn.Module:
    """A copy of ``space.model`` with the tensors of ``written``, without the layers that the choice leaves out.

    Layers that remain keep their names: a ``ModuleList`` without its second element has "0" and "2".

    Raises:
        NotRebuilt: the model cannot be copied, a layer that is left out is no element of a list of modules, or a
            parameter is read by no graph, so that nobody knows its part.
    """
    gone = _left_out(next(iter(states.values())).subnet, choice)
    made = _copied(space.model, written, gone)
    for path in [p for p in gone if not any(p.startswith(f"{other}.") for other in gone)]:
        parent, _, name = path.rpartition(".")
        holder = made.get_submodule(parent)
        if not path or not isinstance(holder, (nn.Sequential, nn.ModuleList)):
            raise NotRebuilt(f"{path or 'what is left out'} is no element of a Sequential or ModuleList")
        delattr(holder, name)
    known = [_numbers(state.subnet) for state in states.values()]
    operators = _operators(states.values())
    for path, module in made.named_modules():
        resize_layer(module, operators[path])
        if not type(module).__module__.startswith("torch.nn."):
            _resize_attributes(module, [numbers[path] for numbers in known])
    return made


def _left_out(subnet: Subnet, choice: Choice) -> list[str]:
    """The paths of the layers that a choice leaves out."""
    found: list[str] = []
    for name, value in choice.items():
        for depth in _depths(subnet.origin.handles[name]):
            found += [run.module for run in depth.left_out(value)]
    return list(dict.fromkeys(found))


def _depths(handle: Handle) -> list[Depth]:
    parts: Sequence[Handle] = handle.parts if isinstance(handle, Tied) else [handle]
    return [part for part in parts if isinstance(part, Depth)]


def _copied(model: nn.Module, written: nn.Module, gone: Sequence[str]) -> nn.Module:
    """A copy of the model with the tensors of the written module. Those of layers that are gone are not copied."""
    small = dict(all_tensors(written, twice=True))
    copied: dict[int, Any] = {}  # what `copy.deepcopy` takes for copied already
    for name, tensor in all_tensors(model):
        if name in small:
            copied[id(tensor)] = copy.deepcopy(small[name])
        elif any(name.startswith(f"{path}.") for path in gone):
            copied[id(tensor)] = tensor
        elif isinstance(tensor, nn.Parameter):
            raise NotRebuilt(f"nothing reads {name}, so that its part is not known")
    try:
        made = copy.deepcopy(model, copied)
    except Exception as error:  # modules may hold anything: locks, files, results of a forward
        raise NotRebuilt(f"it cannot be copied: {type(error).__name__}: {error}") from error
    return made


Numbers = Mapping[int, set[tuple[Any, bool]]]
"""The numbers in the code of a module: what each of them is in a subnet, and whether it counts heads."""


def _numbers(subnet: Subnet) -> Mapping[str, Numbers]:
    """By the path of the module."""
    origin = subnet.origin
    sizes = {axis: len(kept) for axis, kept in subnet.chosen.items()}
    found: dict[str, dict[int, set[tuple[Any, bool]]]] = defaultdict(lambda: defaultdict(set))
    for literal in literals(origin.graph, origin.axes):
        if isinstance(literal.value, int):
            counted = bool(literal.axes) and all(axis.kind is AxisKind.HEADS for axis in literal.axes)
            found[literal.node.meta.get("module", "")][literal.value].add((literal.at(sizes), counted))
    return found


_HEADS = re.compile(r"heads?$")
_SIZES = re.compile(r"head|dim|hidden|width|channel|feature|embed|inner|planes|filters|units|^d_|(^|_)size$")
_OTHERS = re.compile(r"window|patch|image|vocab|seq|len|max|kernel|batch|idx|index")
"""Which names of attributes say that they are sizes of layers. What is in both is none: an attribute that happens to
equal a size may be a limit that forward compares with, of which a graph knows nothing."""


def _resize_attributes(module: nn.Module, known: Iterable[Numbers]) -> None:
    """Give integer attributes of a module what they are in the subnet, where its code tells. Of 4 heads of size 4 the
    name tells which is which."""
    for name, value in list(vars(module).items()):
        if type(value) is not int or not _SIZES.search(name) or _OTHERS.search(name):
            continue
        meant = [pair for numbers in known for pair in numbers.get(value, ())]
        if len({new for new, _ in meant}) > 1:
            meant = [(new, counted) for new, counted in meant if counted == bool(_HEADS.search(name))]
        new = {new for new, _ in meant}
        if len(new) == 1:
            setattr(module, name, new.pop())


def _operators(states: Iterable[ModeState]) -> Mapping[str, list[fx.Node]]:
    """The operators of a subnet by the path of the module that they belong to."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for state in states:
        for node in state.graph.nodes:
            if node.op == "call_function":
                found[node.meta.get("module", "")].append(node)
    return found
