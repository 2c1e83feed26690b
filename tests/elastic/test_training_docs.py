"""The example of docs/elastic_training.md runs."""

from pathlib import Path


def test_example_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "elastic_training.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(compile(example, "docs/elastic_training.md", "exec"), names)
    assert "chosen" in capsys.readouterr().out
