"""`explore` in one process: outcomes, early stopping, objectives, what a study tells, what may be mixed."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import ExplorationError, GraphoptWarning, StoreError
from graphopt.exploration import ASHA, ModelFunction, Pruned, choice, explore, linear, open_study
from graphopt.exploration.engines.inline import InlineEngine
from graphopt.exploration.limits import Limits
from graphopt.exploration.outcome import Objectives, failure
from tests.exploration.searches import BOWL, bowl

INLINE = {"on": "inline", "progress": False}


def once(returned, **options):
    """The only trial of a search whose trial gives (or raises) ``returned``."""

    def trial(net, hp, context):
        if isinstance(returned, BaseException):
            raise returned
        return returned(context) if callable(returned) else returned

    study = explore(None, trial, hyper_parameters={"a": choice(1, 2)}, trials=1, **INLINE, **options)
    return study.trials()[0]


@pytest.mark.parametrize(
    "returned, state, told",
    [
        (float("nan"), "invalid", "nan"),
        (float("inf"), "invalid", "inf"),
        (None, "invalid", "None"),
        ("0.9", "invalid", "'0.9'"),
        (True, "invalid", "True"),
        ([0.9], "invalid", "a list"),
        ({"score": float("nan")}, "invalid", "'score': nan"),
        ({"other": 1.0}, "invalid", "no 'score'"),
        ({"score": np.float32(0.5), "extra": "x"}, "invalid", "'extra'"),
        (ValueError("wrong"), "failed", "ValueError: wrong"),
        (MemoryError("no more"), "failed", "out of memory"),
        (SystemExit(2), "failed", "SystemExit: 2"),
        (RuntimeError("CUDA out of memory. Tried"), "failed", "out of memory"),
        (lambda context: context.report(1, float("nan")), "invalid", "at step 1"),
        (lambda context: context.report(0, 1.0), "failed", "step of at least 1"),
        (np.float64(0.5), "done", ""),
        ({"score": 1, "extra": 2}, "done", ""),
    ],
)
def test_whatever_a_trial_gives_is_recorded_with_its_cause(returned, state, told):
    """F6 and F7."""
    trial = once(returned)
    assert trial.state == state and told in trial.cause
    assert (trial.scores is not None) == (state == "done")
    if state == "done":
        assert all(type(value) is float for value in trial.metrics.values())


def test_out_of_memory_of_torch_is_known_by_its_name():
    class OutOfMemoryError(RuntimeError):
        pass

    assert failure(OutOfMemoryError("x"), 0.0).out_of_memory and not failure(ValueError("x"), 0.0).out_of_memory


def test_trials_without_a_score_are_never_best_and_are_not_repeated():
    def trial(net, hp, context):
        return float("nan") if hp["x0"] > 0.5 else bowl(net, hp, context)

    study = explore(None, trial, hyper_parameters=BOWL, trials=60, **INLINE)
    assert study.counts()["invalid"] > 3 and study.best().hyper_parameters["x0"] <= 0.5
    bad = {t.number for t in study.trials("invalid")}
    assert not {t.parent for t in study.trials()} & bad
    assert len({t.key for t in study.trials()}) == 60


def test_asha_stops_what_is_not_among_the_best():
    def trial(net, hp, context):
        try:
            for step in range(1, 28):
                context.report(step, hp["x"] * step)
        except Pruned:
            steps.append(step)
            raise
        steps.append(step)
        return hp["x"] * step

    steps = []
    study = explore(
        None, trial, hyper_parameters={"x": linear(0, 1, steps=101)}, trials=60, proposer="random",
        stop=ASHA(first=1, eta=3, last=27), **INLINE,
    )  # fmt: skip
    assert set(steps) <= {1, 3, 9, 27}
    counts = study.counts()
    assert counts["pruned"] > 30 and counts["done"] >= 3
    assert sum(steps) < 0.5 * 27 * 60  # what it saves
    assert study.best().hyper_parameters["x"] > 0.85
    for trial in study.trials("pruned"):
        assert "stopped early" in trial.cause and trial.scores is None and trial.curve[-1][0] in (1, 3, 9)


def test_asha_rungs():
    stopping = ASHA(first=2, eta=3, last=20)
    assert [stopping.rung(0, step) for step in (1, 2, 5, 7, 100)] == [None, 2, 2, 6, 18]
    assert stopping.rung(6, 7) is None and stopping.rung(6, 19) == 18
    assert stopping.goes_on(0.0, [1.0]) and not stopping.goes_on(0.0, [1.0, 2.0])
    assert stopping.goes_on(3.0, range(3)) and not stopping.goes_on(1.5, range(4))


class Watched(ASHA):
    """How many values decisions were made by."""

    seen = []

    def goes_on(self, value, others):
        others = list(others)
        self.seen.append(len(others))
        return super().goes_on(value, others)


def test_a_reproducible_search_decides_by_what_the_request_of_a_trial_could_use():
    def trial(net, hp, context):
        context.report(1, hp["x0"])
        return hp["x0"]

    Watched.seen.clear()
    study = explore(
        None, trial, hyper_parameters=BOWL, trials=21, stop=Watched(first=1, last=2), reproducible=True, window=4,
        queue=3, **INLINE,
    )  # fmt: skip
    first = {}
    for t in study.trials():
        first.setdefault(t.request, t.number)
    assert Watched.seen == [Limits(window=4).usable(first[t.request]) for t in study.trials()]


def test_several_objectives():
    def trial(net, hp, context):
        return {"accuracy": hp["size"] ** 0.5, "seconds": hp["size"] * (1 + hp["waste"])}

    study = explore(
        None, trial, hyper_parameters={"size": linear(1, 9, steps=9), "waste": linear(0, 1, steps=5)},
        maximize="accuracy", minimize="seconds", trials=45, **INLINE,
    )  # fmt: skip
    front = study.pareto()
    assert [t.hyper_parameters["size"] for t in front] == [9, 8, 7, 6, 5, 4, 3, 2, 1]  # the best accuracy first
    assert {t.hyper_parameters["waste"] for t in front} == {0}
    assert study.best().metrics["accuracy"] == 3.0
    assert study.best({"seconds": 4.5}).metrics["accuracy"] == 2.0
    with pytest.raises(ExplorationError, match="keeps the budget"):
        study.best({"seconds": 0.5})
    assert Objectives((), "loss").scores({"loss": 2.0}) == (-2.0,)


def test_the_best_are_retrained_and_the_ranks_compared():
    def trial(net, hp, context):
        assert (context.effort, context.final) == ((5.0, True) if context.final else (1.0, False))
        # A short trial ranks all but two right.
        return {0.9: 0.8, 0.8: 0.9}.get(hp["x"], hp["x"]) if not context.final else 10 * hp["x"]

    study = explore(
        None, trial, hyper_parameters={"x": linear(0, 1, steps=11)}, trials=11, retrain=4, effort=5.0, **INLINE
    )
    retrained = [t for t in study.trials() if t.final]
    assert sorted(t.hyper_parameters["x"] for t in retrained) == [0.7, 0.8, 0.9, 1.0]
    assert study.best().hyper_parameters["x"] == 1.0 and study.best().final["score"] == 10.0
    assert study.rank_correlation() == pytest.approx(1 - 2 / 6)
    assert "after retraining: score 10" in study.why(study.best().number)


def test_the_best_are_retrained_once(tmp_path):
    finals = []

    def trial(net, hp, context):
        finals.extend([hp["x"]] * context.final)
        return hp["x"]

    options = {"hyper_parameters": {"x": linear(0, 1, steps=6)}, "trials": 6, "store": tmp_path / "s.db", **INLINE}
    for retrain, expected in ((2, [1.0, 0.8]), (2, [1.0, 0.8]), (3, [1.0, 0.8, 0.6])):
        explore(None, trial, retrain=retrain, **options)
        assert finals == expected


def test_a_study_goes_on_where_it_was(tmp_path):
    """F2 in one process: the same models as without a pause."""
    options = {"hyper_parameters": BOWL, "reproducible": True, "window": 4, **INLINE}
    whole = explore(None, bowl, trials=40, **options)
    for trials in (13, 26, 40):
        study = explore(None, bowl, trials=trials, store=tmp_path / "s.db", **options)
        assert study.counts()["done"] == trials
    assert [t.key for t in study.trials()] == [t.key for t in whole.trials()]
    assert all(t.attempts == 1 for t in study.trials())
    read = open_study(tmp_path / "s.db")
    assert [(t.key, t.scores) for t in read.trials()] == [(t.key, t.scores) for t in whole.trials()]
    assert read.best().key == whole.best().key


def build(width):
    return ("net", width)


def build_otherwise(width):
    return ("another net", width)


def other_bowl(net, hp, context):
    return 2 * bowl(net, hp, context)


def test_what_changed_is_not_mixed(tmp_path):
    """F13."""
    store, options = tmp_path / "s.db", {"trials": 5, **INLINE}
    space = ModelFunction(build, width=(1, 2, 4))
    explore(space, bowl, hyper_parameters=BOWL, store=store, **options)
    explore(space, bowl, hyper_parameters=BOWL, store=store, **options)
    changes = [
        ("space", (space, bowl), {"hyper_parameters": {**BOWL, "y": linear(0, 1)}}),
        ("model", (ModelFunction(build_otherwise, width=(1, 2, 4)), bowl), {"hyper_parameters": BOWL}),
        ("trial and data", (space, other_bowl), {"hyper_parameters": BOWL}),
        ("objectives", (space, bowl), {"hyper_parameters": BOWL, "minimize": "score"}),
    ]
    for what, positional, given in changes:
        with pytest.raises(StoreError, match=f"{what} changed.*resume='fork'"):
            explore(*positional, **given, store=store, **options)
    forked = explore(space, other_bowl, hyper_parameters=BOWL, store=store, resume="fork", **options)
    assert forked.path == tmp_path / "s.fork-1.db" and len(forked) == 5
    assert len(open_study(store)) == 5
    with pytest.raises(StoreError, match="is there already"):
        explore(space, bowl, hyper_parameters=BOWL, store=store, resume="never", **options)
    with pytest.raises(StoreError, match="no study to go on with"):
        explore(space, bowl, hyper_parameters=BOWL, store=tmp_path / "none.db", resume="must", **options)
    with pytest.raises(StoreError, match="reproducible"):
        explore(space, bowl, hyper_parameters=BOWL, store=store, reproducible=True, **options)


def test_a_study_tells_why_and_exports(tmp_path):
    cost = lambda sizes, hp: {"step_seconds": (hp["x0"] + hp["x1"], 0.0, 2.0)}
    study = explore(
        None, bowl, hyper_parameters=BOWL, trials=40, budget={"step_seconds": 0.9}, predictor=cost,
        store=tmp_path / "s.db", **INLINE,
    )  # fmt: skip
    child = next(t for t in study.trials() if t.parent is not None)
    told = study.why(child.number)
    assert f"from trial {child.parent}" in told and "changed: x" in told and "->" in told and "predicted" in told
    refused = next(iter(study.history.refusals))
    assert "never built: step_seconds is predicted as" in study.why(refused)
    assert study.why(child.key[:12]) == told
    for bad in (99, "zz"):
        with pytest.raises(ExplorationError, match="why"):
            study.why(bad)
    lines = study.export(tmp_path / "s.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    with open(study.export(tmp_path / "s.csv"), newline="") as file:
        table = list(csv.DictReader(file))
    assert len(rows) == len(table) == 40
    for trial, row, cells in zip(study.trials(), rows, table):
        assert row["hp.x0"] == trial.hyper_parameters["x0"] == float(cells["hp.x0"])
        assert row["score"] == trial.metrics["score"] == float(cells["score"])
    with pytest.raises(ExplorationError, match="csv, jsonl"):
        study.export(tmp_path / "s.xml")


def test_the_best_of_a_study_keep_its_budget_and_metrics_do_not_hide_columns(tmp_path):
    def trial(net, hp, context):
        return {"score": hp["x"], "seconds": 10 * hp["x"], "hp.x": -1.0}

    with pytest.warns(GraphoptWarning, match="nothing predicts"):
        study = explore(
            None, trial, hyper_parameters={"x": linear(0, 1, steps=6)}, trials=6, budget={"seconds": 7.0}, **INLINE
        )
    assert [t.metrics["score"] for t in study.top(2)] == [0.6, 0.4]
    assert [t.metrics["score"] for t in study.top(2, {})] == [1.0, 0.8]
    for trial, row in zip(study.trials(), study.rows()):
        assert row["seconds"] == trial.seconds != trial.metrics["seconds"] == row["metric.seconds"]
        assert row["hp.x"] == trial.hyper_parameters["x"] and row["metric.hp.x"] == -1.0


def test_torch_is_seeded_in_the_first_trial_though_that_imports_it():
    code = (
        "import sys\n"
        "from graphopt.exploration import explore, choice\n"
        "def trial(net, hp, context):\n"
        "    assert ('torch' in sys.modules) == (len(seen) > 0)\n"
        "    import torch\n"
        "    seen.append((context.seed, float(torch.rand(1))))\n"
        "    return 0.0\n"
        "seen = []\n"
        "explore(None, trial, hyper_parameters={'a': choice(1, 2)}, trials=2, on='inline', progress=False)\n"
        "import torch\n"
        "for seed, drawn in seen:\n"
        "    torch.manual_seed(seed)\n"
        "    assert float(torch.rand(1)) == drawn, seen\n"
        "assert not [f for f in sys.meta_path if 'graphopt' in type(f).__module__]\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("given, expected", [({}, "1"), ({"threads": 3}, "3")])
def test_reproducible_trials_have_one_thread(monkeypatch, given, expected):
    """Sums of other numbers of threads differ in their last digits."""
    from graphopt.exploration import exploring

    told = []

    def engine(where, generator, trainer, folder):
        told.append(str(where.threads))
        return InlineEngine(generator, trainer)

    monkeypatch.setattr(exploring, "start_engine", engine)
    explore(None, bowl, hyper_parameters=BOWL, trials=1, reproducible=True, progress=False, **given)
    assert told == [expected]


def test_ctrl_c_once_ends_after_the_trial_and_can_be_resumed(tmp_path):
    """F14, the first half; the other one needs a process of its own (test_local)."""

    def trial(net, hp, context):
        if context.number == 7 and context.attempt == 0 and not resumed:
            signal.raise_signal(signal.SIGINT)
        return bowl(net, hp, context)

    resumed = False
    options = {"hyper_parameters": BOWL, "trials": 20, "store": tmp_path / "s.db", **INLINE}
    before = signal.getsignal(signal.SIGINT)
    study = explore(None, trial, **options)
    assert study.stopped == "interrupted" and study.counts()["done"] == 8
    assert signal.getsignal(signal.SIGINT) is before
    resumed = True
    study = explore(None, trial, **options)
    assert study.stopped == "limit" and study.counts() == {"done": 20}


def test_checkpoints_are_whole_or_not_there(tmp_path):
    class Unsavable:
        def __reduce__(self):
            raise RuntimeError("amid the file")

    def trial(net, hp, context):
        assert context.load() is None
        context.save({"step": 1})
        with pytest.raises(RuntimeError):
            context.save({"big": list(range(1000)), "bad": Unsavable()})
        assert context.load() == {"step": 1}
        assert [path.name for path in context.folder.iterdir()] == ["checkpoint.pt"]
        return 1.0

    study = explore(None, trial, hyper_parameters={"a": choice(1, 2)}, trials=1, store=tmp_path / "s.db", **INLINE)
    assert study.counts() == {"done": 1}
    assert not list((tmp_path / "s.db.d").glob("trial-*"))  # removed when the trial has ended


def test_a_limit_that_nobody_predicts_is_said():
    with pytest.warns(GraphoptWarning, match="nothing predicts step_seconds"):
        study = explore(
            None, lambda net, hp, context: {"score": hp["x"], "step_seconds": hp["x"]}, trials=11,
            hyper_parameters={"x": linear(0, 1, steps=11)}, budget={"step_seconds": 0.45}, **INLINE,
        )  # fmt: skip
    assert study.best().metrics["score"] == 0.4


@pytest.mark.parametrize(
    "change, told",
    [
        ({"trials": None}, "say how many"),
        ({"trials": 0}, "trials"),
        ({"time": "soon"}, "'soon'"),
        ({"time": -1}, "time"),
        ({"proposer": "magic"}, "proposer"),
        ({"workers": 0, "on": "local"}, "workers"),
        ({"on": "moon"}, "'moon'"),
        ({"threads": 0}, "threads"),
        ({"resources": {"GPU": 1}}, "on='ray'"),
        ({"resources": {"GPU": -1}, "on": "ray"}, "amounts by name"),
        ({"devices": [0], "on": "ray"}, "resources={'GPU': 1}"),
        ({"generation": "nowhere"}, "generation"),
        ({"confidence": 1.5}, "confidence"),
        ({"resume": "maybe"}, "resume"),
        ({"maximize": ("a", "a")}, "twice"),
        ({"hang_after": math.nan}, "hang_after"),
        ({"predictor": "magic"}, "predictor"),
        ({"seed": -1}, "seed"),
    ],
)
def test_arguments_are_checked(change, told):
    with pytest.raises(ExplorationError, match=told):
        explore(None, bowl, **({"hyper_parameters": BOWL, "trials": 1, **INLINE} | change))


def test_what_cannot_be_sent_to_workers_is_told():
    with pytest.raises(ExplorationError, match=r"no lambdas.*on='inline'"):
        explore(None, lambda net, hp, context: 0.0, hyper_parameters=BOWL, trials=1, workers=1, progress=False)
