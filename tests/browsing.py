"""What tests of the web page need: gradio, playwright and a browser; without them they are skipped, in CI they fail."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update"]  # fmt: skip


def missing(what: str) -> None:
    """Skip, or fail where CI=true says that everything has to be there."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(what)


def need_gradio() -> None:
    if importlib.util.find_spec("gradio") is None:
        missing("the web page needs gradio: pip install -e '.[demo]'")


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A headless browser of the system with a fresh user data directory."""
    if importlib.util.find_spec("playwright") is None:
        missing("the browser test needs playwright: pip install -e '.[dev]'")
    program = shutil.which("chromium")
    if program is None:
        missing("the browser test needs chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        opened = running.chromium.launch_persistent_context(str(profile), executable_path=program, args=ARGUMENTS,
                                                            viewport={"width": 1280, "height": 1000})  # fmt: skip
        yield opened
        opened.close()
