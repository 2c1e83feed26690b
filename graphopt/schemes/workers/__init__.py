"""Local processors: `Pool` starts workers that run graphs with collectives together with this process."""

from graphopt.schemes.workers.job import Job
from graphopt.schemes.workers.pool import Pool
from graphopt.schemes.workers.pools import Pools

__all__ = ["Job", "Pool", "Pools"]
