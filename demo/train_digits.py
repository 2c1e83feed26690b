"""Train a small network on handwritten digits by `graphopt.optimize`, with eager beside it.

    make demo        (or: python -m demo.train_digits [--steps 200] [--no-compile])

Shows, with numbers measured here and now: a batch size that grows with the accuracy, the plan with its reasons, the
loss beside eager's, the time, FLOPs and memory of a step beside eager and `torch.compile`, and what is saved where an
optimizer trains the last layer only. The data are the 1,797 digits that come with scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import graphopt
from benchmarks import measure
from benchmarks.training_step import COMPILE, EAGER, EVERY, FLAT, Workload, candidates, measured

MEASURE_EVERY = 20
"""Steps between two measurements of the accuracy."""

SHOWN = 12
"""Steps of which the two losses are printed."""


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images float32 ``(n, 1, 8, 8)`` and labels int64 ``(n,)``: 1,437 to train, 360 to measure the accuracy."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:-360], order[-360:]
    return images[train], labels[train], images[test], labels[test]


def network() -> nn.Module:
    """Three convolutions with batch norm, dropout, and a linear head; the weights follow the seed."""

    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    torch.manual_seed(0)
    return nn.Sequential(
        *block(1, 16), *block(16, 16), nn.MaxPool2d(2), *block(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(32, 10),
    )  # fmt: skip


def adamw(parameters: object, **options: object) -> Optimizer:
    """The optimizer of all models here."""
    return AdamW(parameters, lr=2e-3, weight_decay=1e-2, **options)  # type: ignore[arg-type]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that the model names rightly, in eval mode."""
    model.eval()
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    model.train()
    return right.float().mean().item()


def shuffled(count: int, schedule: graphopt.BatchSizeSchedule) -> Iterator[Tensor]:
    """Batches of indices without end, of the size that the schedule has at the time."""
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(count, generator=generator)
        while len(order) >= schedule.sizes[0]:
            batch, order = order[: schedule.size], order[schedule.size :]
            yield batch


