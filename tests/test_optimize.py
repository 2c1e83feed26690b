"""`optimize`: training steps equal eager's bit for bit, whatever users do to model and optimizer between them."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

import graphopt
from graphopt import ClipNorm, ClipValue
from tests.training import (
    Branching,
    Net,
    Twins,
    counted_captures,
    cross_entropy,
    images,
    mlp,
    no_warning,
    one_warning,
    rows,
)

sgd = lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9)
adamw = lambda model: AdamW(model.parameters(), lr=0.01)


def dense(make=adamw, model=None, **options):
    """Twins of an MLP."""
    return Twins(model or mlp(), make, shape=((1, 1), (1,)), **options)


# -- optimizers, groups, schedules ----------------------------------------------------------------------------------


OPTIMIZERS = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.1),
    "sgd momentum nesterov": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd dampening": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.5),
    "sgd foreach": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True),
    "adam": lambda m: Adam(m.parameters(), lr=0.01),
    "adam amsgrad maximize": lambda m: Adam(m.parameters(), lr=0.01, amsgrad=True, maximize=True, weight_decay=0.1),
    "adamw": lambda m: AdamW(m.parameters(), lr=0.01),
    "adamw foreach": lambda m: AdamW(m.parameters(), lr=0.01, foreach=True),
    "adamw fused": lambda m: AdamW(m.parameters(), lr=0.01, fused=True),
    "adamw tensor lr": lambda m: AdamW(m.parameters(), lr=torch.tensor(0.01)),
    "rmsprop": lambda m: RMSprop(m.parameters(), lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda m: Adagrad(m.parameters(), lr=0.1, lr_decay=0.1),
    "nadam, outside the graph": lambda m: NAdam(m.parameters(), lr=0.01),
}
PARTS = {
    "two groups": lambda m: Adam(
        [{"params": m.head.parameters(), "lr": 0.1}, {"params": m.conv.parameters()}], lr=0.01
    ),
    "two optimizers": lambda m: [SGD(m.conv.parameters(), lr=0.1), AdamW(m.head.parameters(), lr=0.01)],
    "head only": lambda m: SGD(m.head.parameters(), lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_five_steps_are_equal_to_eager(name):
    dense(OPTIMIZERS[name]).steps(rows)


@pytest.mark.parametrize("name", PARTS)
def test_groups_and_several_optimizers(name):
    Twins(Net(), PARTS[name]).steps(images)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: StepLR(o, 2),
        lambda o: CosineAnnealingLR(o, 4),  # reaches a learning rate of zero
        lambda o: OneCycleLR(o, 0.1, total_steps=8),  # changes momentum and betas too
    ],
)
@pytest.mark.parametrize("make", [sgd, adamw])
def test_schedulers_need_no_new_capture(schedule, make):
    twins = dense(make)
    schedulers = twins.each(lambda _, optimizers: schedule(optimizers[0]))
    with counted_captures() as captures, no_warning():
        for _ in range(6):
            twins.step(*rows())
            [s.step() for s in schedulers]
    assert len(captures) == 1


def test_a_users_own_optimizer_runs_after_the_graph():
    class SignDescent(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad.sign())

    dense(lambda m: SignDescent(m.parameters(), {"lr": 0.01})).steps(rows)


def test_lbfgs_runs_in_eager_with_one_warning():
    model = mlp()
    step = graphopt.optimize(model, (5, 4), loss=cross_entropy, optimizer=torch.optim.LBFGS(model.parameters()))
    batch = rows()
    with one_warning("several times a step (LBFGS)"):
        losses = [float(step(*batch)) for _ in range(3)]
    assert losses[2] < losses[0] and step.plan.chosen == "eager"


@pytest.mark.parametrize("option, value", [("weight_decay", 0.1), ("momentum", 0.5), ("nesterov", True), ("lr", 0.0)])
def test_an_option_changed_in_mid_run(option, value):
    twins = dense(lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9 if option == "nesterov" else 0.0))
    twins.steps(rows, 2)
    twins.each(lambda _, optimizers: optimizers[0].param_groups[0].update({option: value}))
    twins.steps(rows, 3)


def test_a_learning_rate_that_is_a_tensor_is_followed():
    twins = dense(lambda m: AdamW(m.parameters(), lr=torch.tensor(0.01)))
    twins.steps(rows, 2)
    twins.each(lambda _, optimizers: optimizers[0].param_groups[0]["lr"].fill_(0.5))
    twins.steps(rows, 2)


@pytest.mark.parametrize("make", [AdamW, NAdam])
def test_a_parameter_group_added_in_mid_run(make):
    twins = dense(lambda m: make(m[2].parameters(), lr=0.01))
    twins.steps(rows, 2)
    twins.each(lambda m, optimizers: optimizers[0].add_param_group({"params": m[0].parameters(), "lr": 0.1}))
    twins.steps(rows, 3)


def test_other_parameters_put_into_a_group():
    twins = dense(lambda m: SGD(m[0].parameters(), lr=0.1))
    twins.steps(rows, 2)
    twins.each(lambda m, optimizers: optimizers[0].param_groups[0].update(params=list(m[2].parameters())))
    twins.steps(rows, 2)


@pytest.mark.parametrize("make", [sgd, adamw, lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.5)])
def test_optimizer_state_thrown_away_in_mid_run(make):
    twins = dense(make)
    twins.steps(rows, 2)
    twins.each(lambda _, optimizers: optimizers[0].state.clear())
    twins.steps(rows, 2)


def test_optimizer_hooks_registered_in_mid_run_are_called():
    twins, calls = dense(), []
    twins.steps(rows, 2)
    twins.made[1][0].register_step_post_hook(lambda *_: calls.append(1))
    twins.steps(rows, 2)
    assert calls == [1, 1]


# -- gradients: clipping, accumulation, keeping ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, clip",
    [
        (adamw, 0.1),
        (adamw, ClipValue(0.01)),
        (adamw, 1e9),
        (lambda m: AdamW(m[2].parameters(), lr=0.01), ClipNorm(0.05)),
        (lambda m: NAdam(m.parameters()), 0.1),
    ],
)
def test_clipping(make, clip):
    dense(make, clip=clip).steps(rows, 3)


@pytest.mark.parametrize("make, schemes", [(sgd, "flat"), (sgd, "exact"), (lambda m: NAdam(m.parameters()), "flat")])
def test_accumulation_over_batches_of_different_sizes(make, schemes):
    twins = dense(make, accumulate=3, clip=0.5, schemes=schemes)
    for size in (5, 5, 3, 1, 5, 2, 5, 5, 5):
        twins.step(*rows(size))


def test_gradients_zeroed_in_mid_accumulation():
    twins = dense(accumulate=2)
    twins.step(*rows())
    twins.each(lambda m, _: m.zero_grad())
    twins.step(*rows())


@pytest.mark.parametrize("make", [adamw, lambda m: NAdam(m.parameters()), lambda m: AdamW(m[2].parameters())])
def test_kept_gradients_are_eagers(make):
    twins = dense(make, keep_grads=True, clip=0.1)
    twins.steps(rows, 3)
    assert all(p.grad is not None for p in twins.ours.parameters())


def test_gradients_are_gone_after_a_step():
    twins = dense()
    twins.step(*rows())
    assert all(p.grad is None for p in twins.ours.parameters())


class Sharing(nn.Module):
    """Parameters whose gradients are one tensor, or one number spread over a shape, or transposed."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(3)) for _ in range(3))
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return x @ self.w.t() + self.a + self.b + self.c.sum()


