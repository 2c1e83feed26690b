"""Training in stages: what each one opens, when it ends, and that a killed training goes on as if nothing had been."""

import os
import signal

import pytest
import torch
from torch.nn import functional as F

from graphopt.elastic.progressive import Convergence, Stage, Watch, joint_mode, progressive_mode
from graphopt.elastic.region import Region
from graphopt.elastic.sampling import Empty, Fixed, Random, Sandwich
from graphopt.elastic.step import ElasticStep
from graphopt.elastic.training import restore, train
from graphopt.errors import ElasticError
from tests.elastic.supernets import attentive, convolutional, untouched


@pytest.fixture
def space():
    found, _, _ = attentive()
    with untouched(found):
        found.model.train()
        yield found


class Loader:
    """Six batches, over and over; fails at a call if told to. ``position`` is its state."""

    def __init__(self, fail_at: int | None = None, *, error: BaseException | None = None):
        numbers = torch.Generator().manual_seed(1)
        self.batches = [
            (torch.randn(6, 5, 4, generator=numbers), torch.randint(3, (6,), generator=numbers)) for _ in range(6)
        ]
        self.position, self.fail_at, self.error = 0, fail_at, error or RuntimeError("killed")

    def __iter__(self):
        while True:
            if self.position == self.fail_at:
                raise self.error
            self.position += 1
            yield self.batches[self.position % 6]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def adam(space):
    return torch.optim.Adam(space.model.parameters(), lr=0.01)


def weights(space):
    return {name: value.clone() for name, value in space.model.state_dict().items()}


def drawn_by(monkeypatch):
    """The choices of every step from now on."""
    seen = []
    call = ElasticStep.__call__

    def recording(self, *batch, **keywords):
        loss = call(self, *batch, **keywords)
        seen.append([choice for choice, _ in self.last])
        return loss

    monkeypatch.setattr(ElasticStep, "__call__", recording)
    return seen


def test_joint_training_lowers_the_loss_of_every_size(space):
    losses = {}
    for moment in ("before", "after"):
        losses[moment] = [
            sum(F.cross_entropy(space.run(choice, x), y).item() for x, y in Loader().batches)
            for choice in (space.full, space.smallest, space.sample(seed=1))
        ]
        if moment == "before":
            (report,) = train(space, Loader(), F.cross_entropy, adam(space), joint_mode(60), progress=False)
    assert report.steps == 60 == len(report.losses)
    assert all(after < 0.7 * before for before, after in zip(losses["before"], losses["after"], strict=True))


def test_progressive_stages_open_one_dimension_after_the_other(space, monkeypatch, tmp_path):
    seen = drawn_by(monkeypatch)
    stages = progressive_mode(space, ["heads", "depth", "embedding"], [3, 4, 2], full=2)
    assert [stage.name for stage in stages] == ["full", "heads", "depth", "embedding"]
    reports = train(space, Loader(), F.cross_entropy, adam(space), stages, progress=False, checkpoint=tmp_path)
    assert [report.steps for report in reports] == [2, 3, 4, 2]
    kind = {d.name: str(d.kind) for d in space.dimensions}

    def open_in(steps):
        return {kind[n] for drawn in steps for choice in drawn for n, v in choice.items() if v != space.full[n]}

    assert all(drawn == [space.full] for drawn in seen[:2])
    assert open_in(seen[2:5]) == {"heads"}
    assert open_in(seen[5:9]) == {"heads", "depth"}
    assert open_in(seen[9:]) == {"heads", "depth", "embedding"}
    depth = next(n for n in kind if kind[n] == "depth")
    for drawn in seen[5:9]:  # sizes are shared, the shallowest and the deepest are there
        assert {choice[depth] for choice in drawn} == {1, 2}
        assert len({tuple(v for n, v in choice.items() if n != depth) for choice in drawn}) == 1
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert kept == ["running.pt", "stage-0-full.pt", "stage-1-heads.pt", "stage-2-depth.pt", "stage-3-embedding.pt"]


def test_by_default_progressive_mode_opens_everything_and_depth_last(space):
    stages = progressive_mode(space, None, 2)
    assert [stage.name for stage in stages] == ["embedding", "heads", "width", "depth"]
    assert set(Region.of(space).only(stages[-1].dimensions).open) == {d.name for d in space.dimensions}


