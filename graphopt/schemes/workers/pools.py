"""The pools of one training step: schemes with as many processors share one."""

from __future__ import annotations

from dataclasses import dataclass, field

from graphopt.schemes.workers.pool import Pool


@dataclass
class Pools:
    """Pools by number of processors and threads of each, started when they are first asked for. They end with this
    object, or with `close`."""

    _pools: dict[tuple[int, int], Pool] = field(default_factory=dict)

    def of(self, processors: int, threads: int) -> Pool:
        """The pool of so many processors. Raises what `Pool` raises."""
        key = processors, threads
        if key not in self._pools:
            self._pools[key] = Pool(processors, threads=threads)
        return self._pools[key]

    def close(self) -> None:
        """End all workers; the next use starts new ones."""
        while self._pools:
            self._pools.popitem()[1].close()
