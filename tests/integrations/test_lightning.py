"""`GraphoptCallback`: a LightningModule trains as without it, and its checkpoints are those of the plain module."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.errors import GraphoptError
from graphopt.integrations import Piece, recording

lightning = pytest.importorskip("lightning")

from graphopt.integrations.lightning import GraphoptCallback  # noqa: E402


class Classifier(lightning.LightningModule):
    """Convolution, batch norm, dropout; logs, validates and remembers its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(4, 3)
        self.losses: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss, prog_bar=True, on_epoch=True)
        self.log_dict({"accuracy": (logits.argmax(1) == y).float().mean()})
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.05)


def loader(rows: int = 40) -> torch.utils.data.DataLoader:
    torch.manual_seed(5)
    data = torch.utils.data.TensorDataset(torch.randn(rows, 2, 6, 6), torch.randint(3, (rows,)))
    return torch.utils.data.DataLoader(data, batch_size=4)


def fitted(folder: Path, *callbacks: Any, module: Any = None) -> tuple[Any, Any, list[Piece]]:
    """A module fitted for two epochs of ten steps, its trainer, and the pieces that were compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Classifier() if module is None else module
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), logger=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    with warnings.catch_warnings(), recording() as pieces:
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer.fit(module, loader(), loader(8))
    return module, trainer, pieces


def test_trains_as_without_it_and_saves_plain_names(tmp_path: Path) -> None:
    eager, plain, none = fitted(tmp_path / "eager")
    callback = GraphoptCallback(("training_step", "validation_step"), dynamic=False)
    ours, trainer, pieces = fitted(tmp_path / "ours", callback)
    assert not none
    assert len(ours.losses) == 20 and all(map(torch.equal, ours.losses, eager.losses))
    assert {n: v.item() for n, v in trainer.callback_metrics.items()} == {
        n: v.item() for n, v in plain.callback_metrics.items()
    }
    (step,) = (piece for piece in pieces if piece.trains)  # forward and loss, compiled once for all twenty steps
    assert step.result.changed and "cross_entropy" not in step.why_not
    assert any(not piece.trains for piece in pieces), "validation"
    (checkpoint,) = (tmp_path / "ours").rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert list(state) == list(Classifier().state_dict())
    loaded = Classifier.load_from_checkpoint(checkpoint)
    assert all(map(torch.equal, loaded.state_dict().values(), eager.state_dict().values()))


def test_the_plain_steps_are_back_after_the_fit(tmp_path: Path) -> None:
    module, *_ = fitted(tmp_path, GraphoptCallback())
    assert not {"training_step", "log", "log_dict"} & set(vars(module))

    class Failing(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("no more data")

    module = Failing()
    module.training_step = own = module.training_step  # a step of the object's own, which has to come back
    with pytest.raises(RuntimeError, match="no more data"):
        fitted(tmp_path, GraphoptCallback(), module=module)
    assert vars(module)["training_step"] is own and "log" not in vars(module)


def test_what_cannot_be_compiled_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="names of methods"):
        GraphoptCallback("training_step")
    with pytest.raises(GraphoptError, match="'lower'"):
        GraphoptCallback(options={"lower": "nothing"})
    with pytest.raises(GraphoptError, match="has no trainng_step"):
        fitted(tmp_path, GraphoptCallback(("trainng_step",)))
    with pytest.raises(GraphoptError, match="compiled already"):
        fitted(tmp_path, GraphoptCallback(), module=torch.compile(Classifier(), backend="eager"))
