"""Calls of normalisations, softmax and losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tests.graph.axis_examples._calls import aten, below, call, floats, positive, stand_in
from tests.graph.axis_rule_oracle import Call


def rms_norm_gradients(grad: torch.Tensor, x: torch.Tensor, shape: list[int], rstd: Any, weight: Any, mask: Any) -> Any:
    """Gradients of input and weight."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (x, weight)]
        return torch.autograd.grad(F.rms_norm(inputs[0], shape, inputs[1]), inputs, grad)


def normalisation() -> Iterator[Call]:
    image, vectors = floats(3, 4, 5, 2), (floats(4), floats(4))
    stats = (floats(4), positive(4))
    for training in (True, False):
        yield call("native_batch_norm", image, *vectors, *stats, training, 0.1, 1e-5)
        yield call("batch_norm", image, *vectors, *stats, training, 0.1, 1e-5, False)
        yield call("_native_batch_norm_legit_functional", image, *vectors, *stats, training, 0.1, 1e-5)
        yield call("_native_batch_norm_legit", image, *vectors, *stats, training, 0.1, 1e-5)
    yield call("_native_batch_norm_legit.no_stats", floats(3, 4), *vectors, True, 0.1, 1e-5)
    yield call("_native_batch_norm_legit_no_training", image, *vectors, *stats, 0.1, 1e-5)
    yield call("_batch_norm_with_update", image, *vectors, *stats, 0.1, 1e-5)
    yield call("_batch_norm_with_update_functional", image, *vectors, *stats, 0.1, 1e-5)
    yield call("_batch_norm_no_update", image, *vectors, *stats, 0.1, 1e-5)
    for name in ("native_layer_norm", "layer_norm"):
        yield call(name, floats(3, 4, 5), [5], floats(5), floats(5), 1e-5)
        yield call(name, floats(3, 4, 5), [4, 5], floats(4, 5), None, 1e-5)
        yield call(name, floats(3, 4), [3, 4], None, None, 1e-5)
    yield call("rms_norm", floats(3, 4, 5), [5], floats(5))
    yield call("_fused_rms_norm", floats(3, 4, 5), [5], floats(5), 1e-5)
    for groups in (1, 2, 4):
        yield call("native_group_norm", image, *vectors, 3, 4, 10, groups, 1e-5)
        yield call("group_norm", image, groups, *vectors)
    options = ([5], floats(3, 4, 1), floats(5), [True, True])
    yield stand_in("_fused_rms_norm_backward", rms_norm_gradients, floats(3, 4, 5), floats(3, 4, 5), *options)
    for name in ("cudnn_batch_norm", "miopen_batch_norm"):
        yield stand_in(name, aten.native_batch_norm, image, *vectors, *stats, True, 0.1, 1e-5)
    yield call("instance_norm", image, *vectors, None, None, True, 0.1, 1e-5, False)
    yield call("instance_norm", image, *vectors, *stats, False, 0.1, 1e-5, False)
    for dim in (0, 2):
        yield call(
            "_weight_norm_interface",
            floats(3, 4, 5),
            floats(*(s if d == dim else 1 for d, s in enumerate((3, 4, 5)))),
            dim,
        )
        yield call(
            "_weight_norm", floats(3, 4, 5), floats(*(s if d == dim else 1 for d, s in enumerate((3, 4, 5)))), dim
        )


def losses() -> Iterator[Call]:
    for dim in (0, 1, -1):
        for name in ("_softmax", "_log_softmax"):
            yield call(name, floats(3, 4, 5), dim, False)
        yield call("_safe_softmax", floats(3, 4, 5), dim)
        yield call("softmax.int", floats(3, 4, 5), dim)
        yield call("log_softmax.int", floats(3, 4, 5), dim)
        yield call("special_softmax", floats(3, 4, 5), dim)
        yield call("special_log_softmax", floats(3, 4, 5), dim=dim)
    for how in (0, 1, 2):
        targets = torch.tensor([0, 4, -100])
        image, places = floats(3, 5, 2, 4), below(5, 3, 2, 4)
        yield call("nll_loss_forward", floats(3, 5), targets, None, how, -100)
        yield call("nll_loss_forward", floats(3, 5), targets, positive(5), how, -100)
        yield call("nll_loss_forward", floats(5), torch.tensor(2), None, how, -100)
        yield call("nll_loss2d_forward", image, places, positive(5), how, -100)
        yield call("nll_loss", floats(3, 5), targets, None, how, -100)
        yield call("nll_loss_nd", image, places, positive(5), how, -100)
        yield call("nll_loss2d", image, places, None, how, -100)
        yield call("cross_entropy_loss", floats(3, 5), targets, positive(5), how, -100, 0.1)
        yield call("cross_entropy_loss", image, places, None, how)
        yield call("cross_entropy_loss", floats(3, 5), positive(3, 5), positive(5), how)
        yield call("cross_entropy_loss", floats(5), torch.tensor(2), None, how)
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "kl_div"):
            yield call(name, floats(3, 4), floats(3, 4), how)
        yield call("binary_cross_entropy", positive(3, 4), positive(3, 4), positive(3, 4), how)
        yield call("binary_cross_entropy_with_logits", floats(3, 4), positive(3, 4), positive(4), positive(4), how)
        yield call("poisson_nll_loss", floats(3, 4), positive(3, 4), True, False, 1e-8, how)
        yield call("multi_margin_loss", floats(3, 5), below(5, 3), 1, 1, None, how)
        yield call("multilabel_margin_loss_forward", floats(3, 5), below(5, 3, 5), how)
    lengths = torch.tensor([6, 5])
    yield call("_ctc_loss", floats(6, 2, 4).log_softmax(-1), below(3, 2, 3) + 1, [6, 5], [3, 2])
    yield call("_ctc_loss.Tensor", floats(6, 2, 4).log_softmax(-1), below(3, 2, 3) + 1, lengths, torch.tensor([3, 2]))
