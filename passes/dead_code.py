"""Dead code: operators that no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphopt.graph.op_rules import is_pure, is_random
from graphopt.graph.text import operator_text
from graphopt.graph.training_graph import TrainingGraph
from graphopt.passes._base import Pass, PassResult, Tier
from graphopt.passes._rewriting import Rewriting


@dataclass(frozen=True)
class DeadCode(Pass):
    """Remove operators and constants that no output depends on.

    Legal because a pure operator does nothing but make its result. Kept, with all they read: operators that are
    not pure (assertions, collectives, writes), and random operators, since one draw less would shift every number
    drawn after it. fx's own ``eliminate_dead_code`` does not know the latter on every release, and leaves
    constants behind.

    ::

        %exp = aten.exp(%x)         # removed
        %rand = aten.rand_like(%x)  # nobody reads it either, but it stays: it draws
        %sin = aten.sin(%x)
        return %sin

    >>> import torch
    >>> from graphopt.graph.capture import capture
    >>> graph = capture(torch.nn.Linear(3, 2), torch.randn(4, 3))
    >>> draft = graph.draft()
    >>> draft.keep_outputs([output.name != "weight" for output in graph.outputs])  # its gradient is not wanted
    >>> result = DeadCode()(draft.finish())
    >>> for change in result.changes:
    ...     print(change.what)
    removed aten.t: no output depends on it
    removed aten.t: no output depends on it
    removed aten.mm: no output depends on it
    removed aten.t: no output depends on it
    >>> result.saving.flops  # of the weight gradient: 2 * batch * 3 * 2
    48
    """

    name: ClassVar[str] = "dead_code"
    tier: ClassVar[Tier] = Tier.EXACT

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class."""
        rewriting = Rewriting(self.name, graph)
        live = {result for result in graph.results if result is not None}
        for node in reversed(graph.nodes):
            if node.op in ("placeholder", "output"):
                continue
            if node not in live and is_pure(node):
                rewriting.remove(node, f"removed {_named(node)}: no output depends on it")
                continue
            if node not in live and is_random(node):
                rewriting.refuse(node, _named(node), "nothing reads it, but later random numbers depend on its draw")
            live.add(node)
            live.update(node.all_input_nodes)
        return rewriting.finish()


def _named(node: fx.Node) -> str:
    return f"constant {node.target}" if node.op == "get_attr" else operator_text(node.target)
