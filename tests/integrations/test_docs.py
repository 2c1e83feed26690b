"""The examples of docs/integrations.md run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from graphopt.integrations import register

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "integrations.md").read_text()
EXAMPLES = dict(re.findall(r"## ([^\n]*)\n[^#]*?```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    accelerate = pytest.importorskip("accelerate")
    torch._dynamo.reset()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("title", ["torch.compile", "Hugging Face Trainer", "Lightning", "Accelerate"])
def test_examples_run(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    register()  # what the entry point of an installation does
    monkeypatch.chdir(tmp_path)
    example = ModuleType("example")  # Dynamo looks for the module of a function
    monkeypatch.setitem(sys.modules, "example", example)
    exec(compile(EXAMPLES[title], f"docs/integrations.md, {title}", "exec"), vars(example))
    if title == "torch.compile":
        assert "selective_saving" in capsys.readouterr().out
        assert (tmp_path / "piece.html").stat().st_size > 100_000
