"""What the user says about single layers: transformations of their weights, and parts of inputs and outputs.

A space finds widths, heads, kernels and depth by itself. These choices it cannot know: they are the user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from graphopt.elastic.axis_sizes import AxisSize
from graphopt.elastic.dimension import Kind, Refused, Value
from graphopt.elastic.handles import Cut, Found, Handle, sizes_of_cuts
from graphopt.elastic.kernel_sizes import KernelSize, is_convolution, possible_sizes, small_window, uses, window_of
from graphopt.elastic.partial_reads import PassOutput, ReadInput, ReadPart, passed_axis
from graphopt.elastic.transformations import Identity, Transformation, inserted, kernel_matrices, own_weights
from graphopt.errors import ElasticError
from graphopt.graph.axes import Axes, Axis
from graphopt.graph.draft import Draft
from graphopt.graph.training_graph import InputKind


class KernelMatrices:
    """For each smaller kernel a learned matrix over its positions, 7 to 5 to 3; the identity at first."""


Option: TypeAlias = Transformation | ReadInput | PassOutput | KernelMatrices
"""What a layer's choices can be."""


class Layers(nn.Module):
    """The choices of single layers, and the parameters of transformations: its own `state_dict` is theirs.

    Args:
        model: whose layers they are.
        wanted: by path of a module, or shell pattern on paths (``stages.*.conv``), a list of options. Each option
            object that has parameters belongs to one layer: with a pattern that means several, give a class or a
            function without arguments that makes one.

    Raises:
        ElasticError: a pattern that means no module with a weight, or something that is no option.
    """

    def __init__(self, model: nn.Module, wanted: Mapping[str, Any] | None):
        super().__init__()
        self.reads: dict[str, list[ReadInput]] = {}
        self.passes: dict[str, list[PassOutput]] = {}
        self.matrices: set[str] = set()
        self.lists: dict[str, list[Transformation]] = {}
        self.kernels: dict[str, dict[int, Transformation]] = {}
        self.transformations = nn.Module()  # its parameters have the paths of their layers
        modules = dict(model.named_modules())
        for pattern, options in (wanted or {}).items():
            paths = [p for p, m in modules.items() if isinstance(getattr(m, "weight", None), nn.Parameter)]
            meant = [p for p in paths if fnmatchcase(p, pattern)]
            if not meant:
                raise ElasticError(f"layers: no module with a weight matches {pattern!r}; there are {', '.join(paths)}")
            several = options if isinstance(options, (list, tuple)) else [options]
            for path in meant:
                for option in several:
                    self._take(path, option, alone=len(meant) == 1)
        for path, transformations in self.lists.items():
            if (f"{path}.weight" if path else "weight") in self.matrices:
                raise ElasticError(
                    f"layers: {path} has KernelMatrices and transformations, which would go through each other; for "
                    "matrices among transformations give Linear(3) and the like"
                )
            self._fit(path, transformations, modules[path].weight)

    def _take(self, path: str, option: Any, *, alone: bool) -> None:
        if isinstance(option, type) or (callable(option) and not isinstance(option, nn.Module)):
            option = option()
        elif isinstance(option, Transformation) and not alone and type(option) is not Identity:
            raise ElasticError(
                f"layers: {type(option).__name__} is given to several layers; give a function that makes one for each"
            )
        name = f"{path}.weight" if path else "weight"
        if isinstance(option, ReadInput):
            self.reads.setdefault(name, []).append(option)
        elif isinstance(option, PassOutput):
            self.passes.setdefault(name, []).append(option)
        elif isinstance(option, KernelMatrices):
            self.matrices.add(name)
        elif isinstance(option, Transformation):
            self.lists.setdefault(path, []).append(option)
        else:
            raise ElasticError(
                f"layers: expected Transformations, ReadInput, PassOutput or KernelMatrices for {path}, got {option!r}"
            )

    def _fit(self, path: str, transformations: list[Transformation], weight: nn.Parameter) -> None:
        """Parameters for the transformations of a layer; what it does without any comes last."""
        transformations[:] = [t for t in transformations if type(t) is not Identity or t.kernel is not None]
        for transformation in transformations:
            transformation.fit(weight)
        self._register(path, transformations)

    def _register(self, path: str, transformations: Sequence[Transformation]) -> None:
        at = self.transformations
        for part in path.split(".") if path else ():
            if part not in dict(at.named_children()):
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        for i, transformation in enumerate(transformations):
            at.add_module(f"transformation{i}", transformation)

    def like(self, name: str) -> list[nn.Parameter]:
        """The weights that transformations have in place of the parameter of this name, on the same channels."""
        found = [
            own
            for path, several in self.lists.items()
            if name == (f"{path}.weight" if path else "weight")
            for transformation in several
            for own in own_weights(transformation).values()
        ]
        return list(dict.fromkeys(found))

    # -- in a graph -------------------------------------------------------------------------------------------------

    def complete(self, found: Found, axes: Axes) -> Found:
        """What was found in a graph of the model, with the choices of layers among it."""
        weights = axes.graph.input_nodes(InputKind.PARAMETER)
        handles, refused = list(found.handles), list(found.refused)
        for path, transformations in self.lists.items():
            name = f"{path}.weight" if path else "weight"
            weight = self._weight(weights, name)
            _check_kernels(weight, name, transformations)
            for kernel in [h for h in handles if isinstance(h, KernelSize) and h.parameter == name]:
                handles.remove(kernel)  # transformations are made for kernels of one size
                why = "the transformations of its layer choose the kernel"
                refused.append(Refused(kernel.name, kernel.kind, str(kernel.full), why, kernel.where))
            made = Transformed(weight, name, path, transformations)
            for i in range(len(transformations)):
                made.rewrite(axes.graph.draft(), i)  # the user's own code: what does not work is an error at once
            handles.append(made)
        for i, handle in enumerate(handles):
            if isinstance(handle, KernelSize) and handle.parameter in self.matrices:
                handles[i] = self._with_matrices(handle, axes)
        for name, parts in self.reads.items():
            self._weight(weights, name)
            handles.append(ReadPart(axes, name, parts))
        return Found(tuple(handles), tuple(refused))

    def _with_matrices(self, handle: KernelSize, axes: Axes) -> Handle:
        path = handle.parameter.rpartition(".")[0]
        if path not in self.kernels:
            value = handle.weight.meta["val"]
            made = kernel_matrices(handle.possible)
            for size in handle.possible[-2::-1]:
                made[size].fit(torch.empty(value.shape, dtype=value.dtype, device=value.device))
            self.kernels[path] = made
            self._register(path, [made[size] for size in handle.possible[-2::-1]])
        return KernelByMatrix(handle, self.kernels[path])

    @staticmethod
    def _weight(weights: Mapping[str, fx.Node], name: str) -> fx.Node:
        if name not in weights:
            raise ElasticError(f"layers: the forward pass reads no parameter {name!r}")
        return weights[name]

    def widths(self, found: Found, axes: Axes) -> dict[str, list[float]]:
        """The shares that `PassOutput` asks for, by the name of the dimension that is the layer's output.

        Raises ElasticError where the output of a layer is no dimension of its own.
        """
        shares: dict[str, list[float]] = {}
        for name, parts in self.passes.items():
            axis = passed_axis(axes, name)
            handle = next((h for h in found.handles if isinstance(h, AxisSize) and h.axis is axis), None)
            if handle is None:
                raise ElasticError(f"PassOutput: the output of {name} is no dimension of this space")
            shares[handle.name] = [*(float(p.ratio) for p in parts), 1.0]
        return shares


