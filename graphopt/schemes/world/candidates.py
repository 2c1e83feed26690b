"""What may run in a world: which schemes a user can name there, and what ``"auto"`` tries."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.errors import GraphoptError
from graphopt.schemes.base import Prepared, Scheme
from graphopt.schemes.candidates import candidates
from graphopt.schemes.flat import Flat
from graphopt.schemes.task import Task
from graphopt.schemes.world.divided import InWorld
from graphopt.schemes.world.eager import EagerInWorld
from graphopt.schemes.world.ranks import World


def candidates_in_world(
    world: World, task: Task, prepared: Prepared, *, precision: str | None, batch_norm: str
) -> tuple[Scheme, ...]:
    """The forms of flat code that are worth a try on one processor, divided over the ranks; the plain one is among
    them. Eager steps are not: they stand in for what cannot be divided, and may compute something else."""
    alone = candidates(task, prepared, threads=[torch.get_num_threads()], precision=precision)
    return tuple(
        InWorld(
            world.size, world.group, batch_norm,
            fused=one.fused, channels_last=one.channels_last, precision=one.precision,
        )
        for one in alone if type(one) is Flat
    )  # fmt: skip


def schemes_in_world(schemes: str | Sequence[str | Scheme], world: World, batch_norm: str) -> tuple[Scheme, ...] | None:
    """The schemes that a user named for a world, None for ``"auto"``.

    Raises:
        GraphoptError: a scheme that runs on one processor: ranks would each train a model of their own.
    """
    if isinstance(schemes, str) and schemes == "auto":
        return None
    known = {"flat": InWorld(world.size, world.group, batch_norm), "eager": EagerInWorld(world.size)}
    found: list[Scheme] = []
    for one in [schemes] if isinstance(schemes, (str, Scheme)) else schemes:
        if isinstance(one, str) and one in known:
            found.append(known[one])
        elif isinstance(one, (InWorld, EagerInWorld)) and one.ranks == world.size:
            found.append(one)
        else:
            raise GraphoptError(
                f"schemes: got {one!r} in a world of {world.size} ranks; expected 'auto', "
                f"{', '.join(map(repr, known))}, or processors=1 to leave each rank by itself"
            )
    if not found:
        raise GraphoptError("schemes: got none; expected 'auto' or at least one")
    return tuple(found)
