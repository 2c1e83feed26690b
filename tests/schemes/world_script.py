"""What `test_world.py` runs on every rank of a world: ``python -m torch.distributed.run ... world_script.py FOLDER``.

Each function of `CASES` is called on all ranks together. Its outcome on each rank goes into a file of FOLDER.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import graphopt
from graphopt.errors import BatchError, GraphoptError, RankError
from graphopt.schemes.world.divided import InWorld
from graphopt.schemes.world.sameness import digest, held
from tests.schemes import pairs
from tests.schemes.trials import FACTOR, Images, images, values_of
from tests.worlds import run_cases

CASES: list[Callable[[], None]] = []
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES.append(function)
    return function


def rank() -> int:
    return distributed.get_rank()


def mine(whole: Any) -> list[torch.Tensor]:
    """This rank's rows of a batch: the first ranks have more."""
    parts = whole[0].shape[0]
    cut = parts - parts // 2
    return [t[:cut] if rank() == 0 else t[cut:] for t in whole]


def assert_same_on_all_ranks(step: Any) -> None:
    """Parameters, buffers and state of all ranks have the same bits, and the same scheme was chosen."""
    world = step.task.world
    digests = world.digests([digest(t) for _, t in held(step.task)])
    assert len(set(map(tuple, digests))) == 1, digests
    assert len(set(world.exchange(step.plan.chosen))) == 1


def trained(name: str, optimizer: str, **options: Any) -> Any:
    """50 steps of all ranks on parts of unequal size, beside those of one processor on whole batches, in float64."""
    make, batch = pairs.CASES[name]
    torch.manual_seed(0)
    alone = make().double()
    shared = copy.deepcopy(alone)
    ours, theirs = (OPTIMIZERS[optimizer](m.parameters()) for m in (shared, alone))
    one = graphopt.optimize(
        alone, batch(4), loss=F.cross_entropy, optimizer=theirs, schemes="eager", processors=1, **options
    )
    step = graphopt.optimize(shared, batch(4), loss=F.cross_entropy, optimizer=ours, **options)
    for i in range(50):
        torch.manual_seed(i)
        whole = batch(7 if i % 3 else 4)
        torch.manual_seed(1000 + i)
        expected = one(*whole)
        after = torch.rand(1)
        torch.manual_seed(1000 + i + rank())  # random numbers are those of rank 0
        loss = step(*mine(whole))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        if rank() == 0:
            assert torch.equal(torch.rand(1), after), "the random state after the step"
    assert step.plan.chosen.startswith("flat on 2 ranks") and step.plan.batch_size in (4, 7), step.plan.explain()
    pairs.assert_equal_state(shared, alone)
    assert_same_on_all_ranks(step)
    return step


@case
def dropout_and_batch_norm() -> None:
    trained("perceptron", "adamw", clip=0.1)


@case
def ignored_targets() -> None:
    trained("tokens", "sgd")


@case
def accumulated_gradients() -> None:
    trained("tokens", "adamw", accumulate=2)


def as_near_to_float64_as_one_processor(low: bool = False, **options: Any) -> None:
    """50 steps of all ranks, of one processor in eager (``low``: under autocast to bf16), and of that in float64."""
    torch.manual_seed(0)
    models = [Images()]
    models += [copy.deepcopy(models[0]), copy.deepcopy(models[0]).double()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in models]
    step = graphopt.optimize(models[0], images(6), loss=F.cross_entropy, optimizer=optimizers[0], **options)
    losses: list[list[torch.Tensor]] = [[], [], []]
    for i in range(50):
        torch.manual_seed(i)
        x, y = images(6)
        losses[0].append(step(*mine((x, y))))
        for k, given in ((1, x), (2, x.double())):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low and k == 1):
                value = F.cross_entropy(models[k](given), y)
            value.backward()
            losses[k].append(value.detach())
            optimizers[k].step()
            optimizers[k].zero_grad()
    ours, eager, exact = (values_of(m, o, l) for m, o, l in zip(models, optimizers, losses, strict=True))
    for kind in ("parameter", "state", "loss"):
        names = [n for n in exact if n.startswith(kind)]
        error, own = (max(float((v[n].double() - exact[n]).abs().max()) for n in names) for v in (ours, eager))
        assert error <= FACTOR * own + 1e-6, f"{kind}: off by {error:.3g}, one processor by {own:.3g}"
    assert_same_on_all_ranks(step)


