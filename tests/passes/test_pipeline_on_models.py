"""All exact passes together on captured training steps: fewer operators, the same bits, nothing left to do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.graph.capture import capture
from graphopt.passes import CommonSubexpressions, ConstantFolding, DeadCode, NoOps, Pipeline
from tests.helpers import assert_keeps_meaning

EXACT = Pipeline([ConstantFolding(), NoOps(), CommonSubexpressions(), DeadCode()])


class Classifier(nn.Module):
    """A body whose positions are averaged before a linear layer."""

    def __init__(self, *body: nn.Module, width: int):
        super().__init__()
        self.body, self.head = nn.Sequential(*body), nn.Linear(width, 5)

    def forward(self, x):
        x = self.body(x)
        return self.head(x.mean(1) if x.dim() == 3 else x.mean((2, 3)))


MODELS = {
    "convolutions": (
        lambda: Classifier(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1), nn.GELU(), width=8
        ),
        (3, 10, 10),
    ),
    "transformer": (
        lambda: Classifier(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True),
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True),
            width=16,
        ),
        (6, 16),
    ),
    "tokens": (lambda: Classifier(nn.Embedding(7, 12), nn.LayerNorm(12), nn.Linear(12, 12), width=12), (6,)),
}


@pytest.mark.parametrize("model, shape", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("optimizer, size", [(None, 4), (torch.optim.AdamW, 1), (torch.optim.AdamW, 4)])
def test_the_same_step(model, shape, optimizer, size):
    net = model()
    x = torch.randint(5, (size, *shape)) if len(shape) == 1 else torch.randn(size, *shape)
    options = {"optimizer": optimizer(net.parameters())} if optimizer else {}
    graph = capture(net, (x, torch.randint(5, (size,))), loss=F.cross_entropy, **options)
    result = assert_keeps_meaning(EXACT, graph, special=False)
    assert len(result.graph) < len(graph)
