"""AOTAutograd and Inductor as this room needs them: what is private in them is imported here and nowhere else.

Dynamo gives a backend one piece at a time (`torch.fx.GraphModule` and fake inputs). AOTAutograd traces it through
autograd, asks for the joint graph to be cut in two, and gives autograd a function of the two compiled halves. Sources:
torch/_dynamo/backends/common.py, torch/_functorch/aot_autograd.py, torch/_inductor/compile_fx.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd import descriptors as aot
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._guards import TracingContext
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.fx.graph import _BoxedCodeGen
from torch.utils import _pytree as pytree

from graphopt.graph.torch_internals import traced_as_in_eager

Rewrite = Callable[[fx.GraphModule, int], fx.GraphModule]
"""What happens to a graph, of which so many results are forward's, before it is cut and compiled."""

Compile = Callable[[fx.GraphModule], Callable[[list[Any]], Sequence[Any]]]
"""What makes a half callable: the function takes its arguments in one list, which it empties."""


def compile_eager(
    piece: fx.GraphModule, inputs: Sequence[Any], *, rewrite: Rewrite, compile_half: Compile
) -> Callable[..., Any]:
    """A piece through AOTAutograd, traced to the kernels that eager calls.

    ``rewrite`` is given its joint graph, or where no gradient is asked for that of forward alone, all of whose results
    are forward's. The joint graph is cut where it says: forward keeps what backward reads, nothing is recomputed.
    """

    def cut(graph: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **others: Any) -> Any:
        return default_partition(
            rewrite(graph, num_fwd_outputs), joint_inputs, num_fwd_outputs=num_fwd_outputs, **others
        )

    def half(graph: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        _keep_saved_values()
        return _boxed(compile_half(graph))

    def forward_alone(graph: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        results = pytree.arg_tree_leaves(*graph.graph.find_nodes(op="output")[0].args)
        return _boxed(compile_half(rewrite(graph, len(results))))

    with traced_as_in_eager():
        return aot_autograd(fw_compiler=half, bw_compiler=half, inference_compiler=forward_alone, partition_fn=cut)(
            piece, list(inputs)
        )


def compile_inductor(
    piece: fx.GraphModule, inputs: Sequence[Any], *, rewrite: Rewrite, key: str | None, options: Mapping[str, Any]
) -> Callable[..., Any]:
    """A piece through Inductor, whose min-cut partitioner is given the joint graph as ``rewrite`` leaves it.

    ``key`` says all that ``rewrite`` depends on, for Inductor's caches; None: they are not used. ``options`` are
    Inductor's own.
    """
    from torch._inductor.compile_fx import compile_fx  # loads what a user of eager kernels does not need

    patches = {"fallback_random": True, **options, "custom_partitioner_fn": _Partitioner(rewrite, key)}
    if key is None:
        patches["force_disable_caches"] = True
    compiled: Any = compile_fx(piece, list(inputs), config_patches=patches)
    return compiled


class _Partitioner(CustomPartitionerFn):
    """Rewrites a joint graph, then cuts it as Inductor does."""

    def __init__(self, rewrite: Rewrite, key: str | None):
        self._rewrite = rewrite
        self._key = key

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        graph = self._rewrite(gm, kwargs["num_fwd_outputs"])
        return min_cut_rematerialization_partition(graph, joint_inputs, **kwargs)

    def uuid(self) -> str | None:
        return self._key

    def __reduce__(self) -> Any:  # Inductor pickles its configuration for the keys of its caches
        return str, (self._key,)


def with_boxed_code(graph: fx.GraphModule) -> Callable[[list[Any]], Sequence[Any]]:
    """``graph`` by torch's own code, as a function that takes its arguments in one list and empties it."""
    graph.graph.set_codegen(_BoxedCodeGen())
    graph.recompile()
    return graph.forward


def position_in_piece(placeholder: fx.Node) -> int | None:
    """Which input of the piece a placeholder of AOTAutograd's graph is; None for one that AOTAutograd has made."""
    descriptor = placeholder.meta.get("desc")
    return descriptor.idx if isinstance(descriptor, aot.PlainAOTInput) else None


def overwritten_inputs(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders that AOTAutograd writes new values to, which the graph gives, once forward has run."""
    descriptors = pytree.arg_tree_leaves(graph.find_nodes(op="output")[0].meta.get("desc", ()))
    written = {d.mutated_input for d in descriptors if isinstance(d, aot.InputMutationAOTOutput)}
    return [n for n in graph.find_nodes(op="placeholder") if n.meta.get("desc") in written]


def register_with_dynamo(name: str, backend: Callable[..., Any]) -> None:
    """Let ``torch.compile`` find ``backend`` by ``name``, unless it does by an entry point or an earlier call."""
    if name not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(compiler_fn=backend, name=name)


def _keep_saved_values() -> None:
    """Tell AOTAutograd that the halves of the piece at hand write into no value that forward has saved.

    It takes for granted that backward may, and then refuses to run it with ``retain_graph=True``.
    """
    context = TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        context.fw_metadata.bw_donated_idxs = []


def _boxed(function: Callable[[list[Any]], Sequence[Any]]) -> Callable[..., Any]:
    def run(arguments: list[Any]) -> Sequence[Any]:
        return function(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
