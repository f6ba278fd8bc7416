"""A real browser for pages: Debian's Chromium, driven by Playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (.ci/install)")
# As root in a container, and without the requests that Chromium makes of its own accord.
_ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


class Opened:
    """A page and what it did: `problems` of its console, `requests` beside itself."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.problems: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        page.on("request", lambda request: self._note(request.url))

    def _note(self, url: str) -> None:
        if not url.startswith(("data:", "blob:")):
            self.requests.append(url)

    def texts(self, selector: str) -> list[str]:
        """What the elements show."""
        found: list[str] = self.page.locator(selector).all_text_contents()
        return found


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        yield running
        running.close()


@contextmanager
def opened(running: Any, path: Path, **settings: Any) -> Iterator[Opened]:
    """A file, opened from the disk, in a window of its own."""
    context = running.new_context(**settings)
    found = Opened(context.new_page())
    found.page.set_default_timeout(20_000)
    found.page.goto(path.as_uri())
    yield found
    context.close()
