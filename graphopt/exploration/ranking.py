"""Ranks of results with one objective or several: Pareto fronts, crowding, and one number for a search to follow."""

from __future__ import annotations

import numpy as np

from graphopt.exploration.pool import scale_of

__all__ = ["best_first", "pareto_front", "pareto_ranks", "scalarised"]


def pareto_front(scores: np.ndarray) -> list[int]:
    """Places of the rows that no other row is at least as good as everywhere and better somewhere. Equal rows stay.

    >>> pareto_front(np.array([[1.0, 3.0], [2.0, 2.0], [1.0, 2.0]]))
    [0, 1]
    """
    if scores.shape[1] == 1:
        return np.flatnonzero(scores[:, 0] == scores[:, 0].max()).tolist() if len(scores) else []
    found: list[int] = []
    # By decreasing sum a row can only be dominated by one before it.
    for i in np.argsort(-scores.sum(1), kind="stable").tolist():
        front = scores[found]
        beaten = len(found) and bool(((front >= scores[i]).all(1) & (front > scores[i]).any(1)).any())
        if not beaten:
            found.append(i)
    return sorted(found)


def pareto_ranks(scores: np.ndarray, least: int) -> np.ndarray:
    """0 for the front, 1 for the front of the rest and so on, until ``least`` rows have one; the others share one."""
    ranks = np.full(len(scores), -1)
    rest = np.arange(len(scores))
    rank = 0
    while len(rest) and len(scores) - len(rest) < least:
        front = pareto_front(scores[rest])
        ranks[rest[front]] = rank
        rest = np.delete(rest, front)
        rank += 1
    ranks[rest] = rank
    return ranks


def crowding(scores: np.ndarray) -> np.ndarray:
    """How far the neighbours of each row are, in units of the range of each column; the ends are infinitely far."""
    distance = np.zeros(len(scores))
    for column in scores.T:
        order = np.argsort(column, kind="stable")
        reach = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = np.inf
        if reach > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / reach
    return distance


def best_first(scores: np.ndarray, count: int) -> list[int]:
    """Places of the ``count`` best rows, best first: by score, or by Pareto rank and then by how alone they are."""
    if not len(scores):
        return []
    if scores.shape[1] == 1:
        return np.argsort(-scores[:, 0], kind="stable")[:count].tolist()
    ranks = pareto_ranks(scores, count)
    alone = np.zeros(len(scores))
    for rank in range(int(ranks.max()) + 1):
        rows = np.flatnonzero(ranks == rank)
        if len(rows):
            alone[rows] = crowding(scores[rows])
    return np.lexsort((-alone, ranks))[:count].tolist()


def scalarised(scores: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One number a row. With several objectives: the least of the weighted ones and a little of their sum, with weights
    drawn anew for each request, so that the search goes to all parts of the front (Knowles, ParEGO, 2006)."""
    if scores.shape[1] == 1:
        return scores[:, 0]
    weights = random.dirichlet(np.ones(scores.shape[1]))
    columns = []
    for column, weight in zip(scores.T, weights):
        middle, spread = scale_of(column)
        columns.append(weight * np.clip((column - middle) / spread, -10, 10))
    parts = np.stack(columns, 1)
    return parts.min(1) + 0.05 * parts.sum(1)
