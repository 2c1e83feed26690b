"""A real search on handwritten digits: an elastic net of convolutions, two workers, a few minutes, a gate.

    python -m benchmarks.exploration real --seconds 300

Within the seconds: a supernet of residual blocks is trained; its subnets are searched with a learning rate and a weight
decay, under a budget of half the step time that the cost model predicts for the full net; the best few are trained
longer. Beside that, not within them:

- **against the full net**: the best model and the full net, both from the supernet's weights and with the same epochs
  over the same data; the full net with each set of hyper-parameters of the models that were trained longer, of which
  the one that is best on the validation images counts. Both on images that neither training nor search has seen, means
  over seeds.
- **the gate**: steps of a sample of models that were run, and of a sample of those that it refused, are measured in
  turn. Which of the first break the budget, which of the second would have kept it?

Clocks of a machine on which others work tell too long times, and other ones each minute. With ``--busy`` trials keep
theirs to themselves: the gate goes by predictions alone. Measured steps are told relative to the full net's too, which
is measured in the same rounds: the budget is half of that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt.elastic
from benchmarks.digit_supernets import resnet
from benchmarks.measure import eager_step
from demo.train_digits import accuracy, digits
from graphopt.cost_model.measured import measure
from graphopt.elastic import Kind, Space
from graphopt.exploration import Context, Study, Training, explore, log
from graphopt.exploration.history import Refusal, Trial
from graphopt.exploration.predictor import ElasticPredictor

BATCH, EPOCHS, EFFORT, RETRAINED, SEEDS = 32, 2, 4.0, 3, 5
SHARE_OF_SUPERNET, SECONDS_AT_THE_END = 0.25, 25.0
SAMPLE = 40
"""Models of each kind that the gate is judged by."""

Images = tuple[Tensor, Tensor]


def data() -> tuple[Images, Images, Images]:
    """Images and labels: 500 to train on, 500 to validate on, 797 that are looked at in the end."""
    images, labels, more, their_labels = digits()
    images, labels = torch.cat([images, more]), torch.cat([labels, their_labels])
    return (images[:500], labels[:500]), (images[500:1000], labels[500:1000]), (images[1000:], labels[1000:])


def supernet() -> Space:
    """Two stages of residual blocks; widths, depths and the residual stream vary."""
    torch.manual_seed(0)
    model = resnet().train()
    return graphopt.elastic.space(
        model, torch.randn(BATCH, 1, 8, 8),
        choices={Kind.EMBEDDING: (0.25, 0.5, 0.75, 1.0), Kind.WIDTH: (0.25, 0.5, 0.75, 1.0), Kind.DEPTH: (1, 2)},
    )  # fmt: skip


def training(train: Images, validation: Images, busy: bool = False) -> Training:
    """The trial."""
    kind = Unclocked if busy else Training
    return kind(F.cross_entropy, torch.optim.AdamW, train, validation, epochs=EPOCHS, batch=BATCH)


class Unclocked(Training):
    """The same without its clock: measured seconds neither correct predictions nor decide what keeps the budget."""

    def __call__(self, net: nn.Module, hyper_parameters: Mapping[str, Any], context: Context) -> dict[str, float]:
        """See `Training`."""
        found = super().__call__(net, hyper_parameters, context)
        return {("clock_seconds" if name == "step_seconds" else name): value for name, value in found.items()}


def real(seconds: float, busy: bool = False, workers: int = 2) -> dict[str, Any]:
    """Run it all; what was found, as plain data."""
    torch.set_num_threads(1)  # as each worker; prices are for so many
    train, validation, unseen = data()
    trial = training(train, validation, busy)
    begun = perf_counter()
    space = supernet()
    steps = _train_for(space, train, SHARE_OF_SUPERNET * seconds)
    trained = perf_counter() - begun
    predictor = ElasticPredictor(space, trial, wanted={"step_seconds"})
    whole = predictor(dict(space.full), {"weight_decay": 1e-2})["step_seconds"][0]
    budget = {"step_seconds": whole / 2}
    with tempfile.TemporaryDirectory(prefix="graphopt-real-") as folder:
        left = seconds - SECONDS_AT_THE_END - (perf_counter() - begun)
        left = max(left, 10.0)  # a busy machine may have left nothing
        study = explore(
            space, trial, hyper_parameters={"lr": log(1e-4, 1e-1, steps=13), "weight_decay": log(1e-4, 1e-1, steps=7)},
            budget=budget, predictor=predictor, workers=workers, time=left, retrain=RETRAINED, effort=EFFORT, threads=1,
            seed=0, store=Path(folder) / "digits.db", progress=True,
        )  # fmt: skip
    took = perf_counter() - begun
    best = study.best()
    return {
        "seconds": took, "of which the supernet": trained, "steps of the supernet": steps, "workers": workers,
        "counts": study.counts(), "rank correlation of search and retraining": study.rank_correlation(),
        "full net: predicted step seconds": whole, "gate without clocks": busy,
        "best": {"sizes": best.sizes, "hyper_parameters": best.hyper_parameters,
                 "predicted step seconds": best.predicted["step_seconds"][0],
                 "share of the full net's": best.predicted["step_seconds"][0] / whole},
        "accuracy on unseen images": against_full(study, space, trial, unseen),
        "gate": gate(study, space, trial, budget["step_seconds"]),
    }  # fmt: skip


def _train_for(space: Space, train: Images, seconds: float) -> int:
    """Train the supernet, in rounds, for about so long. Returns the number of steps."""
    begun, steps, each = perf_counter(), 0, 40
    optimizer = torch.optim.AdamW(space.model.parameters(), lr=3e-3)
    batches = list(zip(train[0].split(BATCH), train[1].split(BATCH)))[:-1]
    while perf_counter() - begun < seconds:
        graphopt.elastic.train(space, batches, F.cross_entropy, optimizer, each, seed=steps, progress=False)
        steps += each
    return steps


def against_full(study: Study, space: Space, trial: Training, unseen: Images) -> dict[str, Any]:
    """Mean percentages of the best model and of the full net, trained alike, and all of them."""
    best = study.best()
    retrained = [t for t in study.trials("done") if t.final]
    ours = [_trained(space, trial, best.sizes, best.hyper_parameters, unseen, seed)[1] for seed in range(SEEDS)]
    full: dict[str, list[tuple[float, float]]] = {}
    for one in retrained:
        full[study.space.describe(one.point)] = [
            _trained(space, trial, dict(space.full), one.hyper_parameters, unseen, seed) for seed in range(SEEDS)
        ]
    chosen = max(full.values(), key=lambda pairs: mean(validated for validated, _ in pairs))
    theirs = [score for _, score in chosen]
    return {"best": mean(ours), "full net": mean(theirs), "of the best": ours, "of the full net": theirs}


def _trained(
    space: Space, trial: Training, sizes: Mapping[str, Any], hyper_parameters: Mapping[str, Any], unseen: Images,
    seed: int,
) -> tuple[float, float]:  # fmt: skip
    """Percentages on validation images and on unseen ones of a subnet that is trained as in the final retraining."""
    net = space.extract(space.choice(sizes))
    with tempfile.TemporaryDirectory(prefix="graphopt-real-") as folder:
        found = trial(net, hyper_parameters, Context(0, 1000 * seed, Path(folder), effort=EFFORT, final=True))
    return 100 * found["accuracy"], 100 * accuracy(net, *unseen)


def gate(study: Study, space: Space, trial: Training, budget: float) -> dict[str, Any]:
    """How far steps of models that were run, and of models that were refused, keep the budget."""
    random = np.random.default_rng(0)
    run = _sample([t for t in study.trials("done")], random)
    refused = _sample([r for r in study.history.refusals.values() if "step_seconds" in r.predicted], random)
    steps = {("full", 0): _step(space, trial, dict(space.full), {"lr": 1e-3, "weight_decay": 1e-2})}
    for kind, models in (("run", run), ("refused", refused)):
        for i, model in enumerate(models):
            sizes, hp = study.space.sizes(model.point), study.space.hyper_parameters(model.point)
            steps[kind, i] = _step(space, trial, sizes, hp)
    measured = measure(steps, rounds=(9, 9), seconds=300.0, warmup=2)
    full = measured["full", 0]
    found: dict[str, Any] = {"budget: seconds": budget, "full net: measured seconds": full.seconds,
                             "disturbed": full.noisy}  # fmt: skip
    for kind, models in (("run", run), ("refused", refused)):
        absolute = np.array([measured[kind, i].seconds / budget for i in range(len(models))])
        relative = np.array([measured[kind, i].seconds / full.seconds / 0.5 for i in range(len(models))])
        predicted = np.array([model.predicted["step_seconds"][0] / budget for model in models])
        broke = (lambda x: float((x > 1).mean())) if kind == "run" else (lambda x: float((x <= 1).mean()))
        told = "break the budget" if kind == "run" else "would have kept the budget"
        found[kind] = {
            "models": len(models), f"share that {told}, seconds": broke(absolute),
            f"share that {told}, relative to the full net": broke(relative),
            "measured / predicted, median": float(median(absolute / predicted)),
            "its spread (median absolute deviation of the logarithm)": float(
                np.median(np.abs(np.log(absolute / predicted) - np.median(np.log(absolute / predicted))))
            ),
            "rows (predicted, measured, of the budget)": np.round(np.stack([predicted, absolute], 1), 3).tolist(),
        }  # fmt: skip
    clocks = [t.metrics[name] / budget for t in study.trials("done") for name in t.metrics if name == "step_seconds"]
    if clocks:
        found["share of all trials whose own clock broke the budget"] = float(np.mean(np.array(clocks) > 1))
    return found


def _sample(models: Sequence[Any], random: np.random.Generator) -> list[Trial | Refusal]:
    places = random.permutation(len(models))[:SAMPLE]
    return [models[i] for i in sorted(places)]


def _step(space: Space, trial: Training, sizes: Mapping[str, Any], hyper_parameters: Mapping[str, Any]) -> Any:
    """A training step of a subnet, as a trial takes it."""
    net: nn.Module = deepcopy(space.extract(space.choice(sizes))).train()
    step = eager_step(net, trial.optimizer(net.parameters(), **trial.options(hyper_parameters)), trial.loss)
    return partial(step, *trial.example(hyper_parameters))
