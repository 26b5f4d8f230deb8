"""Opens every page of the built site in a headless Chromium, as files, and searches. ``make docs-look`` runs it.

It fails on what the browser complains about, on a page without text, and on a search that finds nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fedveil.privacy.report import pdf

SITE = Path(__file__).parents[2] / "build" / "site"
COMPLAINT = re.compile(r":CONSOLE:?\d*[\])]? (.*)")


def opened(browser: str, page: str) -> tuple[str, list[str]]:
    """What a page is after its scripts have run, and what the browser complained about."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
             f"--user-data-dir={profile}", "--virtual-time-budget=5000", "--dump-dom", f"{SITE.as_uri()}/{page}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    return done.stdout, COMPLAINT.findall(done.stderr)


def main() -> int:
    browser = pdf.browser()
    if browser is None:
        sys.exit("no Chromium is installed: apt-get install chromium")
    wrong = 0
    pages = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html") if p.name != "404.html")
    for page in [*pages, "index.html?q=ledger"]:
        text, complaints = opened(browser, page)
        if "<h1" not in text:
            complaints.append("the page is empty")
        if "?q=" in page and "md-search-result__item" not in text:
            complaints.append("the search finds nothing")
        wrong += bool(complaints)
        print(page, *(complaints or ["ok"]), sep=" | ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
