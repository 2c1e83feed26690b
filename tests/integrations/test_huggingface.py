"""``TrainingArguments(torch_compile_backend="graphopt")`` of the Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphopt.integrations import Piece, recording, register

pytest.importorskip("accelerate")

from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments


class Sentences(torch.utils.data.Dataset):
    """Sentences of random tokens; their class is that of the first token."""

    def __init__(self, length: int = 12, count: int = 16):
        torch.manual_seed(7)
        self.tokens = torch.randint(1, 40, (count, length))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[index]
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[0] % 3}


def trained(folder: Path, **arguments: object) -> tuple[list[float], dict[str, torch.Tensor], list[Piece]]:
    """Losses of a few steps, the parameters after them, and the pieces that were compiled."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    settings = TrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=4, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True, seed=3, **arguments,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=Sentences())
    with recording() as pieces:
        trainer.train()
    trainer.save_model(str(folder / "saved"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, dict(model.state_dict()), pieces


def test_trains_a_classifier_as_eager_does(tmp_path: Path) -> None:
    register()
    torch._dynamo.reset()
    eager, parameters, none = trained(tmp_path / "eager")
    ours, compiled, pieces = trained(tmp_path / "ours", torch_compile=True, torch_compile_backend="graphopt")
    assert len(ours) == 4 and ours == eager and not none
    assert any(piece.trains and piece.result is not None and piece.result.changed for piece in pieces)
    assert all(torch.equal(compiled[name], value) for name, value in parameters.items())
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "ours" / "saved")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in parameters.items())
