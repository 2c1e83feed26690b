"""The documentation agrees with the sources: links, errors and their messages, passes, the picture of the floors."""

import re
from urllib.parse import urlparse

import pytest
import yaml

import graphopt
from docs.generate import api_pages, floors, messages, pass_pages
from docs.generate.docstrings import to_markdown
from docs.generate.sources import home
from tests.pages import DOCS, ROOT, TOP, anchors, examples, links, pages, prose

TROUBLES = (DOCS / "troubleshooting.md").read_text()
GENERATED = {"passes/index.md", "changelog.md", "contributing.md"}


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*TOP, *pages()], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for link in links(path.read_text()):
        if link.startswith("http"):
            assert_good_address(link)
            continue
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        if DOCS in there.parents and is_generated(there.relative_to(DOCS).as_posix()):
            continue  # mkdocs checks these when it builds the site
        assert there.exists(), f"{link}: there is no {there}"
        assert not anchor or anchor in anchors(there.read_text()), f"{link}: no such heading"


def assert_good_address(link):
    """An address by its form: nothing is asked of the network."""
    parts = urlparse(link)
    assert parts.scheme in ("http", "https") and "." in parts.netloc, link
    assert not link.endswith((".", ",", ";")), link


def is_generated(page):
    """Whether the page is made when the site is built."""
    made = {each.page for each in pass_pages.passes()} | {each.page for each in api_pages.PAGES}
    return page in made | GENERATED


def test_links_are_found():
    text = (
        "[a](b.md#c), <https://x.org/y>, ![picture](z.png)\n`[no](code)`\n\n```\n[no](block)\n```\n[two\nlines](d.md)\n"
    )
    assert links(text) == ["b.md#c", "https://x.org/y", "d.md"]
    assert anchors("# One `two`, three\n## Write a pass\n") == {"one-two-three", "write-a-pass"}


