"""Joining a Ray cluster, and what it holds."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from graphopt.errors import ExplorationError

__all__ = ["TOKENS", "held", "join", "room_for"]

TOKENS = (
    ". If Ray uses tokens, set RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN for the cluster, all its machines and "
    "this process; else set RAY_AUTH_MODE=disabled everywhere"
)
"""What to do, for errors."""

_STORE_BYTES = 80 * 2**20  # the least that Ray takes; payloads that do not fit go to disk


def join(workers: int | None, cpus: float) -> bool:
    """Join a Ray cluster: the one that this process is connected to already; that of ``RAY_ADDRESS``; one that runs on
    this machine; else begin one here, for ``workers`` of so many ``cpus``. Returns whether it was begun here.

    Raises ExplorationError where the cluster cannot be joined.
    """
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    try:
        ray.init(address="auto", **quiet)
        return False
    except ConnectionError as error:
        if os.environ.get("RAY_ADDRESS"):
            raise _refused(error) from error
    except (RayError, RuntimeError, ValueError) as error:
        raise _refused(error) from error
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local", num_cpus=max(cores, math.ceil((workers or 1) * cpus)), include_dashboard=False,
        object_store_memory=_STORE_BYTES, **quiet,
    )  # fmt: skip
    return True


def room_for(resources: Mapping[str, float]) -> int:
    """How many workers that take ``resources`` each the cluster has room for now; at least 1."""
    there = ray.cluster_resources()
    return max(1, int(min((there.get(name, 0) // amount for name, amount in resources.items() if amount), default=1)))


def _refused(error: BaseException) -> ExplorationError:
    text = str(error).strip()
    hint = ""
    if "token" in text.lower() or "auth" in text.lower():
        hint = TOKENS
    where = os.environ.get("RAY_ADDRESS")
    return ExplorationError(
        f"on='ray': the cluster{f' at {where} (RAY_ADDRESS)' if where else ''} cannot be joined: {text}{hint}"
    )


def held() -> dict[str, float]:
    """What the cluster holds now, by name."""
    found = ray.cluster_resources()
    return {name: found[name] for name in sorted(found) if not name.startswith(("node:", "object_store", "memory"))}
