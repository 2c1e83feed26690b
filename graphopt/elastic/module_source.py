"""The source of an extracted subnet: a Python file with its class, and a function that loads its weights.

The code is written rather than a `torch.fx.GraphModule` made, because that cannot branch on ``self.training`` (its
forward is traced anew when it is unpickled, which would fix the mode in silence).
"""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from itertools import count
from textwrap import indent
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graphopt.elastic.batch_checks import check_of_one, checks_of
from graphopt.elastic.choice import Choice
from graphopt.elastic.forward_arguments import signature_of
from graphopt.elastic.mode_states import ModeState
from graphopt.elastic.module_code import Body, Expression, Names, methods, nested
from graphopt.elastic.module_tree import Tree
from graphopt.elastic.saving import LOAD

if TYPE_CHECKING:
    from graphopt.elastic.space import Space


def source_of(space: Space, choice: Choice, states: Mapping[bool, ModeState], tree: Tree) -> str:
    """The text of the file, with a class ``Subnet`` and a function ``load``.

    Args:
        space, choice: what is extracted.
        states: of the subnet by mode (whether it is train mode), one or two.
        tree: of its tensors.

    Raises:
        ElasticError: something in the graph, its arguments or its output has no form in code.
    """
    first = next(iter(states.values()))
    signature, batch = signature_of(space.model, first.layout)
    alone = check_of_one(space, states, batch)
    bodies: dict[bool, tuple[Body, str]] = {}
    checks: dict[bool, list[str]] = {}
    imports: set[str] = set()
    for training, state in states.items():
        body = Body(state.graph, _names(state, tree, training, batch), training=training)
        body.lines[:0] = checks[training] = [*alone, *checks_of(space, state, batch, training)]
        imports |= body.imports
        bodies[training] = body, nested(state.nested(map(Expression, body.results)), imports)
    in_eval = None
    if len(states) == 2:
        in_eval = Body(states[True].graph, _names(states[True], tree, True, batch), training=True, in_eval=True)
        in_eval.lines[:0] = checks[True]
    name = type(space.model).__name__
    text = [
        f'"""A subnet of {name}, written by graphopt. It needs PyTorch only.',
        "",
        *(f"{d}: {v}" for d, v in choice.items() if d not in choice.inactive),
        '"""',
        "",
        *sorted({"import torch", *imports}, key=lambda line: (line.startswith("from"), line)),
        "from torch import nn",
        "from torch.nn import functional as F",
        "",
        "aten = torch.ops.aten",
        "",
        "",
        f"class Subnet({tree.base}):",
        "    def __init__(self):",
        "        super().__init__()",
        *(f"        {line}" for line in tree.init()),
        "",
        indent("\n".join(methods(signature, bodies, in_eval)), "    "),
    ]
    return "\n".join(text) + LOAD


def _names(state: ModeState, tree: Tree, training: bool, batch: list[str]) -> Names:
    said = {name: tree.expression(name) for name in state.tensors}
    for (mode, target), name in tree.constants.items():
        if mode is training:
            said[target] = tree.expression(name)
    return Names(said, batch, state.folded)


_numbers = count()


def made_from(code: str, tree: Tree) -> nn.Module:
    """The module of a source, with the tensors of its tree. ``module.code`` is the source."""
    name = f"<graphopt subnet {next(_numbers)}>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)  # readable tracebacks
    namespace: dict[str, Any] = {"__name__": "subnet"}
    exec(compile(code, name, "exec"), namespace)
    module: nn.Module = namespace["Subnet"]()
    tensors = tree.values()
    tensors.update({name: tensors[first] for name, first in tree.aliases.items()})
    devices = {t.device for t in tensors.values()}
    if len(devices) == 1:
        module.to(devices.pop())
    with torch.no_grad():
        for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tensor.copy_(tensors[path])
    module.code = code  # type: ignore[assignment]
    return module
