"""Gradient liveness: only gradients that something reads are computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from operator import getitem
from typing import Any, ClassVar

from torch import fx

from graphopt.errors import PassError
from graphopt.graph.draft import Draft
from graphopt.graph.op_rules import flops, is_pure, output_mask, with_output_mask
from graphopt.graph.training_graph import OutputKind, Phase, TrainingGraph
from graphopt.passes._base import Change, Pass, PassResult, Saving, Tier
from graphopt.passes._prune_lists import prune_lists
from graphopt.passes.layer_walk import COPIES, WEIGHTLESS, LayerDecision, walk_layers

SKIPPED = "already skipped by autograd"
"""How a change is marked that eager does too, since the parameter does not require grad: no gain, counted as none."""


@dataclass(frozen=True)
class LivenessResult(PassResult):
    """A `PassResult` with the classification of each layer that the source document of this pass asks for."""

    layers: tuple[LayerDecision, ...] = ()


@dataclass(frozen=True)
class GradientLiveness(Pass):
    """Remove the gradient work that nobody reads.

    A gradient is live if something reads it: the update of a parameter that an optimizer owns, or an output that was
    asked for. Everything that only dead gradients depend on goes, whole operators or the part of one that an output
    mask governs (``convolution_backward``, norms, attention ...), until nothing changes any more.

    Legal because what goes is pure and unread: live values are computed by the same operators from the same operands
    (exact tier). Random operators stay, so that the random stream does not shift.

    ``trainable``: names of the parameters whose gradients are live. On a graph of `capture` with ``gradients="all"``
    this specialises one capture to any freeze pattern. None: the parameters that the step's optimizers own; without
    an optimizer every gradient output stays. ``keep``: names of parameters or batch tensors whose gradient is an output
    that somebody reads. Without them a step with an update returns no gradients: the update reads them inside.
    ``weightless`` and ``copies``: the operator types of the layer walk, see `WEIGHTLESS` and `COPIES`.

    The result's ``layers`` lists for each forward operator whether the walk of the source document removes it, drops
    its input gradient or keeps it (`walk_layers`). Work of parameters that do not require grad is marked ``already
    skipped by autograd`` and saves nothing, since eager does not do it either.

    >>> import torch, graphopt
    >>> from graphopt.passes import GradientLiveness
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> batch = (torch.randn(5, 4), torch.randint(2, (5,)))
    >>> full = graphopt.capture(net, batch, loss=torch.nn.functional.cross_entropy, gradients="all")
    >>> head = GradientLiveness(trainable=["2.weight", "2.bias"])(full)
    >>> [str(o) for o in head.graph.outputs]
    ['loss loss', 'gradient 2.weight', 'gradient 2.bias']
    >>> products = [sum(str(n.target) == "aten.mm.default" for n in g.nodes) for g in (full, head.graph)]
    >>> products
    [4, 1]
    >>> [layer.decision for layer in head.layers if layer.operator in ("addmm", "relu")]
    ['removed', 'removed', 'input gradient dropped']
    """

    name: ClassVar[str] = "gradient_liveness"
    tier: ClassVar[Tier] = Tier.EXACT
    drops_outputs: ClassVar[bool] = True

    trainable: Collection[str] | None = None
    keep: Collection[str] = ()
    weightless: frozenset[Any] = field(default=WEIGHTLESS, repr=False)
    copies: frozenset[Any] = field(default=COPIES, repr=False)

    def __call__(self, graph: TrainingGraph | PassResult) -> LivenessResult:
        """Run the pass; as `Pass.__call__`, with the classification of layers besides."""
        result = super().__call__(graph)
        before = graph.graph if isinstance(graph, PassResult) else graph
        live = {o.name for o in result.graph.outputs if o.kind is OutputKind.GRADIENT} | self._updated(before)
        layers = walk_layers(before, live, self.weightless, self.copies)
        return LivenessResult(
            result.graph, result.changes, result.refusals, layers, before=result.before, removed=result.removed
        )

    def rewrite(self, graph: TrainingGraph) -> PassResult:
        """See the class."""
        self._check_names(graph)
        keep = self._live_outputs(graph)
        required = graph.signature.tree.get("requires_grad")
        eager = _needed(graph, [
            r for o, r in zip(graph.outputs, graph.results, strict=True)
            if r is not None and (o.kind is not OutputKind.GRADIENT or required is None or o.name in required)
        ])  # fmt: skip
        draft = graph.draft()
        draft.keep_outputs(keep)
        _shrink(draft)
        if all(keep) and len(draft.graph.nodes) == len(graph.nodes) and not _masks_differ(graph, draft):
            return PassResult(graph)
        if self.trainable is not None and draft.signature.owned is not None:
            owned = draft.signature.owned & frozenset(self.trainable)
            draft.signature = replace(draft.signature, owned=owned)
        changes = _changes(self.name, graph, draft, eager)
        return PassResult(draft.finish(), changes)

    def _updated(self, graph: TrainingGraph) -> set[str]:
        """Parameters that the update reads the gradient of."""
        owned = set(graph.signature.owned or ())
        return owned if self.trainable is None else owned & set(self.trainable)

    def _live_outputs(self, graph: TrainingGraph) -> list[bool]:
        """For each output whether something reads it."""
        trainable = None if self.trainable is None else set(self.trainable) | set(self.keep)
        updated = {OutputKind.PARAMETER, OutputKind.STATE}

        def live(kind: OutputKind, name: str) -> bool:
            if kind is OutputKind.GRADIENT:
                if name in self.keep:
                    return True
                if graph.signature.owned is not None:  # the update reads its gradients inside the graph
                    return False
                return trainable is None or name in trainable
            return not (kind in updated and trainable is not None and name not in trainable)

        return [live(o.kind, o.name) for o in graph.outputs]

    def _check_names(self, graph: TrainingGraph) -> None:
        names = {i.name for i in graph.inputs}
        unknown = sorted((set(self.trainable or ()) | set(self.keep)) - names)
        if unknown:
            raise PassError(f"{unknown} are neither parameters nor batch tensors of this graph", pass_name=self.name)
        gradients = {o.name for o in graph.outputs if o.kind is OutputKind.GRADIENT} | set(graph.signature.owned or ())
        unused = {i.name for i, node in zip(graph.inputs, graph.placeholders, strict=True) if not node.users}
        missing = sorted(set(self.trainable or ()) - gradients - unused)
        if missing:
            raise PassError(
                f'the graph holds no gradient of {missing[:5]}; capture it with gradients="all"', pass_name=self.name
            )


def _needed(graph: TrainingGraph, roots: Iterable[fx.Node]) -> dict[fx.Node, set[int]]:
    """All nodes that ``roots`` depend on, each with the indices of its results that are read."""
    needed: dict[fx.Node, set[int]] = {}
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed[node] = set()
        for operand in node.all_input_nodes:
            stack.append(operand)
    for node in needed:
        if node.target is getitem:
            needed[node.args[0]].add(node.args[1])  # type: ignore[index,arg-type]
    return needed


def _shrink(draft: Draft) -> None:
    """Erase dead operators and narrow output masks until nothing changes."""
    while True:
        for node in reversed(draft.graph.nodes):
            if not node.users and is_pure(node):
                draft.graph.erase_node(node)
        narrowed = [n for n in draft.graph.nodes if n.op == "call_function" and _narrow(n)]
        if not narrowed and not prune_lists(draft):
            return


def _narrow(node: fx.Node) -> bool:
    """Turn off results of a masked operator that nobody reads."""
    mask = output_mask(node)
    if mask is None or any(user.target is not getitem for user in node.users):
        return False
    read = {user.args[1] for user in node.users}
    wanted = tuple(on and index in read for index, on in enumerate(mask.value))
    if wanted == mask.value or not any(wanted):
        return False
    return with_output_mask(node, wanted) != mask.value


def _masks_differ(graph: TrainingGraph, draft: Draft) -> bool:
    pairs = ((n, draft.node(n)) for n in graph.nodes if n.op == "call_function")
    return any(output_mask(a) != output_mask(b) for a, b in pairs)


def _changes(name: str, graph: TrainingGraph, draft: Draft, eager: dict[fx.Node, set[int]]) -> tuple[Change, ...]:
    """What went, by module: operators removed and results masked, what autograd skips by itself apart."""
    alive = set(draft.graph.nodes)
    evaluate = graph.symbols.evaluate
    gone: dict[tuple[str, str, str], list[tuple[str, int]]] = defaultdict(list)
    for node in graph.nodes:
        if node.op != "call_function" or node.target is getitem or node.meta.get("phase") == Phase.FORWARD:
            continue
        copy = draft.node(node)
        operator = str(node.target).removeprefix("aten.").removesuffix(".default")
        by_eager = node in eager
        if copy not in alive:
            saved = evaluate(flops(node)) if by_eager else 0
            what = operator
        else:
            before, after = output_mask(node), output_mask(copy)
            if before == after or before is None or after is None:
                continue
            off = [i for i, (b, a) in enumerate(zip(before.value, after.value, strict=True)) if b and not a]
            by_eager = any(i in eager.get(node, ()) for i in off)
            saved = evaluate(flops(node)) - evaluate(flops(copy)) if by_eager else 0
            what = f"{operator}: {', '.join(_RESULTS[i] if i < 3 else f'result {i}' for i in off)}"
        marked = "" if by_eager else SKIPPED
        gone[node.meta.get("module", ""), node.meta.get("source", ""), marked].append((what, saved))
    return tuple(
        Change(name, f"{marked + ': ' if marked else 'removed '}{', '.join(dict.fromkeys(w for w, _ in parts))}",
               module, source, Saving(flops=sum(s for _, s in parts)))
        for (module, source, marked), parts in gone.items()
    )  # fmt: skip


_RESULTS = ("input gradient", "weight gradient", "bias gradient")
