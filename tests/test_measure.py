"""The measuring tools, on models whose numbers are known."""

import io
import json
import time

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from benchmarks import measure

KIB = 1024


# -- time -----------------------------------------------------------------------------------------------------------


def test_ratio_to_the_baseline():
    rows = measure.interleaved(
        {"fast": lambda: time.sleep(0.002), "slow": lambda: time.sleep(0.02)}, rounds=5, warmup=1, baseline="slow"
    )
    fast, slow = rows
    assert (fast.name, slow.name, fast.baseline) == ("fast", "slow", "slow")
    assert slow.ratio == slow.ratio_low == slow.ratio_high == 1.0
    assert fast.ratio_low <= fast.ratio <= fast.ratio_high < 1
    assert slow.seconds_low >= 0.02 and fast.seconds >= 0.002


def test_turns_warmup_and_synchronization():
    called, waited = [], []
    measure.interleaved(
        {name: lambda name=name: called.append(name) for name in "abc"},
        rounds=3,
        warmup=2,
        sample_seconds=0,
        synchronize=lambda: waited.append(1),
    )
    assert "".join(called) == "aabbcc" + "abc" + "bca" + "cab"
    assert len(waited) == 2 * len(called)


def test_short_candidates_are_called_several_times_a_sample():
    (row,) = measure.interleaved({"nothing": lambda: None}, rounds=2, sample_seconds=0.001)
    assert row.calls > 100 and row.seconds < 1e-4


@pytest.mark.parametrize("wrong", [{"candidates": {}}, {"rounds": 0}, {"baseline": "b"}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match="interleaved: got"):
        measure.interleaved(**{"candidates": {"a": int}, **wrong})


# -- memory ---------------------------------------------------------------------------------------------------------


def test_peak_of_overlapping_allocations():
    def step():
        a = torch.empty(4 * KIB, dtype=torch.uint8)
        b = torch.empty(8 * KIB, dtype=torch.uint8)
        del a
        c = torch.empty(2 * KIB, dtype=torch.uint8)
        del b, c

    assert measure.peak_bytes(step) == 12 * KIB
    assert measure.peak_bytes(lambda: None) == 0


def test_peak_does_not_count_what_was_there_before():
    held = [torch.empty(100 * KIB, dtype=torch.uint8)]

    def step():
        held.clear()
        held.append(torch.empty(3 * KIB, dtype=torch.uint8))

    assert measure.peak_bytes(step) == 3 * KIB
    assert measure.peak_bytes(step) == 3 * KIB  # the block that is freed was allocated under the profiler


def test_peak_counts_what_is_returned_and_what_backward_allocates():
    weight = torch.ones(64, 64, requires_grad=True)
    x = torch.ones(64, 64)

    def step():
        (x @ weight).sum().backward()
        weight.grad = None

    matrix = 64 * 64 * 4
    assert measure.peak_bytes(lambda: torch.empty(5 * KIB, dtype=torch.uint8)) == 5 * KIB
    assert 2 * matrix <= measure.peak_bytes(step) <= 3 * matrix + KIB


def test_profiler_writes_nothing(capfd):
    measure.peak_bytes(lambda: torch.ones(3))
    assert capfd.readouterr().err == ""


def test_peak_after_an_error():
    with pytest.raises(ZeroDivisionError):
        measure.peak_bytes(lambda: 1 / 0)
    assert measure.peak_bytes(lambda: torch.empty(KIB, dtype=torch.uint8)) == KIB


@pytest.mark.cuda
def test_peak_on_a_gpu():
    def step():
        a = torch.empty(4 * KIB * KIB, dtype=torch.uint8, device="cuda")
        del a

    assert measure.peak_bytes(step, device="cuda") == 4 * KIB * KIB


def everything(model, *batch):
    return [*model.parameters(), *model.buffers(), *batch]


def test_bytes_kept_by_a_linear_and_a_relu():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(4, 16)

    def run():
        return model(x).sum()

    # The ReLU's result, once, although the ReLU and the second layer both keep it; the batch is there anyway.
    assert measure.bytes_kept_by_eager(run, everything(model, x)) == 4 * 32 * 4
    assert measure.bytes_kept_by_eager(run, model.parameters()) == 4 * 32 * 4 + 4 * 16 * 4
    assert measure.bytes_kept_by_eager(run, [x]) == 4 * 32 * 4 + 32 * 8 * 4


def test_a_frozen_convolution_keeps_its_input_in_eager():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1).requires_grad_(False))
    x = torch.randn(2, 3, 6, 6)
    kept = measure.bytes_kept_by_eager(lambda: model(x).sum(), everything(model, x))
    assert kept == 2 * 4 * 6 * 6 * 4


