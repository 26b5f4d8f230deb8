"""The page: self-contained, escaped, readable by a screen reader; charts that say what the numbers say."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from fedveil.common import canonical
from fedveil.common.errors import VerificationError
from fedveil.privacy.report.catalogue import Speaker
from fedveil.privacy.report.charts import charts
from fedveil.privacy.report.plots import Chart, Series, nice, thin
from fedveil.privacy.report.render import render_html, render_report

VOID = {"meta", "link", "br", "hr", "img", "input", "line", "rect", "circle", "path"}
EVIL = '"><script>alert(1)</script><svg onload=x>'


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


@pytest.fixture(scope="module")
def document(honest):
    return canonical.loads(honest.report.read_bytes())


def test_the_page_is_self_contained_and_well_formed(honest, document) -> None:
    page = Page(render_html(document))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "foreignobject"}
    for _, attributes in page.tags:
        assert not any(a in ("src", "href", "srcset", "action") or a.startswith("on") for a in attributes)
    assert not re.search(r"url\(|@import", render_html(document))
    assert document["payload"]["claim"]["sentence"] in page.text.replace("\u00a0", " ")
    assert "fedveil audit verify report.json" in page.text
    for site in honest.sites:
        assert site in page.text
    for lines in (document["payload"]["not_covered"], document["payload"]["deviations"]):
        assert all(x in page.text for x in lines)


def test_every_chart_has_a_name_and_a_description(document) -> None:
    page = Page(render_html(document))
    drawn = [a for tag, a in page.tags if tag == "svg"]
    assert len(drawn) == 8
    assert all(a["role"] == "img" and a["aria-label"] for a in drawn)
    assert sum(tag == "desc" for tag, _ in page.tags) == 8


def test_a_hostile_text_stays_text_wherever_it_stands(document) -> None:
    def poison(value):
        if isinstance(value, dict):
            return {k if k in KEYS else k + EVIL: poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return value + EVIL if isinstance(value, str) else value

    keys: set[str] = set()

    def collect(value, free: bool) -> None:
        if isinstance(value, dict):
            for k, v in value.items():
                if not free:
                    keys.add(k)
                collect(v, k in ("sites", "criteria", "final", "heads", "software", "files", "earlier_sessions"))
        elif isinstance(value, list):
            for v in value:
                collect(v, False)

    collect(document, False)
    KEYS = keys
    html = render_html(poison(document))
    assert EVIL not in html
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    Page(html)


@pytest.mark.parametrize("bad", [None, [], {}, {"payload": {}}, {"payload": {"v": 1}, "signer": "x"}, "text"])
def test_a_malformed_document_is_refused(bad) -> None:
    with pytest.raises(VerificationError, match="cannot be shown"):
        render_html(bad)


def test_render_report_writes_beside_the_report(spoilt, tmp_path) -> None:
    out = render_report(spoilt.report)
    assert out == spoilt.folder / "report.html"
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    spoilt.report.write_bytes(b"{")
    with pytest.raises(VerificationError, match="malformed"):
        render_report(spoilt.report)
    with pytest.raises(VerificationError, match="missing"):
        render_report(tmp_path / "none.json")


def test_the_charts_draw_the_payloads_numbers(document) -> None:
    p = document["payload"]
    by_title = {c.title: c for c in charts(p, Speaker("en"), "")}
    assert [y for _, y in by_title["Sites in each sum"].bars] == [4, 3, 0, 4]
    assert by_title["ε over the planned steps"].series[0].points[-1] == (4, p["claim"]["epsilon"])
    attack = by_title["Best possible membership test"].series[0].points
    assert all(y >= x for x, y in attack)
    assert [y for _, y in attack] == sorted(y for _, y in attack)


def test_points_are_drawn_where_they_belong() -> None:
    svg = Chart("t", "x", "y", "d", [Series("s", [(0, 0), (10, 100)])], low=0, high=100).svg()
    path = re.search(r'd="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    assert path is not None
    x0, y0, x1, y1 = map(float, path.groups())
    assert (x0, x1) == (52.0, 466.0)
    assert y0 == 268 - 42
    assert y1 == 14


@pytest.mark.parametrize(
    "points", [[], [(1, 1)], [(1, 0), (2, 0)], [(0, 1e-9), (1, 1.0)], [(i, i) for i in range(9999)]]
)
@pytest.mark.parametrize("log", [False, True])
def test_any_number_of_points_can_be_drawn(points, log) -> None:
    svg = Chart("t", "x", "y", "d", [Series("s", points, dots=True)], log_y=log, bars=[] if log else points).svg()
    assert svg.endswith("</svg>")
    assert "nan" not in svg
    assert "inf" not in svg
    assert len(svg) < 60_000


def test_ticks_are_round_and_inside() -> None:
    assert nice(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice(0, 3, 6, whole=True) == [0, 1, 2, 3]
    assert nice(1, 1, 5) == [1]
    assert len(thin([(i, 0) for i in range(100_000)])) <= 240
    assert thin([(i, 0) for i in range(1000)])[-1] == (999, 0)


def test_a_report_that_fails_its_checks_is_shown_as_one(spoilt) -> None:
    (spoilt.folder / "joins.json").write_bytes(b"{}")
    render_report(spoilt.report)
    english = (spoilt.folder / "report.html").read_text(encoding="utf-8")
    assert "Do not rely on this report" in english
    assert "join statements" in english
    assert "请勿依赖本报告" in (spoilt.folder / "report.zh.html").read_text(encoding="utf-8")
    (spoilt.folder / "journal.jsonl").unlink()
    render_report(spoilt.report)
    assert "FAILED" in (spoilt.folder / "report.html").read_text(encoding="utf-8")
