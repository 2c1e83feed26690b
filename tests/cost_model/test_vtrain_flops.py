"""The FLOPs of GPT models, built without data, against the formula of Megatron-LM.

The configurations are the distinct ones of VIA-Research/vTrain (commit f8dda84), data/ground_truth_single.csv, as far
as they are in the development split; vocabulary 51,200. ``python -m benchmarks.vtrain FILE`` checks every row.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from benchmarks.vtrain import Row, Shape, capture, megatron_flops, read_rows

CONFIGURATIONS = [
    Shape(hidden, heads, layers, sequence)
    for hidden, heads, sequence in [(1024, 16, 1024), (2048, 16, 1024)]
    for layers in (12, 16, 20, 24)
]
BATCHES = (2, 4, 8, 16, 32, 64, 128)


@cache
def flops_by_layers(hidden: int, heads: int, sequence: int, batch: int) -> tuple[int, int]:
    """FLOPs outside of the layers and of one layer, from graphs with one layer and with two."""
    one, two = (graph(Shape(hidden, heads, layers, sequence)).flops({"batch": batch}) for layers in (1, 2))
    return 2 * one - two, two - one


graph = cache(capture)


@pytest.mark.parametrize("shape", CONFIGURATIONS, ids=lambda s: f"{s.hidden_size}-{s.layers}")
@pytest.mark.parametrize("batch", BATCHES)
def test_flops_are_those_of_the_formula(shape: Shape, batch: int) -> None:
    """Layers are alike, so that a graph of few of them tells the FLOPs of many (the next test)."""
    outside, layer = flops_by_layers(shape.hidden_size, shape.attention_heads, shape.sequence_length, batch)
    assert outside + shape.layers * layer == pytest.approx(megatron_flops(shape, batch), rel=0.01)


def test_deep_models_cost_what_their_layers_cost() -> None:
    shape = replace(CONFIGURATIONS[0], layers=4)
    outside, layer = flops_by_layers(shape.hidden_size, shape.attention_heads, shape.sequence_length, 8)
    assert graph(shape).flops({"batch": 8}) == outside + shape.layers * layer


@pytest.mark.slow
def test_flops_of_a_whole_model() -> None:
    """One of them; ``python -m benchmarks.vtrain`` builds them all."""
    shape = CONFIGURATIONS[-1]
    flops = capture(shape).flops
    assert all(flops({"batch": b}) == pytest.approx(megatron_flops(shape, b), rel=0.01) for b in BATCHES)


def test_rows_are_read_by_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "# a comment\n"
        "gpus,global_batch,micro_batch,hidden_size,attention_heads,layers,sequence_length,"
        "tensor_parallel,data_parallel,pipeline_parallel,iteration_ms\n"
        "4,16,4,2048,16,24,1024,1,2,2,410.5\n"
    )
    (row,) = read_rows(path)
    assert row == Row(4, 16, 4, 2048, 16, 24, 1024, 1, 2, 2, 410.5)
    assert row.shape == CONFIGURATIONS[-1]