def train(steps: int, console: Console) -> int:
    """Train a model by graphopt and its twin by eager on the same batches; returns the last batch size."""
    images, labels, test_images, test_labels = digits()
    schedule = graphopt.BatchSizeSchedule(16, 128, start_accuracy=0.5, target_accuracy=0.98)

    model, twin = network().train(), network().train()
    step = graphopt.optimize(  # by schemes that give eager's bits, so that the two can be compared digit by digit
        model, (schedule.size, 1, 8, 8), loss=F.cross_entropy, optimizer=adamw(model.parameters()), schemes="exact"
    )
    eager = measure.eager_step(twin, adamw(twin.parameters()), F.cross_entropy)

    losses: list[tuple[int, int, float, float]] = []
    plans: dict[int, graphopt.Plan] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("capturing the step ...", total=steps)
        for number, batch in zip(range(1, steps + 1), shuffled(len(labels), schedule)):
            x, y = images[batch], labels[batch]
            torch.manual_seed(number)  # dropout draws the same numbers on both sides
            ours = step(x, y).item()
            torch.manual_seed(number)
            losses.append((number, len(y), ours, eager(x, y).item()))
            plans[len(y)] = step.plan
            progress.advance(task)
            if number % MEASURE_EVERY == 0 or number == steps:
                reached = accuracy(model, test_images, test_labels)
                progress.update(task, description=f"batches of {schedule.size:3}, accuracy {reached:.1%}")
                before = schedule.size
                if schedule.update(reached) > before:
                    progress.print(f"step {number}: accuracy {reached:.1%}, so batches of {schedule.size} from here on")

    console.rule("The plan")
    last = schedule.size
    console.print(plans[last].explain(), markup=False, highlight=False)
    captured = {plan.facts.capture_seconds for plan in plans.values() if plan.facts}
    console.print(f"\nbatch sizes planned: {', '.join(map(str, sorted(plans)))}; captures: {len(captured)}")

    console.rule("The loss beside eager's")
    table = Table("step", "batch", "graphopt", "eager", "equal")
    for row in losses[:: max(1, len(losses) // SHOWN)]:
        number, size, ours, theirs = row
        table.add_row(f"{number:,}", str(size), f"{ours:.9f}", f"{theirs:.9f}", "yes" if ours == theirs else "NO")
    console.print(table)
    equal = sum(ours == theirs for *_, ours, theirs in losses)
    ours_state, twin_state = model.state_dict(), twin.state_dict()
    same = sum(torch.equal(ours_state[name], twin_state[name]) for name in ours_state)
    console.print(
        f"equal losses: {equal} of {len(losses)} steps; equal tensors of the trained models: {same} of "
        f"{len(ours_state)}\naccuracy on 360 unseen digits: graphopt {accuracy(model, test_images, test_labels):.1%}, "
        f"eager {accuracy(twin, test_images, test_labels):.1%}"
    )
    return last


def compare(size: int, console: Console, *, compiler: bool) -> None:
    """One step of the same model by all, in turn: time, FLOPs, memory."""
    console.rule(f"A step of batch {size}: graphopt, eager and torch.compile")
    work = Workload("digits", "", network, _batch, F.cross_entropy, adamw)
    names = [name for name in EVERY[:4] + (COMPILE,) if compiler or name != COMPILE]
    _table(work, size, names, console)


def head_only(size: int, console: Console) -> None:
    """An optimizer that owns the last layer only: eager computes all gradients, ours those that are read."""
    console.rule("Training the last layer only")
    console.print(
        "The optimizer owns the head; nothing was frozen by hand, so eager computes every gradient.\n"
        "Gradient liveness leaves out what nobody reads. A body frozen by hand (second table) autograd skips by itself."
    )
    work = Workload("head", "", network, _batch, F.cross_entropy, adamw, lambda model: model[-1].parameters())
    _table(work, size, [EAGER, FLAT], console)
    frozen = Workload("frozen", "", _frozen, _batch, F.cross_entropy, adamw, _trainable)
    _table(frozen, size, [EAGER, FLAT], console, title="the body frozen by hand")


def _frozen() -> nn.Module:
    model = network().requires_grad_(False)
    model[-1].requires_grad_(True)
    return model


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _batch(size: int) -> tuple[Tensor, Tensor]:
    images, labels, *_ = digits()
    return images[:size], labels[:size]


def _table(work: Workload, size: int, names: Sequence[str], console: Console, title: str | None = None) -> None:
    with console.status("") as status:
        say: Callable[[str], None] = status.update if console.is_terminal else console.print
        made = candidates(work, work.batch(size), say, names)
        say("measuring, in turn")
        rows = measured(made, rounds=20)
    table = Table(
        "", "step, ms", "quartiles", "of eager", "FLOPs", "kept, KiB", "peak, KiB", "first step, s", title=title
    )
    for row in rows:
        table.add_row(
            row["name"].replace(FLAT, "graphopt"), f"{row['seconds'] * 1e3:.2f}", row["quartiles"],
            f"{row['ratio to eager']:.2f}", f"{row['flops']:,}" if row["flops"] else "-",
            f"{row['bytes_kept'] / 1024:,.0f}", f"{row['peak_bytes'] / 1024:,.0f}", f"{row['first_seconds']:.1f}",
        )  # fmt: skip
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.train_digits", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes the most time")
    options = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    torch.set_num_threads(1)  # the network is small: more threads would wait for each other
    start = time.perf_counter()
    machine = measure.machine_description()
    console.print(f"graphopt {graphopt.__version__}, torch {machine['torch']}, {machine['cpu']}, one thread")
    size = train(options.steps, console)
    compare(size, console, compiler=not options.no_compile)
    head_only(size, console)
    console.print(f"done in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
