"""`space`: the dimensions in which a model can vary, found on its graph; `Space`: its choices and their subnets."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from random import Random
from typing import Any

from torch import nn

from graphopt.elastic import captures, options
from graphopt.elastic.choice import Choice
from graphopt.elastic.dimension import Dimension, Kind, Refused, Value
from graphopt.elastic.handles import Handle
from graphopt.elastic.layers import Layers
from graphopt.elastic.modes import keeping_modes
from graphopt.elastic.options import Sizes
from graphopt.elastic.subnet import Subnet
from graphopt.elastic.supergraph import Supergraph
from graphopt.errors import BatchError, CaptureError, ElasticError
from graphopt.graph.batch import flatten, one_batch
from graphopt.graph.tracing import FreeSizes, check_arguments
from graphopt.graph.training_graph import TrainingGraph
from graphopt.schemes import ModelWatch

Where = Mapping[str, Any] | Callable[[Choice], bool]
"""Which choices are wanted: values by pattern on names, or a function of a choice."""


def space(
    model: nn.Module,
    batch: Any,
    *,
    choices: Mapping[Any, Sizes] | None = None,
    fixed: Any = (),
    tied: Any = (),
    names: Mapping[str, str] | None = None,
    free: FreeSizes | None = None,
    layers: Mapping[str, Any] | None = None,
) -> Space:
    """Find the elastic dimensions of a model.

    The forward pass is captured in train and in eval mode, and the identities of tensor dimensions in it are found;
    each group of coupled dimensions that may shrink is a `Dimension`. No module class is known and none is changed: the
    model stays what it is, and owns the shared weights.

    Patterns below are a `Kind`, or shell patterns on names of dimensions or on the paths of all modules that one
    reaches (``layers.3.*``).

    Args:
        model: any `torch.nn.Module`.
        batch: an example of its inputs (no target): a tensor, a tuple, or a dict for a model called by keyword. Its
            batch size stays free if it is at least 2.
        choices: sizes (int) or shares of the full size (float) by pattern; by default a quarter, a half, three quarters
            and all of widths and heads, a half to all of the embedding, kernel sizes 3, 5, 7 ..., every number of runs
            of layers.
        fixed: patterns of dimensions that keep their size.
        tied: patterns, or sequences of patterns: the dimensions that one of them means have one value. Or a mapping
            from new names to that.
        names: new names by pattern. (Other arguments mean dimensions by the names that the analysis gave.)
        free: further sizes to keep free in captures, as in `graphopt.capture`.
        layers: choices of single layers, by path or pattern on paths: `Transformation`s of their weights,
            `KernelMatrices`, `ReadInput` and `PassOutput`; see `graphopt.elastic.layers`.

    Raises:
        ElasticError: nothing is elastic (with the reasons), a pattern means nothing, a size is out of range, tied
            dimensions differ, or a backward of the model's own is no derivative.
        CaptureError: the forward pass cannot become one graph.
        BatchError: the model rejects the batch.

    Example:
        >>> import torch, graphopt.elastic
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
        >>> space = graphopt.elastic.space(net, torch.randn(5, 4))
        >>> [str(dimension) for dimension in space.dimensions]
        ['0.hidden: width, one of 2, 4, 6, 8']
        >>> space.run(space.smallest, torch.randn(3, 4)).sum().backward()
        >>> net[0].weight.grad.abs().sum(1) > 0
        tensor([ True,  True, False, False, False, False, False, False])
    """
    return Space(model, batch, choices=choices, fixed=fixed, tied=tied, names=names, free=free, layers=layers)


class Space:
    """The elastic dimensions of a model, and its subnets. Made by `space`.

    ``model``: the owner of the shared weights. ``dimensions``: in the order of the graph. ``refusals``: groups that
    keep their size, with the reason. ``full``, ``smallest``: the choices at the ends. ``notes``: what was left undone,
    in sentences (a mode that could not be captured, an output that subnets do not have).

    Pickled it is the model, the batch and the options: it is captured anew where it is unpickled, which gives the same
    dimensions.
    """

    def __init__(
        self, model: nn.Module, batch: Any, *, choices: Mapping[Any, Sizes] | None = None, fixed: Any = (),
        tied: Any = (), names: Mapping[str, str] | None = None, free: FreeSizes | None = None,
        layers: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        check_arguments(model, None)
        self._given = {
            "choices": choices, "fixed": fixed, "tied": tied, "names": names, "free": free, "layers": layers
        }  # fmt: skip
        self.model, self.batch, self.free = model, batch, free
        self.layers = Layers(model, layers)
        self.notes: list[str] = []
        self._states: dict[Hashable, list[tuple[ModelWatch, Supergraph]]] = {}
        self._captures = captures.Captures(model, self.layers, free)
        self.primary = self._captured(batch, None)
        refused = list(self.primary.found.refused)
        tied_up = options.tie(self.primary.found.handles, tied)
        named = options.rename(tied_up, names)
        handles, kept = options.fix(tied_up, fixed)
        refused += [Refused(named[h], h.kind, str(h.full), "fixed by the user", h.where) for h in kept]
        if passed := self.layers.widths(self.primary.found, self.primary.axes):
            choices = {**passed, **(choices or {})}
        values = options.choices_of(handles, choices)
        for handle in [h for h in handles if len(values[h]) < 2]:
            refused.append(Refused(handle.name, handle.kind, str(handle.full), "it has one choice only", handle.where))
            handles.remove(handle)
        self.dimensions: tuple[Dimension, ...] = ()
        self._set({named[h]: (h, Dimension(named[h], h.kind, values[h], h.where)) for h in handles})
        refused += self._in_the_other_mode()
        refused += self._that_fit()
        self.notes += captures.notes(self.primary)
        self.refusals: tuple[Refused, ...] = tuple(refused)
        if not self.dimensions:
            reasons = "; ".join(f"{r.name}: {r.why}" for r in self.refusals[:5]) or "no parameter has a free axis"
            raise ElasticError(f"model: nothing in it is elastic ({reasons})")

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "batch": self.batch, "given": self._given, "layers": self.layers.state_dict()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        Space.__init__(self, state["model"], state["batch"], **state["given"])
        self.layers.load_state_dict(state["layers"])

    # -- choices ----------------------------------------------------------------------------------------------------

    def dimension(self, name: str) -> Dimension:
        """The dimension of this name. Raises ElasticError if there is none."""
        found = self._by_name.get(name)
        if found is None:
            raise ElasticError(f"name: no dimension {name!r}; there are {', '.join(self._by_name)}")
        return found

    @property
    def full(self) -> Choice:
        """The whole model."""
        return Choice({d.name: d.full for d in self.dimensions})

    @property
    def smallest(self) -> Choice:
        """Every dimension at its smallest."""
        return self.choice({d.name: d.smallest for d in self.dimensions})

    def choice(self, values: Mapping[str, Any] | None = None, **more: Any) -> Choice:
        """A choice; what is not given is full.

        Args:
            values: by name or pattern; a later one overrides an earlier one. A value is one of the dimension's
                choices, or a float: that share of the full size, the nearest choice. Of depth also a tuple of
                indices of runs.
            more: the same, for names that are identifiers.

        Raises:
            ElasticError: a pattern that means no dimension, or a value that it cannot have.
        """
        if isinstance(values, Choice) and not more and values.keys() == self._by_name.keys():
            values = dict(values)
        found = {d.name: d.full for d in self.dimensions}
        for pattern, given in {**(values or {}), **more}.items():
            for dimension in self._meant(pattern):
                found[dimension.name] = options.value_of(dimension, given)
        return Choice(found, self.primary.inactive(found))

    def counts_where(self) -> dict[str, tuple[dict[str, tuple[Value, ...]], ...]]:
        """Where dimensions count that are inactive in some subnets: by name, ways of being read. In a choice of
        `Dimension.choices` the dimension counts exactly if, of one of its ways, each dimension named there has one of
        the values there. Those that always count are left out."""
        dead = {
            d.name: {value: self.primary.handles[d.name].dead(value) for value in d.choices} for d in self.dimensions
        }
        able = {name: by_value for name, by_value in dead.items() if any(by_value.values())}
        found = {}
        for name in (d.name for d in self.dimensions if not self.primary.handles[d.name].first):
            ways = {
                tuple(
                    (other, tuple(value for value, gone in by_value.items() if node not in gone))
                    for other, by_value in able.items()
                    if any(node in gone for gone in by_value.values())
                )
                for node in self.primary.handles[name].readers()
            }
            if ways and () not in ways:
                found[name] = tuple(dict(way) for way in sorted(ways))
        return found

    def sample(self, *, seed: int | Random | None = None, where: Where | None = None) -> Choice:
        """A random choice, each dimension uniformly among its choices.

        Args:
            seed: a number, a generator to draw from, or None for another choice each time.
            where: values by pattern that are not drawn, or a function that says whether a choice is wanted.

        Raises:
            ElasticError: no wanted choice among a thousand.
        """
        generator = seed if isinstance(seed, Random) else Random(seed)
        pinned = where if isinstance(where, Mapping) else {}
        for _ in range(_TRIES):
            drawn: dict[str, Any] = {d.name: generator.choice(d.choices) for d in self.dimensions}
            for pattern, value in pinned.items():
                drawn.update({d.name: value for d in self._meant(pattern)})
            choice = self.choice(drawn)
            if not callable(where) or where(choice):
                return choice
        raise ElasticError(f"where: none of {_TRIES} random choices is wanted")

    def _meant(self, pattern: str) -> list[Dimension]:
        found = options.meant(pattern, self.dimensions)
        if not found:
            raise ElasticError(f"choice: no dimension matches {pattern!r}; there are {', '.join(self._by_name)}")
        return found

    # -- subnets ----------------------------------------------------------------------------------------------------

    def subnet(self, choice: Mapping[str, Any], *, loss: Any = None, batch: Any = None) -> Subnet:
        """The subnet of a choice in the present state of the model (train or eval mode ...): graph and slices.

        ``batch``: an example of what it is given, with the target behind the inputs if there is a ``loss`` (as in
        `graphopt.capture`); by default that of the space.
        """
        return self._state(self.batch if batch is None else batch, loss).subnet(self._checked(choice))

    def graph(
        self, choice: Mapping[str, Any], *, loss: Any = None, batch: Any = None, backward: bool | None = None
    ) -> TrainingGraph:
        """The graph of a choice, in the present state of the model; kept.

        Args:
            choice: of `choice`, or what makes one.
            loss, batch: as for `subnet`.
            backward: whether the graph has a backward; by default if there is a loss.

        Returns:
            A forward or joint graph like those of `graphopt.capture_forward` and `graphopt.capture`. Its parameters,
            buffers and gradients have the shapes of the subnet: ``subnet(choice).slices`` says which parts of the
            shared ones they are.
        """
        found = self.subnet(choice, loss=loss, batch=batch)
        if backward is False or (backward is None and loss is None):
            return found.graph
        from graphopt.elastic.joint import joint

        return joint(found)

    def run(self, choice: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The output of a subnet, as the model called with these arguments gives it.

        Parameters are slices of the model's own: autograd's gradients land in those, in the part that the subnet has.
        Buffers that the model updates (running statistics) are updated in the part that the subnet has. The model's
        present mode counts, any batch size may come.

        Raises:
            ElasticError: the choice is outside of the space.
            BatchError: the model rejects the arguments.
        """
        batch = one_batch(args, kwargs)
        return self._state(batch, None).subnet(self._checked(choice))(flatten(batch)[0])

    def extract(self, choice: Mapping[str, Any], **how: Any) -> nn.Module:
        """The subnet of a choice as a module of its own; see `graphopt.elastic.extract`."""
        from graphopt.elastic.extract import extract

        return extract(self, self._checked(choice), **how)

    def select(self, budget: Any, **how: Any) -> Any:
        """The best choices within a budget; see `graphopt.elastic.select`."""
        from graphopt.elastic.select import select

        return select(self, budget, **how)

    def _checked(self, choice: Mapping[str, Any]) -> Choice:
        if isinstance(choice, Choice) and choice.keys() == self._by_name.keys():
            if all(choice[d.name] == d.full or d.admits(choice[d.name]) for d in self.dimensions):
                return choice
        return self.choice(choice)

    # -- states of the model ------------------------------------------------------------------------------------------

    def _state(self, batch: Any, loss: Any) -> Supergraph:
        """The supergraph for the model as it is now and this batch."""
        _, layout, size = flatten(batch)
        known = self._states.setdefault((layout, loss), [])
        for watch, found in known:
            if watch.same() and found.graph.symbols.admits({"batch": size}):
                return found
        made = self._captured(batch, loss)
        made.adopt(self.primary)
        return made

    def _captured(self, batch: Any, loss: Any) -> Supergraph:
        _, layout, _ = flatten(batch)
        made = self._captures.supergraph(batch, loss)
        watch = ModelWatch(self.model)
        self._states.setdefault((layout, loss), []).append((watch, made))
        return made

    def _set(self, found: Mapping[str, tuple[Handle, Dimension]]) -> None:
        self.primary.handles = {name: handle for name, (handle, _) in found.items()}
        self.dimensions = tuple(dimension for _, dimension in found.values())
        self._by_name = {d.name: d for d in self.dimensions}

    def _drop(self, names: Mapping[str, str]) -> list[Refused]:
        """Take dimensions out of the space, for these reasons."""
        gone = [d for d in self.dimensions if d.name in names]
        self._set({d.name: (self.primary.handles[d.name], d) for d in self.dimensions if d.name not in names})
        return [Refused(d.name, d.kind, str(d.full), names[d.name], d.where) for d in gone]

    def _in_the_other_mode(self) -> list[Refused]:
        """Capture the model in the other mode; what cannot vary there is no dimension."""
        mode = "train" if not self.model.training else "eval"
        with keeping_modes(self.model):
            self.model.train(not self.model.training)
            try:
                made = self._captured(self.batch, None)
            except (CaptureError, BatchError) as error:
                self.notes.append(f"in {mode} mode the model was not captured: {error}")
                return []
        made.adopt(self.primary)
        return self._drop({name: f"in {mode} mode: {why}" for name, why in made.missing.items()})

    def _that_fit(self) -> list[Refused]:
        """Try the smallest subnet of every state without data, operator by operator; what does not fit is no dimension
        of the space."""
        from graphopt.elastic.trial import misfits

        refused: list[Refused] = []
        for states in list(self._states.values()):
            for _, found in states:
                refused += self._drop(misfits(found, self.dimensions))
        return refused

    def __str__(self) -> str:
        from graphopt.elastic.report import table

        return table(self)

    def __repr__(self) -> str:
        many = {kind: sum(d.kind is kind for d in self.dimensions) for kind in Kind}
        return f"Space({', '.join(f'{n} {kind}' for kind, n in many.items() if n)}; {len(self.refusals)} refused)"


_TRIES = 1000
