"""Processes that run a divided graph for real, and the check that every test of it makes: `assert_equals_whole`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from graphopt.graph.lowering import lower
from graphopt.graph.torch_internals import name_process_group
from graphopt.graph.training_graph import InputKind, OutputKind, TrainingGraph
from graphopt.passes import PassResult, ShardAxes


def work(rank: int, world: int, folder: str, pipe: Connection) -> None:
    """One processor: takes ``(graph's path, inputs, seed)`` until it is told to stop, gives the outputs or the error.

    Groups of the first 2 ... ``world`` processes are called ``graphopt2`` ...
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=20)
    )
    for size in range(2, world + 1):
        group = dist.new_group(list(range(size)))
        if rank < size:
            name_process_group(f"graphopt{size}", group)
    while (task := pipe.recv()) is not None:
        path, inputs, seed = task
        try:
            torch.manual_seed(seed)
            with torch.no_grad():
                outputs = lower(TrainingGraph.load(path), in_place=False).run(*inputs)
            pipe.send((outputs, torch.get_rng_state()))
        except Exception as error:  # the test that gave the task raises it
            pipe.send(error)
    dist.destroy_process_group()


class Team:
    """Processes that work on parts of one batch."""

    def __init__(self, world: int, folder: str):
        self.world, self.folder, self.broken = world, folder, False
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(rank, world, folder, theirs), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, graph: TrainingGraph, inputs: Sequence[Sequence[Any]], seed: int = 0) -> list[Any]:
        """The outputs and the random state of each processor, given the inputs of each."""
        assert not self.broken, "an earlier test left processors that wait for each other"
        path = str(Path(self.folder) / "graph.zip")
        graph.save(path)
        for pipe, mine in zip(self._pipes, inputs):
            pipe.send((path, list(mine), seed))
        self.broken = True
        answers = []
        for pipe in self._pipes[: len(inputs)]:
            assert pipe.poll(60), "a processor does not answer"
            answers.append(pipe.recv())
            if isinstance(answers[-1], Exception):
                raise answers[-1]
        self.broken = False
        return answers

    def stop(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(1 if self.broken else 20)
            if process.is_alive():
                process.kill()  # it waits for another


@contextmanager
def team(world: int) -> Iterator[Team]:
    """A team for the time of a test module."""
    with tempfile.TemporaryDirectory() as folder:
        started = Team(world, folder)
        try:
            yield started
        finally:
            started.stop()


def divided(graph: TrainingGraph, values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """The inputs of each processor: parts of ``values``, those of the graph before it was divided, and its place."""
    lies = graph.signature.tree["placements"]["inputs"]
    found, begin = [], 0
    for size in sizes:
        mine: list[Any] = []
        for position, input_ in enumerate(graph.inputs):
            if input_.kind is InputKind.PLACE:
                mine.append(sum(sizes) if input_.field == "total" else begin)
            elif input_.kind in (InputKind.BATCH, InputKind.TANGENT) and input_.name in lies:
                dim = int(lies[input_.name].split()[1])
                mine.append(values[position].narrow(dim, begin, size).clone())
            else:
                mine.append(values[position])
        found.append(mine)
        begin += size
    return found


def shard(graph: TrainingGraph, processors: int, **options: Any) -> PassResult:
    """`ShardAxes` for a team; it must not refuse."""
    result = ShardAxes(processors, group=f"graphopt{processors}", **options)(graph)
    assert not result.refusals, result.refusals
    return result


def assert_equals_whole(
    team: Team,
    graph: TrainingGraph,
    values: Sequence[Any],
    sizes: Sequence[int],
    *,
    seed: int = 3,
    tolerance: float = 1e-10,
    **options: Any,
) -> TrainingGraph:
    """Every output of the divided graph equals that of the graph, within what rounding in float64 explains, and the
    random state of each processor afterwards is that of one that ran it all. Gives the divided graph."""
    result = shard(graph, len(sizes), **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        expected = lower(graph, in_place=False).run(*values)
    state = torch.get_rng_state()
    answers = team.run(result.graph, divided(result.graph, values, sizes), seed)
    words = result.graph.signature.tree["placements"]["outputs"]
    for i, (output, word, whole) in enumerate(zip(graph.outputs, words, expected, strict=True)):
        parts = [outputs[i] for outputs, _ in answers]
        if word.startswith("sharded"):
            assert output.kind in (OutputKind.OUTPUT, OutputKind.GRADIENT)
            parts = [torch.cat(parts, int(word.split()[1]))]
        for part in parts:
            scale = (
                1e-2 * tolerance * (1 + whole.abs().max().item() if whole.numel() and whole.is_floating_point() else 1)
            )
            torch.testing.assert_close(
                part, whole, rtol=tolerance, atol=scale, equal_nan=True, msg=lambda m, output=output: f"{output}: {m}"
            )
    for _, drawn in answers:
        assert torch.equal(drawn, state), "the processors drew other numbers than one alone"
    return result.graph
