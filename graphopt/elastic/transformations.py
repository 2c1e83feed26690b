"""Transformations: what the weight of a layer becomes in a subnet, by a function that may have parameters of its own.

A layer whose choices are n transformations draws m of them in a step, and the i-th draws of all layers are subnet i.
Their parameters are trained, saved and extracted with it. The matrices between kernel sizes of Once-for-All are one
case (`Linear`), scales or whole weights of its own for each size another (`Own`: switchable norms).

A transformation is given the weight as wide as the subnet has it, so its parameters do not depend on widths: they act
on the positions of a kernel, or are one number where a weight has none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from graphopt.elastic.kernel_sizes import crop_padding, refresh, small_window
from graphopt.errors import ElasticError
from graphopt.graph.draft import Draft
from graphopt.graph.stateless import functional_call
from graphopt.graph.torch_internals import FakeTensorMode, fake_mode_of
from graphopt.graph.training_graph import Input, InputKind, Phase

if TYPE_CHECKING:
    from graphopt.elastic.subnet import Subnet

PREPARES = "prepares"
"""In the metadata of a node that computes the subnet's weight from the shared one: the name of that weight."""


class Transformation(nn.Module, ABC):
    """What a weight becomes. Subclasses implement `forward`; those with parameters make them in `fit`.

    ``kernel``: the size of the kernels that it gives; None: that of those it is given. Else the shape must stay.

    Example:
        >>> class Noisy(Transformation):
        ...     def forward(self, weight):
        ...         return weight + 0.01 * weight.abs()
    """

    def __init__(self, kernel: int | None = None):
        super().__init__()
        if kernel is not None and (type(kernel) is not int or kernel < 1):
            raise ElasticError(f"kernel: expected a positive int or None, got {kernel!r}")
        self.kernel = kernel

    def fit(self, weight: Tensor) -> None:
        """Make the parameters, for the full weight of the layer. Called once, by the space."""

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """The weight of the subnet, from the shared one ``[out, in, *kernel]``, which may be narrower than the full."""

    def centre(self, weight: Tensor) -> Tensor:
        """``weight`` with kernels of the size ``kernel``, cropped about their centre; a view."""
        if self.kernel is None:
            return weight
        for dim, (k, s) in enumerate(zip(weight.shape[2:], small_window(weight.shape[2:], self.kernel))):
            if k != s:
                weight = weight.narrow(dim + 2, (k - s) // 2, s)
        return weight


class Identity(Transformation):
    """The weight as it is, or the centre of its kernels."""

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        return self.centre(weight)


class Linear(Transformation):
    """A learned matrix over the positions of a kernel (a scale, where there is one position); the identity at first."""

    matrix: nn.Parameter

    def fit(self, weight: Tensor) -> None:
        """See `Transformation.fit`."""
        self.matrix = nn.Parameter(torch.eye(_positions(self.centre(weight)), dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        small = self.centre(weight)
        return F.linear(_flat(small), self.matrix).reshape(small.shape)


class NonLinear(Transformation):
    """``w + up(activation(down(w)))`` over the positions of a kernel, with learned matrices; the identity at first.

    ``hidden``: how many features stand between, by default as many as positions.
    """

    down: nn.Parameter
    up: nn.Parameter

    def __init__(
        self, kernel: int | None = None, *, hidden: int | None = None, activation: Callable[[Tensor], Tensor] = F.gelu
    ):
        super().__init__(kernel)
        self.hidden, self.activation = hidden, activation

    def fit(self, weight: Tensor) -> None:
        """See `Transformation.fit`."""
        positions = _positions(self.centre(weight))
        hidden = self.hidden or positions
        self.down = nn.Parameter(torch.randn(hidden, positions).to(weight) / positions**0.5)
        self.up = nn.Parameter(torch.zeros(positions, hidden).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        small = self.centre(weight)
        flat = _flat(small)
        return (flat + F.linear(self.activation(F.linear(flat, self.down)), self.up)).reshape(small.shape)


class Own(Transformation):
    """A weight of its own in place of the shared one, from which it starts; narrower subnets have the same part of it
    as of the shared one."""

    weight: nn.Parameter

    def fit(self, weight: Tensor) -> None:
        """See `Transformation.fit`."""
        self.weight = nn.Parameter(self.centre(weight).detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        own: Tensor = self.weight
        for dim, size in enumerate(self.centre(weight).shape):
            if own.shape[dim] != size:
                own = own.narrow(dim, 0, size)
        return own


class InTurn(Transformation):
    """Several transformations one behind the other: 7 to 5 to 3."""

    steps: Sequence[Transformation]

    def __init__(self, steps: Iterable[Transformation]):
        steps = list(steps)
        sizes = [step.kernel for step in steps if step.kernel is not None]
        super().__init__(sizes[-1] if sizes else None)
        self.steps = nn.ModuleList(steps)  # type: ignore[assignment]

    def fit(self, weight: Tensor) -> None:
        """See `Transformation.fit`. Steps that were fitted for another one keep their parameters."""
        for step in self.steps:
            if not any(True for _ in step.parameters()):
                step.fit(weight)
            with torch.no_grad():
                weight = step(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """See the class."""
        for step in self.steps:
            weight = step(weight)
        return weight


def kernel_matrices(sizes: Sequence[int]) -> dict[int, Transformation]:
    """For each kernel size its transformation, by matrices from one size to the next smaller one, as Once-for-All has
    them: that of 5 x 5 is used on the way to 3 x 3 too. ``sizes`` ascend; the last one is the full kernel."""
    found: dict[int, Transformation] = {sizes[-1]: Identity()}
    steps: list[Transformation] = []
    for size in sizes[-2::-1]:
        steps.append(Linear(size))
        found[size] = InTurn(steps) if len(steps) > 1 else steps[0]
    return found


def draw(counts: Mapping[str, int], m: int, generator: torch.Generator | None = None) -> list[dict[str, int]]:
    """m of each layer's transformations, by index: the i-th draws of all layers are subnet i.

    Args:
        counts: how many transformations each layer has, by the layer's name.
        m: how many subnets there are. A layer with fewer transformations uses all of them before one comes again.
    """
    if m < 1 or any(n < 1 for n in counts.values()):
        raise ElasticError(f"draw: expected m >= 1 and at least one transformation a layer, got m={m}, {dict(counts)}")
    drawn = {layer: _drawn(n, m, generator) for layer, n in counts.items()}
    return [{layer: indices[i] for layer, indices in drawn.items()} for i in range(m)]


def _drawn(n: int, m: int, generator: torch.Generator | None) -> list[int]:
    found: list[int] = []
    while len(found) < m:
        found += torch.randperm(n, generator=generator).tolist()
    return found[:m]


def _positions(weight: Tensor) -> int:
    return prod(weight.shape[2:])


def _flat(weight: Tensor) -> Tensor:
    return weight.reshape(*weight.shape[:2], _positions(weight))


# -- in a graph ----------------------------------------------------------------------------------------------------


def own_weights(transformation: Transformation) -> dict[str, nn.Parameter]:
    """The weights of `Own` in a transformation, which have the channels of the shared one, by name."""
    paths = ((path, m) for path, m in transformation.named_modules() if isinstance(m, Own))
    return {f"{path}.weight" if path else "weight": own.weight for path, own in paths}


def inserted(draft: Draft, origin: fx.Node, name: str, label: str, transformation: Transformation) -> None:
    """Transform a weight in a draft before anything reads it.

    Args:
        draft: of the subnet, with its widths.
        origin: the placeholder of the weight in the graph that the draft was made of.
        name: of the weight.
        label: of the transformation; its parameters become inputs of the graph, ``label.parameter``.

    Where kernels become smaller the padding of their convolutions follows. Raises ElasticError for a transformation
    that changes a shape or cannot be traced, and for a convolution without the padding that a smaller kernel needs.
    """
    weight, shared = draft.node(origin), origin.meta["val"]
    if not weight.users:
        return  # the layer was left out
    before, readers = weight.meta["val"], list(weight.users)
    mode = fake_mode_of(before)
    assert mode is not None
    parameters = dict(transformation.named_parameters())
    own, full = own_weights(transformation), shared.shape
    inputs = []
    for key, parameter in parameters.items():
        shape = tuple(parameter.shape)
        if key in own:  # as wide as the weight is in the subnet
            shape = tuple(before.shape[d] if size == full[d] else size for d, size in enumerate(shape))
        inputs.append(_input(draft, mode, f"{label}.{key}", parameter, shape))

    def run(tensor: Tensor, *given: Tensor) -> Tensor:
        made = functional_call(transformation, dict(zip(parameters, given, strict=True)), (tensor,))
        if is_dense(made) and not any(made is t for t in (tensor, *given)):  # there must be an operator to mark
            return made
        return made.clone()  # in a memory order that a weight by itself has

    try:
        with mode, torch.no_grad():
            parts = make_fx(run)(*(o.meta["val"] for o in (weight, *inputs))).graph
    except Exception as error:  # the user's own code ran: any exception is possible
        first = str(error).strip().partition("\n")[0]
        raise ElasticError(
            f"transformations: {label} cannot be traced on {name} {list(before.shape)}: {first}"
        ) from error
    after = next(iter(reversed(parts.nodes))).args[0].meta["val"]
    window = before.shape[2:]
    wanted = (*before.shape[:2], *small_window(window, transformation.kernel or max(window, default=1)))
    if tuple(after.shape) != wanted or after.dtype != before.dtype:
        raise ElasticError(
            f"transformations: {label} gives {name} the shape {list(after.shape)} ({after.dtype}), expected "
            f"{list(wanted)} ({before.dtype})"
        )
    if after.shape != before.shape:
        crop_padding(weight, before.shape[2:], after.shape[2:])
    meta = {"phase": Phase.FORWARD, "module": name.rpartition(".")[0], "source": "", PREPARES: name}
    _insert(draft, parts, [weight, *inputs], readers, meta)
    if after.shape != before.shape:
        refresh(readers)
    required = set(draft.signature.tree.get("requires_grad", ()))
    required.update(f"{label}.{key}" for key, p in parameters.items() if p.requires_grad)
    draft.signature = replace(draft.signature, tree={**draft.signature.tree, "requires_grad": sorted(required)})


def is_transformed(subnet: Subnet) -> bool:
    """Whether weights of a subnet go through transformations, or are read in part."""
    return bool(subnet.own) or any(PREPARES in node.meta for node in subnet.graph.nodes)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a tensor lie side by side in memory, in any order of its dimensions."""
    size = 1
    for length, stride in sorted(zip(tensor.shape, tensor.stride()), key=lambda pair: pair[1]):
        if length != 1 and stride != size:
            return False
        size *= length if length != 1 else 1
    return True


def _input(draft: Draft, mode: FakeTensorMode, name: str, parameter: nn.Parameter, shape: tuple[int, ...]) -> fx.Node:
    with mode:
        value = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
    return draft.add_input(Input(InputKind.PARAMETER, name), value)


def _insert(
    draft: Draft, parts: fx.Graph, operands: Sequence[fx.Node], readers: Sequence[fx.Node], meta: Mapping[str, object]
) -> None:
    """Copy traced operators behind the inputs of the draft; ``readers`` of the first operand read their result."""
    copies = dict(zip(parts.find_nodes(op="placeholder"), operands, strict=True))
    first = next(n for n in draft.graph.nodes if n.op != "placeholder")
    with draft.graph.inserting_before(first):
        for part in parts.nodes:
            if part.op == "call_function":
                copies[part] = draft.graph.node_copy(part, copies.__getitem__)
                copies[part].meta = {**meta, "val": part.meta["val"]}
            elif part.op == "get_attr":
                raise ElasticError("transformations: a tensor that is no parameter of it; register it as one")
    result = copies[next(iter(reversed(parts.nodes))).args[0]]
    for reader in readers:
        reader.replace_input_with(operands[0], result)
