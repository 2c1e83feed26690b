"""One training step of a supernet: which gradient it makes, what it costs, and what a failure leaves behind."""

import signal

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from graphopt.elastic import sized_code
from graphopt.elastic.distillation import InPlaceDistillation, soft_cross_entropy
from graphopt.elastic.sampling import Fixed, Random, Sandwich
from graphopt.elastic.step import ElasticStep
from graphopt.errors import ElasticError, GraphoptError, LossError
from tests.elastic.supernets import BOTH, attentive, untouched


@pytest.fixture(params=BOTH, ids=[make.__name__ for make in BOTH])
def supernet(request):
    space, x, y = request.param()
    with untouched(space):
        space.model.train()
        yield space, x, y


def sgd(space, rate=0.1):
    return torch.optim.SGD(space.model.parameters(), lr=rate)


def gradients(space, run):
    """Gradients of the model's parameters after ``run()``; zeros where there are none."""
    space.model.zero_grad(set_to_none=True)
    run()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in space.model.named_parameters()}


def one_by_one(space, x, y, choices, loss=F.cross_entropy):
    def run():
        for choice in choices:
            loss(space.run(choice, x), y).backward()

    return gradients(space, run)


def gradient_of_step(space, step, x, y):
    """What a step of plain gradient descent at rate 1 subtracts from each parameter."""
    before = {n: p.detach().clone() for n, p in space.model.named_parameters()}
    step(x, y)
    return {n: before[n] - p.detach() for n, p in space.model.named_parameters()}


def without_dropout(space):
    for module in space.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()


@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_gradient_is_that_of_the_subnets_together(supernet, combine):
    space, x, y = supernet
    without_dropout(space)
    step = ElasticStep(space, F.cross_entropy, sgd(space, 1.0), strategy=Sandwich(), subnets=4, combine=combine, seed=3)
    state = {n: v.clone() for n, v in space.model.state_dict().items()}
    found = gradient_of_step(space, step, x, y)
    assert len(step.last) == 4
    space.model.load_state_dict(state)
    expected = one_by_one(space, x, y, [choice for choice, _ in step.last])
    share = 0.25 if combine == "mean" else 1.0
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, share * expected[name], rtol=1e-4, atol=1e-6)


def test_loss_is_that_of_the_subnets(supernet):
    space, x, y = supernet
    without_dropout(space)
    state = {n: v.clone() for n, v in space.model.state_dict().items()}
    step = ElasticStep(space, F.cross_entropy, sgd(space), subnets=4)
    loss = step(x, y)
    space.model.load_state_dict(state)
    with torch.no_grad():
        alone = [F.cross_entropy(space.run(choice, x), y) for choice, _ in step.last]
    torch.testing.assert_close(torch.stack([one for _, one in step.last]), torch.stack(alone))
    torch.testing.assert_close(loss, torch.stack(alone).mean())
    assert not loss.requires_grad


def test_one_code_gives_the_bits_of_each_subnet(supernet):
    """Outputs, gradients and running statistics, for subnets that were never made."""
    space, x, y = supernet
    without_dropout(space)
    state = {n: v.clone() for n, v in space.model.state_dict().items()}
    for seed in range(8):
        choice = space.sample(seed=seed)
        results = []
        for way in (space.run, lambda c, *a: sized_code.run(space, c, *a)):
            space.model.load_state_dict(state)
            kept = {}

            def run(way=way, kept=kept, choice=choice):
                kept["output"] = way(choice, x)
                F.cross_entropy(kept["output"], y).backward()

            found = gradients(space, run)
            results.append([kept["output"], *found.values(), *(b.clone() for b in space.model.buffers())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), choice


def test_other_batch_sizes_and_modes_by_the_same_code():
    space, x, _ = attentive()
    with untouched(space):
        for training in (True, False):
            space.model.train(training)
            for rows in (2, 5, 6):
                choice = space.sample(seed=rows)
                assert torch.equal(sized_code.run(space, choice, x[:rows]), space.run(choice, x[:rows]))


def test_new_subnets_make_no_new_graphs(supernet):
    space, x, y = supernet
    step = ElasticStep(space, F.cross_entropy, sgd(space), strategy=Random(), subnets=4, seed=7)
    step.sampler.region = step.sampler.region.only(
        ["width", "embedding", "heads"][: 3 if "heads" in kinds(space) else 2]
    )
    step(x, y)
    origin = space.subnet(space.full).origin
    made = len(origin._subnets)
    for _ in range(5):
        step(x, y)
    assert len(origin._subnets) == made


def kinds(space):
    return {str(dimension.kind) for dimension in space.dimensions}


def test_flops_of_a_step_are_those_of_its_subnets_alone(supernet):
    space, x, y = supernet
    step = ElasticStep(space, F.cross_entropy, sgd(space), subnets=4)
    with FlopCounterMode(display=False) as together:
        step(x, y)
    alone = 0
    for choice, _ in step.last:
        net = space.extract(choice)
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(net(x), y).backward()
        alone += counter.get_total_flops()
    assert together.get_total_flops() == alone > 0


def test_distillation_learns_from_the_largest(supernet):
    space, x, y = supernet
    without_dropout(space)
    teaching = InPlaceDistillation(0.75, start=0, ramp=0)
    state = {n: v.clone() for n, v in space.model.state_dict().items()}
    step = ElasticStep(space, F.cross_entropy, sgd(space, 1.0), subnets=2, distillation=teaching)
    found = gradient_of_step(space, step, x, y)
    space.model.load_state_dict(state)
    (full, _), (small, _) = step.last
    assert full == space.full

    def run():
        teacher = space.run(full, x)
        student = space.run(small, x)
        own = F.cross_entropy(student, y)
        (F.cross_entropy(teacher, y) + 0.25 * own + 0.75 * soft_cross_entropy(student, teacher.detach())).backward()

    expected = gradients(space, run)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, 0.5 * expected[name], rtol=1e-4, atol=1e-6)


