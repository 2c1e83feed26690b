"""Statistics of batch norms of one subnet: those that a plain module of that size estimates."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.elastic.batch_norm_statistics import batch_norm_statistics, evaluate, with_statistics
from graphopt.errors import ElasticError
from tests.elastic.supernets import attentive, convolutional, untouched


@pytest.fixture
def space():
    found, _, _ = convolutional()
    with untouched(found):
        yield found


def batches(count=4):
    numbers = torch.Generator().manual_seed(5)
    return [
        (torch.randn(8, 1, 6, 6, generator=numbers) * 2 + 1, torch.randint(5, (8,), generator=numbers))
        for _ in range(count)
    ]


def by_torch(model: nn.Module) -> dict[str, torch.Tensor]:
    """The usual recipe on a plain model: reset, batch norms in train mode, the mean over batches."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for x, _ in batches():
            model(x)
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name}


def test_full_net_agrees_with_torch(space):
    found = batch_norm_statistics(space, space.full, batches())
    before = {name: value.clone() for name, value in space.model.state_dict().items()}
    momenta = [m.momentum for m in space.model.modules() if isinstance(m, nn.BatchNorm2d)]
    expected = by_torch(space.model)
    for module, momentum in zip((m for m in space.model.modules() if isinstance(m, nn.BatchNorm2d)), momenta):
        module.momentum = momentum
    assert found.keys() == expected.keys() and len(found) == 14
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
        assert not torch.equal(before[name], value)


def test_a_subnet_evaluates_with_them_as_its_extracted_module_does(space):
    for seed in range(3):
        choice = space.sample(seed=seed)
        state = {name: value.clone() for name, value in space.model.state_dict().items()}
        found = batch_norm_statistics(space, choice, batches())
        assert all(torch.equal(value, state[name]) for name, value in space.model.state_dict().items())
        net = space.extract(choice).eval()
        assert {n: b.shape for n, b in net.named_buffers() if n in found} == {n: b.shape for n, b in found.items()}
        net.load_state_dict(found, strict=False)
        x, y = batches(6)[-1]
        with torch.no_grad():
            alone = F.cross_entropy(net(x), y)
        loss = evaluate(space, choice, [(x, y)], F.cross_entropy, calibration=batches())
        assert loss == pytest.approx(float(alone), rel=1e-5)
        assert loss != pytest.approx(evaluate(space, choice, [(x, y)], F.cross_entropy), rel=1e-3)
        assert all(torch.equal(value, state[name]) for name, value in space.model.state_dict().items())


def test_they_are_the_mean_and_unbiased_variance_of_what_a_layer_sees(space):
    """Of the first norm, by hand: its input is the first convolution of the batch."""
    choice = space.smallest
    net = space.extract(choice)
    weight, bias = (next(p for n, p in net.named_parameters() if n == f"0.{which}") for which in ("weight", "bias"))
    seen = [F.conv2d(x, weight, bias, padding=1) for x, _ in batches()]
    found = batch_norm_statistics(space, choice, batches())
    torch.testing.assert_close(found["1.running_mean"], torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0))
    torch.testing.assert_close(found["1.running_var"], torch.stack([s.var((0, 2, 3)) for s in seen]).mean(0))


def test_mode_and_statistics_are_given_back_after_an_error(space):
    space.model.train()
    space.model[2].eval()
    modes = [module.training for module in space.model.modules()]
    state = {name: value.clone() for name, value in space.model.state_dict().items()}
    found = batch_norm_statistics(space, space.smallest, batches())
    with pytest.raises(ZeroDivisionError), with_statistics(space, space.smallest, found):
        assert not torch.equal(space.model.state_dict()["1.running_mean"], state["1.running_mean"])
        raise ZeroDivisionError
    assert modes == [module.training for module in space.model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in space.model.state_dict().items())


def test_a_model_without_batch_norms_needs_none():
    space, x, y = attentive()
    assert batch_norm_statistics(space, space.smallest, [(x, y)]) == {}
    with untouched(space):
        assert 0 <= evaluate(space, space.smallest, [(x, y)], lambda o, t: (o.argmax(1) == t).float().mean()) <= 1


def test_no_batches(space):
    with pytest.raises(ElasticError, match="none"):
        batch_norm_statistics(space, space.full, [])
    with pytest.raises(ElasticError, match="none"):
        evaluate(space, space.full, [], F.cross_entropy)
    with pytest.raises(ElasticError, match="target"):
        evaluate(space, space.full, [batches()[0][0]], F.cross_entropy)