def test_no_page_has_two_titles():
    for path in pages():
        titles = re.findall(r"^# ", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
        assert len(titles) == 1, path


# -- errors ----------------------------------------------------------------------------------------------------------


def entries(name):
    """The rows under a class on the page of troubles: ``(message, cause and cure)``."""
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", TROUBLES, re.DOTALL | re.MULTILINE)
    assert section is not None, f"docs/troubleshooting.md has no entry of {name}"
    return re.findall(r"^\| `(.+?)` \| (.+) \|$", section[1], re.MULTILINE), section[1]


PUBLIC = [name for name in messages.error_classes() if name in graphopt.__all__]


def test_all_error_classes_are_public():
    assert list(messages.error_classes()) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_each_error_has_an_entry(name):
    rows, section = entries(name)
    assert rows, f"{name}: no message is explained"
    assert all(len(cure.split()) >= 3 for _, cure in rows)
    assert f"<!-- messages: {name} -->" in section


@pytest.mark.parametrize("name", PUBLIC)
def test_messages_on_the_page_are_those_of_the_sources(name):
    known = {" ".join(text.split()) for text in messages.messages().get(name, {})}
    others = {" ".join(text.split()) for text in messages.all_texts()}
    for message, _ in entries(name)[0]:
        assert told(message, known) or told(message, others), f"{name}: no code says {message!r}"


def told(message, templates):
    """Whether a template is this message: ``…`` on the page stands for anything but nothing, at the ends for more."""
    pattern = re.compile(".+".join(map(re.escape, message.split(messages.HOLE))))
    core = re.compile(".+".join(map(re.escape, message.removesuffix(": …").removesuffix(" …").split(messages.HOLE))))
    return any(pattern.fullmatch(text) or core.fullmatch(text) for text in templates)


def test_messages_are_read_off_the_sources():
    found = messages.messages()
    assert "clip: expected a bound of at least 0, got …" in found["GraphoptError"]
    assert "the step runs in eager mode: …" in found["GraphoptWarning"]
    assert "the outputs of the signature differ from those before the pass" in found["PassError"]
    assert not told("clip: expected a bound of at least 1, got …", found["GraphoptError"])
    assert "All messages of LossError" in messages.listed("LossError")


# -- what is generated -----------------------------------------------------------------------------------------------


def test_every_public_pass_has_a_page():
    from graphopt import passes

    public = {
        n
        for n in passes.__all__
        if isinstance(getattr(passes, n), type) and issubclass(getattr(passes, n), passes.Pass)
    }
    found = pass_pages.passes()
    assert {each.name for each in found} == public - {"Pass", "Pipeline"}
    for each in found:
        there = getattr(passes, each.name)
        assert each.page == f"passes/{there.name}.md" and each.module == there.__module__
        assert each.tier.startswith("exact") == (there.tier is passes.Tier.EXACT)
        assert f"::: {each.module}.{each.name}" in pass_pages.page(each)
        assert f"]({there.name}.md)" in pass_pages.index(found)


def test_passes_that_optimize_runs_come_first():
    from graphopt.step import PASSES

    running = [each.name for each in pass_pages.passes() if each.by_default]
    assert running == ["GradientLiveness", *(type(one).__name__ for one in PASSES)]


def test_the_example_of_the_page_of_passes_runs(capsys):
    (example,) = examples(pass_pages.index(pass_pages.passes()))
    exec(compile(example.code, "passes/index.md", "exec"), {})
    before, after = map(int, re.match(r"(\d+) -> (\d+) operators", capsys.readouterr().out).groups())
    assert after < before


def test_the_reference_names_what_is_public():
    import importlib

    apart = pass_pages.passes()
    for each in api_pages.PAGES:
        module = importlib.import_module(each.module)
        for where, name in api_pages.names(each, apart):
            there = getattr(module, name)
            assert getattr(importlib.import_module(where), name) is there
            if isinstance(there, type):
                assert there.__module__ == where == home(each.module, name)
    listed = {name for each in api_pages.PAGES[:2] for _, name in api_pages.names(each, apart)}
    assert listed == {name for name in graphopt.__all__ if not name.startswith("_")}


def test_docstrings_become_markdown():
    text = "Lead::\n\n    %a = f(%x)\n      %b\n\nExample:\n    >>> 1\n    1\n\nSee :class:`graphopt.Plan`.\n"
    assert to_markdown(text) == (
        "Lead:\n\n```text\n%a = f(%x)\n  %b\n```\n\nExample:\n    ```pycon\n    >>> 1\n    1\n    ```\n\n"
        "See `graphopt.Plan`.\n"
    )


def test_the_picture_of_the_floors_is_that_of_the_contract():
    assert floors.main(["--check"]) == 0, "python -m docs.generate.floors draws it"


def test_the_picture_shows_floors_and_imports():
    floor_of = {name: k for k, floor in enumerate(floors.floors()) for name in floor}
    assert floor_of["schemes"] < floor_of["passes"] < floor_of["cost_model"] < floor_of["graph"] < floor_of["errors"]
    used = floors.imports()
    assert {"errors", "graph"} <= used["passes"] and {"cost_model", "passes"} <= used["schemes"]
    drawn = [(a, b) for a in floor_of for b in used.get(a, ()) if b in floor_of]
    lazy = {("graph", "visualize"), ("plan", "visualize")}  # those that the contract names
    assert {(a, b) for a, b in drawn if floor_of[b] < floor_of[a]} <= lazy
    assert all(f"<title>{a} imports {b}</title>" in floors.svg() for a, b in drawn[:20])


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["version"] == graphopt.__version__ and cited["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text().split()[:4] == ["Apache", "License", "Version", "2.0,"]
    titles = " ".join((DOCS / "references.md").read_text().split())
    for source in cited["references"]:
        assert source["title"] in titles and source["authors"], source["title"]


def test_texts_on_pages_are_no_templates():
    for path in pages():
        assert "TODO" not in prose(path.read_text()), path
