"""The examples of the documentation run, and print what the page says they print."""

import re
from pathlib import Path

import pytest

from benchmarks.readme_table import example_output, main
from tests.pages import DOCS, ROOT, examples, pages

TESTS = ROOT / "tests"


def elsewhere(page: Path) -> bool:
    """Whether another test file names the page: its examples are run there, in the way that they need."""
    mine = Path(__file__).name
    return any(f'"{page.name}"' in path.read_text() for path in TESTS.rglob("test_*.py") if path.name != mine)


def with_examples() -> list[str]:
    """Pages whose examples are run here."""
    found = [page for page in pages() if any(examples(page.read_text())) and not elsewhere(page)]
    return [page.relative_to(DOCS).as_posix() for page in found]


def same_text(printed: str, shown: str) -> None:
    """The lines agree, but for numbers of spaces: tables are laid out for the width of a terminal."""
    assert [line.split() for line in printed.strip().splitlines()] == [
        line.split() for line in shown.strip().splitlines()
    ]


@pytest.mark.parametrize("name", with_examples())
def test_examples_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    variables: dict = {"__name__": "example"}
    for example in examples((DOCS / name).read_text()):
        capsys.readouterr()
        exec(compile(example.code, name, "exec"), variables)
        if example.output is not None:
            same_text(capsys.readouterr().out, example.output)


def test_what_is_looked_for_is_there():
    assert {"index.md", "extend/pass.md", "extend/operator_rule.md", "extend/scheme.md"} <= set(with_examples())


def test_an_example_may_have_a_setup_and_an_output():
    first = "<!-- setup\nx = 1\n-->\n\n```python\nprint(x)\n```\n\n```\n1\n```\n\n"
    text = first + "```python\nx += 1\n```\nand\n```\n2\n```\n"
    first, second = examples(text)
    assert (first.code, first.output) == ("x = 1\nprint(x)\n", "1\n")
    assert (second.code, second.output) == ("x += 1\n", None)


# -- the README ------------------------------------------------------------------------------------------------------


def masked(output: str) -> list[str]:
    """The lines of a plan without what clocks and roundings say: durations, ratios of them, numbers of steps."""
    text = re.sub(r"\d[\d.]* (µs|ms|s)\b", "TIME", output)
    text = re.sub(r"\d[\d.]* times", "N times", text)
    text = re.sub(r"\d+ steps?\b", "N steps", text)
    text = re.sub(r"(?<=^loss )[\d.]+|(?<=\nloss )[\d.]+", "X", text)
    return [" ".join(line.split()) for line in text.strip().strip("`").strip().splitlines()]


def loss_of(output: str) -> float:
    return float(re.search(r"^loss ([\d.]+)$", output, re.MULTILINE)[1])


def test_the_readme_shows_what_its_example_prints():
    text = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- output: begin -->\n(.*?)<!-- output: end -->", text, re.DOTALL)[1]
    printed = example_output(text)
    assert masked(printed) == masked(shown)
    assert loss_of(printed) == pytest.approx(loss_of(shown), abs=2e-3)


def test_the_readme_begins_with_its_example_in_about_15_lines():
    (first, *_) = examples((ROOT / "README.md").read_text())
    assert 10 <= len([line for line in first.code.splitlines() if line.strip()]) <= 16


def test_the_tables_of_the_readme_are_those_of_the_results():
    assert main(["--check"]) == 0, "python -m benchmarks.readme_table fills them"