@pytest.mark.parametrize("options", [{}, {"keep_grads": True}, {"accumulate": 3}, {"clip": 0.1}])
@pytest.mark.parametrize("make", [sgd, lambda m: NAdam(m.parameters(), weight_decay=0.1)])
def test_gradients_that_share_memory_in_the_graph(options, make):
    dense(make, Sharing(), **options).steps(rows, 6)


@pytest.mark.parametrize(
    "options, clip", [({"fused": True}, None), ({"foreach": True}, 0.1), ({"foreach": False}, 0.1)]
)
def test_gradients_laid_out_otherwise_than_their_parameters(options, clip):
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(48, 64))
            self.spread = nn.Parameter(torch.randn(64, 48))

        def forward(self, x):
            return x @ self.w.t() + self.spread.sum(0)

    make = lambda m: AdamW(m.parameters(), lr=0.1, **options)
    twins = Twins(Transposed(), make, loss=F.mse_loss, shape=((1, 1), (1, 1)), clip=clip)
    twins.steps(lambda: (torch.randn(5, 64), torch.randn(5, 48)), 3)


def test_kept_gradients_can_be_changed_one_by_one():
    twins = dense(sgd, Sharing(), keep_grads=True)
    twins.steps(rows, 2)
    twins.each(lambda m, _: [p.grad.mul_(i) for i, p in enumerate(m.parameters())])
    twins.compare()
    twins.steps(rows, 2)


