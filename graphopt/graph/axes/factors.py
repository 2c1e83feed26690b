"""Identities of tensor dimensions: a union-find over factors that are refined into products and sums.

A dimension is a *factor*: a set of indices in order. A view writes one as a product of smaller factors, outermost first
(768 = 12 x 64), a concatenation, split or slice as a sum (64 = 32 + 32). Two factors found to be the same are merged,
and what is known of the parts of one then holds for the other. Factors only get smaller and classes only merge, so
every sequence of these operations ends. A structure that does not fit one found before freezes the factors concerned.

Sizes are ints. A free size takes part as a large prime of its own (see `propagate`), so that dividing and comparing
ints decides what dividing and comparing expressions would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any


class Factor:
    """A class of equal dimensions, or one merged into another (``parent``).

    ``parts``: what it is made of, empty for a leaf; they are concatenated where ``is_sum``, else multiplied.
    ``frozen``: why its indices must stay as they are, empty if nothing says so. ``tags``: bits of `Tag`.
    ``place``: the node at which it got its structure, or became part of one.
    """

    __slots__ = ("frozen", "is_sum", "parent", "parts", "place", "size", "tags")

    def __init__(self, size: int, frozen: str = ""):
        self.size = size
        self.parent: Factor | None = None
        self.parts: tuple[Factor, ...] = ()
        self.is_sum = False
        self.frozen = frozen
        self.tags = 0
        self.place: Any = None

    def __repr__(self) -> str:
        root = find(self)
        if not root.parts:
            return str(root.size)
        return f"({(' + ' if root.is_sum else ' x ').join(map(repr, root.parts))})"


_FEW = 64
"""The most pieces of equal size that a concatenation is cut into for a view that it was not made for."""

ONE = Factor(1)
"""The dimension of size 1: it has no identity, every dimension may be broadcast to meet it."""


def find(factor: Factor) -> Factor:
    """The representative of the class of ``factor``."""
    root = factor
    while root.parent is not None:
        root = root.parent
    while factor is not root:
        factor.parent, factor = root, factor.parent  # type: ignore[assignment]
    return root


class Factors:
    """All factors of a graph, and the operations that merge and refine them.

    ``at`` is the node for which an operation is done: reports name it. ``contradictions`` lists, for each meeting of
    two structures that do not fit, the two factors, both nodes and a sentence. While not ``binding``, nothing freezes.
    """

    def __init__(self) -> None:
        self.all: list[Factor] = []
        self.contradictions: list[tuple[Factor, Factor, Any, str]] = []
        self.at: Any = None
        self.binding = True

    def new(self, size: int, frozen: str = "") -> Factor:
        """A new factor; `ONE` for size 1."""
        if size == 1:
            return ONE
        factor = Factor(size, frozen if self.binding else "")
        self.all.append(factor)
        return factor

    def freeze(self, factor: Factor, reason: str) -> None:
        """Keep the indices of ``factor`` as they are. The first reason stays."""
        factor = find(factor)
        if self.binding and not factor.frozen and factor is not ONE:
            factor.frozen = reason

    def tag(self, factor: Factor, tags: int) -> None:
        """Add bits of `Tag` to the class of ``factor``."""
        factor = find(factor)
        if factor is not ONE:
            factor.tags |= tags

    # -- making ---------------------------------------------------------------------------------------------------

    def product(self, parts: Iterable[Factor]) -> Factor:
        """The dimension that runs over ``parts``, the first one slowest."""
        return self._made([p for p in map(find, parts) if p is not ONE], prod, False)

    def concat(self, parts: Iterable[Factor]) -> Factor:
        """The dimension of ``parts`` one behind the other."""
        return self._made([p for p in map(find, parts) if p.size], sum, True)

    def _made(self, parts: list[Factor], total: Any, is_sum: bool) -> Factor:
        if len(parts) == 1:
            return parts[0]
        made = self.new(total([p.size for p in parts]))
        if made is not ONE:
            self._shape(made, parts, is_sum)
        return made

    def _shape(self, factor: Factor, parts: Sequence[Factor], is_sum: bool) -> None:
        factor.parts, factor.is_sum, factor.place = tuple(parts), is_sum, self.at
        for part in factor.parts:
            if part is not ONE:
                part.place = part.place or self.at

    # -- reading --------------------------------------------------------------------------------------------------

    def factors(self, factor: Factor) -> list[Factor]:
        """``factor`` as a product of factors that are none, outermost first."""
        return self._flat(factor, False)

    def segments(self, factor: Factor) -> list[Factor]:
        """``factor`` as a concatenation of factors that are none."""
        return self._flat(factor, True)

    def _flat(self, factor: Factor, is_sum: bool) -> list[Factor]:
        factor = find(factor)
        if not factor.parts or factor.is_sum != is_sum:
            return [factor]
        return [leaf for part in factor.parts for leaf in self._flat(part, is_sum)]

    # -- merging --------------------------------------------------------------------------------------------------

    def unify(self, a: Factor, b: Factor) -> None:
        """Find that ``a`` and ``b`` are the same dimension: position i of one is position i of the other."""
        a, b = find(a), find(b)
        if a is b:
            return
        if a.size != b.size:
            self._contradict(a, b, f"sizes {a.size} and {b.size}")
            return
        if a.parts and b.parts:
            if not self._fit(a, b):
                return
            a, b = find(a), find(b)
            if a is b:
                return
        if a.parts:
            a, b = b, a
        a.parent = b
        b.frozen = b.frozen or a.frozen
        b.tags |= a.tags

    def _fit(self, a: Factor, b: Factor) -> bool:
        """Refine and merge the parts of two structured factors until they are the same."""
        if a.is_sum and b.is_sum:
            return self._match_segments(self.segments(a), self.segments(b))
        if not a.is_sum and not b.is_sum:
            return self._match_products(a, b)
        whole, pieces = (b, self.segments(a)) if a.is_sum else (a, self.segments(b))
        for cut, piece in zip(self._cut_product(whole, _borders(pieces)), pieces, strict=True):
            self.unify(cut, piece)
        return True

    def _match_products(self, a: Factor, b: Factor) -> bool:
        left, right = self.factors(a)[::-1], self.factors(b)[::-1]
        while left and right:
            x, y = find(left.pop()), find(right.pop())
            if x is y:
                continue
            if x.size == y.size:
                self.unify(x, y)
                continue
            if x.size < y.size:
                x, y, left, right = y, x, right, left
            halves = self._halves(x, y.size) if x.size % y.size == 0 else None
            if halves is None:
                self._contradict(a, b, f"{a!r} and {b!r} have no common factors")
                return False
            self.unify(halves[0], y)
            left.extend(self.factors(halves[1])[::-1])
        return True

    def _match_segments(self, left: list[Factor], right: list[Factor]) -> bool:
        if self._shifted(left, right):
            reason = f"{self.at} meets it with itself, shifted"
            for piece in (*left, *right):
                self.freeze(piece, reason)
            return False
        left, right = left[::-1], right[::-1]
        while left and right:
            x, y = left.pop(), right.pop()
            if x.size == y.size:
                self.unify(x, y)
                continue
            if x.size < y.size:
                x, y, left, right = y, x, right, left
            head, tail = self.cut(x, [y.size])
            self.unify(head, y)
            left.append(tail)
        return True

    @staticmethod
    def _shifted(left: Sequence[Factor], right: Sequence[Factor]) -> bool:
        """Whether a piece stands in both at different places only, and would be cut: ``x[1:] - x[:-1]``. To merge would
        make all indices of x one. Pieces that change places as wholes (the halves of a rotation) may merge."""
        if [piece.size for piece in left] == [piece.size for piece in right]:
            return False
        places: tuple[dict[Factor, set[int]], dict[Factor, set[int]]] = ({}, {})
        for segments, found in zip((left, right), places, strict=True):
            begin = 0
            for segment in map(find, segments):
                found.setdefault(segment, set()).add(begin)
                begin += segment.size
        a, b = places
        return any(piece.size > 1 and piece in b and a[piece].isdisjoint(b[piece]) for piece in a)

    # -- refining -------------------------------------------------------------------------------------------------

    def reshape(self, dims: Sequence[Factor], sizes: Sequence[int]) -> list[Factor]:
        """The dimensions of a view: ``dims`` split and joined into ``sizes``, matched from left to right.

        Where there are no common factors (4 x 6 as 3 x 8), the dimensions concerned freeze and those of the result
        are new.
        """
        rest = [d for d in map(find, dims) if d is not ONE][::-1]
        result: list[Factor] = []
        at = 0
        while at < len(sizes):
            size, need, got = sizes[at], sizes[at], []
            while need > 1 and rest:
                x = find(rest.pop())
                if need % x.size == 0:
                    got.append(x)
                    need //= x.size
                elif x.parts and not x.is_sum:
                    rest.extend(x.parts[::-1])
                elif x.size % need == 0 and (halves := self._halves(x, need)) is not None:
                    got.append(halves[0])
                    rest.append(halves[1])
                    need = 1
                else:
                    got.append(x)
                    break
            if need == 1:
                result.append(self.product(got))
                at += 1
                continue
            have, want = prod(x.size for x in got), size
            first = at
            while have != want and (rest if have < want else at + 1 < len(sizes)):
                if have < want:
                    got.append(find(rest.pop()))
                    have *= got[-1].size
                else:
                    at += 1
                    want *= sizes[at]
            reason = self._no_common(got, sizes[first : at + 1])
            for x in got:
                self.freeze(x, reason)
            result += [self.new(s, reason) for s in sizes[first : at + 1]]
            at += 1
        return result

    def _no_common(self, dims: Sequence[Factor], sizes: Sequence[int]) -> str:
        before = next((f" (split so by {x.place})" for x in dims if x.place is not None), "")
        return f"{self.at} views {[x.size for x in dims]}{before} as {list(sizes)}: no common factors"

    def _halves(self, factor: Factor, outer: int) -> tuple[Factor, Factor] | None:
        """A leaf or a sum as a product of an outer factor of this size and an inner one; None where it cannot be."""
        inner = factor.size // outer
        if not factor.parts:
            self._shape(factor, (self.new(outer), self.new(inner)), False)
        else:  # (n1 x inner) + (n2 x inner) = (n1 + n2) x inner
            segments = self.segments(factor)
            if any(s.size % inner for s in segments):
                if outer > _FEW:
                    return None
                segments = self.cut(factor, range(inner, factor.size, inner))
                factor = find(factor)
            pairs = [self.reshape([s], [s.size // inner, inner]) for s in segments]
            for _, tail in pairs[1:]:
                self.unify(tail, pairs[0][1])
            factor = find(factor)
            self._shape(factor, (self.concat(head for head, _ in pairs), find(pairs[0][1])), False)
        return factor.parts[0], factor.parts[1]

    def cut(self, factor: Factor, borders: Sequence[int]) -> list[Factor]:
        """``factor`` cut at ``borders`` (ascending, inside): the pieces in order."""
        factor = find(factor)
        if not borders:
            return [factor]
        if not factor.parts:
            ends = [*borders, factor.size]
            pieces = [self.new(e - b) for b, e in zip([0, *borders], ends, strict=True)]
            self._shape(factor, pieces, True)
            return pieces
        if factor.is_sum:
            return self._cut_sum(factor, borders)
        return self._cut_product(factor, borders)

    def _cut_sum(self, factor: Factor, borders: Sequence[int]) -> list[Factor]:
        pieces: list[list[Factor]] = [[]]
        left = list(borders)
        begin = 0
        for segment in self.segments(factor):
            end = begin + segment.size
            inside = [b - begin for b in left if begin < b < end]
            for position, piece in enumerate(self.cut(segment, inside)):
                if position:
                    pieces.append([])
                pieces[-1].append(piece)
            if end in left:
                pieces.append([])
            left = [b for b in left if b > end]
            begin = end
        return [self.concat(p) for p in pieces]

    def _cut_product(self, factor: Factor, borders: Sequence[int]) -> list[Factor]:
        """A cut between two indices of the outermost factor cuts that one. A cut inside of an index of it sets this
        index apart and cuts what lies below: 12 x 64 at 100 gives (1 x 64 + 36) and (28 + 10 x 64)."""
        outer, *rest = self.factors(factor)
        inner = prod(f.size for f in rest)
        ends: dict[int, list[int]] = {}  # index of the outer factor -> cuts inside of it
        for border in borders:
            index, inside = divmod(border, inner)
            ends.setdefault(index, []).extend([inside] if inside else [])
        edges = sorted(
            {e for i, within in ends.items() for e in ((i, i + 1) if within else (i,)) if 0 < e < outer.size}
        )
        pieces: list[list[Factor]] = [[]]
        begin = 0
        for part in self.cut(outer, edges):
            if begin in ends and (begin * inner) in borders:
                pieces.append([])
            cuts = ends.get(begin, [])
            below = self.cut(self.product(rest), cuts) if cuts else [self.product([part, *rest])]
            for position, piece in enumerate(below):
                if position:
                    pieces.append([])
                pieces[-1].append(piece)
            begin += part.size
        return [self.concat(p) for p in pieces]

    # -- reports --------------------------------------------------------------------------------------------------

    def _contradict(self, a: Factor, b: Factor, what: str) -> None:
        a, b = find(a), find(b)
        known = _why_fixed(a), _why_fixed(b)
        if all(known) or (any(known) and not self.binding):  # nothing was free that is not any more
            a.frozen = b.frozen = known[0] or known[1]
            return
        places = [str(f.place) for f in (a, b) if f.place is not None]
        reason = f"contradiction at {self.at}: {what}" + (f" (from {' and '.join(places)})" if places else "")
        self.contradictions.append((a, b, self.at, reason))
        for factor in (a, b):
            factor.frozen = factor.frozen or reason

    def settle(self) -> None:
        """Hand what holds of a whole (frozen, tags) on to its parts, the largest first: parts are smaller."""
        wholes = [f for f in self.all if f.parent is None and f.parts]
        for whole in sorted(wholes, key=lambda f: -f.size):
            for part in map(find, whole.parts):
                if part is not ONE:
                    part.frozen = part.frozen or whole.frozen
                    part.tags |= whole.tags


def _why_fixed(factor: Factor) -> str:
    """The reason for which no index of the factor can move, empty if one can."""
    factor = find(factor)
    if factor.frozen or not factor.parts:
        return factor.frozen
    reasons = [_why_fixed(part) for part in map(find, factor.parts) if part is not ONE]
    return reasons[0] if reasons and all(reasons) else ""


def _borders(pieces: Sequence[Factor]) -> list[int]:
    """Where the pieces of a concatenation meet."""
    borders, end = [], 0
    for piece in pieces[:-1]:
        end += piece.size
        borders.append(end)
    return borders
