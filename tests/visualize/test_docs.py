"""The examples of the pages of docs run."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", ["show.md", "plots.md"])
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert blocks
    variables: dict = {}
    for block in blocks:
        exec(compile(block, name, "exec"), variables)
    if name == "show.md":
        assert {p.name for p in tmp_path.iterdir()} >= {"step.html", "step.graphml", "step.dot", "step.json"}
