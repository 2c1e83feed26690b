"""Axis rules as einsum-like patterns: ``"self: mk, mat2: kn -> mn"``.

One letter is one dimension; the same letter is the same dimension wherever it stands. ``*`` stands for any number of
dimensions that are broadcast against each other (at most once an operand), ``1`` for a dimension of size 1. ``a?``: the
operand may be broadcast to what it says. An operand that is None or a number is left out. Results are separated by
``;``. A letter that no operand has is a new dimension. Several patterns are separated by ``|``: the first one that fits
the ranks of the operands holds.

A letter that no result has is summed over. FLOPs follow: a product of operands costs 2 x the sizes of all letters,
multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.graph.op_rules.arguments import operand, shape
from graphopt.graph.op_rules.reductions import Reduction
from graphopt.graph.sizes import Expr, product

if TYPE_CHECKING:
    from graphopt.graph.axes.factors import Factor
    from graphopt.graph.axes.propagation import Propagation

AxisRule = Callable[["Propagation", fx.Node], Any]


@dataclass(frozen=True)
class Term:
    """What a pattern says of one operand."""

    name: str
    letters: str
    broadcast: bool

    def fits(self, node: fx.Node) -> bool:
        """Whether the operand of ``node`` has as many dimensions."""
        given = operand(node, self.name)
        if not isinstance(given, fx.Node) or self.broadcast:
            return True
        rank = len(given.meta["val"].shape)
        return rank == len(self.letters) or ("*" in self.letters and rank >= len(self.letters) - 1)

    def split(self, dims: tuple[Any, ...]) -> tuple[str, tuple[Any, ...], tuple[Any, ...]]:
        """The single letters, a dimension for each of them, and the dimensions of ``*``."""
        before, star, behind = self.letters.partition("*")
        if not star:
            return self.letters[-len(dims) :] if self.broadcast and dims else self.letters[: len(dims)], dims, ()
        end = len(dims) - len(behind)
        return before + behind, dims[: len(before)] + dims[end:], dims[len(before) : end]


@dataclass(frozen=True)
class Form:
    """One pattern: its operands, and the letters of each result."""

    terms: tuple[Term, ...]
    results: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Form:
        """The form that ``text`` describes; see the module."""
        left, _, right = text.partition("->")
        terms = []
        for term in left.split(","):
            name, _, letters = (part.strip() for part in term.partition(":"))
            terms.append(Term(name.removesuffix("?"), letters, name.endswith("?")))
        return cls(tuple(terms), tuple(r.strip() for r in right.split(";")))

    @cached_property
    def factors(self) -> tuple[Term, ...]:
        """The operands that are multiplied: not those that are broadcast and added."""
        return tuple(term for term in self.terms if not term.broadcast)

    @cached_property
    def contracted(self) -> str:
        """The letters that at least two factors have and no result."""
        count: dict[str, int] = {}
        for term in self.factors:
            for letter in term.letters:
                count[letter] = count.get(letter, 0) + (letter != "1")
        return "".join(x for x, times in count.items() if times > 1 and not any(x in r for r in self.results))

    def dims(self, see: Propagation, node: fx.Node) -> Any:
        """The dimensions of the results."""
        bound: dict[str, Factor] = {}
        stars: tuple[Factor, ...] = ()
        for term in self.terms:
            given = operand(node, term.name)
            if not isinstance(given, fx.Node):
                continue
            letters, singles, middle = term.split(see.of(given))
            for letter, dim in zip(letters, singles, strict=True):
                if letter != "1":
                    bound[letter] = see.meet(bound[letter], dim) if letter in bound else dim
            stars = see.broadcast(stars, middle)
        self._mark(see, node, bound, stars)
        dims = [
            _result(see, bound, stars, letters, node, i, len(self.results)) for i, letters in enumerate(self.results)
        ]
        return dims[0] if len(dims) == 1 else dims

    def _mark(self, see: Propagation, node: fx.Node, bound: dict[str, Factor], stars: tuple[Factor, ...]) -> None:
        """Says which dimensions are those of a layer's weight, or are contracted between two operands."""
        weight = next((t for t in self.terms if t.name == "weight"), None)
        if weight is not None:
            for letter in weight.letters:
                see.feature(bound[letter])
        elif self.contracted and len(self.factors) == 2:
            a, b = self.factors
            both, one = set(a.letters) & set(b.letters), set(a.letters) ^ set(b.letters)
            batch = [bound[x] for x in a.letters if x in both and x in bound and x in self.results[0]]
            kept = [bound[x] for x in a.letters + b.letters if x in one and x in bound]
            for letter in self.contracted:
                left, right = operand(node, a.name), operand(node, b.name)
                see.contracted(left, right, bound[letter], kept, [*stars, *batch], node)

    def flops(self, node: fx.Node) -> Expr:
        """2 x the product of the sizes of all letters."""
        sizes: dict[str, Expr] = {}
        for term in self.factors:
            letters, singles, _ = term.split(shape(node, term.name))
            sizes.update(zip(letters, singles, strict=True))
        *_, middle = Term("", self.results[0], False).split(tuple(node.meta["val"].shape))
        return 2 * product([*sizes.values(), *middle])

    def reductions(self, node: fx.Node) -> tuple[Reduction, ...]:
        """The sums over letters that a result does not have; of several results (gradients), over those of the
        operand ``grad...`` that it does not have."""
        gradient = [t for t in self.factors if t.name.startswith("grad")] if len(self.results) > 1 else self.factors
        found = []
        for i, letters in enumerate(self.results):
            summed = {x for t in gradient for x in t.letters} - set(letters) - {"1"}
            if places := tuple(p for t in self.factors for p in _places(node, t, summed)):
                found.append(Reduction("sum", places, result=i))
        return tuple(found)