def test_a_trained_model_needs_no_stage_of_its_own(space, monkeypatch):
    seen = drawn_by(monkeypatch)
    train(space, Loader(), F.cross_entropy, adam(space), progressive_mode(space, ["width"], 2), progress=False)
    assert len(seen) == 2 and all(len(drawn) > 1 for drawn in seen)


def test_a_schedule_begins_anew_with_each_stage_or_spans_them(space):
    stages = progressive_mode(space, ["width", "depth"], [2, 3], full=1)
    seen = {}
    for restart in (True, False):
        optimizer = adam(space)
        rates = seen[restart] = []

        def loss(output, target, rates=rates, optimizer=optimizer):
            rates.append(optimizer.param_groups[0]["lr"])
            return F.cross_entropy(output, target)

        def linear(optimizer, steps):
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

        train(space, Loader(), loss, optimizer, stages, scheduler=linear, restart=restart, progress=False)
    descending = {restart: list(dict.fromkeys(rates)) for restart, rates in seen.items()}
    assert descending[False] == pytest.approx([0.01 * (1 - k / 6) for k in range(6)])
    assert max(descending[True][1:]) == pytest.approx(0.01 * 2 / 3) and seen[True].count(0.01) > 5  # a first step each


@pytest.mark.parametrize(("killed_at", "restart"), [(1, True), (5, False), (8, True)])
def test_a_killed_training_goes_on_in_its_stage(space, tmp_path, killed_at, restart):
    """Weights in the end are those of a training that nobody killed, bit for bit."""
    stages = progressive_mode(space, ["width", "depth"], [5, 4], full=3)
    start = weights(space)

    def scheduler(optimizer, steps):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def run(loader, folder, optimizer):
        return train(
            space, loader, F.cross_entropy, optimizer, stages, progress=False, checkpoint=folder, every=1,
            scheduler=scheduler, restart=restart, seed=2,
        )  # fmt: skip

    run(Loader(), tmp_path / "whole", adam(space))
    expected = weights(space)
    space.model.load_state_dict(start)
    with pytest.raises(RuntimeError, match="killed"):
        run(Loader(fail_at=killed_at), tmp_path / "killed", adam(space))
    space.model.load_state_dict(start)  # a new process has other weights
    reports = run(Loader(), tmp_path / "killed", adam(space))
    assert sum(len(report.losses) for report in reports) == 12 - killed_at
    assert all(torch.equal(value, expected[name]) for name, value in weights(space).items())
    again = run(Loader(), tmp_path / "killed", adam(space))  # it is done: nothing is trained
    assert not any(report.losses for report in again)
    assert all(torch.equal(value, expected[name]) for name, value in weights(space).items())


def test_interrupt_keeps_the_step_and_writes_the_checkpoint(space, tmp_path):
    start, calls = weights(space), []

    def loss(output, target):
        calls.append(1)
        if len(calls) == 9:  # inside of the third step
            os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(output, target)

    with pytest.raises(KeyboardInterrupt):
        train(space, Loader(), loss, adam(space), joint_mode(6), progress=False, checkpoint=tmp_path, every=100)
    assert len(calls) == 12
    interrupted = weights(space)
    space.model.load_state_dict(start)
    train(space, Loader(), F.cross_entropy, adam(space), joint_mode(3), progress=False)
    assert all(torch.equal(value, interrupted[name]) for name, value in weights(space).items())
    space.model.load_state_dict(start)
    (report,) = train(space, Loader(), F.cross_entropy, adam(space), joint_mode(6), progress=False, checkpoint=tmp_path)
    assert len(report.losses) == 3


def test_a_stage_can_be_restored(space, tmp_path):
    stages, start = progressive_mode(space, ["width", "depth"], 2), weights(space)
    train(space, Loader(), F.cross_entropy, adam(space), stages[:1], progress=False)
    expected = weights(space)
    space.model.load_state_dict(start)
    reports = train(space, Loader(), F.cross_entropy, adam(space), stages, progress=False, checkpoint=tmp_path)
    assert not all(torch.equal(value, expected[name]) for name, value in weights(space).items())
    restore(space, reports[0].checkpoint)
    assert all(torch.equal(value, expected[name]) for name, value in weights(space).items())
    other, _, _ = convolutional()
    with untouched(other), pytest.raises(ElasticError, match="another model"):
        restore(other, reports[0].checkpoint)