def test_nothing_is_kept_without_gradients():
    model = nn.Linear(3, 3).requires_grad_(False)
    assert measure.bytes_kept_by_eager(lambda: model(torch.ones(2, 3)).sum()) == 0


def test_views_count_by_their_storage():
    weight = torch.ones(10, requires_grad=True)
    data = torch.ones(100)
    kept = measure.bytes_kept_by_eager(lambda: (weight * data[:10]).sum() + (weight * data[50:60]).sum())
    assert kept == 400  # `data` once and whole; the product keeps only what the weight's gradient needs


@pytest.mark.slow
def test_bytes_kept_by_compile():
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    x, y = torch.randn(4, 16), torch.randn(4, 8)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: F.mse_loss(model(x), y))
    kept = measure.bytes_kept_by_compile(lambda: compiled(x, y), everything(model, x, y))
    assert kept == 4 * 32 * 4 + 4 * 8 * 4  # the result of tanh and the prediction


# -- steps and reports ----------------------------------------------------------------------------------------------


def test_eager_step_trains():
    model = nn.Linear(3, 2)
    step = measure.eager_step(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss)
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    before = model.weight.detach().clone()
    first = step(x, y)
    torch.testing.assert_close(first, F.mse_loss(F.linear(x, before, model.bias + 0.1 * model.bias.grad), y))
    torch.testing.assert_close(model.weight, before - 0.1 * model.weight.grad)
    assert step(x, y) < first


def test_eager_step_of_a_model_with_its_own_loss():
    class Own(nn.Linear):
        def forward(self, values):
            output = type("Output", (), {})()
            output.loss = super().forward(values).square().mean()
            return output

    model = Own(3, 2)
    step = measure.eager_step(model, torch.optim.SGD(model.parameters(), lr=0.1), None)
    values = torch.randn(5, 3)
    assert step(values=values) > step({"values": values})


def test_machine_description_is_json():
    described = measure.machine_description()
    assert described["torch"] == torch.__version__ and described["cores"] >= 1 and described["cpu"]
    assert described["memory_bytes"] > 2**20 and described["threads"] == 1
    json.dumps(described)


def test_table():
    rows = [
        {"name": "eager", "seconds": 0.0123, "ratio": 1.0, "kept_bytes": 3 * 2**20, "flops": 12345678},
        {"name": "ours", "seconds": 0.0061, "ratio": 0.5, "kept_bytes": None, "flops": 99},
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    measure.print_table(rows, title="Steps", console=console)
    text = console.export_text()
    for part in ("Steps", "seconds (ms)", "kept bytes (MiB)", "12.300", "0.500", "3.00", "12,345,678", "-"):
        assert part in text


def test_table_of_timings():
    console = Console(width=100, record=True, file=io.StringIO())
    measure.print_table([measure.Timing("ours", "eager", 0.5, 0.4, 0.6, 0.7, 0.65, 0.75, 20, 1)], console=console)
    text = console.export_text()
    for part in ("ratio to eager", "500.000", "400.000 to 600.000", "0.700", "0.650 to 0.750"):
        assert part in text


def test_json_does_not_depend_on_the_order_of_keys(tmp_path):
    (timing,) = measure.interleaved({"a": lambda: None}, rounds=1)
    measure.write_json(tmp_path / "new" / "one.json", {"b": 1, "a": [timing]})
    measure.write_json(tmp_path / "two.json", {"a": [timing], "b": 1})
    text = (tmp_path / "new" / "one.json").read_text()
    assert text == (tmp_path / "two.json").read_text() and text.endswith("}\n")
    assert json.loads(text)["a"][0]["name"] == "a"
