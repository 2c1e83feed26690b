"""The site builds without a warning, nothing on it is loaded from the network, and it works from disk."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from docs.generate import messages, pass_pages
from tests.pages import ROOT
from tests.visualize.browser import Viewer, browser, executable

pytest.importorskip("material", reason="mkdocs-material is not installed: pip install 'graphopt[docs]'")


@pytest.mark.slow
def test_the_site(tmp_path):
    """One test, so that the site is built once, whatever number of processes the tests run in."""
    site = built(tmp_path)
    assert_nothing_is_loaded_from_the_network(site)
    assert_generated_pages_hold_what_they_are_made_from(site)
    assert not list(site.rglob("*.py")), "sources of the generator are on the site"
    if executable() is not None:  # without a browser the tests of pages say what is left out
        assert_a_page_opened_from_disk_finds_a_message(site)


def built(folder: Path) -> Path:
    """The site, built as by ``make docs``; whoever asks for something from the network fails."""
    nobody = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | nobody | {"GRAPHOPT_DOCS_SOURCES": str(folder / "sources"), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr, run.stderr
    return folder / "site"


# -- what pages load -------------------------------------------------------------------------------------------------


class Loads(HTMLParser):
    """What a page loads when it is opened: scripts, styles, pictures, fonts (not what it links to)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.found.append(given.get("href") or "")
        elif tag != "a":
            self.found += [v for k, v in attrs if k in ("src", "srcset", "data", "poster") and v]


def loads(html: str) -> list[str]:
    parser = Loads()
    parser.feed(html)
    return parser.found


def is_foreign(address: str) -> bool:
    return re.match(r"(https?:)?//", address.strip()) is not None


def assert_nothing_is_loaded_from_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        found = loads(page.read_text())
        assert found and not [address for address in found if is_foreign(address)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style


def test_foreign_loads_would_be_seen():
    page = '<script src="https://cdn.example.org/a.js"></script><a href="https://b.org">b</a><img src="c.png">'
    assert [is_foreign(address) for address in loads(page)] == [True, False]


# -- what pages hold -------------------------------------------------------------------------------------------------


def assert_generated_pages_hold_what_they_are_made_from(site: Path) -> None:
    for each in pass_pages.passes():
        html = (site / each.page.replace(".md", ".html")).read_text()
        assert each.name in html, each.name
        assert "&gt;&gt;&gt; &gt;" not in html and "::</p>" not in html, f"{each.name}: markup of docstrings is left"
    troubles = (site / "troubleshooting.html").read_text()
    assert "<!-- messages" not in troubles
    for name in messages.messages():
        assert f"All messages of {name} (" in troubles
    assert '<svg xmlns="http://www.w3.org/2000/svg" class="floors"' in (site / "architecture.html").read_text()


def assert_a_page_opened_from_disk_finds_a_message(site: Path) -> None:
    with browser() as started:
        tab = started.new_page(viewport={"width": 1400, "height": 1000})
        viewer = Viewer(tab)
        tab.goto((site / "passes" / "no_ops.html").as_uri())
        tab.locator(".md-search__input").fill("lost since optimize")
        first = tab.locator(".md-search-result__item h1").first
        first.wait_for(timeout=60_000)
        assert first.inner_text() == "Troubleshooting, by message"
        assert viewer.problems == []
        viewer.picture("documentation_search")


def test_links_to_the_sources_become_pages_or_text():
    from docs.generate import hooks

    def inside(text: str, page: str) -> str:
        return hooks._inside(hooks._UP.search(text), page)

    assert inside("[a](../passes/no_ops.py)", "page.md") == "[a](passes/no_ops.md)"
    assert inside("[a](../../passes/no_ops.py)", "extend/pass.md") == "[a](../passes/no_ops.md)"
    assert inside("[a](../LICENSE)", "page.md") == "a"
    assert inside("[a](../axes.md)", "extend/pass.md") == "[a](../axes.md)"
