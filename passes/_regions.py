"""The graph that every processor runs, where each operator has a regime: operator by operator, from the table.

The draft is worked through in order. Each operand is converted to how the operator's strategy wants it, integers in
arguments become those of the part (sizes) or stay those of the whole (numbers that are computed with), and the
operator's metadata are inferred anew and compared with what the strategy says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import getitem
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.graph.draft import infer_or_copy
from graphopt.graph.literals.roles import Role
from graphopt.graph.op_rules import operand_names, set_operand
from graphopt.graph.sizes import Expr, expression
from graphopt.graph.torch_internals import fake_mode_of, without_guards
from graphopt.graph.training_graph import InputKind, TrainingGraph
from graphopt.passes._conversions import WHOLE, Conversions, Lies
from graphopt.passes._parts import maker
from graphopt.passes._placement import Placement, Replicated, Sharded
from graphopt.passes._places import Numbers, Places, computed_numbers
from graphopt.passes._rewriting import remove_dead
from graphopt.passes._strategies import BATCH, Regime, Strategies, Strategy, is_sums

aten = torch.ops.aten


class DividedGraph:
    """One graph divided by regimes of its operators (by name; an operator that is not named is whole).

    Raises PassError for a regime that the table does not have, and where a size cannot be written.
    """

    def __init__(self, table: Strategies, regimes: Mapping[str, Regime], group: str):
        self.table, self.group = table, group
        self.graph = table.graph
        self.chosen: dict[fx.Node, Strategy] = {
            node: table.in_regime(node, regimes.get(node.name))
            for node in self.graph.nodes
            if node.op != "output" and table.of(node)
        }
        axes = [s.regime for s in self.chosen.values() if s.regime is not None and not is_sums(s.regime)]
        self.axes: tuple[str, ...] = tuple(dict.fromkeys(axes))
        self.draft = self.graph.draft()
        divided = BATCH in self.axes
        self.numbers = Places(self.draft, BATCH, table.processors) if divided else Numbers(self.draft)
        self.conversions = Conversions(self.draft, self.numbers, table.processors, group)
        self.lies: dict[fx.Node, Lies] = {}
        self.words: list[str] = []
        self._kind = {n: i.kind for i, n in zip(self.graph.inputs, self.graph.placeholders, strict=True)}

    def run(self) -> TrainingGraph:
        """The divided graph; ``signature.tree["placements"]`` says how its inputs and outputs lie."""
        for node in self.graph.placeholders:
            self._input(node)
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self._input(node)
            elif node.op == "call_function":
                self._operator(node)
        self._outputs()
        remove_dead(self.draft)
        inputs = zip(self.graph.inputs, self.graph.placeholders)
        record = {
            "axes": list(self.axes),
            "processors": self.table.processors,
            "group": self.group,
            "inputs": {
                f"{i.name}.{i.field}" if i.field else i.name: self.lies[n].word
                for i, n in inputs
                if self.lies[n] != WHOLE
            },
            "outputs": self.words,
        }
        signature = self.draft.signature
        self.draft.signature = replace(signature, tree={**signature.tree, "placements": record})
        return self.draft.finish()

    # -- inputs and outputs -----------------------------------------------------------------------------------------

    def _input(self, node: fx.Node) -> None:
        """Inputs are whole but those of which every reader has the processor's rows of the batch."""
        value, copy = node.meta.get("val"), self.draft.node(node)
        self.lies[node] = self._batch_rows(node)
        if self.lies[node] == WHOLE and isinstance(value, torch.Tensor):
            self._resize(copy, value, self._sizes(value, WHOLE))

    def _batch_rows(self, node: fx.Node) -> Lies:
        """How an input lies: as rows of the part, where nobody reads it otherwise."""
        if BATCH not in self.axes or self._kind.get(node) not in (InputKind.BATCH, InputKind.TANGENT):
            return WHOLE
        dims = self.table.flows[BATCH].where(node)
        if len(dims) != 1:
            return WHOLE
        found = self._lies(node, None, Sharded(dims[0]), BATCH)
        for user in node.users:
            strategy = self.chosen.get(user)
            wanted = strategy.operands.get(node) if strategy is not None else None
            rows = strategy is not None and strategy.regime == BATCH and wanted == found.placement
            if user.op == "output" or (wanted is not None and not rows):
                return WHOLE
        return found if len(found.pieces) == 1 and found.pieces[0][0] == 1 else WHOLE

    def _outputs(self) -> None:
        results: list[Any] = []
        for output, node in zip(self.graph.outputs, self.graph.results, strict=True):
            copy = self.draft.node(node) if node is not None else None
            lies = self.lies.get(node, WHOLE) if node is not None else WHOLE
            if copy is not None and lies != WHOLE:
                known = self.conversions.known(copy, WHOLE)
                scattered = lies.size is None and " as " in lies.word  # parts of unequal size, not in one run
                if known is not None:
                    copy, lies = known, WHOLE
                elif scattered or not self.table.allowed(output, lies.placement):
                    copy, lies = self.conversions.convert(copy, lies, WHOLE, self.draft.output), WHOLE
            results.append(copy)
            self.words.append(lies.word)
        self.draft.output.args = (tuple(results),)

    # -- operators --------------------------------------------------------------------------------------------------

    def _operator(self, node: fx.Node) -> None:
        copy = self.draft.node(node)
        if node.target is getitem:
            source, index = maker(node)
            lies = self.chosen[source].result(index) if source in self.chosen else Replicated()
            self.lies[node] = self._lies(node, None, lies, self._axis(source))
            copy.meta["val"] = self.draft.node(source).meta["val"][index]
            return
        if not any(_is_tensor(n.meta.get("val")) for n in (node, *node.all_input_nodes)):
            self.lies[node] = WHOLE  # arithmetic of numbers: whoever reads one is given that of the part or the whole
            return
        strategy = self.chosen[node]
        changed = self._operands(node, copy, strategy) | self._integers(node, copy, strategy)
        if changed and _is_tensor(node.meta["val"]):
            try:
                infer_or_copy(self.draft, copy)
            except Exception as error:
                raise PassError(f"{node.name} ({node.target}) along {strategy.regime!r}: {error}") from error
            self._compare(node, copy, strategy)
        if not isinstance(strategy.results, tuple):
            self.lies[node] = self._lies(node, None, strategy.results, self._axis(node))

    def _axis(self, node: fx.Node) -> str:
        regime = self.chosen[node].regime if node in self.chosen else None
        return "" if regime is None or is_sums(regime) else regime

    def _lies(self, node: fx.Node, index: int | None, placement: Placement, axis: str) -> Lies:
        """How a value lies: a `Lies` of its placement along an axis."""
        if not isinstance(placement, Sharded):
            return Lies(placement)
        flow = self.table.flows[axis]
        pieces = flow.pieces(flow.dims_of(node, index)[placement.dim])
        assert pieces is not None, f"{node} has no parts along {axis}"
        whole = tuple((self.numbers.whole(outer), self.numbers.whole(inner)) for outer, inner in pieces)
        return Lies(placement, axis, whole, None if axis == BATCH else int(flow.size))

    def _operands(self, node: fx.Node, copy: fx.Node, strategy: Strategy) -> bool:
        """Give the operator its operands as it wants them; whether their shapes are others than before."""
        axis, given, changed = self._axis(node), {}, False
        rows = self.table.flows[BATCH].row_indices(node) if axis == BATCH else []
        for source in node.all_input_nodes:
            value = source.meta.get("val")
            if isinstance(value, (list, tuple)) and self.chosen[maker(source)[0]].regime is not None:
                raise PassError(f"{node.name} ({node.target}) reads all results of {source.name} at once")
            if not isinstance(value, torch.Tensor):
                continue
            mine = self.draft.node(source)
            if source in strategy.operands:
                wanted = self._lies(source, None, strategy.operands[source], axis)
                made = self.conversions.convert(mine, self.lies[source], wanted, copy)
            else:
                told = str(node.target).startswith("aten.new_")  # it is told the size
                made = mine if told else self._shaped_like(source, mine, self._unread(source, axis), copy)
            if source in rows:
                assert isinstance(self.numbers, Places)
                made = self.draft.add(aten.sub.Scalar, made, self.numbers.begin(), like=copy)
            given[mine] = made
            changed |= made.meta["val"] is not value
        copy.args = fx.node.map_arg(copy.args, lambda n: given.get(n, n))
        copy.kwargs = fx.node.map_arg(copy.kwargs, lambda n: given.get(n, n))
        return changed

    def _unread(self, source: fx.Node, axis: str) -> Lies:
        """How an operand lies that lends its shape only: as a part where it carries the axis."""
        dims = self.table.flows[axis].where(source) if axis else ()
        return self._lies(source, None, Sharded(dims[0]), axis) if dims else WHOLE

    def _shaped_like(self, source: fx.Node, mine: fx.Node, wanted: Lies, reader: fx.Node) -> fx.Node:
        """An operand whose values are never read: itself where it has the right shape, else an empty tensor."""
        sizes = self._sizes(source.meta["val"], wanted)
        if list(map(expression, mine.meta["val"].shape)) == sizes:
            return mine
        numbers = [self.numbers.number(size) for size in sizes]
        return self.draft.add(aten.new_empty.default, mine, numbers, like=reader)

    def _integers(self, node: fx.Node, copy: fx.Node, strategy: Strategy) -> bool:
        """Sizes among the arguments as those of the part, numbers that are computed with as those of the whole."""
        changed = False
        for name, index, role, value in computed_numbers(node):
            number = self._number(role, value, strategy)
            if number is not None:
                _set(copy, name, index, number)
                changed |= strategy.regime != BATCH  # there sizes are those in the metadata
        axis = self._axis(node)
        if axis and axis != BATCH:
            for literal in self.table.literals(node, axis):
                if not literal.refusal:
                    size = self.numbers.whole(self.table.part_of(literal, axis))
                    _set(copy, literal.argument, literal.index, self.numbers.number(size))
                    changed = True
        return changed

    def _number(self, role: Role, value: fx.Node, strategy: Strategy) -> int | fx.Node | None:
        """What stands for a number that the graph computes; None where it stays."""
        if not self._depends_on_batch(value):
            return None
        if role is Role.VALUE or strategy.regime != BATCH or not isinstance(value.meta["val"], torch.SymInt):
            return self.numbers.twin(self.draft.node(value))
        return self.numbers.number(expression(value.meta["val"]))

    def _depends_on_batch(self, value: fx.Node) -> bool:
        found = value.meta["val"]
        expr = found.node.expr if isinstance(found, (torch.SymInt, torch.SymFloat, torch.SymBool)) else None
        symbol = self.graph.symbols.symbols.get(BATCH)
        return BATCH in self.axes and isinstance(expr, sympy.Basic) and symbol in expr.free_symbols

    # -- sizes ------------------------------------------------------------------------------------------------------

    def _sizes(self, value: torch.Tensor, lies: Lies) -> list[Expr]:
        """The sizes of what each processor has of a value."""
        sizes = [self.numbers.whole(size) for size in value.shape]
        if isinstance(lies.placement, Sharded):
            count = self.conversions.count(lies)
            sizes[lies.placement.dim] = sum(expression(outer * count * inner) for outer, inner in lies.pieces)
        return [expression(size) for size in sizes]

    def _resize(self, copy: fx.Node, value: torch.Tensor, sizes: list[Expr]) -> None:
        if list(map(expression, value.shape)) == sizes:
            return
        made = [self.conversions.size(size) for size in sizes]
        strides = [self.conversions.size(self.numbers.whole(stride)) for stride in value.stride()]
        mode = fake_mode_of(value)
        assert mode is not None
        with mode, without_guards(mode):
            copy.meta["val"] = value.new_empty_strided(made, strides)

    def _compare(self, node: fx.Node, copy: fx.Node, strategy: Strategy) -> None:
        """The shapes that operators give are those that the strategy says."""
        several = isinstance(node.meta["val"], (list, tuple))
        olds = enumerate(node.meta["val"]) if several else [(None, node.meta["val"])]
        for index, old in olds:
            new = copy.meta["val"] if index is None else copy.meta["val"][index]
            if not isinstance(old, torch.Tensor):
                continue
            lies = self._lies(node, index, strategy.result(index), self._axis(node))
            want, got = self._sizes(old, lies), list(map(expression, new.shape))
            if want != got:
                raise PassError(f"{node.name} ({node.target}) along {strategy.regime!r} gives {got}, expected {want}")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, list, tuple))


def _set(copy: fx.Node, name: str, index: int | None, value: Any) -> None:
    """Set an integer among the arguments, or one of a list of them."""
    if index is None:
        set_operand(copy, name, value)
        return
    position = operand_names(copy).index(name)
    given: Any = copy.kwargs[name] if name in copy.kwargs else copy.args[position]
    set_operand(copy, name, [value if i == index else g for i, g in enumerate(given)])
