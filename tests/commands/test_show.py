"""``graphopt show`` and ``graphopt explain``, as a user calls them."""

import pytest
import torch

from graphopt.errors import BatchError, GraphoptError
from graphopt.visualize.target import load_target
from tests.commands.program import PROGRAM, data, output
from tests.visualize.test_page import read


def test_show_writes_the_page(folder):
    said = data("show", "my_step.py:step", "-o", "page.html", "--machine", "H100", "--batch", "32")
    page = read((folder / "page.html").read_text())
    assert said["path"] == "page.html" and said["after"] == page["facts"]["after"]
    assert page["sizes"] == {"batch": 32} and page["facts"]["after"]["machine"].startswith("H100")
    assert said["after"]["operators"] < said["before"]["operators"]
    assert "step.html" in output("show", "my_step.py:forward_only") and (folder / "step.html").exists()


def test_explain_says_what_passes_did_and_what_it_costs(folder):
    text = output("explain", "my_step.py:step", "--machine", "H100", "--axes", "--graph")
    assert "gradient_liveness:" in text and "already skipped by autograd" not in text
    assert "prices:" in text and "0.hidden" in text and "aten.addmm" in text
    found = data("explain", "my_step.py:step", "--machine", "H100")
    before, after = found["facts"]["FLOPs"]
    assert before > after and found["price"]["flops"] == after
    assert sum(change["saving"]["flops"] for change in found["changes"]) == before - after
    assert "no prices" in output("explain", "my_step.py:step")


def test_targets_that_are_none(folder):
    for text, why in (
        ("my_step", "expected module:function"), ("nowhere.py:f", "no file"), ("no_such_module:f", "no module"),
        ("my_step.py:g", "no function 'g'"), ("my_step.py:nothing", "gave int; expected"),
        ("my_step.py:halves", "no model or no batch"),
    ):  # fmt: skip
        with pytest.raises(GraphoptError, match=why):
            load_target(text)


@pytest.mark.parametrize("command", ["explain", "show", "elastic"])
def test_a_forgotten_loss_is_asked_for(folder, command):
    (folder / "my_step.py").write_text(PROGRAM + "\n\ndef forgotten():\n    return step()[:2]\n")
    with pytest.raises(BatchError, match=r"my_step.py:forgotten gives no loss.* give \(model, batch, loss\)"):
        output(command, "my_step.py:forgotten")


def test_an_optimizer_may_stand_in_the_place_of_the_loss(folder):
    (folder / "my_step.py").write_text(PROGRAM + "\n\ndef own_loss():\n    m, b, _, o = step()\n    return m, b, o\n")
    found = load_target("my_step.py:own_loss")
    assert found.loss is None and isinstance(found.optimizer, torch.optim.Optimizer)
