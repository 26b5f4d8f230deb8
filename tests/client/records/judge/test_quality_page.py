"""The report: plots from rounded counts, hidden small counts, one self-contained page; and suspected units."""

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.client.records.judge import hidden_counts, page, stages
from fedveil.client.records.judge.quality import assess
from fedveil.client.records.read.sources import read


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
    text = page.to_html(report)
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert {"svg", "rect", "figure", "table"} <= parser.seen
    assert text.count("<svg") == len(contract.loaded)  # completeness, and every column but the one with a hidden count
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"(src|href)=|https?://|<script|url\(|@import", text)
    for part in ("Direct identifiers", "Stages", "Rows that one record can change", "completeness"):
        assert part in text
    assert json.loads(json.dumps(page.to_json(report))) == page.to_json(report)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=14), st.lists(st.integers(0, 9), max_size=3), st.integers(2, 8))
def test_bars_hold_no_hidden_count(counts, others, k):
    bins = [(f"b{i}", n) for i, n in enumerate(counts)]
    drawn = hidden_counts.bars(bins, others, k)
    if any(0 < n < k for n in others):
        assert drawn == []
    assert all(n == 0 or n >= k for _, n in drawn)
    assert not drawn or sum(n for _, n in drawn) == sum(counts)
    if bins and all(n == 0 or n >= k for n in (*counts, *others)):
        assert [n for _, n in drawn] == counts  # nothing to hide: nothing is hidden


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.lists(st.integers(1, 7), max_size=6), st.integers(3, 8))
def test_sums_are_made_of_what_is_shown(parts, others, k):
    """Other hidden parts give the same sum; and what is said of it is true."""
    told = hidden_counts.total([hidden_counts.shown(p, k) for p in parts])
    changed = [others[i] if 0 < p < k and i < len(others) and others[i] < k else p for i, p in enumerate(parts)]
    assert hidden_counts.total([hidden_counts.shown(p, k) for p in changed]) == told
    if isinstance(told, int):
        assert told == sum(parts)
    else:
        assert sum(parts) < k if told[0] == "<" else sum(parts) > int(told[1:])


def test_rates_are_bounds_where_a_count_is_hidden():
    assert [hidden_counts.rate(b, 100, 5) for b in (0, 1, 4, 5)] == [1.0, ">0.9500", ">0.9500", 0.95]
    assert hidden_counts.rate(1, 4, 5) == "hidden"
    assert [hidden_counts.rate(b, 100, 5) for b in ("<5", ">10", "hidden")] == [">0.9500", "hidden", "hidden"]
    assert hidden_counts.rate(10, "hidden", 5) == "hidden"
    assert hidden_counts.total([12, "<5"]) == ">12"  # not 15, from which the 3 would follow
    assert hidden_counts.split([10, 3], 100, 5) == [10, "<5"]
    assert hidden_counts.split([95, 0], 98, 5) == ["hidden", 0]  # the rest is 3
    assert hidden_counts.chain(83, [(3, True), (6, True), (0, False)], 5) == [("<5", "<83"), (6, "<77"), (0, "<77")]
    assert hidden_counts.chain(83, [(80, True), (0, True)], 5) == [("hidden", "hidden"), ("hidden", "hidden")]
    assert hidden_counts.chain(83, [(80, False), (7, True)], 5) == [("hidden", 83), (7, 76)]


def test_problems_stand_in_the_page_without_values(contract, rows, table):
    rows[0][1] = "7373"
    report = full(contract, table(rows))
    text = page.to_html(report)
    assert "does not meet" in text
    assert "range" in text
    assert "7373" not in text + json.dumps(page.to_json(report))
    assert page.to_json(report)["problems"][0]["cells"] == "<5"


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
