"""A real browser for the tests of pages: Debian's Chromium, driven by Playwright. Without one they are skipped."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCREENSHOTS = Path(
    os.environ.get("GRAPHOPT_SCREENSHOTS", Path(__file__).resolve().parents[2] / "build" / "screenshots")
)
"""Where the tests leave pictures of the pages; git ignores it."""

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def executable() -> str | None:
    """Path of the browser: that of ``GRAPHOPT_BROWSER``, or one on the path."""
    return os.environ.get("GRAPHOPT_BROWSER") or next(filter(None, map(shutil.which, _NAMES)), None)


NEEDS_BROWSER = pytest.mark.skipif(
    executable() is None, reason="needs a browser: install chromium, or name one in GRAPHOPT_BROWSER"
)


class Viewer:
    """One tab. ``open`` a page; ``problems`` then lists its complaints and what it asked of the network."""

    def __init__(self, tab):
        self.tab = tab
        self.problems: list[str] = []
        tab.on("console", lambda message: self.problems.append(message.text) if message.type != "log" else None)
        tab.on("pageerror", lambda error: self.problems.append(str(error)))
        tab.on("request", self._asked)

    def _asked(self, request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:", "about:")):
            self.problems.append(f"request {request.url}")

    def open(self, path: Path) -> "Viewer":
        self.tab.goto(path.as_uri())
        self.tab.wait_for_function("document.body.dataset.ready === 'true'", timeout=30_000)
        return self

    def run(self, script: str):
        """The value of a script, in which ``app`` is the page's."""
        return self.tab.evaluate(f"() => {{ const app = window.graphopt.app; {script} }}")

    def picture(self, name: str) -> Path:
        """Leave a picture."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.tab.screenshot(path=SCREENSHOTS / f"{name}.png")
        return SCREENSHOTS / f"{name}.png"


@contextmanager
def browser() -> Iterator:
    """The browser, with an empty profile of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable(), args=list(_FLAGS), headless=True)
        try:
            yield started
        finally:
            started.close()
