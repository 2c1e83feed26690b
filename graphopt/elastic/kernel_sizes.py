"""Kernel sizes: convolutions whose kernels can be cropped about their centre, 7 to 5 to 3.

A kernel without its border is the kernel with zeros there, so the function stays what it was, position by position,
where the padding shrinks by as much as the kernel does on each side, ``dilation * (k - k') / 2``. That keeps the shape
of the output for every stride, and for transposed convolutions too. Where there is less padding than that the output
would grow: such a convolution is rigid, with the reason. (Source: Cai et al., Once-for-All, ICLR 2020, 3.2.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.elastic.dimension import Kind, Refused, Value
from graphopt.elastic.handles import Cut, Found, Handle, sizes_of
from graphopt.errors import ElasticError
from graphopt.graph.axes import Axes
from graphopt.graph.draft import Draft, infer
from graphopt.graph.op_rules.arguments import operand, operand_names, set_operand
from graphopt.graph.resize import Resizer, dense_strides
from graphopt.graph.sizes import expression
from graphopt.graph.torch_internals import fake_mode_of, without_guards
from graphopt.graph.training_graph import InputKind

_CAST = torch.ops.aten._to_copy.default
_SLICE = torch.ops.aten.slice.Tensor


class KernelSize(Handle):
    """The size of the kernels of one weight, that of their largest dimension: a kernel of 3 x 7 at size 5 is 3 x 5.

    ``possible``: the sizes that its convolutions allow, ascending, the last is the full one.
    """

    kind = Kind.KERNEL
    full: int

    def __init__(self, weight: fx.Node, name: str, module: str, possible: Sequence[int]):
        self.weight, self.parameter, self.possible = weight, name, tuple(possible)
        self.full = self.possible[-1]
        self.name = f"{module}.kernel" if module else "kernel"
        self.where = (module,)

    def choices(self, wanted: Sequence[int | float] | None) -> tuple[Value, ...]:
        if wanted is None:  # a centre of 1 is another kind of layer: it must be asked for
            return tuple(size for size in self.possible if size > 1)
        if wrong := [w for w in wanted if isinstance(w, bool) or not isinstance(w, (int, float)) or w <= 0]:
            raise ElasticError(f"choices: {self.name} can be {', '.join(map(str, self.possible))}, got {wrong[0]!r}")
        # one list is for kernels of many sizes: what this one cannot have is left out
        return tuple(size for size in sizes_of(self.full, wanted) if size in self.possible)

    def readers(self) -> frozenset[fx.Node]:
        return frozenset(uses(self.weight))

    def cuts(self, value: Value) -> Mapping[str, Mapping[int, Cut]]:
        assert isinstance(value, int)
        window = window_of(self.weight)
        pairs = enumerate(zip(window, small_window(window, value)))
        return {self.parameter: {d + 2: ((k - s) // 2, (k + s) // 2) for d, (k, s) in pairs if k != s}}

    def rewrite(self, draft: Draft, value: Value) -> None:
        assert isinstance(value, int)
        weight = draft.node(self.weight)
        window = window_of(weight)
        crop_padding(weight, window, small_window(window, value))
        old = weight.meta["val"]
        shape = (*old.shape[:2], *small_window(window, value))
        with fake_mode_of(old):  # type: ignore[union-attr]
            strides = dense_strides(shape, old.stride())
            weight.meta["val"] = torch.empty_strided(shape, strides, dtype=old.dtype, device=old.device)
        refresh(list(weight.users))


def find(axes: Axes, resizer: Resizer) -> Found:
    """The kernels of more than one position, in the order of the parameters."""
    handles: list[Handle] = []
    refused: list[Refused] = []
    for name, weight in axes.graph.input_nodes(InputKind.PARAMETER).items():
        layers = [n for n in uses(weight) if is_convolution(n)]
        if not layers or max(window := window_of(weight)) == 1:
            continue
        module = layers[0].meta.get("module", "") or name.rpartition(".")[0]
        possible, why = possible_sizes(weight)
        handle = KernelSize(weight, name, module, possible)
        if why:
            refused.append(Refused(handle.name, Kind.KERNEL, " x ".join(map(str, window)), why, (module,)))
        else:
            handles.append(handle)
    return Found(tuple(handles), tuple(refused))


def possible_sizes(weight: fx.Node) -> tuple[list[int], str]:
    """The sizes that the kernels of a convolution's weight can have, ascending; why, if it is one only."""
    window, readers = window_of(weight), uses(weight)
    whole = max(window)
    possible, reason = [], f"a kernel of {whole} has no smaller centre"
    for size in range(1, whole):
        small = small_window(window, size)
        if any((k - s) % 2 for k, s in zip(window, small)):
            continue
        why = next(filter(None, (_why_not(n, weight, window, small) for n in readers)), "")
        if why:
            reason = why
        else:
            possible.append(size)
    return [*possible, whole], "" if possible else reason


