"""The documents build as a site without a warning, and the site needs nothing from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data")}
SHAPES = ("h1", "h2", "h3", "li", "ol", "pre", "table", "tr", "img", "strong", "em", "blockquote")


class Resources(HTMLParser):
    """What a page loads by itself; links that a reader follows are not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        rel = dict(attrs).get("rel")
        if rel not in ("canonical", "prev", "next"):
            self.found += [value for name, value in attrs if (tag, name) in LOADED and value]


def resources(text: str) -> list[str]:
    parser = Resources()
    parser.feed(text)
    styles = "".join(re.findall(r"<style.*?</style>", text, re.S))
    return parser.found + in_css(styles)


def in_css(text: str) -> list[str]:
    """Files that a style sheet loads; what it holds itself (data:) is none."""
    found = re.findall(r"url\(\s*[\"']?([^\"')]+)", text) + re.findall(r"@import\s+[\"']([^\"']+)", text)
    return [x for x in found if not x.startswith(("data:", "#"))]


def wrong(loaded: list[str], at: Path) -> list[str]:
    """Those that lie outside of the site, or nowhere."""
    bad = []
    for name in loaded:
        parts = urlsplit(name)
        if parts.scheme or parts.netloc or not (at / unquote(parts.path)).is_file():
            bad.append(name)
    return bad


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: an unknown link, heading or page that is in no menu is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_and_style_sheet_loads_only_what_the_site_holds(site: Path) -> None:
    pages, sheets = sorted(site.rglob("*.html")), sorted(site.rglob("*.css"))
    assert len(pages) > 35
    assert sheets
    # 404.html is the one page with absolute paths: a server shows it under any address
    loaded = {p: resources(p.read_text(encoding="utf-8")) for p in pages if p.name != "404.html"}
    assert all(any(".css" in x for x in found) for found in loaded.values())
    loaded |= {p: in_css(p.read_text(encoding="utf-8")) for p in sheets}
    assert {str(p): w for p, found in loaded.items() if (w := wrong(found, p.parent))} == {}


def test_what_comes_from_outside_is_found(tmp_path: Path) -> None:
    (tmp_path / "here.js").touch()
    page = (
        '<link rel="stylesheet" href="https://fonts.example/css"><script src="//cdn.example/x.js"></script>'
        '<script src="here.js?v=1"></script><a href="https://example.org">a link</a><img src="none.png">'
        "<style>@import 'https://fonts.example/b'; a { background: url(data:image/png;base64,AA) }</style>"
    )
    assert wrong(resources(page), tmp_path) == [
        "https://fonts.example/css", "//cdn.example/x.js", "none.png", "https://fonts.example/b",
    ]  # fmt: skip


def test_no_page_makes_the_theme_fetch_something(site: Path) -> None:
    """Its script fetches a library for diagrams, and a repository's figures, where a page has such a thing."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert 'class="mermaid"' not in text
        assert 'data-md-component="source"' not in text


def test_search_is_inside_and_finds_every_page(site: Path) -> None:
    script = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    index = json.loads(script.removeprefix("var __index = "))
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")} - {"404.html"}
    assert {d["location"].partition("#")[0] for d in index["docs"]} == pages
    assert 'iframe-worker.js"' in (site / "index.html").read_text(encoding="utf-8")


def test_the_python_reference_holds_every_public_name(site: Path) -> None:
    text = (site / "reference" / "api.html").read_text(encoding="utf-8")
    public = re.findall(r" as (\w+)$", (ROOT / "src" / "fedveil" / "__init__.pyi").read_text(), re.M)
    assert {"split", "simulate", "sweep", "Run", "Dirichlet"} <= set(public)
    assert [name for name in public if f'id="fedveil.{name}"' not in text] == []
    assert ":class:" not in text
    assert ":func:" not in text


def shape(text: str) -> dict[str, int]:
    return {tag: len(re.findall(rf"<{tag}[ >]", text)) for tag in SHAPES}


def test_a_page_has_the_same_shape_on_a_forge(site: Path) -> None:
    """The site's Markdown and a forge's (CommonMark) differ in lists and code inside lists: no page may show it."""
    forge, compared = MarkdownIt("commonmark").enable("table"), 0
    for source in (ROOT / "docs").rglob("*.md"):
        if source.name == "api.md":  # made of docstrings
            continue
        text = (site / source.relative_to(ROOT / "docs").with_suffix(".html")).read_text(encoding="utf-8")
        article = text[text.index("<article") : text.index("</article>")]
        assert shape(article) == shape(forge.render(source.read_text(encoding="utf-8"))), source.name
        compared += 1
    assert compared > 30