def test_parameters_that_multiply_each_other_are_updated_from_their_old_values():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return (self.a * self.b).sum() + 0 * x.sum()

    twins = dense(sgd, Product(), loss=lambda out, y: out)
    twins.steps(rows, 3)


def test_a_parameter_that_the_loss_does_not_use_is_skipped():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    twins = dense(lambda m: AdamW(m.parameters(), lr=0.1, weight_decay=0.5), Partly(), keep_grads=True)
    twins.steps(rows, 3)
    assert twins.ours.unused.weight.grad is None


def test_tied_weights_are_updated_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(torch.tanh(self.embed(x)))

    Twins(Tied(), adamw, shape=((1,), (1,))).steps(lambda: (torch.randint(7, (6,)), torch.randint(7, (6,))))


# -- the model changes ----------------------------------------------------------------------------------------------


def test_progressive_unfreezing():
    twins = dense()
    twins.each(lambda m, _: m[0].requires_grad_(False))
    twins.steps(rows, 2)
    twins.each(lambda m, _: m[0].weight.requires_grad_(True))
    twins.steps(rows, 2)
    twins.each(lambda m, _: m.requires_grad_(True))
    twins.steps(rows, 2)


def test_train_and_eval_modes_are_planned_once_each():
    twins = Twins(Net(0.5), sgd)
    with counted_captures() as captures:
        for mode in (True, False, True, False):
            twins.each(lambda m, _, mode=mode: m.train(mode))
            twins.steps(images, 2)
    assert len(captures) == 2


def test_one_layer_in_eval_mode():
    twins = Twins(Net(), sgd)
    twins.steps(images, 2)
    twins.each(lambda m, _: m.norm.eval())
    twins.steps(images, 2)


@pytest.mark.parametrize("schemes", ["flat", "eager", "exact"])
def test_dropout_draws_eagers_numbers(schemes):
    Twins(Net(0.5), sgd, schemes=schemes).steps(images, 6)


def test_a_dropout_rate_changed_in_mid_run():
    twins = Twins(Net(0.5), sgd)
    twins.steps(images, 2)
    twins.each(lambda m, _: setattr(m.drop, "p", 0.1))
    twins.steps(images, 2)


@pytest.mark.parametrize("schemes", ["flat", "eager", "exact"])
def test_a_buffer_that_the_model_replaces(schemes):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.body(x) * self.calls

    twins = dense(sgd, Counting(), schemes=schemes)
    with counted_captures() as captures:
        twins.steps(rows, 6)
    assert len(captures) == (schemes != "eager") and float(twins.ours.calls) == 6


@pytest.mark.parametrize("schemes", ["flat", "eager", "exact"])
def test_a_model_that_counts_in_python_runs_in_eager(schemes):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.body(x) * self.calls

    twins = dense(sgd, Counting(), schemes=schemes)
    with one_warning("forward changes calls: a Python number") if schemes != "eager" else no_warning():
        twins.steps(rows, 4)
    assert twins.ours.calls == 4 and len(twins.run._situations) == 1


def test_a_tensor_replaced_in_mid_run_that_is_no_buffer():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale, self.last = nn.Linear(4, 3), torch.tensor(2.0), torch.zeros(1)

        def forward(self, x):
            self.last = self.body(x) * self.scale
            return self.last

    twins = dense(sgd, Scaled())
    with counted_captures() as captures:
        twins.steps(rows, 2)
        twins.each(lambda m, _: m.scale.mul_(3))  # in place: a graph sees it
        twins.each(lambda m, _: m(torch.ones(1, 4)))  # an evaluation, which leaves a tensor behind
        twins.steps(rows, 2)
        assert len(captures) == 1
        twins.each(lambda m, _: setattr(m, "scale", torch.tensor(5.0)))
        twins.steps(rows, 2)
        assert len(captures) == 2


