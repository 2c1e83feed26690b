"""`SizeTable`: many size expressions of one graph compiled once, evaluated exactly for any sizes in microseconds.

Shapes, FLOPs and bytes of a graph are polynomials of its free sizes with integer coefficients, now and then with a
floor division in them (strided convolutions over a free size). A table holds one sparse matrix of coefficients; each
evaluation makes the vector of monomials and multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import sympy
from scipy.sparse import csr_array

from graphopt.errors import GraphoptError
from graphopt.graph.sizes import Expr

_EXACT = float(2**62)


class SizeTable:
    """Expressions over symbols, as a function from sizes to a vector of integers.

    >>> n = sympy.Symbol("n")
    >>> SizeTable([3, 2 * n, n * (n + 1)]).at({n: 10})
    array([  3,  20, 110])
    """

    def __init__(self, expressions: Sequence[Expr]):
        """Args: expressions: ints or sympy expressions whose values are integers."""
        monomials: dict[tuple[tuple[sympy.Basic, int], ...], int] = {(): 0}
        terms: dict[Expr, list[tuple[int, int]]] = {}
        rows, columns, coefficients = [], [], []
        for row, expression in enumerate(expressions):
            if expression not in terms:
                terms[expression] = [
                    (monomials.setdefault(monomial, len(monomials)), coefficient)
                    for monomial, coefficient in _polynomial(expression)
                ]
            for column, coefficient in terms[expression]:
                rows.append(row)
                columns.append(column)
                coefficients.append(coefficient)
        shape = (len(expressions), len(monomials))
        self._matrix = csr_array((np.array(coefficients, dtype=np.int64), (rows, columns)), shape=shape)
        self._magnitude = abs(self._matrix).astype(np.float64)
        self._monomials = tuple(monomials)
        self.symbols: frozenset[sympy.Symbol] = frozenset(
            symbol for monomial in monomials for atom, _ in monomial for symbol in atom.free_symbols
        )

    def __len__(self) -> int:
        return self._matrix.shape[0]

    def at(self, sizes: Mapping[sympy.Symbol, int]) -> np.ndarray:
        """The values in order, int64.

        Args:
            sizes: a positive integer for each of `symbols`.

        Raises:
            GraphoptError: a symbol has no size, or a value does not fit into 62 bits.
        """
        if missing := self.symbols - sizes.keys():
            raise GraphoptError(f"sizes: no size given for {', '.join(sorted(map(str, missing)))}")
        atoms = {atom: _value(atom, sizes) for monomial in self._monomials for atom, _ in monomial}
        exact = [prod(atoms[atom] ** power for atom, power in monomial) for monomial in self._monomials]
        if (self._magnitude @ np.array(exact, dtype=np.float64)).max(initial=0) >= _EXACT:
            given = ", ".join(f"{symbol}={size}" for symbol, size in sizes.items())
            raise GraphoptError(f"sizes: {given} give counts of FLOPs or bytes beyond 62 bits; expected real sizes")
        return self._matrix @ np.array(exact, dtype=np.int64)

    def at_many(self, sizes: Mapping[sympy.Symbol, np.ndarray]) -> np.ndarray:
        """The values at many sizes at once, int64 of shape ``(expressions, count)``.

        Args:
            sizes: for each of `symbols` an int64 array of ``count`` positive integers.

        Raises:
            GraphoptError: as `at`.
        """
        if missing := self.symbols - sizes.keys():
            raise GraphoptError(f"sizes: no size given for {', '.join(sorted(map(str, missing)))}")
        count = len(next(iter(sizes.values()))) if sizes else 1
        atoms = {atom: _values(atom, sizes) for monomial in self._monomials for atom, _ in monomial}
        exact = np.ones((len(self._monomials), count), dtype=np.int64)
        rough = np.ones(exact.shape)
        for row, monomial in enumerate(self._monomials):
            for atom, power in monomial:
                exact[row] *= atoms[atom] ** power
                rough[row] *= atoms[atom].astype(np.float64) ** power
        if (self._magnitude @ rough).max(initial=0) >= _EXACT:
            raise GraphoptError("sizes: they give counts of FLOPs or bytes beyond 62 bits; expected real sizes")
        return self._matrix @ exact


def _polynomial(expression: Expr) -> list[tuple[tuple[tuple[sympy.Basic, int], ...], int]]:
    """(monomial, coefficient) pairs; a monomial is a product of powers of atoms, sorted."""
    if isinstance(expression, int):
        return [((), expression)] if expression else []
    found = []
    for term, coefficient in sympy.expand(expression).as_coefficients_dict().items():
        powers = term.as_powers_dict()
        whole = all(isinstance(p, (int, sympy.Integer)) and p >= 0 for p in powers.values())
        if not coefficient.is_Integer or not whole:
            return [(((expression, 1),), 1)]  # a quotient: evaluated as one atom
        monomial = tuple(sorted(((a, int(p)) for a, p in powers.items() if a != 1), key=str))
        found.append((monomial, int(coefficient)))
    return found


def _values(atom: sympy.Basic, sizes: Mapping[sympy.Symbol, np.ndarray]) -> np.ndarray:
    """`_value` at many sizes: other atoms than symbols once for each combination that occurs."""
    if isinstance(atom, sympy.Symbol):
        return sizes[atom]
    symbols = sorted(atom.free_symbols, key=str)
    given, where = np.unique(np.stack([sizes[s] for s in symbols]), axis=1, return_inverse=True)
    found = [_value(atom, dict(zip(symbols, column))) for column in given.T.tolist()]
    return np.array(found, dtype=np.int64)[where.reshape(-1)]


def _value(atom: sympy.Basic, sizes: Mapping[sympy.Symbol, int]) -> int:
    if isinstance(atom, sympy.Symbol):
        return int(sizes[atom])
    return int(atom.xreplace({symbol: sympy.Integer(size) for symbol, size in sizes.items()}))
