"""A report that failed its checks is shown as one: nobody reads a false figure without seeing that it is false."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from fedveil.common import canonical, identity
from fedveil.common.errors import VerificationError
from fedveil.deploy.cli.audit import app
from fedveil.privacy.report import pdf
from fedveil.privacy.report.build import DOMAIN
from fedveil.privacy.report.render import render_report


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def false(spoilt):
    """The server's signature under a smaller ε."""
    payload = canonical.loads(spoilt.report.read_bytes())["payload"]
    payload["claim"] |= {"epsilon": 0.5, "fallback_epsilon": 0.75}
    spoilt.report.write_bytes(canonical.dumps(identity.signed(spoilt.server, DOMAIN, payload)))
    return spoilt


def test_the_page_says_so_first_and_strikes_the_figures(false) -> None:
    done = call("render", false.report, "--consortium-key", false.public)
    assert isinstance(done.exception, VerificationError)
    assert done.exception.exit_code == 60
    for name, banner in (("report.html", "NOT VERIFIED"), ("report.zh.html", "核验未通过")):
        page = (false.folder / name).read_text(encoding="utf-8")
        body = page[page.index("<body>") :]
        assert body.index(banner) < body.index("<h1>"), "before anything else"
        assert "<h1><s>" in body
        assert "ε = <s>0.5</s>" in body
        front = body[body.index('<div class="front">') : body.index('<p class="seal">')]
        assert "<s>0.75</s>" in front
        left = re.sub(r"<s>.*?</s>|<svg.*?</svg>", "", front, flags=re.S)
        assert not re.search(r"\b0\.7?5\b", left), "every figure of the first page is struck out"
    assert "按 PLD 计算的 ε" in (false.folder / "report.zh.html").read_text(encoding="utf-8")
    for name, banner in (("model-card.md", "NOT VERIFIED"), ("model-card.zh.md", "核验未通过")):
        card = (false.folder / name).read_text(encoding="utf-8")
        assert banner in card.split("##")[0]
        figures = [line for line in card.splitlines() if "0.5" in line and line.startswith("- ")]
        assert figures
        assert all(line.startswith("- ~~") and line.endswith("~~") for line in figures)
    assert "NOT VERIFIED" in (false.folder / "data-card.md").read_text(encoding="utf-8").split("##")[0]


def test_so_does_the_printed_page(false, tmp_path, monkeypatch) -> None:
    seen: list[str] = []

    def printed(page, out):
        seen.append(page.read_text(encoding="utf-8"))
        return out

    monkeypatch.setattr(pdf, "print_page", printed)
    done = call("pdf", false.folder, "--out", tmp_path / "x.pdf")
    assert isinstance(done.exception, VerificationError)
    assert "NOT VERIFIED" in seen[0]


def test_a_page_written_without_the_command_says_so_too(false) -> None:
    assert "NOT VERIFIED" in render_report(false.report).read_text(encoding="utf-8")


def test_a_report_that_passed_is_not_struck(spoilt) -> None:
    assert call("render", spoilt.report).exit_code == 0
    for path in (*spoilt.folder.glob("*.html"), *spoilt.folder.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert not any(x in text for x in ("NOT VERIFIED", "核验未通过", "<s>", "~~")), path.name


def test_what_a_card_and_the_command_do_not_claim(spoilt) -> None:
    call("render", spoilt.report)
    card = (spoilt.folder / "model-card.md").read_text(encoding="utf-8")
    assert "Every privacy figure here" in card
    assert "the server's word" in card
    assert "every number" not in card
    said = " ".join(call("verify", spoilt.report).stdout.split())
    assert "Its pages and cards were not" in said
