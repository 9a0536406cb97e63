"""A real browser for tests: the system's Chromium or Chrome, driven by Playwright; where there is none they skip."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")


@contextmanager
def browser() -> Iterator[Any]:
    """A running browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    found = os.environ.get("RANKOPT_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is on the PATH, and RANKOPT_BROWSER names none")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield started
        finally:
            started.close()


class Opened:
    """A page in a context of its own that reports everything that goes wrong, and whatever it asks the network for."""

    def __init__(self, chromium: Any, path: Path, **options: Any) -> None:
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.dialogs: list[str] = []
        self.context = chromium.new_context(**options)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.on("dialog", lambda d: (self.dialogs.append(d.message), d.dismiss()))
        self.page.goto(path.resolve().as_uri())
        self.page.wait_for_function("document.documentElement.dataset.ready === 'true'", timeout=60_000)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def clean(self, path: Path) -> None:
        """Nothing went wrong, and nothing but the file itself (and data in it) was asked for."""
        assert self.errors == []
        assert self.dialogs == []
        strangers = [u for u in self.asked if not u.startswith(("data:", "blob:")) and u != path.resolve().as_uri()]
        assert strangers == []
