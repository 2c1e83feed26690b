"""The backend with Inductor behind the passes."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from graphopt.integrations import recording
from tests.integrations.twins import bytes_saved, compiled, total


def partly_frozen() -> nn.Module:
    """A trained convolution before frozen ones; batch norm in both modes, dropout."""
    frozen = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()).requires_grad_(False) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), *frozen, nn.Dropout(0.2))


@pytest.mark.slow
def test_trains_like_eager_up_to_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = partly_frozen(), torch.randn(4, 4, 6, 6)
    twin = copy.deepcopy(model)
    for round_ in ("compiled", "from Inductor's cache"):
        torch._dynamo.reset()
        counters.clear()
        ours = compiled(model, options={"lower": "inductor", "inductor": {"fx_graph_cache": True}})
        with recording() as pieces:
            for seed in range(2):
                for call in (ours, twin):
                    torch.manual_seed(seed)
                    total(call(x)).backward()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            if theirs.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(list(model.buffers()), list(twin.buffers()))
        if round_ == "compiled":
            (piece,) = pieces
            assert piece.result.changed and not piece.dropped
            assert {c.pass_name for c in piece.result.changes} >= {"selective_saving"}
            known = [x, *model.parameters(), *twin.parameters()]
            assert bytes_saved(partial(ours, x), known) < bytes_saved(partial(twin, x), known)
        else:
            assert counters["aot_autograd"]["autograd_cache_hit"] == 1 and not pieces
