"""The published schema: the real report meets it, other things do not; the page's form for readers of all kinds."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedveil.common import canonical
from fedveil.common.errors import VerificationError
from fedveil.privacy.report import schema
from fedveil.privacy.report.catalogue import LANGUAGES
from fedveil.privacy.report.render import render_html, rounds

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def document(honest):
    return canonical.loads(honest.report.read_bytes())


def test_the_published_schema_is_the_packages() -> None:
    published = json.loads((ROOT / "docs" / "schema" / f"{schema.NAME}.json").read_text(encoding="utf-8"))
    assert published == schema.schema()
    assert published["properties"].keys() == {"payload", "signer", "signature"}


def test_the_real_report_meets_it_and_every_field_is_described(document) -> None:
    assert schema.errors(document) == []
    described = schema.schema()["$defs"]["payload"]["properties"]
    # This run's members have seen no other ledger, and its noise was nobody's to draw again.
    assert set(described) == {*document["payload"], "other_ledgers", "not_private"}


CHANGES: dict[str, tuple[Any, str]] = {
    "a version": (lambda p: p.update(v=1), "report.payload.v"),
    "a field too many": (lambda p: p.update(praise=1), "'praise' is not known"),
    "a field too few": (lambda p: p.pop("not_covered"), "not_covered is missing"),
    "a text for a number": (lambda p: p["claim"].update(epsilon="2"), "report.payload.claim.epsilon"),
    "true for a number": (lambda p: p["steps"].update(planned=True), "report.payload.steps.planned"),
    "a negative δ": (lambda p: p["claim"].update(delta=-1e-5), "out of bounds"),
    "another status": (lambda p: p.update(status="FINE"), "none of COMPLETED"),
    "a short hash": (lambda p: p["hashes"].update(plan="ab"), "does not match"),
    "a point of three": (lambda p: p["claim"]["curve"][0].append(1), "has 3 entries"),
    "a part of a round": (lambda p: p["rounds"][0].pop("members"), "rounds[0]: members is missing"),
    "a nested one": (lambda p: p["sites"]["alba"].update(left=1.5), "sites.alba"),
    "an audit without numbers": (lambda p: p.update(audit={"v": 1, "one_run": {}}), "audit"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_meet_it_is_named_with_its_place(document, change) -> None:
    spoilt = copy.deepcopy(document)
    apply, place = CHANGES[change]
    apply(spoilt["payload"])
    found = schema.errors(spoilt)
    assert found
    assert any(place in error for error in found), found


def test_another_validator_agrees(document) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema.schema())
    jsonschema.Draft202012Validator.check_schema(schema.schema())
    assert list(validator.iter_errors(document)) == []
    for apply, _ in CHANGES.values():
        spoilt = copy.deepcopy(document)
        apply(spoilt["payload"])
        assert list(validator.iter_errors(spoilt))


def test_the_validator_refuses_a_schema_it_does_not_understand() -> None:
    with pytest.raises(VerificationError, match="patternProperties"):
        schema.errors({}, {"patternProperties": {}})
    assert len(schema.errors([1] * 999, {"items": {"type": "string"}})) == schema.MAX_ERRORS


# -- the page ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_screen_reader_finds_its_way(document, lang) -> None:
    html = render_html(document, lang)
    levels = [int(x) for x in re.findall(r"<h([1-6])>", html)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), "no level is skipped"
    tables = re.findall(r"<table.*?</table>", html, re.S)
    assert len(tables) >= 8
    for table in tables:
        assert "<caption>" in table
        assert len(re.findall("<th[ >]", table)) == table.count('<th scope="'), "every header says what it heads"
    assert html.count("<title>") == 1 + html.count("<svg")
    assert html.count("<desc>") == html.count("<svg")


PAIRS = (
    ("ink", "bg"), ("ink", "card"), ("soft", "bg"), ("soft", "card"), ("good", "goodbg"), ("warn", "warnbg"),
    ("warn", "card"), ("heroink", "hero"), ("herosoft", "hero"),
)  # fmt: skip


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    digits = colour if len(colour) == 6 else "".join(2 * c for c in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_texts_have_contrast_in_light_in_dark_and_on_paper(document) -> None:
    style = render_html(document).split("</style>")[0]
    schemes = re.findall(r":root \{([^}]*)\}", style)
    assert len(schemes) == 3
    assert "prefers-color-scheme: dark" in style
    assert "size:A4" in style
    for scheme in schemes:
        c = dict(re.findall(r"--([a-z]+):#([0-9a-f]{3,6})", scheme))
        for ink, paper in PAIRS:
            assert contrast(c[ink], c[paper]) >= 4.5, (ink, paper)
        for line in ("a", "b", "soft"):
            assert contrast(c[line], c["card"]) >= 3, line


def test_equal_rounds_share_a_line(document) -> None:
    found = rounds(document["payload"])
    assert [(r["first"], r["last"], r["outcome"]) for r in found] == [
        (1, 1, "applied"), (2, 2, "applied"), (3, 3, "aborted"), (4, 4, "applied"),
    ]  # fmt: skip
    p = {"rounds": [{**found[0], "round": n} for n in range(1, 100)]}
    assert [(r["first"], r["last"]) for r in rounds(p)] == [(1, 99)]
