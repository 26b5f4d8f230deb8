"""One catalogue, two languages: nothing is missing in either, nothing is left in English, nothing is unused."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib.resources import files
from string import Formatter

import pytest

from fedveil.common import canonical
from fedveil.common.errors import UsageError
from fedveil.privacy.report.cards import cards
from fedveil.privacy.report.catalogue import LANGUAGES, Speaker, messages
from fedveil.privacy.report.render import render_html
from fedveil.privacy.report.verify import verify_report
from fedveil.privacy.report.wording import words

AUDIT = {
    "v": 1,
    "conformance": {"measured_noise_multiplier": 7.1, "interval": [6.9, 7.3], "claimed_noise_multiplier": 7.0,
                    "confidence": 0.99, "passed": True, "plan_hash": "0" * 64},
    "one_run": {"epsilon_lower_bound": 0.7, "claimed_epsilon": 2.0, "confidence": 0.95},
}  # fmt: skip
# Names and terms that stay as they are in a Chinese text.
TERMS = {
    "PLD", "RDP", "SHA", "KEY", "JSON", "Ring", "LWE", "dp", "accounting", "Balle", "Wang", "Feldman", "Zrnic", "nyi",
    "Kairouz", "Liu", "Steinke", "WEAK", "fedveil", "audit", "verify", "report", "json", "consortium", "key", "UTC",
    "kB", "MB", "GB", "L2", "AUC",
}  # fmt: skip


@pytest.fixture(scope="module")
def document(honest):
    return canonical.loads(honest.report.read_bytes())


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


def test_every_message_is_in_every_language_with_the_same_placeholders() -> None:
    assert len(messages()) > 200
    for key, texts in messages().items():
        assert set(texts) == set(LANGUAGES), key
        assert all(texts.values()), key
        assert fields(texts["en"]) == fields(texts["zh"]), key
        assert all(re.fullmatch("[a-z_]+", name) for name in fields(texts["en"])), key


def test_every_chinese_message_is_chinese() -> None:
    for key, texts in messages().items():
        plain = re.sub(r"\{[a-z_]+\}", "", texts["zh"])
        left = set(re.findall(r"[A-Za-z]{2,}", plain)) - TERMS
        assert not left, (key, left)


def test_no_message_is_unused() -> None:
    """A key stands in a template or a module, or belongs to a section whose keys are chosen by a value."""
    room = files("fedveil.privacy.report")
    source = "\n".join(x.read_text("utf-8") for x in room.iterdir() if x.name.endswith((".py", ".j2")))
    chosen = {"status", "outcome", "mode", "metric", "adjacency", "unit", "units", "result", "protects", "claim",
              "mechanism", "sampling", "deviation", "accountant", "public", "against", "covered", "field",
              "checked", "several", "counted", "together", "groups", "precedent"}  # fmt: skip
    for key in messages():
        section, name = key.split(".", 1)
        known = section in chosen or f'"{key}"' in source or f"'{key}'" in source or f'col("{name}")' in source
        known |= re.match(r"card\.(what|model|stats)", key) is not None or f'"{name}"' in source
        assert known, key


def test_every_check_has_a_name_in_every_language(honest, make) -> None:
    found = verify_report(honest.report, auditor="0" * 64)
    english = [c.named(Speaker("en")) for c in found.checks]
    assert english == [c.name for c in found.checks]
    chinese = [c.named(Speaker("zh")) for c in found.checks]
    assert all(re.search("[\u4e00-\u9fffε]", name) for name in chinese)
    assert len(set(chinese)) == len(chinese)
    known = {key.removeprefix("checked.") for key in messages() if key.startswith("checked.")}
    slugs = {c.name.replace(" ", "_").replace("-", "_") for c in found.checks if not c.name.startswith("ledger of ")}
    assert known == {*slugs, "statistics", "ledger_of"}


def test_an_unknown_language_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no catalogue"):
        Speaker("xx")


def test_the_signed_sentences_are_the_catalogues(document) -> None:
    p = document["payload"]
    w = words(p, Speaker("en"))
    assert w["claim"] == p["claim"]["sentence"]
    assert w["attack"] == p["claim"]["attack_sentence"]
    assert (w["covered"], w["not_covered"], w["deviations"]) == (p["covered"], p["not_covered"], p["deviations"])
    assert w["against"] == p["trust"]["against"]


class Prose(HTMLParser):
    """The texts of a page outside of elements that declare themselves English, or are code or styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.lang = ""
        self.skip: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        found = dict(attrs)
        if tag == "html":
            self.lang = found["lang"] or ""
        if self.skip or found.get("lang") == "en" or tag in ("style", "code") or found.get("class") == "mono":
            if tag not in ("br", "meta", "line", "rect", "circle", "path"):
                self.skip.append(tag)
        self.texts += [v for k, v in attrs if k in ("aria-label", "title") and v and not self.skip]

    def handle_endtag(self, tag) -> None:
        if self.skip:
            assert self.skip.pop() == tag

    def handle_data(self, data) -> None:
        if not self.skip and data.strip():
            self.texts.append(data.strip())


def test_no_english_sentence_is_left_in_the_chinese_page(honest, document) -> None:
    document = {**document, "payload": {**document["payload"], "audit": AUDIT}}
    page = Prose(render_html(document, "zh", verify_report(honest.report)))
    assert page.lang == "zh-Hans"
    assert sum(len(re.findall("[\u4e00-\u9fff]", t)) for t in page.texts) > 1500
    for text in page.texts:
        shown = text.replace(document["payload"]["consortium"], "")
        for site in document["payload"]["sites"]:
            shown = shown.replace(site, "")
        left = [w for w in re.findall(r"[A-Za-z]{2,}", shown) if w not in TERMS]
        assert len(left) < 3 or "dp-accounting" in shown, text
    english = render_html(document, "en")
    assert '<html lang="en">' in english
    assert not re.search("[\u4e00-\u9fff]", english)


def test_an_audits_results_are_said_in_both_languages(document) -> None:
    document = {**document, "payload": {**document["payload"], "audit": AUDIT}}
    english, chinese = (render_html(document, lang) for lang in LANGUAGES)
    assert "Measured noise multiplier 7.1 [6.9, 7.3] against claimed 7" in english
    assert "No evidence above ε ≥ 0.7" in english
    assert "7.1 [6.9, 7.3]" in chinese
    assert "none attached" not in english


def test_the_cards_are_said_in_both_languages_and_hold_no_foreign_markup(document) -> None:
    p = {**document["payload"], "consortium": "<b>[x](y)|*"}
    for lang in LANGUAGES:
        found = cards(p, lang)
        assert set(found) == {"model-card.md", "data-card.md"}
        for text in found.values():
            assert "\\<b\\>\\[x\\](y)\\|\\*" in text
            assert "<b>" not in text
    english, chinese = cards(document["payload"], "en"), cards(document["payload"], "zh")
    assert document["payload"]["claim"]["sentence"] in english["model-card.md"]
    assert "k-anonymity (5): met" in english["data-card.md"]
    assert "准则" in chinese["data-card.md"] or "满足" in chinese["data-card.md"]
    for name in english:
        assert english[name].count("\n## ") == chinese[name].count("\n## ")
