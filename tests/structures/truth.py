"""What is known of a small module: `Structure`, made by `example`; `taken` and `rescaled` make variants of a module.

The truth is a table of the shapes of all parameters and buffers, each size an expression over the sizes that the
constructor takes: ``+`` is a concatenation and ``*`` a product, outermost first; a number is a fixed size.
"""

from __future__ import annotations

import ast
import copy
import fnmatch
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Place = tuple[str, int]
"""The name of a parameter or buffer, and a dimension of it."""

WORDS = {"inputs": "input", "outputs": "output"}
"""Sizes that no structure may change, and what the reason must say."""


@dataclass(frozen=True)
class Structure:
    """A module, a batch for it, and which of its axes are free.

    Free: the indices may be permuted, in all places alike, and the outputs stay the same up to rounding; and an index
    may be removed in all places, which gives a smaller network of the same form (with other statistics where a mean
    or a norm runs over the axis). ``free`` is complete, so that a dimension in none of its places is not free.
    """

    name: str
    build: Callable[..., nn.Module]
    """The module, the same numbers each time. Takes other sizes by keyword, unless ``rebuilds`` is False."""
    batch: tuple[Tensor, ...]
    free: dict[str, tuple[int, frozenset[Place]]]
    """Size and places of each free group by its label. A place may be shared: 12 x 64, or one beside the other."""
    frozen: dict[Place, str]
    """Dimensions larger than 1 without a free group, with a word that the reason contains (or an empty string)."""
    depth: tuple[str, ...] = ()
    """Paths of modules that can be left out, because what enters and what leaves has the same axes."""
    note: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Size by label, of groups that are not free too."""
    layout: Mapping[Place, str] = field(default_factory=dict)
    """The expression of every dimension: ``heads*size``, ``left+right``, ``3*heads*size``."""
    same_size: tuple[frozenset[str], ...] = ()
    """Free groups that are permuted apart, but that one operator cuts into equal sizes: one group is right too."""
    rebuilds: bool = True


def example(
    name: str,
    batch: Tensor | tuple[Tensor, ...],
    shapes: str,
    *,
    frozen: Mapping[str, str] | None = None,
    depth: str = "",
    same_size: str = "",
    rebuilds: bool = True,
) -> Callable[[type[nn.Module]], Structure]:
    """Makes a class of modules a `Structure`. The constructor's defaults are the sizes; its docstring is the note.

    - ``shapes``: a line a tensor (or pattern of names): its name and the expressions of its sizes. The name of a module
      stands for its weight, and what else it has of one dimension is as long as the first one of the weight.
    - ``frozen``: labels that are not free, and a word of the reason. ``inputs`` and ``outputs`` never are.

    Raises ValueError when the table misses a tensor or contradicts it.
    """
    words = {**WORDS, **(frozen or {})}

    def structure(cls: type[nn.Module]) -> Structure:
        sizes = {p.name: p.default for p in inspect.signature(cls).parameters.values()}
        build = functools.partial(_seeded, cls)
        places = {n: tensor.shape for n, tensor in tensors(build()).items()}
        layout = _layout(shapes, places)
        for (tensor, dim), expression in layout.items():
            if positions(expression, sizes)[1] != places[tensor][dim]:
                raise ValueError(f"{name}: {tensor} has the shape {tuple(places[tensor])}, not {expression} in {dim}")
        free = {
            label: (size, frozenset(p for p, e in layout.items() if label in labels(e)))
            for label, size in sizes.items()
            if label not in words
        }
        for label, (_, where) in free.items():
            if not where:
                raise ValueError(f"{name}: no tensor has the size {label}")
        taken_up = frozenset().union(*(where for _, where in free.values()))
        rest = {
            place: next((words[label] for label in labels(expression)), "")
            for place, expression in layout.items()
            if place not in taken_up and places[place[0]][place[1]] > 1
        }
        return Structure(
            name,
            build,
            batch if isinstance(batch, tuple) else (batch,),
            free,
            rest,
            depth=tuple(depth.split()),
            note=inspect.cleandoc(cls.__doc__ or ""),
            sizes=sizes,
            layout=layout,
            same_size=(frozenset(same_size.split()),) if same_size else (),
            rebuilds=rebuilds,
        )

    return structure


def values(*shape: int) -> Tensor:
    """Random numbers, the same for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def indices(below: int, *shape: int) -> Tensor:
    """Random indices, the same for the same shape."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(sum(shape)))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tensor with two names has the first one."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def labels(expression: str) -> list[str]:
    """The names in an expression."""
    return [node.id for node in ast.walk(_parsed(expression)) if isinstance(node, ast.Name)]


def positions(
    expression: str, sizes: Mapping[str, int], chosen: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, int]:
    """Where the chosen indices of each label lie in a dimension, and how long the dimension is without a choice.

    >>> positions("2*a+b", {"a": 3, "b": 1}, {"a": torch.tensor([2, 0])})
    (tensor([2, 0, 5, 3, 6]), 7)
    """

    def walk(node: ast.expr) -> tuple[Tensor, int]:
        if isinstance(node, ast.BinOp):
            (left, many), (right, few) = walk(node.left), walk(node.right)
            if isinstance(node.op, ast.Add):
                return torch.cat([left, right + many]), many + few
            return (left[:, None] * few + right).flatten(), many * few
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return torch.arange(node.value), node.value
        assert isinstance(node, ast.Name)
        size = sizes[node.id]
        return (chosen or {}).get(node.id, torch.arange(size)), size

    return walk(_parsed(expression))


def taken(
    structure: Structure, model: nn.Module, chosen: Mapping[str, Tensor], but: Place | None = None
) -> dict[str, Tensor]:
    """The parameters and buffers with the chosen indices of each label, in all places but one."""
    result = {}
    for name, tensor in tensors(model).items():
        tensor = tensor.detach()
        for dim in range(tensor.dim()):
            expression = structure.layout[name, dim]
            if (name, dim) != but and not chosen.keys().isdisjoint(labels(expression)):
                tensor = tensor.index_select(dim, positions(expression, structure.sizes, chosen)[0])
        result[name] = tensor.clone()
    return result


def load(model: nn.Module, numbers: Mapping[str, Tensor]) -> nn.Module:
    """Puts numbers into the parameters and buffers of a module."""
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            tensor.copy_(numbers[name])
    return model


def rescaled(model: nn.Module, seed: int) -> nn.Module:
    """A copy with other parameters, spread so widely that no attention is near to uniform and no norm is the identity.

    A fresh module hides errors: its biases are zero, its norms scale by 1, and small weights make softmax a mean.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor.copy_(drawn.abs() + 0.3)
            elif name.endswith("running_mean") or (isinstance(tensor, nn.Parameter) and tensor.dim() < 2):
                tensor.copy_(drawn * 0.7 + 0.3)
            elif isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor.copy_(drawn * 1.5 * tensor[0].numel() ** -0.5)
    return model


@functools.cache
def _parsed(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


def _seeded(cls: type[nn.Module], **sizes: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(**sizes)


def _layout(shapes: str, places: Mapping[str, torch.Size]) -> dict[Place, str]:
    layout: dict[Place, str] = {}
    for line in filter(None, map(str.strip, shapes.splitlines())):
        pattern, *sizes = line.split()
        found = {name: sizes for name in fnmatch.filter(places, pattern)}
        for name, shape in places.items():
            if not found.get(name) and name.rpartition(".")[0] == pattern:
                found[name] = sizes if len(shape) == len(sizes) else sizes[: len(shape)]
        for name, expressions in found.items():
            if len(expressions) != len(places[name]) or (name, 0) in layout:
                raise ValueError(f"{line!r} does not fit {name} of shape {tuple(places[name])}, or came before")
            layout.update({(name, dim): expression for dim, expression in enumerate(expressions)})
        if not found:
            raise ValueError(f"{line!r} names no tensor; there are {', '.join(places)}")
    missing = {(name, dim) for name, shape in places.items() for dim in range(len(shape))} - set(layout)
    if missing:
        raise ValueError(f"no line for {', '.join(sorted({name for name, _ in missing}))}")
    return layout
