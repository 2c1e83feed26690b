"""The program that the tests of commands are given, and how they call them."""

import json
from typing import Any

from typer.testing import CliRunner, Result

from graphopt.cli import app

PROGRAM = """
import itertools
import torch
from torch import nn

def step():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    batch = torch.randn(6, 4), torch.randint(2, (6,))
    return net, batch, nn.functional.cross_entropy, torch.optim.SGD(net[2].parameters(), lr=0.1)

def forward_only():
    return {"model": nn.Linear(3, 2), "batch": (torch.randn(5, 3),)}

def named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 16), nn.Linear(16, 2)

        def forward(self, x, scale):
            return self.head(torch.relu(self.body(x)) * scale)

    net = Net()
    batch = {"x": torch.randn(5, 3), "scale": torch.rand(5, 1), "labels": torch.randint(2, (5,))}
    return net, batch, nn.functional.cross_entropy, torch.optim.AdamW(net.parameters())

shared = nn.Linear(4, 2)

def the_same():
    return shared, (torch.randn(6, 4), torch.randint(2, (6,))), nn.functional.cross_entropy

def nothing():
    return 7

def halves():
    return nn.Linear(3, 2), None

def broken():
    raise ZeroDivisionError("in the user's own code")
"""


def invoke(*arguments: Any) -> Result:
    """A command in this process; errors of ours are raised, as `graphopt.cli.main` gets them."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def output(*arguments: Any) -> str:
    """The standard output of a command that ends well."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def data(*arguments: Any) -> Any:
    """What a command prints with ``--json``, which is one value and nothing else."""
    return json.loads(output(*arguments, "--json"))
