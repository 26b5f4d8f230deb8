"""Every link and every path in README.md, CHANGELOG.md and docs/ leads to something that is there.

A link may name a heading of a page. A path in backticks counts if it ends like one of our files and has a folder in
front; a page that speaks of Flower's own files names them from ``flwr``'s root, which is tried too.
"""

import re
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^()\s]+)\)")
NAMED = re.compile(r"`((?:[\w.@-]+/)+[\w.@-]+\.(?:py|md|toml|json|yaml|sh|conf|service))(?:::\w+)?`")
ROOMS = ("common", "privacy", "client", "server", "deploy", "tests", "docs", "src")
FENCED = re.compile(r"^```.*?^```", re.M | re.S)
FLOWER = Path(str((util.find_spec("flwr") or pytest.fail("flwr is not installed")).origin)).parent


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub turns them into fragments."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path, text: str) -> list[str]:
    """Relative links of ``text``, as it stands in ``page``, whose file or heading does not exist."""
    dead = []
    for link in LINK.findall(FENCED.sub("", text)):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (heading and heading not in anchors(target)):
            dead.append(link)
    return dead


def absent_files(text: str) -> list[str]:
    """Paths in backticks that begin in one of our folders, or end in .py, and are nowhere."""
    named = (n for n in NAMED.findall(text) if n.endswith(".py") or n.split("/")[0] in ROOMS)
    return [n for n in named if not any((base / n).is_file() for base in (ROOT, FLOWER))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_is_named_exists(page: Path) -> None:
    assert absent_files(page.read_text(encoding="utf-8")) == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {ROOT / link for link in LINK.findall(PAGES[0].read_text(encoding="utf-8"))}
    assert [p.name for p in PAGES[1:] if p not in linked] == []


def test_a_dead_link_a_wrong_heading_and_an_absent_file_are_found() -> None:
    page = ROOT / "docs" / "guide.md"
    text = "[a](none.md) [b](guide.md#guide) [c](guide.md#no-such-heading) [d](#guide) [e](../docs/none.png) [f](https://x.y/z)"
    assert dead_links(page, text) == ["none.md", "guide.md#no-such-heading", "../docs/none.png"]
    assert absent_files("`common/errors.py` `common/none.py` `tests/none.json` `supercore/object_ref.py`") == [
        "common/none.py",
        "tests/none.json",
    ]