def _places(node: fx.Node, term: Term, letters: set[str]) -> Iterable[tuple[str, int]]:
    """Where an operand has one of these letters."""
    given = operand(node, term.name)
    if isinstance(given, fx.Node):
        rank = len(given.meta["val"].shape)
        names, at, middle = term.split(tuple(range(rank)))
        chosen = [d for letter, d in zip(names, at, strict=True) if letter in letters]
        yield from ((term.name, d) for d in sorted([*chosen, *(middle if "*" in letters else ())]))


def _result(
    see: Propagation,
    bound: dict[str, Factor],
    stars: tuple[Factor, ...],
    letters: str,
    node: fx.Node,
    index: int,
    count: int,
) -> tuple[Factor, ...]:
    dims: list[Factor] = []
    for letter in letters:
        if letter == "*":
            dims.extend(stars)
            continue
        if letter != "1" and letter not in bound:
            sizes = see.sizes(node) if count == 1 else see.sizes(node, index)
            bound[letter] = see.new(sizes[len(dims)])
        dims.append(see.one if letter == "1" else bound[letter])
    return tuple(dims)


class Pattern:
    """The axis rule that a text describes; see the module. Also gives FLOPs and reductions."""

    def __init__(self, text: str):
        self.text = text
        self.forms = tuple(map(Form.parse, text.split("|")))

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"

    def __call__(self, see: Propagation, node: fx.Node) -> Any:
        form = self.form(node)
        return see.unknown(node) if form is None else form.dims(see, node)

    @property
    def is_product(self) -> bool:
        """Whether operands are multiplied and summed over."""
        return bool(self.forms[0].contracted) and len(self.forms[0].results) == 1

    def form(self, node: fx.Node) -> Form | None:
        """The first pattern that fits the ranks of the operands of ``node``."""
        return next((f for f in self.forms if all(t.fits(node) for t in f.terms)), None)

    def flops(self, node: fx.Node) -> Expr:
        """See `Form.flops`."""
        form = self.form(node)
        return form.flops(node) if form is not None else 0

    def reductions(self, node: fx.Node) -> tuple[Reduction, ...]:
        """See `Form.reductions`."""
        form = self.form(node)
        return form.reductions(node) if form is not None else ()