@case
def float32() -> None:
    as_near_to_float64_as_one_processor()


@case
def all_options() -> None:
    scheme = InWorld(2, fused=True, channels_last=True, precision="bf16")
    as_near_to_float64_as_one_processor(low=True, schemes=[scheme])


def like_ddp(model: nn.Module, **options: Any) -> Any:
    """Ten steps beside those of DistributedDataParallel."""
    other = copy.deepcopy(model)
    wrapped = DistributedDataParallel(other)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    step = graphopt.optimize(model, (4, 4), loss=F.cross_entropy, optimizer=ours, **options)
    for i in range(10):
        torch.manual_seed(10 * i + rank())
        x, y = torch.randn(4, 4).double(), torch.randint(2, (4,))
        loss = step(x, y)
        expected = F.cross_entropy(wrapped(x), y)
        expected.backward()
        theirs.step()
        theirs.zero_grad()
        total = expected.detach().clone()
        distributed.all_reduce(total)
        torch.testing.assert_close(loss, total / 2)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert_same_on_all_ranks(step)
    return step


@case
def local_batch_norm_is_that_of_ddp() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    step = like_ddp(model, batch_norm="local")
    assert "local batch norm" in step.plan.chosen


class Branching(nn.Module):
    """Control flow by values: no graph. One of its layers takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head, self.unused = (
            nn.Linear(4, 3),
            nn.BatchNorm1d(3),
            nn.Linear(3, 2),
            nn.Linear(2, 2),
        )
        self.unused.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.layer(x))
        return self.head(h if float(h.sum()) > 1e9 else torch.tanh(h))


@case
def what_cannot_be_captured_runs_as_by_ddp() -> None:
    torch.manual_seed(0)
    with one_warning("eager mode"):
        step = like_ddp(Branching().double())
    assert step.plan.chosen == "eager on 2 ranks"


@case
def what_cannot_be_divided_is_said_and_runs_as_by_ddp() -> None:
    def contrastive(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output @ output.T, torch.arange(len(output)))  # every row against every other one

    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    step = graphopt.optimize(model, (4, 4), loss=contrastive, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with one_warning("as by DistributedDataParallel: the step cannot be divided"):
        for i in range(3):
            torch.manual_seed(10 * i + rank())
            step(torch.randn(4, 4), torch.randint(4, (4,)))
    assert step.plan.chosen == "eager on 2 ranks"
    assert_same_on_all_ranks(step)


def small(**options: Any) -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(rank())
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return graphopt.optimize(model, (4, 4), loss=F.cross_entropy, optimizer=optimizer, **options), model, optimizer


def rows(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 4), torch.randint(2, (count,))


@contextmanager
def one_warning(match: str) -> Any:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        yield
    found = [str(w.message) for w in given if issubclass(w.category, graphopt.GraphoptWarning)]
    assert len(found) == 1 and match in found[0], found


@contextmanager
def refused(*kinds: type[Exception], match: str = "") -> Any:
    """Rank k gets an exception of the k-th kind; nothing of the model changes."""
    try:
        yield
    except kinds[rank()] as error:
        assert match in str(error), error
    else:
        raise AssertionError("nothing was raised")


@case
def models_that_differ_become_that_of_rank_0() -> None:
    step, model, _ = small()
    first = [p.detach().clone() for p in model.parameters()]
    for p in first:
        distributed.broadcast(p, 0)
    with one_warning("ranks differed in 0.weight, 0.bias, 2.weight and 1 more"):
        step(*rows())
    assert_same_on_all_ranks(step)
    with torch.no_grad():
        if rank() == 1:
            model[0].weight.add_(1.0)
    with one_warning("ranks differed in 0.weight: all have the values of rank 0"):
        step(*rows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            with torch.no_grad():
                model[0].weight.mul_(0.999)  # by all ranks alike
            step(*rows())
    assert_same_on_all_ranks(step)


@case
def ranks_in_different_states_are_told() -> None:
    step, model, optimizer = small()
    step(*rows())
    before = [p.detach().clone() for p in model.parameters()]
    if rank() == 1:
        model.eval()
    with refused(RankError, RankError, match="in train mode"):
        step(*rows())
    model.train()
    optimizer.param_groups[0]["lr"] = 0.1 + rank()
    with refused(RankError, RankError, match="lr=0.1"):
        step(*rows())
    optimizer.param_groups[0]["lr"] = 0.1
    with refused(RankError, RankError, match="torch.float64"):
        x, y = rows()
        step(x.double() if rank() else x, y)
    with refused(RankError, BatchError, match="size is 0"):
        step(*rows(4 if rank() == 0 else 0))
    with refused(RankError, GraphoptError, match="inference mode"):
        with torch.inference_mode(rank() == 1):
            step(*rows())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    step(*rows())
    assert_same_on_all_ranks(step)


@case
def clocks_that_differ_lead_to_one_choice() -> None:
    step, _, _ = small()
    generator = torch.Generator().manual_seed(rank())
    now = [0.0]

    def clock() -> float:
        now[0] += float(torch.rand(1, generator=generator)) * (10 if now[0] > 200 else 1)
        return now[0]

    step._clock = clock
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(400):
            step(*rows(3 + i % 2 + rank()))
            assert len(set(step.task.world.exchange(f"{step.plan.chosen} {step.plan.reason}"))) == 1
    assert any("the machine changed" in n for n in step.plan.notes)


@case
def arguments_that_mean_nothing_in_a_world_are_refused() -> None:
    for options, match in (
        ({"processors": 3}, "world of 2"), ({"schemes": "exact"}, "expected 'auto', 'flat', 'eager'"),
        ({"schemes": [graphopt.schemes.Flat()]}, "world of 2 ranks"),
    ):  # fmt: skip
        with refused(GraphoptError, GraphoptError, match=match):
            small(**options)
    step, _, _ = small(processors=1)
    step(*rows())
    assert step.plan.chosen != "flat on 2 ranks" and step.task.world is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step, _, _ = small(schemes=["eager"], processors=2)
        step(*rows())
    assert step.plan.chosen == "eager on 2 ranks"


@case
def a_plan_on_which_ranks_differ_is_made_anew() -> None:
    step, _, _ = small(schemes=["flat", "eager"])
    step(*rows(3))
    known = InWorld.why_not
    if rank() == 1:
        InWorld.why_not = lambda *_: "not on this rank"  # type: ignore[method-assign]
    with refused(RankError, RankError, match="ranks differ"):
        step(*rows())
    InWorld.why_not = known  # type: ignore[method-assign]
    step(*rows())
    feasible = [c.scheme for c in step.plan.candidates if c.why_not is None]
    assert feasible == ["flat on 2 ranks", "eager on 2 ranks"], feasible
    assert_same_on_all_ranks(step)


@case
def a_model_in_ddp_is_left_to_it() -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 2))
    step = graphopt.optimize(model, (4, 4), loss=F.cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with one_warning("brings the gradients of ranks together"):
        for i in range(8):
            torch.manual_seed(10 * i + rank())
            step(*rows())
    found = [torch.empty_like(model.module.weight) for _ in range(2)]
    distributed.all_gather(found, model.module.weight.detach())
    assert torch.equal(*found)


if __name__ == "__main__":
    run_cases(CASES)