def _check_kernels(weight: fx.Node, name: str, transformations: Sequence[Transformation]) -> None:
    for transformation in transformations:
        if transformation.kernel is None:
            continue
        if not all(is_convolution(node) for node in uses(weight)):
            raise ElasticError(f"layers: {name} is no weight of a convolution, it has no kernel of a size")
        possible, why = possible_sizes(weight)
        if transformation.kernel not in possible:
            raise ElasticError(
                f"layers: {name} can have kernels of {possible}, got {transformation.kernel}. {why}".strip()
            )


class Transformed(Handle):
    """Which transformation the weight of a layer goes through: one of n by index; n is none, as in the whole model."""

    kind = Kind.TRANSFORMATION

    def __init__(self, weight: fx.Node, parameter: str, path: str, transformations: Sequence[Transformation]):
        self.weight, self.parameter, self.transformations = weight, parameter, tuple(transformations)
        self.name = f"{path}.transformation" if path else "transformation"
        self.full, self.where = len(self.transformations), (path,)

    def choices(self, wanted: Sequence[int | float] | None) -> tuple[Value, ...]:
        every = range(len(self.transformations) + 1)
        if wrong := [w for w in wanted or () if type(w) is not int or w not in every]:
            raise ElasticError(f"choices: {self.name} can be an index up to {every[-1]}, got {wrong[0]!r}")
        return tuple(every if wanted is None else sorted({*(int(w) for w in wanted), every[-1]}))

    def readers(self) -> frozenset[fx.Node]:
        return frozenset(uses(self.weight))

    def rewrite(self, draft: Draft, value: Value) -> None:
        assert isinstance(value, int)
        inserted(draft, self.weight, self.parameter, self._label(value), self.transformations[value])

    def sizes(self, value: Value, axes: Axes) -> dict[Axis, int]:
        """Those of the weight behind the transformation, as an extracted subnet has it."""
        assert isinstance(value, int)
        kernel = self.transformations[value].kernel if value != self.full else None
        window = window_of(self.weight)
        small = small_window(window, kernel or max(window))
        changed = {d + 2: (0, s) for d, (k, s) in enumerate(zip(window, small)) if k != s}
        return sizes_of_cuts({self.parameter: changed} if changed else {}, axes)

    def parameters(self, value: Value) -> Mapping[str, nn.Parameter]:
        if value == self.full:
            return {}
        assert isinstance(value, int)
        return {f"{self._label(value)}.{n}": p for n, p in self.transformations[value].named_parameters()}

    def own_cuts(self, value: Value, cuts: Mapping[str, Mapping[int, Cut]]) -> Mapping[str, Mapping[int, Cut]]:
        assert isinstance(value, int)
        mine, full = cuts.get(self.parameter, {}), self.weight.meta["val"].shape
        return {
            f"{self._label(value)}.{name}": {d: cut for d, cut in mine.items() if own.shape[d] == full[d]}
            for name, own in own_weights(self.transformations[value]).items()
        }

    def _label(self, index: int) -> str:
        return f"{self.name}{index}"


class KernelByMatrix(KernelSize):
    """The size of the kernels of one weight, with a matrix for each smaller one."""

    def __init__(self, plain: KernelSize, by_size: Mapping[int, Transformation]):
        super().__init__(plain.weight, plain.parameter, plain.where[0], plain.possible)
        self.by_size = by_size

    def cuts(self, value: Value) -> Mapping[str, Mapping[int, Cut]]:
        return {}  # all of the shared kernel is given to the matrices

    def sizes(self, value: Value, axes: Axes) -> dict[Axis, int]:
        """Those of the weight behind the matrix, as an extracted subnet has it."""
        return sizes_of_cuts(super().cuts(value), axes)

    def rewrite(self, draft: Draft, value: Value) -> None:
        assert isinstance(value, int)
        inserted(draft, self.weight, self.parameter, f"{self.name}{value}", self.by_size[value])

    def parameters(self, value: Value) -> Mapping[str, nn.Parameter]:
        if value == self.full:
            return {}
        assert isinstance(value, int)
        return {f"{self.name}{value}.{n}": p for n, p in self.by_size[value].named_parameters()}


__all__ = ["KernelByMatrix", "KernelMatrices", "Layers", "Option", "Transformed"]
