"""The pool: this process and its workers, the processors that run steps together."""

from __future__ import annotations

import os
import threading
import uuid
import warnings
import weakref
from collections.abc import Collection, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphopt.cost_model.machine import available_cores
from graphopt.errors import GraphoptError, GraphoptWarning, WorkerError
from graphopt.graph.training_graph import Input, Output, TrainingGraph
from graphopt.schemes.workers.job import Job
from graphopt.schemes.workers.team import Team

_WAIT = torch.ops._c10d_functional.wait_tensor.default
_UNCHANGED = "The step was not made: parameters, buffers, optimizer state and random numbers are as before it"


class Pool:
    """``processors`` of this machine: this process is number 0, the others are workers that it starts and stops.

    Workers are ``python -m`` processes. They receive saved graphs and tensors, and run nothing else. They end with
    `close`, with the pool object, with this process however it ends, and when one of them fails: no process is left
    behind. After a failure the next use starts new ones.

    Example:
        >>> pool = Pool(2)  # doctest: +SKIP
        >>> job = pool.load(graph)  # doctest: +SKIP
        >>> loss, *gradients = job(parameters, [(x[:16], y[:16]), (x[16:], y[16:])])  # doctest: +SKIP
    """

    def __init__(self, processors: int, *, threads: int = 1, timeout: float = 300.0):
        """Start the workers, without waiting for them: they are ready when a graph is loaded.

        Args:
            processors: how many take part, at least 2.
            threads: of torch on each processor; those of this process are set for a step only.
            timeout: seconds for one step; then a worker that has not answered is given up.

        Raises:
            GraphoptError: an argument is no positive number, or this process belongs to a group of processes already.
            WorkerError: a worker cannot be started.
        """
        _check(processors, threads, timeout)
        self.processors, self.threads, self.timeout = processors, threads, timeout
        self._name = f"graphopt {uuid.uuid4().hex}"
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._jobs, self._steps = count(), count()
        self._forgotten: list[int] = []
        self._teams = [Team(processors, threads, timeout, self._name)]
        self._finalizer = weakref.finalize(self, _end, self._teams)

    def load(
        self,
        graph: TrainingGraph | Sequence[TrainingGraph],
        *,
        own: Collection[Input] | None = None,
        gathered: Collection[Output] = (),
    ) -> Job:
        """Send ``graph`` to all processors, to be run as often as one likes.

        Args:
            graph: what every processor runs on its part: forward, backward up to gradients, and functional collectives.
                Those of whatever group are made collectives of this pool. It holds no update: that is the caller's,
                when all have finished (`Job.__call__`, ``commit``). Or one for each processor: with the same inputs
                and outputs (None where another processor gives it) and the same collectives in the same order. A
                worker is sent what its graph reads.
            own: the inputs that differ between processors; by default those of the batch, tangents and places.
            gathered: outputs of which main gets every worker's value (`Job.gathered`), through shared memory.

        Raises:
            GraphoptError: the graph cannot be saved, or is not on the CPU; graphs that do not fit together.
            WorkerError: a worker cannot load it (an operator is not registered there), or is gone.
        """
        if isinstance(graph, TrainingGraph):
            graphs = [_joined(graph, self._name)] * self.processors
        else:
            check_together(graph, self.processors)
            graphs = [_joined(each, self._name) for each in graph]
        job = Job(self, next(self._jobs), graphs, own, gathered)
        with self._lock:
            self._send(self._ready(), job)
        weakref.finalize(job, self._forgotten.append, job.number)
        return job

    def close(self) -> None:
        """End the workers. The pool cannot be used afterwards; closing twice is no error."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def processes(self) -> tuple[int, ...]:
        """The process numbers of the workers that run now."""
        return tuple(w.process.pid for team in self._teams if not team.broken for w in team.workers)

    def step(self, job: Job, common: Sequence[Any], parts: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        """One step of ``job``; see `Job.__call__`."""
        with self._lock:
            team = self._ready()
            self._send(team, job)
            state = torch.get_rng_state() if job.random else None
            threads = torch.get_num_threads()
            if threads != self.threads:
                torch.set_num_threads(self.threads)
            try:
                with team.watch.deadline(self.timeout):
                    job.send(team, next(self._steps), common, parts)
                    results = job.run(common, parts[0])
                    team.answers()
            except BaseException as error:
                if state is not None:
                    torch.set_rng_state(state)
                team.fail(error, _UNCHANGED)
            finally:
                if threads != self.threads:
                    torch.set_num_threads(threads)
        return results

    def _ready(self) -> Team:
        """The workers, connected; new ones where the last ones are gone."""
        if os.getpid() != self._owner:
            raise WorkerError(f"the pool belongs to process {self._owner}, this is a forked child; make one here")
        if not self._finalizer.alive:
            raise WorkerError("the pool is closed; make a new one")
        team = self._teams[-1]
        if team.broken:
            if not team.ended:
                warnings.warn(f"workers were started anew: {team.why_broken()}", GraphoptWarning, stacklevel=4)
            self._teams[:] = [team := Team(self.processors, self.threads, self.timeout, self._name)]
        team.ready()
        return team

    def _send(self, team: Team, job: Job) -> None:
        """Let the workers load what they have not."""
        if job.number in team.loaded:
            return
        paths: dict[int, Path] = {}
        for worker, graph in zip(team.workers, job.graphs[1:], strict=True):
            if id(graph) not in paths:
                paths[id(graph)] = team.directory / f"{job.number}-{worker.processor}.graph"
                graph.save(paths[id(graph)])
        try:
            with team.watch.deadline(self.timeout):
                while self._forgotten:
                    team.tell({"do": "forget", "jobs": [self._forgotten.pop()]})
                for i, (worker, graph) in enumerate(zip(team.workers, job.graphs[1:], strict=True)):
                    worker.tell(job.description(i, str(paths[id(graph)])))
                refusals = team.answers()
        except BaseException as error:
            team.fail(error, "the graph was not loaded")
        finally:
            for path in paths.values():
                path.unlink(missing_ok=True)
        if refusals:
            raise WorkerError("the graph was not loaded: " + "\n".join(refusals))
        team.loaded.add(job.number)


def _end(teams: list[Team]) -> None:
    for team in teams:
        team.end(politely=True)


def check_together(graphs: Sequence[TrainingGraph], processors: int) -> None:
    """Raise GraphoptError where ``graphs`` are not those of so many processors: others would wait for ever for a
    collective that one of them does not run."""
    if len(graphs) != processors:
        raise GraphoptError(f"graph: got {len(graphs)} graphs, expected one for each of {processors} processors")
    first = graphs[0]
    expected = [str(node.target) for node in collectives(first)]
    for i, graph in enumerate(graphs):
        if graph.inputs != first.inputs or graph.outputs != first.outputs:
            raise GraphoptError(f"graph: that of processor {i} has other inputs or outputs than that of processor 0")
        found = [str(node.target) for node in collectives(graph)]
        if found != expected:
            k = next((k for k, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
            got, wanted = ([*names, "none"][min(k, len(names))] for names in (found, expected))
            raise GraphoptError(
                f"graph: collective {k} of processor {i} is {got}, that of processor 0 is {wanted}; all processors "
                "must run the same collectives in the same order"
            )


def collectives(graph: TrainingGraph) -> list[fx.Node]:
    """The operators of ``graph`` that communicate, in order; waits are none."""
    return [node for node in graph.nodes if _communicates(node) and node.target is not _WAIT]


def _communicates(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "_c10d_functional"


def _joined(graph: TrainingGraph, name: str) -> TrainingGraph:
    """``graph`` with its collectives in the group ``name``."""
    for node in graph.placeholders:
        device = getattr(node.meta["val"], "device", torch.device("cpu"))
        if device.type != "cpu":
            raise GraphoptError(
                f"graph: its input {node.name} is on {device}; local workers run on the CPU. "
                "For several devices start the script by torchrun"
            )
    draft = graph.draft()
    for node in draft.graph.nodes:
        if _communicates(node):
            names = [a.name for a in node.target._schema.arguments]
            if "group_name" in names:
                at = names.index("group_name")
                if at < len(node.args):
                    node.update_arg(at, name)
                else:
                    node.update_kwarg("group_name", name)
    return draft.finish()


def _check(processors: int, threads: int, timeout: float) -> None:
    for argument, value, least in (("processors", processors, 2), ("threads", threads, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise GraphoptError(f"{argument}: got {value!r}, expected an integer of at least {least}")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise GraphoptError(f"timeout: got {timeout!r}, expected a positive number of seconds")
    if not torch.distributed.is_available():
        raise GraphoptError("processors: this torch was built without torch.distributed, which collectives need")
    if torch.distributed.is_initialized() or os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise GraphoptError(
            "processors: this process belongs to a group already (torchrun, or init_process_group), whose processes "
            "would each start workers; start the script with plain python to let it start its own"
        )
    cores = available_cores()
    if processors * threads > cores:
        warnings.warn(
            f"{processors} processors with {threads} threads each take turns on {cores} cores",
            GraphoptWarning,
            stacklevel=3,
        )
