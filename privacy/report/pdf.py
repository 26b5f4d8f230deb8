"""A report's page as PDF, by a headless Chromium that is installed already; nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from fedveil.common.errors import FedveilError, UsageError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT = 120
# The page loads nothing; these keep the browser itself from talking to anybody.
_QUIET = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--no-pdf-header-footer",
)  # fmt: skip


def browser() -> str | None:
    """The path of the first installed browser that can print; None if there is none."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def require_writable(out: Path) -> None:
    """Raise :class:`UsageError` unless a file can be written at ``out``; a browser would not say."""
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK) or out.is_dir():
        raise UsageError(f"{out} cannot be written", hint="--out FILE, in a folder that exists")


def print_page(page: Path, out: Path) -> Path:
    """Print ``page`` (HTML) to ``out`` (PDF, A4); returns ``out``.

    Raises:
        UsageError: no browser is installed, or ``out`` cannot be written.
        FedveilError: the browser wrote nothing, or not within two minutes.
    """
    require_writable(out)
    program = browser()
    if program is None:
        raise UsageError(
            "no Chromium was found", hint="install chromium (and fonts-noto-cjk for Chinese), or print the page by hand"
        )
    # As root, Chromium cannot build its sandbox; the page has no script and loads nothing.
    root = ("--no-sandbox",) if os.geteuid() == 0 else ()
    with tempfile.TemporaryDirectory() as profile:
        command = [
            program,
            *_QUIET,
            *root,
            f"--user-data-dir={profile}",
            f"--print-to-pdf={out}",
            page.resolve().as_uri(),
        ]
        try:
            done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)  # noqa: S603
        except subprocess.TimeoutExpired as e:
            raise FedveilError(f"{program} did not print {page.name} within {TIMEOUT} s") from e
    if done.returncode or not out.is_file() or not out.read_bytes().startswith(b"%PDF-"):
        raise FedveilError(
            f"{program} could not print {page.name} (exit code {done.returncode})",
            hint="open the page in a browser and print it by hand; a browser in a sandbox may not reach these folders",
        )
    return out
