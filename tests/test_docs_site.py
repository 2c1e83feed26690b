"""The site builds without a warning, and nothing on it is loaded from the network."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from docs.generate import messages, pass_pages
from tests.pages import ROOT
from tests.visualize.browser import NEEDS_BROWSER, Viewer, browser

pytest.importorskip("material", reason="mkdocs-material is not installed: pip install 'graphopt[docs]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as by ``make docs``."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(command, cwd=ROOT, env=offline(), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr, run.stderr
    return folder


def offline() -> dict[str, str]:
    """The environment, with a proxy that nobody answers at: who asks for anything fails."""
    nobody = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return os.environ | nobody | {"NO_MKDOCS_2_WARNING": "1"}


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


def test_nothing_is_loaded_from_the_network(site):
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


def test_generated_pages_hold_what_they_are_made_from(site):
    for each in pass_pages.passes():
        html = (site / each.page.replace(".md", ".html")).read_text()
        assert each.name in html, each.name
        assert "&gt;&gt;&gt; &gt;" not in html and "::</p>" not in html, each.name
    troubles = (site / "troubleshooting.html").read_text()
    assert "<!-- messages" not in troubles
    for name in messages.messages():
        assert f"All messages of {name} (" in troubles
    assert '<svg xmlns="http://www.w3.org/2000/svg" class="floors"' in (site / "architecture.html").read_text()


def test_the_search_finds_messages(site):
    index = (site / "search" / "search_index.json").read_text()
    assert "has lost" in index and "gradient_liveness" in index


@NEEDS_BROWSER
def test_a_page_opened_from_disk_finds_a_message(site):
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

    link = lambda text: hooks._UP.search(text)
    assert hooks._inside(link("[a](../passes/no_ops.py)"), "page.md") == "[a](passes/no_ops.md)"
    assert hooks._inside(link("[a](../../passes/no_ops.py)"), "extend/pass.md") == "[a](../passes/no_ops.md)"
    assert hooks._inside(link("[a](../LICENSE)"), "page.md") == "a"
    assert hooks._inside(link("[a](../axes.md)"), "extend/pass.md") == "[a](../axes.md)"


def test_sources_of_the_generator_are_not_on_the_site(site):
    assert not list(site.rglob("*.py"))
