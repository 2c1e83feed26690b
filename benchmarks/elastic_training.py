"""Training of supernets and prices of their subnets, on real digits and this machine.

    python -m benchmarks.elastic_training [accuracy] [cost] [prices] [search] [--steps N] [--seeds N] [--ways WAY ...]

- ``accuracy``: subnets of one joint (one progressive) training against the same nets trained alone for as many steps.
  Each training that is over is kept in a file, so that it may be run in pieces.
- ``cost``: steps over four subnets against those run alone as plain modules in eager mode, in turn.
- ``prices``: predicted against measured step times of 30 subnets.
- ``search``: candidates priced a second, and the time to select.

Models and data are those of `benchmarks.digit_supernets`. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from time import perf_counter, process_time
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.digit_supernets import (
    BATCH,
    MODELS,
    Batches,
    accuracy_of,
    adamw,
    alone,
    cosine,
    sizes_of,
    space_of,
    tied_space_of,
)
from benchmarks.measure import eager_step, interleaved, machine_description, print_table, write_json
from demo.train_digits import digits
from graphopt.cost_model import Machine
from graphopt.elastic import Choice, Space
from graphopt.elastic.prices import METRICS, Prices, Training
from graphopt.elastic.progressive import Stage, joint_mode, progressive_mode
from graphopt.elastic.region import Region
from graphopt.elastic.sampler import Sampler
from graphopt.elastic.sampling import Fixed, Leaning, Recurring, Sandwich
from graphopt.elastic.select import select
from graphopt.elastic.step import ElasticStep
from graphopt.elastic.training import train

RESULTS = Path(__file__).parent / "results" / "elastic_training.json"
KEPT = RESULTS.with_name("elastic_accuracy.jsonl")

Way = Callable[[str, int, int], tuple[Space, Sequence[Stage]]]
"""Of a model's name, a seed and a number of steps: a supernet and the stages of its training."""

ONE_SCHEDULE = "progressive, one schedule"
"""The way in which the learning rate does not begin anew with each stage."""


def _progressive(name: str, seed: int, steps: int) -> tuple[Space, Sequence[Stage]]:
    space = space_of(name, seed)
    kinds = len({d.kind for d in space.dimensions})
    part = steps // (kinds + 1)
    return space, progressive_mode(space, None, part, full=steps - part * kinds)


WAYS: dict[str, Way] = {
    "joint": lambda name, seed, steps: (space_of(name, seed), joint_mode(steps)),
    "progressive": _progressive,
    ONE_SCHEDULE: _progressive,
    "joint, tied sizes": lambda name, seed, steps: (tied_space_of(name, seed), joint_mode(steps)),
    "joint, leaning draws": lambda name, seed, steps: (
        space_of(name, seed), joint_mode(steps, strategy=Sandwich(rest=Leaning()))
    ),
    "joint, 6 subnets": lambda name, seed, steps: (space_of(name, seed), joint_mode(steps, subnets=6)),
    "joint, 8 subnets": lambda name, seed, steps: (space_of(name, seed), joint_mode(steps, subnets=8)),
}  # fmt: skip
"""Ways of training. The first two are what the library does by default; the others say what that costs or gains."""


class KeptRuns:
    """Accuracies of trainings that are over, in a file of one JSON object a line: a run that was ended goes on."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._found = {json.dumps(row["what"]): row["accuracies"] for row in map(json.loads, lines)}

    def of(self, what: Sequence[Any], run: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What ``run`` gives, by name of the subnet; run once for each ``what``."""
        key = json.dumps(what)
        if key not in self._found:
            began = process_time()
            self._found[key] = run()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            row = {"what": list(what), "accuracies": self._found[key], "processor seconds": process_time() - began}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        found: dict[str, float] = self._found[key]
        return found