def test_a_loss_that_is_a_module_is_followed():
    loss = nn.CrossEntropyLoss(weight=torch.rand(3))
    twins = dense(adamw, loss=loss)
    with no_warning():
        twins.steps(rows, 2)
        loss.label_smoothing = 0.3
        twins.steps(rows, 2)
        loss.weight.mul_(2)
        twins.steps(rows, 2)
        loss.weight = torch.rand(3)
        twins.steps(rows, 2)


def test_a_layer_replaced_in_mid_run():
    twins = dense(lambda m: SGD(m[0].parameters(), lr=0.1))
    twins.steps(rows, 2)
    layer = nn.Linear(8, 3)
    twins.each(lambda m, _: m.__setitem__(2, copy.deepcopy(layer)))
    twins.steps(rows, 2)
    twins.each(lambda m, _: m.__setitem__(1, nn.ReLU()))
    twins.steps(rows, 2)


def test_a_model_cast_in_mid_run():
    twins = dense(lambda m: SGD(m.parameters(), lr=0.1))
    twins.steps(rows, 2)
    twins.each(lambda m, _: m.double())
    twins.steps(lambda: (torch.randn(5, 4).double(), torch.randint(3, (5,))), 2)


def test_parameters_given_other_memory_in_mid_run():
    twins = dense()
    twins.steps(rows, 2)
    new = {n: torch.randn_like(p) for n, p in twins.eager.named_parameters()}
    twins.each(lambda m, _: [setattr(p, "data", new[n].clone()) for n, p in m.named_parameters()])
    twins.steps(rows, 2)


# -- checkpoints, and back and forth between eager and optimize -----------------------------------------------------


def restore(twins, saved):
    """Load what `save` gave into both."""
    for (model, optimizers), buffer in zip(zip((twins.eager, twins.ours), twins.made), saved, strict=True):
        buffer.seek(0)
        states = torch.load(buffer, weights_only=True)
        model.load_state_dict(states[0])
        optimizers[0].load_state_dict(states[1])


def save(twins):
    """A checkpoint of both."""
    buffers = [io.BytesIO(), io.BytesIO()]
    states = twins.each(lambda m, optimizers: (m.state_dict(), optimizers[0].state_dict()))
    [torch.save(state, buffer) for state, buffer in zip(states, buffers)]
    return buffers


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("first", [0, 2])
def test_checkpoints_resume_equal(make, first):
    twins = dense(make)
    twins.steps(rows, first)
    saved = save(twins)
    twins.steps(rows, 2)
    restore(twins, saved)
    twins.compare()
    twins.steps(rows, 2)
    fresh = dense(make)
    restore(fresh, saved)
    fresh.steps(rows, 2)


def test_back_to_eager_and_again_to_the_graph():
    twins = Twins(Net(), adamw)
    twins.steps(images, 2)
    batches = [images() for _ in range(2)]

    def by_hand(model, optimizers):
        for x, y in batches:
            cross_entropy(model(x), y).backward()
            optimizers[0].step()
            optimizers[0].zero_grad()

    twins.each(by_hand)
    twins.compare()
    twins.steps(images, 2)


