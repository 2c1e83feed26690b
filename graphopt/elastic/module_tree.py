"""`Tree`: the parameters, buffers and modules of an extracted subnet, and how code says them."""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from graphopt.elastic.mode_states import ModeState
from graphopt.errors import ElasticError

CONSTANTS = "graph_constants"
"""Where the module keeps tensors that the model's code made: buffers that are not saved with its state."""


class Tree:
    """The parameters and buffers of the module by path, and how code says them.

    ``parameters``, ``saved``, ``unsaved``: tensors by name (unsaved: buffers that no state dict has); ``aliases``:
    names of tied tensors, with the names that they stand for; ``frozen``: parameters that are not trained.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, torch.Tensor], states: Mapping[bool, ModeState]):
        trained = {n: p.requires_grad for n, p in model.named_parameters()}
        persistent = set(model.state_dict(keep_vars=True))
        self.parameters = {n: tensors[n] for n in trained if n in tensors}
        buffers = {n: tensors[n] for n, _ in model.named_buffers() if n in tensors}
        self.saved = {n: t for n, t in buffers.items() if n in persistent}
        self.unsaved = {n: t for n, t in buffers.items() if n not in persistent}
        self.frozen = [n for n in self.parameters if not trained[n]]
        if other := tensors.keys() - self.parameters.keys() - buffers.keys():
            raise ElasticError(f"extract: {min(other)} is no tensor of the model")
        self.constants: dict[tuple[bool, str], str] = {}
        for training, state in states.items():
            for node in state.graph.graph.find_nodes(op="get_attr"):
                self._constant(training, str(node.target), state.graph.constants[str(node.target)])
        first = {id(t): n for n, t in all_tensors(model)}
        every = self.values()
        self.aliases = {}
        for name, tensor in all_tensors(model, twice=True):
            if first[id(tensor)] != name and first[id(tensor)] in every:
                self.aliases[name] = first[id(tensor)]
        order = [n for n, _ in all_tensors(model, twice=True)]
        names = [n for n in order if n in every or n in self.aliases] + [n for n in every if n not in set(order)]
        self.paths: list[str] = []
        for name in names:
            parts = name.split(".")[:-1]
            self.paths += [".".join(parts[: i + 1]) for i in range(len(parts))]
        self.paths = list(dict.fromkeys(self.paths))
        self.mappings = {p.rpartition(".")[0] for p in self.paths if not _attribute(p.rpartition(".")[2])}

    def _constant(self, training: bool, target: str, value: torch.Tensor) -> None:
        """A constant of a graph as a buffer; the same one in both modes where they are equal."""
        for name, known in self.unsaved.items():
            if name.startswith(f"{CONSTANTS}.") and known.dtype == value.dtype and torch.equal(known, value):
                self.constants[training, target] = name
                return
        taken = sum(name.startswith(f"{CONSTANTS}.") for name in self.unsaved)
        self.constants[training, target] = f"{CONSTANTS}.c{taken}"
        self.unsaved[f"{CONSTANTS}.c{taken}"] = value

    def expression(self, name: str) -> str:
        """How code says a tensor: ``self.layers["0"].weight``."""
        *path, last = name.split(".")
        where = self.module(".".join(path))
        return f"{where}.{last}" if _attribute(last) else f'getattr({where}, "{last}")'

    @staticmethod
    def module(path: str) -> str:
        """How code says a module."""
        return "self" + "".join(f".{p}" if _attribute(p) else f'["{p}"]' for p in path.split(".") if p)

    def init(self) -> list[str]:
        """The lines that make modules, parameters and buffers."""
        lines = [f"{self.module(path)} = {self._container(path)}" for path in self.paths]
        for name, tensor in self.parameters.items():
            rest = ", requires_grad=False" if name in self.frozen else ""
            lines.append(self._register("parameter", name, f"nn.Parameter({_empty(tensor)}{rest})"))
        for name, tensor in self.saved.items():
            lines.append(self._register("buffer", name, _empty(tensor)))
        for name, tensor in self.unsaved.items():
            lines.append(self._register("buffer", name, f"{_empty(tensor)}, persistent=False"))
        for name, first in self.aliases.items():
            kind = "parameter" if first in self.parameters else "buffer"
            lines.append(self._register(kind, name, self.expression(first)))
        return lines

    def _register(self, kind: str, name: str, value: str) -> str:
        path, _, last = name.rpartition(".")
        return f'{self.module(path)}.register_{kind}("{last}", {value})'

    def _container(self, path: str) -> str:
        return "nn.ModuleDict()" if path in self.mappings else "nn.Module()"

    @property
    def base(self) -> str:
        """The class of the module itself: one with names that are no identifiers is a mapping."""
        return "nn.ModuleDict" if "" in self.mappings else "nn.Module"

    def values(self) -> dict[str, torch.Tensor]:
        """All tensors by name, but aliases."""
        return {**self.parameters, **self.saved, **self.unsaved}


def all_tensors(model: nn.Module, twice: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a model with their names; tied ones once, or under each name that they have."""
    yield from model.named_parameters(remove_duplicate=not twice)
    yield from model.named_buffers(remove_duplicate=not twice)


def _attribute(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _empty(tensor: torch.Tensor) -> str:
    """Code of a tensor without values, in this memory order."""
    shape = tuple(tensor.shape)
    if tensor.is_contiguous() or 0 in tensor.stride():
        return f"torch.empty({shape}, dtype={tensor.dtype})"
    return f"torch.empty_strided({shape}, {tensor.stride()}, dtype={tensor.dtype})"
