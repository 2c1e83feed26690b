"""The example of the page on prices runs."""

import re
from pathlib import Path


def test_the_example_of_the_page_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "prices.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "docs/prices.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "kept for backward" in printed and "flat step at batch=64 on H100" in printed
