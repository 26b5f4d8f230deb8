"""No hidden count follows from what a report shows: by brute force over small tables, and end to end on real ones."""

import itertools
import json

import pytest

from fedveil.client.records.judge import hidden_counts, page, stages
from fedveil.client.records.judge.quality import assess
from fedveil.client.records.judge.quality_report import ColumnQuality, Problem, QualityReport
from fedveil.client.records.judge.stages import Stage
from fedveil.client.records.read import intake, sources
from fedveil.client.records.read.sources import Rules

K = 3


def ambiguous(tables):
    """Every count from 1 to K - 1 has two values among the tables that look alike.

    Args:
        tables: of each table its counts by name, and its report.
    """
    alike = {}
    for truth, report in tables:
        alike.setdefault(json.dumps(report, sort_keys=True), []).append(truth)
    found = 0
    for same in alike.values():
        for name in same[0]:
            values = {t[name] for t in same}
            if any(0 < v < K for v in values):
                assert len(values) > 1, (name, same)
                found += 1
    assert found  # there was something to hide
    return len(alike)


def column(name, parts, rows, other=0, limit=None, coded=0):
    """A column with missing, two kinds of unreadable, and outside cells; the rest lies in two bins."""
    missing, texts, dates, outside = parts
    rest = rows - sum(parts)
    bins = (("low", rest // 2), ("high", rest - rest // 2))
    return ColumnQuality(
        name, missing, outside, 0, False, unreadable=texts + dates, kinds=(texts, dates, 0, 0), other=other,
        limit=limit, bins=bins, coded=coded,
    )  # fmt: skip


def told(q, rows):
    """The problems of a column, an identifier's included: its count is that of the values."""
    some = [
        Problem(q.name, "a", q.kinds[0], "", "type", "kind"),
        Problem(q.name, "b", q.kinds[1], "", "type", "kind"),
        Problem(q.name, "c", q.missing, "", "missing", "missing"),
        Problem(q.name, "d", q.out_of_bounds, "", "range", "out_of_bounds"),
    ]
    present = Problem(q.name, "e", rows - q.missing - q.unreadable, "", "identifier", "present")
    over = [Problem(q.name, "f", q.other, "", "other", "other")] if q.limit is not None and q.other > q.limit else []
    return [*(p for p in some if p.count), present, *over]


def compositions(rows, parts):
    return (p for p in itertools.product(range(rows + 1), repeat=parts) if sum(p) <= rows)


@pytest.mark.parametrize("rows", [6, 7, 9, 12])
def test_one_column(rows):
    def tables():
        for parts, coded in itertools.product(compositions(rows, 4), range(4)):
            if coded > parts[0]:
                continue
            q = column("x", parts, rows, coded=coded)
            report = QualityReport(rows, 0, (q,), tuple(told(q, rows)), K, stages=cell_stages([q], rows))
            names = ("missing", "texts", "dates", "outside", "rest", "unreadable", "invalid")
            truth = (*parts, rows - sum(parts), q.unreadable, q.invalid)
            yield dict(zip(names, truth, strict=True)), page.to_json(report)

    assert ambiguous(tables()) > 20


def cell_stages(columns, rows):
    def stage(name, found):
        return Stage(name, rows, rows, found, {})

    return (
        stage("unreadable", sum(c.unreadable for c in columns)),
        stage("missing codes", sum(c.coded for c in columns)),
        stage("taken for other", sum(c.other for c in columns)),
    )


@pytest.mark.parametrize("limit", [0, 1, 2, 5])
def test_sums_over_two_columns(limit):
    """Stage totals stand beside the columns' own figures."""
    rows = 6

    def tables():
        for a, b in itertools.product(compositions(rows, 2), repeat=2):
            for others in itertools.product(range(rows), range(4)):
                some = zip("xy", (a, b), others, strict=True)
                qs = [column(n, (p[0], p[1], 0, 0), rows, o, limit) for n, p, o in some]
                problems = tuple(p for q in qs for p in told(q, rows))
                report = QualityReport(rows, 0, tuple(qs), problems, K, stages=cell_stages(qs, rows))
                yield (
                    {"m": a[0], "u": a[1], "m2": b[0], "u2": b[1], "o": others[0], "o2": others[1]},
                    page.to_json(report),
                )

    ambiguous(tables())


@pytest.mark.parametrize("drop", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("rows", [6, 8, 13])
def test_stages(rows, drop):
    """Rows that were left out, found and left: at least one row always stays."""
    names = ("exact duplicates", "near duplicates", "outliers")

    def tables():
        for out, *found in itertools.product(range(5), *[range(rows)] * 3):
            done, left = [Stage("read", rows + out, rows + out, 0, {})], rows
            done.append(Stage("consent and retention", rows + out, rows, 0, {}))
            truth = {"left out": out}
            for name, n, dropped in zip(names, found, drop, strict=True):
                if n >= left:
                    break
                done.append(Stage(name, left, left - n if dropped else left, n, {}))
                left -= n if dropped else 0
                truth |= {name: n, f"rows after {name}": left}
            else:
                # Without a stage that tells, near duplicates are at least the exact ones that were kept.
                if drop[0] or found[1] >= found[0]:
                    yield truth, page.to_json(QualityReport(rows, found[0], (), (), K, stages=tuple(done)))

    ambiguous(tables())


def test_contradicting_rows_do_not_bound_duplicates():
    """d exact and x near duplicates, of which every two rows of a key differ in at most 2x + d rows."""
    rows = 40

    def tables():
        for d, x, unkeyed in itertools.product(range(8), range(8), range(5)):
            for y in range(2 * x + d + 1) if x else (0,):
                if y == 1:
                    continue  # nobody contradicts himself
                q = ColumnQuality("x", 0, 0, 0, False, conflicting=y)
                done = (
                    Stage("exact duplicates", rows, rows - d, d, {}),
                    Stage("near duplicates", rows - d, rows - d, x, {}),
                )
                report = QualityReport(rows, d, (q,), (), K, stages=done, unkeyed=unkeyed)
                note = None if not unkeyed else hidden_counts.shown(unkeyed, K)
                yield {"d": d, "x": x, "y": y, "unkeyed": unkeyed}, [page.to_json(report), note, y > 0]

    ambiguous(tables())


def reported(contract, path, secret):
    rules = Rules(secret=secret)
    raw = intake.take_in(sources.open_source(path, contract, None), contract, rules, "t")
    _, done = stages.reduce(raw, contract, ())
    return page.to_json(assess(raw, contract, done, stages.stability(contract)))


def columns_of(make, **changes):
    """The small contract's columns, some changed: by name, what."""
    columns = [c.model_dump() for c in make().columns]
    for c in columns:
        c.update(changes.get(c["name"], {}))
    return columns


def spoilt(rows, column, text, some):
    for i in some:
        rows[i][column] = text


def twelve(make_rows):
    return [[f"q{i}-{r[0]}", *r[1:]] for i in range(2) for r in make_rows]


def two(first, text, second, other):
    """Ten cells of one column, and 1 to 4 of another."""
    return lambda rows, n: (spoilt(rows, first, text, range(10)), spoilt(rows, second, other, range(20, 20 + n)))


def numbered(rows, n):
    for i, row in enumerate(rows):
        row[3] = "?" if i < n else str(1000 + 7 * i)


def repeated(rows, n):
    spoilt(rows, 3, "500", range(6))
    rows.extend(list(rows[i]) for i in range(30, 30 + n))


JOBS = {"values": ["a", "b", "c", "other"], "levels": [["a", "b"], ["c", "other"]], "unseen": "other"}
KEYED = {"patient": {"pseudonym": True}}, {"near_key": ["patient"]}
CASES = {
    "missing beside a visible validity": ({}, {}, two(3, "9", 3, "?")),
    "out of bounds beside unreadable": ({}, {}, two(3, "abc", 3, "9")),
    "unreadable of one column of two": ({}, {}, two(3, "abc", 1, "abc")),
    "other of one column of two": (
        {"job": {**JOBS, "unseen_limit": 1.0}, "grade": {"unseen_limit": 1.0}},
        {},
        two(4, "7", 2, "zz"),
    ),
    "values of an identifier": ({"dose": {"high": 100000}}, {}, numbered),
    "a dropped stage between shown ones": (
        {"dose": {"low": -1000, "high": 1000}},
        {"duplicates": "drop", "fitted_outliers": "drop"},
        repeated,
    ),
    "near duplicates": (*KEYED, lambda r, n: r.extend([r[i][0], "99", *r[i][2:]] for i in range(n))),
    "rows without a key": (*KEYED, lambda r, n: spoilt(r, 0, "", range(n))),
}


@pytest.mark.parametrize("case", CASES)
def test_reports_are_alike_whatever_the_hidden_count_is(make, rows, table, secret, case):
    """Written as tables, with k = 5: 1 to 4 of something, beside as much as can be visible."""
    changes, quality, spoil = CASES[case]
    contract = make(columns=columns_of(make, **changes), quality=quality)
    seen = []
    for n in (1, 2, 3, 4):
        some = twelve(rows)
        spoil(some, n)
        added = len(some) - len(twelve(rows))
        # What is added grows the table itself, whose rows are visible: another row is left out for it.
        del some[len(some) - 2 * added : len(some) - added]
        seen.append(reported(contract, table(some), secret))
    bare = [{k: v for k, v in s.items() if k != "bars"} for s in seen]
    assert all(b == bare[0] for b in bare)


def test_a_visible_count_is_shown(make, rows, table, secret):
    """Negative control: from k on, the same figures are exact."""
    contract = make(columns=columns_of(make, patient={"pseudonym": True}), quality={"near_key": ["patient"]})
    some = twelve(rows)
    some += [[r[0], "99", *r[2:]] for r in some[:6]]
    spoilt(some, 0, "", range(20, 26))
    found = reported(contract, table(some), secret)
    assert next(s for s in found["stages"] if s["stage"] == "near duplicates")["found"] == 6
    assert found["columns"][0]["consistency"] == 0.75  # 12 of the 48 rows that have a key
    assert any(n.startswith("6 rows lack a value of the near key") for n in found["notes"])


def test_a_limit_under_k_does_not_single_a_count_out(make, rows, table, secret):
    """0.05 of 24 rows is one cell: with "<5", and no refusal, it would be one."""
    grades = [reported(make(), table([[*r[:4], "7" if i < n else r[4], r[5]] for i, r in enumerate(rows)]), secret)
              for n in (0, 1, 2, 4, 5)]  # fmt: skip
    shown = [next(c for c in g["columns"] if c["column"] == "grade")["other"] for g in grades]
    assert shown == ["<2", "<2", ">1", ">1", ">1"]
    assert [[p["cells"] for p in g["problems"]] for g in grades] == [[], [], [">1"], [">1"], [">1"]]


def test_rows_without_a_key_are_not_one_person(make, rows, table, secret):
    """Neither repetitions nor contradictions, and none of them is dropped; a missing code of the key is no key too."""
    columns = columns_of(make, patient={"pseudonym": True, "missing_codes": ["?"]})
    contract = make(columns=columns, quality={"near_key": ["patient"], "near_duplicates": "drop"})
    some = twelve(rows)
    spoilt(some, 0, "", range(5))
    spoilt(some, 0, "?", range(5, 10))
    found = reported(contract, table(some), secret)
    near = next(s for s in found["stages"] if s["stage"] == "near duplicates")
    assert (near["found"], near["left"]) == (0, 48)
    assert {c["consistency"] for c in found["columns"]} == {1.0}
    assert any(n.startswith("10 rows lack a value of the near key") for n in found["notes"])