def test_a_stage_ends_when_it_has_converged(space):
    stages = progressive_mode(space, ["width"], 3, full=500, until=Convergence(below=0.9))
    reports = train(space, Loader(), F.cross_entropy, adam(space), stages, progress=False)
    assert reports[0].converged and 10 <= reports[0].steps < 500
    assert reports[1].steps == 3


def test_convergence_by_patience():
    rule, watch = Convergence(patience=5, improvement=0.01), Watch()
    falling = [watch.add(1.0 / (step + 1), rule) for step in range(20)]
    assert not any(falling)
    flat = [watch.add(watch.smooth, rule) for _ in range(6)]
    assert flat == [False] * 4 + [True, True]
    assert not any(Watch().add(float("nan"), rule) for _ in range(20))


def test_sum_and_mean_differ_by_the_number_of_subnets(space):
    """One step of plain gradient descent: the sum moves weights as far as a mean at so many times the rate."""
    start, moved = weights(space), {}
    for combine, rate in (("sum", 0.01), ("mean", 0.04)):
        space.model.load_state_dict(start)
        stages = joint_mode(1, combine=combine, strategy=Fixed([{}, {"width": 0.5}, space.smallest, {"depth": 1}]))
        train(space, Loader(), F.cross_entropy, torch.optim.SGD(space.model.parameters(), rate), stages, progress=False)
        moved[combine] = weights(space)
    for name, value in moved["sum"].items():
        torch.testing.assert_close(value, moved["mean"][name], rtol=1e-4, atol=1e-6)


def test_progress_is_shown(space, capsys):
    train(space, Loader(), F.cross_entropy, adam(space), 2)
    shown = capsys.readouterr().err
    assert "joint" in shown and "2/2" in shown and "loss" in shown


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s, f: progressive_mode(s, [], 1), "one to 5"),
        (lambda s, f: progressive_mode(s, ["a", "b", "c", "d", "e", "f"], 1), "one to 5"),
        (lambda s, f: progressive_mode(s, ["width", "nothing"], 1), "nothing"),
        (lambda s, f: progressive_mode(s, ["width", "*"], 1), "earlier stage"),
        (lambda s, f: progressive_mode(s, ["width"], [1, 2]), "2 numbers for 1"),
        (lambda s, f: progressive_mode(s, ["width"], 1, strategies={"depth": Empty()}), "not in the order"),
        (lambda s, f: progressive_mode(s, ["width"], 1, until=Convergence(below=1)), "full net"),
        (lambda s, f: Stage("x", ("*",), 0), "positive number"),
        (lambda s, f: Convergence(), "threshold"),
        (lambda s, f: Convergence(patience=0), "patience"),
        (lambda s, f: train(s, [], F.cross_entropy, adam(s), 1, progress=False), "no batch"),
        (lambda s, f: train(s, Loader(), F.cross_entropy, adam(s), (), progress=False), "stages"),
        (lambda s, f: train(s, Loader(), F.cross_entropy, adam(s), 1, every=0, progress=False), "every"),
        (lambda s, f: other_stages(s, f), "other|expected"),
        (lambda s, f: damaged(s, f), "cannot be read"),
    ],
)
def test_bad_input(space, tmp_path, make, words):
    before = weights(space)
    with pytest.raises(ElasticError, match=words):
        make(space, tmp_path)
    if make.__code__.co_names[0] == "train":
        assert all(torch.equal(value, before[name]) for name, value in weights(space).items())


def other_stages(space, folder):
    for strategy, steps in ((Sandwich(), joint_mode(1)), (Random(), progressive_mode(space, ["width"], 1))):
        assert strategy is not None
        train(space, Loader(), F.cross_entropy, adam(space), steps, progress=False, checkpoint=folder)


def damaged(space, folder):
    (folder / "running.pt").write_bytes(b"no checkpoint")
    train(space, Loader(), F.cross_entropy, adam(space), 1, progress=False, checkpoint=folder)
