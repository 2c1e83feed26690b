"""Logs for TensorBoard, read back from their files."""

import pytest

from graphopt.errors import ExplorationError
from graphopt.exploration import ASHA, choice, explore, linear, open_study
from tests.exploration.searches import bowl

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
plugin = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")

OPTIONS = {
    "hyper_parameters": {"x": linear(0, 1, steps=11), "kind": choice("a", "b")}, "proposer": "random",
    "on": "inline", "progress": False,
}  # fmt: skip


def curve(net, hp, context):
    """Reports three values; its score is the last one."""
    for step in (1, 2, 3):
        context.report(step, hp["x"] * step)
    return {"score": hp["x"] * 3, "seconds": 1.0 + hp["x"]}


def read(folder):
    """Scalars by tag as [(step, value)], and the names and values of hyper-parameters, of one folder."""
    found = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.SCALARS: 0})
    found.Reload()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    hyper = {}
    try:
        contents = found.PluginTagToContent("hparams")
    except KeyError:  # there are none
        contents = {}
    for content in contents.values():
        data = plugin.HParamsPluginData.FromString(content)
        for name, value in data.session_start_info.hparams.items():
            hyper[name] = getattr(value, value.WhichOneof("kind"))
    return scalars, hyper


def check(folder, study, limit):
    """The log in ``folder`` says what ``study`` says."""
    scalars, _ = read(folder)
    ended = [study.history.trials[number] for number in study.history.ended]
    assert scalars["study/score"] == [(i + 1, pytest.approx(t.metrics["score"])) for i, t in enumerate(ended)]
    best = [max((t.metrics["score"] for t in ended[: i + 1] if t.metrics["seconds"] <= limit), default=None)
            for i in range(len(ended))]  # fmt: skip
    told = {step: value for step, value in scalars["study/best_score"]}
    assert told == {i + 1: pytest.approx(value) for i, value in enumerate(best) if value is not None}
    assert scalars["study/done"][-1] == (len(ended), len(ended))
    for trial in ended:
        curves, hyper = read(folder / f"trial-{trial.number:05d}")
        assert hyper == {"x": pytest.approx(trial.hyper_parameters["x"]), "kind": trial.hyper_parameters["kind"]}
        assert curves["metrics/score"][-1][1] == pytest.approx(trial.metrics["score"])
        assert curves["intermediate/score"] == [(s, pytest.approx(trial.hyper_parameters["x"] * s)) for s in (1, 2, 3)]


def test_a_search_is_logged_and_gone_on_with(tmp_path):
    options = OPTIONS | {"minimize": "seconds", "maximize": "score", "store": tmp_path / "s.db",
                         "tensorboard": tmp_path / "log"}  # fmt: skip
    with pytest.warns(UserWarning, match="nothing predicts"):
        for trials in (5, 9):
            study = explore(None, curve, trials=trials, budget={"seconds": 1.75}, **options)
    check(tmp_path / "log", study, 1.75)
    assert study.best().metrics["score"] == pytest.approx(
        read(tmp_path / "log")[0]["study/best_score"][-1][1]
    )  # under the budget


def test_a_study_on_file_is_exported(tmp_path):
    explore(None, curve, trials=6, maximize="score", minimize="seconds", store=tmp_path / "s.db", **OPTIONS)
    study = open_study(tmp_path / "s.db")
    check(study.export(tmp_path / "log", "tensorboard"), study, 1e9)
    with pytest.raises(ExplorationError, match="holds a log already"):
        study.export(tmp_path / "log", "tensorboard")


def test_trials_that_were_stopped_or_failed_and_final_scores_are_logged(tmp_path):
    def trial(net, hp, context):
        context.report(1, hp["x"])
        if hp["x"] == 0.5:
            raise ValueError("in the middle")
        context.report(2, 2 * hp["x"])
        return 10 * hp["x"] if context.final else 2 * hp["x"]

    study = explore(
        None, trial, trials=22, stop=ASHA(first=1, last=2), retrain=1, tensorboard=tmp_path / "log", **OPTIONS
    )
    (failed, *_) = study.trials("failed")
    pruned = study.trials("pruned")[0]
    scalars, _ = read(tmp_path / "log")
    assert scalars["study/failed"][-1][1] == len(study.trials("failed"))
    for number, value in ((failed.number, 0.5), (pruned.number, pruned.hyper_parameters["x"])):
        curves, hyper = read(tmp_path / "log" / f"trial-{number:05d}")
        assert curves["intermediate/score"] == [(1, pytest.approx(value))] and hyper["x"] == pytest.approx(value)
    best = study.best()
    assert scalars["final/score"] == [(best.number, pytest.approx(best.final["score"]))]
    curves, _ = read(tmp_path / "log" / f"trial-{best.number:05d}")
    assert [step for step, _ in curves["final/score"]] == [1, 2]


def test_without_tensorboard_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ExplorationError, match=r"pip install 'graphopt\[tensorboard\]'"):
        explore(None, bowl, trials=1, tensorboard=tmp_path / "log", **OPTIONS)
