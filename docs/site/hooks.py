"""What mkdocs does beside rendering docs/: pages that lie elsewhere in the repository join the site.

The home page is README.md. A notebook's page is made of its script. Links between pages are written as they lead on a
forge, and are turned into those of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# By path in the repository, the page of the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "examples/persons/README.md": "examples/persons.md",
    **{
        f"examples/notebooks/{p.name}": f"notebooks/{p.stem}.md" for p in (ROOT / "examples" / "notebooks").glob("*.py")
    },
}
_LINK = re.compile(r"(\]\()([^()\s#]+)(#[^()\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of :data:`ELSEWHERE`."""
    for source, page in ELSEWHERE.items():
        path = ROOT / source
        text = notebook(path) if path.suffix == ".py" else path.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page into those of the site; a page that stands alone needs no menu beside it."""
    if page.file.src_uri in ("index.md", "zh.md"):
        page.meta["hide"] = ["navigation"]
    return relinked(markdown, page.file.src_uri)


def relinked(markdown: str, page: str) -> str:
    """``markdown`` of the site's ``page``, with each relative link of the repository leading to the site's file."""
    here = {site: source for source, site in ELSEWHERE.items()}.get(page, f"docs/{page}")

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), found[2]))
        there = ELSEWHERE.get(target, target.removeprefix("docs/"))
        if "://" in found[2] or there == target:  # not a page of the site: strict mode says so
            return found[0]
        return found[1] + posixpath.relpath(there, posixpath.dirname(page) or ".") + (found[3] or "")

    return _LINK.sub(link, markdown)


def notebook(path: Path) -> str:
    """A script in percent format as a page: text cells as they are, code cells as blocks."""
    cells = [
        cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```"
        for cell in jupytext.read(path).cells
    ]
    name = f"examples/notebooks/{path.name}"
    note = (
        f"This page is the script `{name}`. Run it as it is (`python {name}`), or open it as a notebook: "
        f"`jupytext --to notebook {name}` (extra `docs`)."
    )
    return "\n\n".join([cells[0], note, *cells[1:]]) + "\n"
