"""Machines: from data sheets, kept between processes, stale when what they hold for has changed."""

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt import GraphoptWarning, capture
from graphopt.cost_model import Machine, estimate
from graphopt.cost_model import calibrate as calibration
from graphopt.cost_model import machine as machines
from graphopt.cost_model.machine import VERSION, fingerprint, load, path_of
from graphopt.errors import CostModelError
from tests.cost_model.machines import simple


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machines, "_CURRENT", {})
    return tmp_path


def here(**changes) -> Machine:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return simple(**{"fingerprint": dict(fingerprint()), "measured": now} | changes)


@pytest.mark.parametrize("name", ["V100", "A100", "H100", "H200", "B200", "NVIDIA H100 80GB HBM3"])
def test_named_machines_price_a_step(name):
    model = nn.Linear(64, 8)
    graph = capture(model, (torch.randn(16, 64), torch.randint(8, (16,))), loss=F.cross_entropy)
    machine = Machine.named(name)
    assert machine.source.startswith("https://") and machine.stale() == "" and machine.link.bandwidth > 1e9
    assert 0 < estimate(graph, machine).seconds < 1e-2


def test_newer_gpus_are_faster_where_products_decide():
    model = nn.Linear(4096, 4096, bias=False)
    graph = capture(model, (torch.randn(4096, 4096),))
    names = ("V100", "A100", "H100", "B200")
    seconds = [estimate(graph, Machine.named(name), precision="fp16").seconds for name in names]
    assert seconds == sorted(seconds, reverse=True)


def test_an_unknown_machine_is_refused_with_the_names_that_are_near():
    with pytest.raises(CostModelError, match="H100"):
        Machine.named("H101")


def test_what_was_measured_is_kept_and_found_again():
    machine = here(scales={"gemm": 1.25}, spread=0.2)
    path = machine.save()
    kept = load(path)
    assert path == path_of(fingerprint()) and asdict(kept) == asdict(machine)
    model = nn.Linear(6, 3)
    graph = capture(model, (torch.randn(4, 6), torch.randint(3, (4,))), loss=F.cross_entropy)
    assert estimate(graph, kept).seconds == estimate(graph, machine).seconds


def test_current_measures_once(monkeypatch):
    calls = []
    monkeypatch.setattr(calibration, "calibrate", lambda progress: calls.append(progress) or here())
    first = Machine.current(progress=False)
    assert Machine.current() is first and calls == [False]
    machines._CURRENT.clear()  # another process
    assert asdict(Machine.current()) == asdict(first) and calls == [False]
    machines._CURRENT.clear()
    monkeypatch.setattr(machines, "fingerprint", lambda: (*fingerprint(), ("another", 1)))
    Machine.current()
    assert len(calls) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"curves": {"gemm": 3}}', '{"curves": {}, "link": 1}'])
def test_a_damaged_file_is_reported_and_measured_anew(text):
    path = here().save()
    path.write_text(text.replace("{", f'{{"version": {VERSION}, ', 1).replace(", }", "}"))
    with pytest.warns(GraphoptWarning, match="measuring anew"):
        assert load(path) is None


def test_a_file_of_another_version_is_measured_anew():
    path = here().save()
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    assert load(path) is None


def test_a_folder_that_cannot_be_written_warns_and_loses_nothing(folder, monkeypatch):
    (folder / "file").write_text("not a folder")
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(folder / "file"))
    with pytest.warns(GraphoptWarning, match="GRAPHOPT_CACHE_DIR"):
        assert here().save() is None
    assert (folder / "file").read_text() == "not a folder"


def test_a_failed_write_leaves_the_old_file(monkeypatch):
    path = here(spread=0.3).save()

    def torn(*arguments, **keywords):
        raise OSError("no space left on device")

    monkeypatch.setattr(machines.os, "replace", torn)
    with pytest.warns(GraphoptWarning, match="no space left"):
        here(spread=0.4).save()
    assert load(path).spread == 0.3 and [p.name for p in path.parent.iterdir()] == [path.name]


def test_stale_says_what_changed():
    assert here().stale() == ""
    other = here()
    changed = replace(other, fingerprint={**other.fingerprint, "threads": 77})
    assert "threads was 77, is" in changed.stale()
    old = (datetime.now(UTC) - timedelta(days=400)).isoformat()
    assert "measured 400 days ago" in here(measured=old).stale()