def uses(weight: fx.Node) -> list[fx.Node]:
    """What reads a parameter, through casts and slices of it."""
    found: list[fx.Node] = []
    for user in weight.users:
        found += uses(user) if user.target in (_CAST, _SLICE) and user.args[0] is weight else [user]
    return found


def is_convolution(node: fx.Node) -> bool:
    """Whether a node is a convolution, transposed or not."""
    return getattr(node.target, "_opname", "") in _CONVOLUTIONS


_CONVOLUTIONS = {f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)} | {"convolution", "_convolution"}


def small_window(window: Sequence[int], size: int) -> tuple[int, ...]:
    """The kernel of this window at a smaller size."""
    return tuple(min(k, size) for k in window)


def crop_padding(weight: fx.Node, before: Sequence[int], after: Sequence[int]) -> None:
    """Take what kernels lose off the padding of all convolutions that read ``weight``, in place.

    Raises ElasticError where one has too little padding, or the weight is read by anything else.
    """
    for layer in uses(weight):
        if reason := _why_not(layer, weight, before, after):
            raise ElasticError(f"kernel size: {layer.name} cannot have kernels of {list(after)}: {reason}")
        padding = operand(layer, "padding")
        if not isinstance(padding, str):  # "same" is computed from the kernel
            cut = _cut(layer, before, after)
            set_operand(layer, "padding", [p - c for p, c in zip(_long(padding, len(cut)), cut)])


# -- what a convolution allows -------------------------------------------------------------------------------------


def window_of(weight: fx.Node) -> tuple[int, ...]:
    """The kernel of a weight, ``(1,)`` where it has none."""
    return tuple(int(expression(s)) for s in weight.meta["val"].shape[2:]) or (1,)


def _why_not(node: fx.Node, weight: fx.Node, before: Sequence[int], after: Sequence[int]) -> str:
    """Why a reader of ``weight`` cannot have smaller kernels; empty if it can."""
    if not is_convolution(node):
        return f"{node.target} reads its weight too"
    if not _is_weight(node, weight):
        return f"{node.name} reads it as something else than its weight"
    padding = operand(node, "padding")
    if padding == "same":
        return ""
    cut = _cut(node, before, after)
    given = [0] * len(cut) if padding == "valid" else _long(padding, len(cut))
    if any(p < c for p, c in zip(given, cut)):
        return f"its padding of {list(given)} is less than the {cut} that its kernel loses on each side"
    return ""


def _is_weight(node: fx.Node, weight: fx.Node) -> bool:
    others = [n for name in operand_names(node) if name != "weight" for n in _sources(operand(node, name))]
    return all(origin(n) is not weight for n in others)


def _sources(value: Any) -> list[fx.Node]:
    return [value] if isinstance(value, fx.Node) else []


def origin(node: fx.Node) -> fx.Node:
    """What a value is a cast or slice of."""
    while node.target in (_CAST, _SLICE):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _cut(node: fx.Node, before: Sequence[int], after: Sequence[int]) -> list[int]:
    """What each dimension of the input loses on each side."""
    dilation = _long(operand(node, "dilation"), len(before))
    return [d * (k - s) // 2 for d, k, s in zip(dilation, before, after)]


def _long(value: Any, count: int) -> list[int]:
    """An argument of a convolution with a number for each dimension."""
    numbers: Iterable[int] = value if isinstance(value, (list, tuple)) else [value]
    found = [int(v) for v in numbers]
    return found * count if len(found) == 1 else found


def refresh(readers: Sequence[fx.Node]) -> None:
    """New metadata for casts and slices of a weight whose shape changed; what reads those gives what it gave."""
    for node in readers:
        if node.target in (_CAST, _SLICE):
            mode = fake_mode_of(node.meta["val"])
            assert mode is not None
            with without_guards(mode):
                node.meta["val"] = infer(node)
            refresh(list(node.users))