def accuracy(
    steps: int, seeds: int, random: int, models: Sequence[str], ways: Sequence[str], kept: KeptRuns
) -> list[dict[str, Any]]:
    """Rows: model, way of training, subnet, accuracy, and how far from the same net trained alone, means over seeds."""
    rows = []
    for name in models:
        plain = space_of(name, 0)
        for way in ways:
            found: dict[str, list[tuple[float, float]]] = {}
            for seed in range(seeds):
                space, stages = WAYS[way](name, seed, steps)
                sizes = sizes_of(space, random)

                def run(
                    space: Any = space, stages: Any = stages, sizes: Any = sizes, seed: int = seed, way: str = way
                ) -> Any:  # fmt: skip
                    train(
                        space, Batches(seed), F.cross_entropy, adamw(space.model.parameters()), stages,
                        scheduler=cosine, restart=way != ONE_SCHEDULE, seed=seed,
                    )  # fmt: skip
                    return {size: accuracy_of(space, choice) for size, choice in sizes.items()}

                together = kept.of([name, way, seed, steps, random], run)
                for size, choice in sizes.items():
                    untied = plain.choice(_untied(space, choice))
                    net = {n: v for n, v in untied.to_dict().items() if n not in untied.inactive}
                    by_itself = kept.of(
                        [name, "alone", seed, steps, net],
                        lambda name=name, net=net, seed=seed: {"": alone(name, net, seed, steps)},  # type: ignore[misc]
                    )[""]
                    found.setdefault(size, []).append((together[size], by_itself))
            for size, pairs in found.items():
                rows.append(
                    {"model": name, "way": way, "subnet": size, "accuracy": mean(a for a, _ in pairs),
                     "against alone": mean(a - b for a, b in pairs), "seeds": seeds, "steps": steps}
                )  # fmt: skip
            if random:
                rows.append(
                    {"model": name, "way": way, "subnet": "random, mean", "seeds": seeds, "steps": steps,
                     "accuracy": mean(a for n, p in found.items() if n.startswith("random") for a, _ in p),
                     "against alone": mean(a - b for n, p in found.items() if n.startswith("random") for a, b in p)}
                )  # fmt: skip
    print_table(rows, title=f"digits, {steps} steps, {seeds} seeds")
    return rows


def _untied(space: Space, choice: Choice) -> dict[str, Any]:
    """The values of a choice by all dimensions that it ties together."""
    found: dict[str, Any] = {}
    for name, value in choice.items():
        handle = space.primary.handles[name]
        found.update(dict.fromkeys([part.name for part in getattr(handle, "parts", (handle,))], value))
    return found


SETS = 3
"""Sets of subnets that ``cost`` goes through in turn."""


def cost(rounds: int, models: Sequence[str], graphs: bool) -> list[dict[str, Any]]:
    """Rows: steps over four subnets (forward, backward, one update) against the same subnets as plain modules, each
    with an optimizer of its own, one by one: sets that come again and again, by autograd and as graphs, and sets that
    nobody has run before."""
    rows = []
    images, labels, *_ = digits()
    x, y = images[:BATCH], labels[:BATCH]
    for name in models:
        space = space_of(name, 0)
        strategy = Recurring(sets=SETS)
        steps = {
            by: ElasticStep(space, F.cross_entropy, adamw(space.model.parameters()), strategy=strategy, schemes=schemes)
            for by, schemes in ({"autograd": None} | ({"graphs": "flat"} if graphs else {})).items()
        }
        sampler = Sampler(Region.of(space), strategy)
        sets = [sampler.draw() for _ in range(SETS)]
        singles = [_alone_steps(space, choices) for choices in sets]

        def one_by_one(singles: Any = singles) -> None:
            for of_set in singles:
                for single in of_set:
                    single(x, y)

        def together(step: ElasticStep) -> Callable[[], None]:
            def run() -> None:
                for _ in range(SETS):
                    step(x, y)

            return run

        candidates = {"one by one": one_by_one, **{by: together(step) for by, step in steps.items()}}
        for _ in range(2):
            for candidate in candidates.values():
                candidate()  # graphs are made when a set comes for the second time
        counted = {}
        for what, candidate in candidates.items():
            with FlopCounterMode(display=False) as counter:
                candidate()
            counted[what] = counter.get_total_flops()
        for timing in interleaved(candidates, rounds=rounds)[1:]:
            rows.append(
                {"model": name, "subnets": "again and again", "by": timing.name,
                 "FLOPs": counted[timing.name] / counted["one by one"], "time": timing.ratio,
                 "low": timing.ratio_low, "high": timing.ratio_high, "rounds": rounds}
            )  # fmt: skip
        rows.append({"model": name, "subnets": "never run before", "by": "autograd", **_fresh(space, x, y, rounds)})
        print(*rows, sep="\n", file=sys.stderr)
    print_table(rows, title="steps over four subnets, relative to the four alone (plain modules, eager)")
    return rows


def _alone_steps(space: Space, choices: Sequence[Choice]) -> list[Callable[..., Any]]:
    nets = [space.extract(choice).train() for choice in choices]
    return [eager_step(net, adamw(net.parameters()), F.cross_entropy) for net in nets]


