"""What every test runs under: one torch thread, a fixed seed, no network, and the hypothesis profiles."""

import os
import random
from pathlib import Path

# Before the first import of torch or transformers: nothing is downloaded, and nothing starts more threads
# than the test processes already have.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch

from benchmarks.zoo._torchvision import define_missing_operators

define_missing_operators()

SEED = 0

# `ci` is for every run: the same examples each time, so that a failure says something of the change at hand. `fuzz` is
# for `make fuzz`: new examples each time; a failure prints how to reproduce it and is kept in `.hypothesis/`. Deadlines
# would measure the machine, not the code.
_ALWAYS = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
}
hypothesis.settings.register_profile("ci", max_examples=25, derandomize=True, **_ALWAYS)
hypothesis.settings.register_profile("fuzz", max_examples=2000, **_ALWAYS)
hypothesis.settings.load_profile("ci")


class _TorchRandom:
    """Torch's random state in the form of ``random.Random``: hypothesis resets it before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# hypothesis keeps a weak reference only.
_torch_random = _TorchRandom()
hypothesis.register_random(_torch_random)


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    """Starts each test with one torch thread and the same random state, whatever ran before it."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Calibrations and measured steps, of the user and of other tests, are neither read nor written."""
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("graphopt.cost_model.machine._CURRENT", {})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked ``cuda`` where there is no device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