def test_distillation_ramps_up():
    teaching = InPlaceDistillation(0.8, start=10, ramp=20)
    assert [teaching.at(step) for step in (0, 9, 10, 20, 30, 99)] == pytest.approx([0, 0, 0, 0.4, 0.8, 0.8])
    logits = torch.randn(4, 7, 3)
    assert soft_cross_entropy(logits, logits).abs() < 1e-6
    by_hand = (logits.softmax(1) * (logits.log_softmax(1) - (2 * logits).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(soft_cross_entropy(2 * logits, logits), by_hand)


def test_a_failing_subnet_leaves_the_weights_as_they_were(supernet):
    space, x, y = supernet
    before = [p.detach().clone() for p in space.model.parameters()]
    calls = []

    def loss(output, target):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("the third one fails")
        return F.cross_entropy(output, target)

    step = ElasticStep(space, loss, sgd(space), subnets=4)
    with pytest.raises(ValueError, match="third"):
        step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, space.model.parameters(), strict=True))
    assert all(p.grad is None for p in space.model.parameters())
    step(x, y)
    assert not all(torch.equal(a, b) for a, b in zip(before, space.model.parameters(), strict=True))


def test_interrupt_waits_for_the_update():
    space, x, y = attentive()
    with untouched(space):
        state = {n: v.clone() for n, v in space.model.state_dict().items()}
        results = []
        for interrupted in (False, True):
            space.model.load_state_dict(state)

            def loss(output, target, interrupted=interrupted, hits=[]):  # noqa: B006
                if interrupted and not hits:
                    hits.append(1)
                    signal.raise_signal(signal.SIGINT)
                return F.cross_entropy(output, target)

            step = ElasticStep(space, loss, sgd(space), subnets=3, seed=1)
            if interrupted:
                with pytest.raises(KeyboardInterrupt):
                    step(x, y)
            else:
                step(x, y)
            results.append([p.detach().clone() for p in space.model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_model_with_its_own_loss_and_mappings():
    class WithLoss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

        def forward(self, x, labels):
            return {"loss": F.cross_entropy(self.net(x), labels)}

    import graphopt.elastic

    batch = {"x": torch.randn(6, 4), "labels": torch.randint(3, (6,))}
    model = WithLoss()
    space = graphopt.elastic.space(model, batch)
    step = ElasticStep(space, "model", sgd(space))
    first = step(batch)
    for _ in range(20):
        last = step(**batch)
    assert last < first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"combine": "product"}, "mean"),
        ({"subnets": 0}, "positive number"),
        ({"loss": 3}, "callable"),
        ({"optimizer": None}, "no closure"),
        ({"space": 1}, "graphopt.elastic.space"),
    ],
)
def test_bad_arguments(change, words):
    space, _, _ = attentive()
    given = {"space": space, "loss": F.cross_entropy, "optimizer": sgd(space)} | change
    with pytest.raises(ElasticError, match=words):
        ElasticStep(given.pop("space"), given.pop("loss"), given.pop("optimizer"), **given)


def test_bad_steps():
    space, x, y = attentive()
    with untouched(space):
        step = ElasticStep(space, lambda o, t: F.cross_entropy(o, t).detach(), sgd(space))
        with pytest.raises(LossError, match="detached"):
            step(x, y)
        step = ElasticStep(
            space, F.cross_entropy, sgd(space), strategy=Fixed([space.smallest]), subnets=1,
            distillation=InPlaceDistillation(ramp=0),
        )  # fmt: skip
        with pytest.raises(ElasticError, match="Sandwich"):
            step(x, y)
        with torch.inference_mode(), pytest.raises(GraphoptError, match="inference"):
            step(x, y)
        with pytest.raises(ElasticError, match="weight from 0 to 1"):
            InPlaceDistillation(2.0)
