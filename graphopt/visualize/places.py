"""Where on the page each operator belongs: its column, and the module it is shown in.

Most operators say it themselves (``meta["phase"]``, ``meta["module"]``). Those that do not are placed by what they work
on: sums of gradients, the update, inputs and constants.
"""

from __future__ import annotations

from torch import fx

from graphopt.graph.text import operator_text
from graphopt.graph.training_graph import InputKind, OutputKind, Phase
from graphopt.visualize.comparison import Comparison
from graphopt.visualize.folding import BACKWARD, FORWARD, UPDATE, Spot

_COLUMNS = {Phase.FORWARD: FORWARD, Phase.BACKWARD: BACKWARD, Phase.UPDATE: UPDATE}


def spots_of(compared: Comparison) -> list[Spot]:
    """A spot for each of ``compared.drawn``."""
    sources: dict[int, list[int]] = {}
    first_reader: dict[int, int] = {}
    for source, reader in sorted(compared.edges):
        sources.setdefault(reader, []).append(source)
        first_reader[source] = min(reader, first_reader.get(source, reader))
    batch, owners = _batch(compared), _owners(compared, sources)
    found: list[Spot] = []
    sums: set[int] = set()
    for i, one in enumerate(compared.drawn):
        meta = one.node.meta
        spot = Spot(
            _COLUMNS.get(meta.get("phase", Phase.INPUT), FORWARD),
            meta.get("module", "") or "",
            meta.get("source", "") or "",
            word_of(one.node),
        )
        if one.node in batch:
            spot = Spot(FORWARD, "", "inputs", "")
        elif spot.column == UPDATE:
            spot = spot._replace(module=owners.get(i, ""), source="")
        elif spot.column == BACKWARD and not spot.module and not spot.source:
            spot = spot._replace(module=_around_last([(found[k], k in sums) for k in sources.get(i, ()) if k < i]))
            sums.add(i)
        found.append(spot)
    for i in reversed(range(len(found))):
        node = compared.drawn[i].node
        if node.op != "call_function" and node not in batch and i in first_reader:
            found[i] = found[first_reader[i]]._replace(word="", at=first_reader[i])
    return found


def word_of(node: fx.Node) -> str:
    """An operator's name without its namespace; empty for inputs and constants."""
    if node.op != "call_function":
        return ""
    return operator_text(node.target).removeprefix("aten.").removeprefix("_c10d_functional.")


def _batch(compared: Comparison) -> set[fx.Node]:
    """The inputs that are a level of their own: the batch, and where a part of it lies."""
    graphs = [graph for graph in (compared.after, compared.before) if graph is not None]
    pairs = [pair for graph in graphs for pair in zip(graph.inputs, graph.placeholders, strict=True)]
    return {node for given, node in pairs if given.kind in (InputKind.BATCH, InputKind.PLACE)}


def _around_last(sources: list[tuple[Spot, bool]]) -> str:
    """The module of a sum of gradients: that around the one that gave the last gradient, whose input was read twice.

    ``sources``: what it adds, in order of execution, each with whether it is such a sum itself.
    """
    gradients = [pair for pair in sources if pair[0].column == BACKWARD]
    if len(gradients) < 2:
        return ""
    last, is_sum = gradients[-1]
    return last.module if is_sum else last.module.rpartition(".")[0]


def _owners(compared: Comparison, sources: dict[int, list[int]]) -> dict[int, str]:
    """The module of the parameter that an operator of the update works for, where it is one parameter alone."""
    names: dict[int, set[str]] = {}
    for graph in (compared.before, compared.after):
        if graph is None:
            continue
        for output, node in zip(graph.outputs, graph.results, strict=True):
            if node is not None and output.kind in (OutputKind.PARAMETER, OutputKind.STATE):
                if (i := compared.index(node)) is not None:
                    names.setdefault(i, set()).add(output.name)
    for i in reversed(range(len(compared.drawn))):
        if i in names and compared.drawn[i].node.meta.get("phase") == Phase.UPDATE:
            for source in sources.get(i, ()):
                names.setdefault(source, set()).update(names[i])
    return {i: next(iter(found)).rpartition(".")[0] for i, found in names.items() if len(found) == 1}
