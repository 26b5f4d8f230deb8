"""The report: plots from rounded counts, hidden small counts, one self-contained page; and suspected units."""

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedveil.client.ingest import page, stages
from fedveil.client.ingest.quality import assess
from fedveil.client.ingest.sources import read


def full(contract, path):
    raw = read(path, contract)
    kept, done = stages.reduce(raw, contract, ())
    assert kept.rows == raw.rows
    return assess(raw, contract, done, stages.stability(contract))


class Balanced(HTMLParser):
    """Every opened element is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_has_plots_and_needs_nothing(contract, rows, table):
    rows[0][3] = "?"
    report = full(contract, table(rows))
    text = report.to_html()
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert {"svg", "rect", "figure", "table"} <= parser.seen
    assert text.count("<svg") == 1 + len(contract.loaded)
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"(src|href)=|https?://|<script|url\(|@import", text)
    for part in ("Direct identifiers", "Stages", "Rows that one record can change", "completeness"):
        assert part in text
    assert json.loads(json.dumps(report.to_json())) == report.to_json()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 50))
def test_bars_are_the_nearest_multiple(n, k):
    bar = page.rounded(n, k)
    assert bar % k == 0
    assert abs(bar - n) <= k / 2


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_no_hidden_count_is_a_difference_of_what_is_shown(hidden, others):
    """Of k = 5: whatever the bars and the total say, at least two values of the hidden count fit them."""
    k = 5
    shown_bars = [page.rounded(n, k) for n in others]
    total = hidden + sum(others)
    assume(total >= k)  # a smaller total is hidden itself
    low = sum(max(0, b - 2) for b in shown_bars)
    high = sum(b + 2 for b in shown_bars)
    fitting = [m for m in range(1, k) if low <= total - m <= high]
    assert hidden in fitting
    assert len(fitting) >= 2


def test_small_losses_of_a_stage_are_hidden():
    assert page.shown_pair(100, 97, 5) == ">95"
    assert page.shown_pair(100, 100, 5) == 100
    assert page.shown_pair(100, 90, 5) == 90
    assert page.shown_pair(100, 0, 5) == 0
    assert [page.rate(b, 100, 5) for b in (0, 1, 4, 5)] == [1.0, ">0.9500", ">0.9500", 0.95]
    assert page.rate(1, 4, 5) == "hidden"


def test_problems_stand_in_the_page_without_values(contract, rows, table):
    rows[0][1] = "7373"
    report = full(contract, table(rows))
    text = report.to_html()
    assert "does not meet" in text
    assert "range" in text
    assert "7373" not in text + json.dumps(report.to_json())
    assert report.to_json()["problems"][0]["cells"] == "<5"


@pytest.mark.parametrize(
    ("low", "high", "values", "words"),
    [
        (100, 300, [5.1, 5.9, 6.2, 4.8, 7.0, 5.5], "cholesterol in mmol/l"),
        (140, 210, [1.61, 1.72, 1.83, 1.9, 1.55], "metres"),
        (30, 120, [160, 180, 200, 220, 190], "pounds"),
        (100, 300, [5.1, 5.9, 6.2], ""),  # too few to say
        (100, 300, [1, 2000, 5, 90000, 40], ""),
    ],
)
def test_suspected_units(make, table, low, high, values, words):
    columns = [
        {"name": "x", "role": "feature", "type": "number", "low": low, "high": high},
        {"name": "y", "role": "target", "type": "category", "values": ["0", "1"]},
    ]
    contract = make(columns=columns, l=1)
    inside = [[str(low + i % 3 + 0.5), str(i % 2)] for i in range(30)]
    report = assess(read(table([*inside, *([str(v), "0"] for v in values)], ["x", "y"]), contract), contract)
    (problem,) = report.problems
    assert problem.count == len(values)
    assert words in problem.remedy
    assert ("if they were" in problem.remedy) == bool(words)
