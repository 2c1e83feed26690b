"""Data-parallel steps whose workers die: nothing of such a step is seen."""

from __future__ import annotations

import copy
import os
import signal
import threading
import warnings

import pytest
import torch
from torch.nn import functional as F

import graphopt
from graphopt.errors import GraphoptWarning, WorkerError
from graphopt.schemes import DataParallel
from tests.schemes.pairs import CASES, advance, assert_equal_state, gone, pair, tokens, workers


@pytest.mark.parametrize("synchronise", ["owner", "scatter", "tree"])
def test_training_goes_on_without_a_worker_that_was_killed(synchronise):
    eager, shared, a, b, batch = pair("perceptron", schemes=[DataParallel(2, synchronise)])
    advance((eager, shared), batch(6), 0)
    pids = workers(shared)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    data = batch(6)
    with pytest.warns(GraphoptWarning):
        advance((eager, shared), data, 1)
    for i in range(2, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GraphoptWarning)
            advance((eager, shared), batch(6), i)
    assert_equal_state(a, b)
    later = workers(shared)
    shared.close()
    assert gone(pids + later)


def snapshot(model, optimizer):
    state = [value for slots in optimizer.state_dict()["state"].values() for value in slots.values()]
    return copy.deepcopy([*model.state_dict().values(), *state])


@pytest.mark.parametrize("synchronise", ["owner", "scatter", "tree"])
def test_a_required_scheme_stops_training_and_leaves_model_and_state_as_they_were(synchronise):
    make, _ = CASES["tokens"]
    torch.manual_seed(0)
    model = make().double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = tokens(4)
    scheme = DataParallel(2, synchronise, required=True)
    step = graphopt.optimize(model, (x, y), loss=F.cross_entropy, optimizer=sgd, schemes=[scheme])
    step(x, y)
    before = snapshot(model, sgd)
    wrong = x.clone()
    wrong[-1, 0] = 99  # no such token: only the worker's part fails
    pids = workers(step)
    with pytest.raises(WorkerError, match="processor 1"):
        step(wrong, y)
    assert all(map(torch.equal, snapshot(model, sgd), before)) and gone(pids)
    step(x, y)  # a new pool
    after = snapshot(model, sgd)
    assert not all(map(torch.equal, after, before))
    pids = workers(step)
    threading.Timer(0.05, os.kill, (pids[0], signal.SIGKILL)).start()
    with pytest.raises(WorkerError, match="SIGKILL"):
        for _ in range(10_000):  # the worker dies amid one of them
            after = snapshot(model, sgd)
            step(x, y)
    assert all(map(torch.equal, snapshot(model, sgd), after)) and gone(pids)
    step.close()
