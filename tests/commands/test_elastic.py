"""``graphopt elastic``: the table of a space, a subnet within a budget, and what is written of it."""

import importlib.util
import sys

import pytest
import torch

from graphopt.errors import ElasticError
from tests.commands.program import data, invoke, output


def test_the_space_is_listed(folder):
    text = output("elastic", "my_step.py:step")
    assert "Elastic" in text and "0.hidden" in text and "subnet:" not in text
    found = data("elastic", "my_step.py:step")
    assert [d["name"] for d in found["dimensions"]] == ["0.hidden"] and found["choice"] is None
    assert found["refused"] and found["full"]["parameters"] == 4 * 8 + 8 + 8 * 2 + 2


def test_a_budget_is_kept(folder):
    found = data("elastic", "my_step.py:step", "--select", "flops=0.5", "--select", "parameters=99%")
    assert found["facts"]["flops"] <= 0.5 * found["full"]["flops"]
    assert found["choice"] == {"0.hidden": 4}  # the largest that keeps it
    absolute = data("elastic", "my_step.py:step", "--select", f"parameters={found['full']['parameters']}")
    assert absolute["choice"] == {"0.hidden": 8}


def test_a_budget_that_nothing_keeps_is_a_no(folder):
    result = invoke("elastic", "my_step.py:step", "--select", "parameters=2")
    assert result.exit_code == 1 and "no subnet meets it" in result.stderr


def test_a_subnet_is_saved_as_a_folder(folder):
    assert "written: small" in output("elastic", "my_step.py:step", "--choose", "*.hidden=0.5", "--out", "small")
    spec = importlib.util.spec_from_file_location("subnet_of_a_test", folder / "small" / "subnet.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["subnet_of_a_test"] = module
    spec.loader.exec_module(module)
    net = module.load()
    assert net(torch.randn(3, 4)).shape == (3, 2)
    assert sum(p.numel() for p in net.parameters()) == 4 * 4 + 4 + 4 * 2 + 2


@pytest.mark.parametrize("target", ["my_step.py:step", "my_step.py:named"])
def test_a_subnet_is_exported(folder, target):
    output("elastic", target, "--select", "flops=0.6", "--out", "nets/small.pt2")
    net = torch.export.load(folder / "nets" / "small.pt2").module()
    given = {"x": torch.randn(9, 3), "scale": torch.rand(9, 1)} if target.endswith("named") else {}
    found = net(**given) if given else net(torch.randn(9, 4))
    assert found.shape == (9, 2)  # another batch size than the example's


def test_a_model_without_dimensions_is_an_error(folder):
    with pytest.raises(ElasticError, match="nothing in it is elastic"):
        invoke("elastic", "my_step.py:forward_only")
