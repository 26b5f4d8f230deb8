"""The reference pages say what the code says, and the README's figures are those of the pages that it names."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from fedveil.common import errors, settings
from fedveil.deploy.lab.simulate import Config

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
FILES = {"federation.toml": settings.Federation, "site.toml": settings.SiteSettings}


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "site" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["pages"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["settings.md", "commands.md", "errors.md"])
def test_a_page_is_current(pages: ModuleType, name: str) -> None:
    assert (REFERENCE / name).read_text(encoding="utf-8") == pages.PAGES[name](), "give 'make docs' and commit the page"


class _Section(BaseModel):
    word: Literal["a", "b"] = "a"
    words: tuple[Literal["a", "b"], ...] = Field(default=("a",), max_length=3)
    digits: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = ()
    big: int | None = Field(default=None, ge=1, le=1 << 48)
    share: float = Field(gt=0, lt=1)
    tiny: float = Field(default=1e-5, ge=1e-13)
    where: Path = Path("x")
    on: bool = False


def test_types_bounds_and_defaults_in_words(pages: ModuleType) -> None:
    found = _Section.model_json_schema()["properties"]
    said = {k: (pages.kind(s), pages.bounds(s).replace("\u00a0", " ")) for k, s in found.items()}
    assert said == {
        "word": ("`a`, `b`", ""),
        "words": ("list of `a`, `b`", "at most 3"),
        "digits": ("list of 64 hexadecimal digits", ""),
        "big": ("whole number", "≥ 1, ≤ 2^48"),
        "share": ("number", "> 0, < 1"),
        "tiny": ("number", "≥ 1e-13"),
        "where": ("path", ""),
        "on": ("true or false", ""),
    }
    assert pages.default(found["big"] | {"required": False}) == "none"
    assert pages.default(found["share"] | {"required": True}) == "**required**"
    assert pages.default(found["words"] | {"required": False}) == '`["a"]`'


def examples() -> dict[str, str]:
    blocks = re.findall(r"^```toml\n(.*?)^```", (REFERENCE / "settings.md").read_text(encoding="utf-8"), re.M | re.S)
    return dict(zip(FILES, blocks, strict=True))


@pytest.mark.parametrize("file", FILES)
def test_an_example_is_read_as_it_stands_and_names_every_setting(tmp_path: Path, file: str) -> None:
    text, path = examples()[file], tmp_path / file
    path.write_text(text, encoding="utf-8")
    settings.load(path, FILES[file])
    named: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            named[line.strip("[]")] = set()
        elif line:
            named[list(named)[-1]].add(line.removeprefix("# ").partition(" =")[0])
    wanted = {name: set(f.annotation.model_fields) for name, f in FILES[file].model_fields.items()}  # type: ignore[union-attr]
    assert named == wanted


@pytest.mark.parametrize("file", FILES)
def test_what_is_off_in_an_example_can_be_switched_on(tmp_path: Path, file: str) -> None:
    lines = examples()[file].splitlines()
    off = [i for i, line in enumerate(lines) if line.startswith("# ")]
    assert off
    for i in off:
        on = [line for j, line in enumerate(lines) if j != i]
        on.insert(i, lines[i].removeprefix("# "))
        if "noise_multiplier" in lines[i]:  # exactly one of the two
            on = [line for line in on if not line.startswith("epsilon")]
        (tmp_path / file).write_text("\n".join(on), encoding="utf-8")
        settings.load(tmp_path / file, FILES[file])


def test_every_setting_has_a_description() -> None:
    for model in FILES.values():
        for section in model.model_fields.values():
            fields = section.annotation.model_fields  # type: ignore[union-attr]
            assert [k for k, f in fields.items() if not f.description] == []


def test_every_setting_of_a_simulation_has_a_description() -> None:
    described = re.findall(r"^        (\w+): ", Config.__doc__ or "", re.M)
    assert described == [f.name for f in fields(Config)]


def test_every_error_has_a_row() -> None:
    text = (REFERENCE / "errors.md").read_text(encoding="utf-8")
    own = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.FedveilError)]
    assert len(own) > 20
    for cls in own:
        assert f"| {cls.exit_code} | `{cls.__name__}` |" in text


def test_every_command_has_a_heading() -> None:
    found = re.findall(r"^##+ fedveil (.*)$", (REFERENCE / "commands.md").read_text(encoding="utf-8"), re.M)
    assert {"simulate", "data contract sign", "client run", "audit verify", "provision new", "ledger show"} <= set(
        found
    )
    assert len(found) == len(set(found)) > 50


def foreign(readme: str) -> list[str]:
    """Figures of the README's table that are not on the page which their row names."""
    rows = re.findall(r"^\|.*\]\((docs/bench-[\w-]+\.md)[^)]*\)[^|]*\| ([^|]*) \| `make bench-", readme, re.M)
    assert len(rows) >= 5
    out = []
    for page, cell in rows:
        text = (ROOT / page).read_text(encoding="utf-8")
        figures = re.findall(r"\d+(?:\.\d+)?(?: ± [\d.]+\d)?(?:x|/\d+)?", re.sub(r"at \d+M\b.*?(?=,|$)", "", cell))
        out += [f"{page}: {f}" for f in figures if not re.search(rf"(?<![\d.]){re.escape(f)}(?!\d)", text)]
    return out


def test_the_readme_s_figures_are_those_of_the_pages() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert foreign(readme) == []
    assert foreign(readme.replace("0.905 ± 0.004", "0.955 ± 0.004").replace("29.5x", "39.5x")) == [
        "docs/bench-accuracy.md: 0.955 ± 0.004",
        "docs/bench-secagg.md: 39.5x",
    ]