def test_the_model_can_be_copied_and_pickled_after_steps():
    twins = Twins(Net(), adamw)
    twins.steps(images, 2)
    buffer = io.BytesIO()
    torch.save(twins.ours, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    copied, optimizer = copy.deepcopy((twins.ours, twins.made[1][0]))
    x, _ = images()
    assert torch.equal(loaded(x), copied(x))
    assert optimizer.state_dict()["state"].keys() == twins.made[1][0].state_dict()["state"].keys()


# -- what users put around it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schemes", ["flat", "eager"])
def test_autocast_around_the_step(schemes):
    twins = Twins(Net(), sgd, schemes=schemes)
    for dtype in (torch.bfloat16, torch.bfloat16, None, torch.float16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            twins.step(*images())


@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(around):
    model = mlp()
    step = graphopt.optimize(model, (5, 4), loss=cross_entropy, optimizer=sgd(model), schemes="flat")
    with around():
        assert step(*rows()).requires_grad is False


def test_nan_flows_as_in_eager():
    twins = Twins(Net(), adamw, clip=0.5)
    x, y = images()
    x[0, 0, 0, 0] = float("nan")
    twins.steps(images, 1)
    assert twins.step(x, y).isnan()
    twins.steps(images, 1)


def test_forward_hooks_warn_once_and_their_effect_on_values_stays():
    model, seen = mlp(), []
    model[1].register_forward_hook(lambda module, args, output: seen.append(1) or output * 2)
    twins = dense(adamw, model)
    with one_warning("forward hooks (on Tanh) run once"):
        twins.steps(rows, 3)
    assert "forward hooks" in twins.run.plan.explain()


def test_tensor_hooks_run_in_eager():
    model, seen = mlp(), []
    model[0].weight.register_hook(lambda gradient: seen.append(1) or gradient * 2)
    twins = dense(adamw, model)
    with one_warning("a hook is registered on a parameter"):
        twins.ours[0].weight.register_hook(lambda gradient: seen.append(1) or gradient * 2)
        twins.steps(rows, 2)
    assert len(seen) == 4


def test_backward_hooks_registered_in_mid_run_are_called():
    twins, seen = dense(), []
    twins.steps(rows, 2)
    handles = twins.each(lambda m, _: m[0].register_full_backward_hook(lambda *_: seen.append(1)))
    with one_warning("backward hooks"):
        twins.steps(rows, 2)
    [handle.remove() for handle in handles]
    assert len(seen) == 4 and twins.run.plan.chosen == "eager"
    twins.steps(rows, 1)
    assert twins.run.plan.chosen == "flat"


# -- batches and plans ----------------------------------------------------------------------------------------------


def test_other_batch_sizes_need_no_new_capture():
    twins = Twins(Net(), sgd)
    with counted_captures() as captures:
        for size in (4, 6, 4, 9, 1, 2, 1):
            twins.step(*images(size)) if size > 1 else None
    assert captures == [4]
    assert [twins.run.plan.batch_size] == [2]


def test_batch_size_one_is_captured_on_its_own():
    twins = dense()
    with counted_captures() as captures:
        for size in (5, 1, 7, 1):
            twins.step(*rows(size))
    assert captures == [5, 1]


def test_batches_by_position_by_tuple_and_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x):
            return self.body(x)

    model = Keyword()
    still = SGD(model.parameters(), lr=0.0)
    step = graphopt.optimize(model, (5, 4), loss=cross_entropy, optimizer=still, schemes="flat")
    x, y = rows()
    losses = [step(x, y), step((x, y)), step([x, y])]
    losses += [step(x=x, labels=y), step({"x": x, "labels": y}), step(labels=y, x=x)]
    assert len({float(loss) for loss in losses}) == 1


def test_auto_measures_and_then_decides():
    twins = dense(schemes="exact")
    twins.steps(rows, 200)  # so short steps run in rows
    plan = twins.run.plan
    assert plan.chosen in ("flat", "eager") and plan.reason.startswith("measured")
    assert all(1 <= len(c.seconds) <= 8 for c in plan.candidates)
    assert plan.explain().splitlines()[0].startswith("batch size 5: ")
    assert plan.to_dict()["facts"]["flops"][0] > 0


def test_what_cannot_be_captured_runs_in_eager_with_one_warning():
    twins = dense(adamw, Branching())
    with one_warning("training.py:"):
        twins.steps(rows, 3)
    assert twins.run.plan.chosen == "eager" and "could not be captured" not in twins.run.plan.candidates[0].why_not


def test_a_model_that_returns_its_own_loss():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x, y):
            out = self.body(x)
            return {"loss": F.cross_entropy(out, y), "logits": out}

    model = Own()
    again = copy.deepcopy(model)
    step = graphopt.optimize(model, (5, 4), optimizer=sgd(model), schemes="flat")
    twin = graphopt.optimize(again, (5, 4), optimizer=sgd(again), schemes="eager")
    for _ in range(3):
        batch = rows()
        assert torch.equal(step(*batch), twin(*batch))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
