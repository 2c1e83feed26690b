"""How a search begins: the largest, the smallest and the middle net, then points by chance."""

from __future__ import annotations

import numpy as np

from graphopt.exploration.pool import View
from graphopt.exploration.sieve import Nothing, Request, Sieve

__all__ = ["start"]


def start(count: int, request: Request, view: View, sieve: Sieve, random: np.random.Generator) -> Nothing | None:
    """Choose models for those places of the request that are among the first ``count`` of the study, or for all of them
    while no trial has ended well."""
    landmarks = view.space.landmarks()
    while len(sieve.chosen) < request.count:
        number = view.count + len(sieve.chosen)
        if number >= count and view.scored:
            return None
        if number < len(landmarks) and any(sieve.take(point, None, "landmark") for point in landmarks):
            continue
        if nothing := sieve.take_by_chance(random, "start"):
            return nothing
    return None