def _fresh(space: Space, x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    """The ratio for subnets that were never run: kernels are made for their sizes by whoever runs first, so both sides
    take turns in that, and the ratio is the geometric mean of those of both orders."""
    sampler = Sampler(Region.of(space), Sandwich(), seed=7)
    step = ElasticStep(space, F.cross_entropy, adamw(space.model.parameters()))
    ratios: tuple[list[float], list[float]] = [], []
    for turn in range(2 * (rounds // 2) + 4):
        choices = sampler.draw()
        singles = _alone_steps(space, choices)
        step.sampler.strategy = Fixed(choices)
        runs = [lambda: [single(x, y) for single in singles], lambda: step(x, y)]  # noqa: B023  (called at once)
        taken = [0.0, 0.0]
        for side in (0, 1) if turn % 2 else (1, 0):
            start = perf_counter()
            runs[side]()
            taken[side] = perf_counter() - start
        if turn >= 4:
            ratios[turn % 2].append(taken[1] / taken[0])
    low, high = sorted(map(median, ratios))
    return {"FLOPs": 1.0, "time": (low * high) ** 0.5, "low": low, "high": high, "rounds": rounds}


def prices(count: int, rounds: int) -> list[dict[str, Any]]:
    """Rows: predicted against measured steps of subnets as plain modules in eager mode."""
    rows = []
    images, labels, *_ = digits()
    x, y = images[:BATCH], labels[:BATCH]
    for name in MODELS:
        space = space_of(name, 0)
        training = Training((x, y), F.cross_entropy, adamw(space.model.parameters()))
        choices = [space.full, space.smallest, *(space.sample(seed=i) for i in range(count - 2))]
        predicted = Prices(space, Machine.current(), mode="eager", training=training).of(choices, "step_seconds")
        steps = {}
        for i, choice in enumerate(choices):
            net = space.extract(choice).train()
            steps[str(i)] = _bound(eager_step(net, adamw(net.parameters()), F.cross_entropy), x, y)
        timings = interleaved(steps, rounds=rounds)
        measured = [timing.seconds for timing in timings]
        scale = median(m / p for m, p in zip(measured, predicted))
        pairs = list(combinations(range(count), 2))
        agree = [(predicted[a] - predicted[b]) * (measured[a] - measured[b]) for a, b in pairs]
        rows.append(
            {"model": name, "subnets": count, "mean error": mean(abs(p / m - 1) for p, m in zip(predicted, measured)),
             "mean error, one scale": mean(abs(scale * p / m - 1) for p, m in zip(predicted, measured)),
             "Kendall tau": sum(1 if a > 0 else -1 for a in agree) / len(agree),
             "range": max(measured) / min(measured)}
        )  # fmt: skip
    print_table(rows, title="predicted and measured step times")
    return rows


def _bound(step: Callable[..., Any], x: Tensor, y: Tensor) -> Callable[[], Any]:
    return lambda: step(x, y)


def search() -> list[dict[str, Any]]:
    """Rows: candidates priced a second by metric, seconds to compile, and to select."""
    rows = []
    images, labels, *_ = digits()
    machine = Machine.named("H100")
    for name in MODELS:
        space = space_of(name, 0)
        made = Prices(space, machine, training=Training((images[:BATCH], labels[:BATCH]), F.cross_entropy))
        start = perf_counter()
        made.table([space.full], METRICS)
        compiled = perf_counter() - start
        many = [space.sample(seed=i) for i in range(2000)]
        row: dict[str, Any] = {"model": name, "compile s": compiled}
        for metric in METRICS:
            start = perf_counter()
            made.of(many, metric)
            row[f"{metric} 1/s"] = round(len(many) / (perf_counter() - start))
        start = perf_counter()
        whole = float(made.of([space.full], "latency_seconds")[0])
        found = select(space, {"latency_seconds": 0.8 * whole}, prices=made)
        row |= {"select s": perf_counter() - start, "exact": found.exact, "front": len(found.front)}
        rows.append(row)
    print_table(rows, title="pricing and selection")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic_training")
    parser.add_argument("parts", nargs="*", help="accuracy, cost, prices, search; all by default")
    parser.add_argument("--steps", type=int, default=1000, help="of each training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (%(default)s)")
    parser.add_argument("--random", type=int, default=5, help="random subnets trained alone too (%(default)s)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="for accuracy and cost")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS)[:2], help="for accuracy")
    parser.add_argument("--kept", type=Path, default=KEPT, help="trainings that are over; they are not repeated")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="cost: autograd alone")
    parser.add_argument("--rounds", type=int, default=20, help="of timings (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go (%(default)s)")
    options = parser.parse_args(arguments)
    parts = {
        "cost": lambda: cost(options.rounds, options.models, options.graphs),
        "prices": lambda: prices(30, options.rounds),
        "search": search,
        "accuracy": lambda: accuracy(
            options.steps, options.seeds, options.random, options.models, options.ways, KeptRuns(options.kept)
        ),
    }
    if unknown := set(options.parts) - set(parts):
        parser.error(f"unknown parts {sorted(unknown)}; there are {', '.join(parts)}")
    results = {name: part() for name, part in parts.items() if not options.parts or name in options.parts}
    write_json(options.out, {"machine": machine_description(), **results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
