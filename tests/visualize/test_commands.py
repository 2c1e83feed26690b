"""``graphopt show`` and ``graphopt explain``, as a user calls them."""

import json
import textwrap

import pytest
from typer.testing import CliRunner

from graphopt.cli import app
from graphopt.errors import GraphoptError
from graphopt.visualize.target import load_target
from tests.visualize.test_page import read

PROGRAM = """
    import torch
    from torch import nn

    def step():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        batch = torch.randn(6, 4), torch.randint(2, (6,))
        return net, batch, nn.functional.cross_entropy, torch.optim.SGD(net[2].parameters(), lr=0.1)

    def forward_only():
        return {"model": nn.Linear(3, 2), "batch": (torch.randn(5, 3),)}

    def nothing():
        return 7

    def halves():
        return nn.Linear(3, 2), None
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_step.py").write_text(textwrap.dedent(PROGRAM))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_show_writes_the_page(folder):
    said = json.loads(
        call("show", "my_step.py:step", "-o", "page.html", "--machine", "H100", "--batch", "32", "--json")
    )
    data = read((folder / "page.html").read_text())
    assert said["path"] == "page.html" and said["after"] == data["facts"]["after"]
    assert data["sizes"] == {"batch": 32} and data["facts"]["after"]["machine"].startswith("H100")
    assert said["after"]["operators"] < said["before"]["operators"]
    assert "step.html" in call("show", "my_step.py:forward_only") and (folder / "step.html").exists()


def test_explain_says_what_passes_did_and_what_it_costs(folder):
    text = call("explain", "my_step.py:step", "--machine", "H100", "--axes", "--graph")
    assert "gradient_liveness:" in text and "already skipped by autograd" not in text
    assert "prices:" in text and "0.hidden" in text and "aten.addmm" in text
    data = json.loads(call("explain", "my_step.py:step", "--machine", "H100", "--json"))
    before, after = data["facts"]["FLOPs"]
    assert before > after and data["price"]["flops"] == after
    assert sum(change["saving"]["flops"] for change in data["changes"]) == before - after
    assert "no prices" in call("explain", "my_step.py:step")


def test_targets_that_are_none(folder):
    for text, why in (
        ("my_step", "expected module:function"), ("nowhere.py:f", "no file"), ("no_such_module:f", "no module"),
        ("my_step.py:g", "no function 'g'"), ("my_step.py:nothing", "gave int; expected"),
        ("my_step.py:halves", "no model or no batch"),
    ):  # fmt: skip
        with pytest.raises(GraphoptError, match=why):
            load_target(text)


def test_help_has_an_example():
    for name in ("show", "explain"):
        assert f"graphopt {name} train.py:step" in call(name, "--help")
