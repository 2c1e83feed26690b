"""What is known of schemes over batch sizes, where prices hold for some of them only."""

from graphopt.choice import Landscape
from graphopt.cost_model.measured import Measurement


def measured(seconds: float) -> Measurement:
    return Measurement(seconds, 0.99 * seconds, 1.01 * seconds, 9)


def price(scheme: str, size: int) -> tuple[float, float, float] | None:
    """Of graphs that hold from 16 rows on."""
    seconds = {"flat": 1e-3 * size, "eager": 5e-3 + 8e-4 * size}[scheme]
    return None if size < 16 else (seconds, 0.8 * seconds, 1.2 * seconds)


def test_sizes_that_a_graph_does_not_hold_for_are_interpolated_without_prices():
    landscape = Landscape(price)
    for size in (16, 64):
        for scheme in ("flat", "eager"):
            landscape.add(scheme, size, measured(price(scheme, size)[0]))
    for scheme in ("flat", "eager"):
        below = landscape.belief(scheme, 4)
        assert below is not None and below.source == "interpolated" and 0 < below.low <= below.seconds <= below.high
    (crossover,) = landscape.crossovers({16: "flat", 64: "eager"}, ["flat", "eager"])
    assert (crossover.before, crossover.after) == ("flat", "eager") and 16 < crossover.size <= 64
