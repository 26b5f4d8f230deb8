"""Drift against an earlier signed report, and contradictions under one near key: known answers, and hostile folders."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.client.records import lineage
from fedveil.client.records.judge import drift, hidden_counts, page
from fedveil.client.records.judge.quality import assess
from fedveil.client.records.read.sources import Rules, read
from fedveil.client.records.release.pipeline import ingest
from fedveil.common import identity
from fedveil.common.errors import DataError, VerificationError

BINS = {"x": [f"b{i}" for i in range(10)]}


def report(numbers, missing=0, invalid=0, k=5):
    bins = list(zip(BINS["x"], numbers, strict=True))
    shown = [hidden_counts.shown(n, k) for n in (missing, invalid)]
    return {
        "bars": {"x": hidden_counts.bars(bins, (missing, invalid), k)},
        "columns": [{"column": "x", "missing": shown[0], "invalid": shown[1]}],
    }


def test_known_distances():
    (same,) = drift.compare(report([10] * 10), report([20] * 10), BINS)
    assert (same.distance, same.moved) == (0.0, False)
    (half,) = drift.compare(report([100] * 5 + [0] * 5), report([0] * 5 + [100] * 5), BINS)
    assert half.distance == pytest.approx(1.0)
    assert half.moved
    (missing,) = drift.compare(report([100] * 10, missing=1000), report([100] * 10), BINS)
    assert missing.distance == pytest.approx(0.5)  # half of the cells are missing now, none were
    (quarter,) = drift.compare(report([50, 50] + [0] * 8), report([25, 75] + [0] * 8), BINS)
    assert quarter.distance == pytest.approx(0.25)
    # Shares 3/8 and 5/8, two tables of 100: 2 · sqrt(15/64 · 0.02) / 2 + sqrt(ln(1000) / 2 · 0.02).
    assert quarter.chance == pytest.approx(math.sqrt(15 / 64 * 0.02) + math.sqrt(math.log(1000) / 2 * 0.02))
    assert not quarter.moved


def test_reports_drawn_on_other_widths_meet_on_the_coarser():
    fine, coarse = [10] * 10, [1, 9] * 5
    now, before = report(fine), report(coarse)
    assert len(now["bars"]["x"]) == 10
    assert len(before["bars"]["x"]) == 5
    (found,) = drift.compare(now, before, BINS)
    assert found.distance == 0.0  # although the finest bins differ: those are hidden


@given(st.lists(st.integers(0, 40), min_size=10, max_size=10), st.lists(st.integers(0, 40), min_size=10, max_size=10))
def test_distance_is_the_total_variation_of_what_both_show(a, b):
    now, before = report(a), report(b)
    (one,) = drift.compare(now, before, BINS)
    (other,) = drift.compare(before, now, BINS)
    assert (one.distance, one.chance) == (other.distance, other.chance)
    if one.distance is None:
        assert one.why
        assert not one.moved
        return
    assert 0 <= one.distance <= 1
    width = {10: 1, 5: 2, 2: 5, 1: 10}
    step = math.lcm(*(width[len(r["bars"]["x"])] for r in (now, before)))
    p, q = (np.add.reduceat(x, range(0, 10, step)) / sum(x) for x in (a, b))
    assert one.distance == pytest.approx(np.abs(p - q).sum() / 2)


def test_what_cannot_be_said():
    assert drift.compare(report([10] * 10, missing=3), report([10] * 10), BINS)[0].why == "a count under k is hidden"
    other = report([10] * 10)
    other["bars"]["x"][0][0] = "b99"
    assert drift.compare(report([10] * 10), other, BINS)[0].why == "the earlier contract had other levels"
    assert drift.compare({"bars": {"y": []}}, {"bars": {}}, {"y": []})[0].why == "not in the earlier table"
    assert drift.compare(report([0] * 10), report([10] * 10), BINS)[0].why == "no cells"


def test_chance_is_rarely_exceeded_and_a_shift_is_seen():
    rng = np.random.default_rng(5)
    p = np.array([0.3, 0.2, 0.1, 0.1, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01])
    same = [
        drift.compare(report(rng.multinomial(900, p)), report(rng.multinomial(600, p)), BINS)[0] for _ in range(300)
    ]
    assert sum(d.distance is not None for d in same) > 250
    assert sum(d.distance is not None and d.distance > (d.chance or 0) for d in same) <= 1
    shifted = drift.compare(report(rng.multinomial(900, p[::-1])), report(rng.multinomial(600, p)), BINS)[0]
    assert shifted.moved


@pytest.fixture
def earlier(contract, rows, table, tmp_path, secret):
    """A work folder of an accepted table, its secret where ``fedveil data check`` keeps it."""
    work = tmp_path / "earlier"
    lineage.private_folder(work)
    lineage.write_private(work / "commitment.key", secret)
    ingest(table(many(rows), name="e.csv"), contract, work, secret=secret)
    return work


def many(rows):
    """Every row 40 times under other names, ages moved by up to 4 years."""
    return [[f"q{i}-{r[0]}", str(int(r[1]) + i % 5), *r[2:]] for i in range(40) for r in rows]


def test_a_second_table_is_compared_with_the_first(contract, rows, table, tmp_path, secret, earlier):
    before = drift.earlier(earlier)
    again = ingest(table(many(rows)), contract, tmp_path / "w", secret=secret, before=before).report
    assert {d.column for d in again.moves} == {"age", "job", "dose", "grade", "y"}
    assert all(d.distance == 0 for d in again.moves)
    moved = [r if float(r[3]) else [*r[:3], "2.5", *r[4:]] for r in many(rows)]  # one dose in six is another now
    out = ingest(table(moved), contract, tmp_path / "w", secret=secret, before=before).report
    by_name = {d.column: d for d in out.moves}
    assert by_name["dose"].distance == pytest.approx(1 / 6)
    assert by_name["dose"].moved
    assert [d.column for d in out.moves if d.moved] == ["dose"]
    assert any("'dose' has moved" in note for note in out.notes)
    assert "explained by chance" in page.to_html(out)
    assert page.to_json(out)["drift"][2] == {
        "column": "dose", "distance": 0.1667, "chance": pytest.approx(0.1, abs=0.05), "moved": True, "why": "",
    }  # fmt: skip
    assert "explained by chance" not in page.to_html(
        ingest(table(moved), contract, tmp_path / "w", secret=secret).report
    )


def test_the_evidence_says_nothing_of_drift(contract, rows, table, tmp_path, secret, earlier):
    out = ingest(table(many(rows)), contract, tmp_path / "w", secret=secret, before=drift.earlier(earlier))
    assert "drift" not in json.dumps(out.evidence)


def test_only_the_signed_report_counts(earlier, tmp_path):
    other = identity.public_hex(identity.new_signing_key())
    with pytest.raises(VerificationError, match="not signed by the given key"):
        drift.earlier(earlier, other)
    data = (earlier / "quality.json").read_bytes()
    (earlier / "quality.json").write_bytes(data.replace(b'"missing":0', b'"missing":9', 1))
    with pytest.raises(VerificationError, match="is not the report that the signed lineage record names"):
        drift.earlier(earlier)
    (earlier / "quality.json").write_bytes(data)
    assert drift.earlier(earlier)["usable"]
    (earlier / "lineage.json").unlink()
    with pytest.raises(DataError, match="holds no accepted table's reports"):
        drift.earlier(earlier)
    with pytest.raises(DataError):
        drift.earlier(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_report_that_is_none_is_refused(earlier, secret):
    """Signed by the right key, and still not a quality report."""
    good = {"column": "x", "invalid": 0, "missing": 0}
    bars = (
        [["b0", "7"]], [["b0", -9]], [["b0", True]], [["b0", 1 << 60]], [["b0", 7, 7]], [[0, 7]], ["b0"], 5,
        [["b0", 7]] * 41,
    )  # fmt: skip
    others = ({"missing": -9}, {"missing": "<5"}, {"invalid": None}, {"column": ["x"]}, {"column": "y"})
    for text in (
        "[]",
        "{",
        '{"bars":{}}',
        *(json.dumps({"bars": b, "columns": [good]}) for b in ([], *({"x": b} for b in bars))),
        *(json.dumps({"bars": {}, "columns": c}) for c in ({}, [5], [good, good])),
        *(json.dumps({"bars": {"x": [["b0", 7]]}, "columns": c}) for c in ([], *([{**good, **o}] for o in others))),
    ):
        forge(earlier, text.encode(), secret)
        with pytest.raises(DataError, match="is not a quality report") as e:
            drift.earlier(earlier)
        assert e.value.hint
    forge(earlier, json.dumps({"bars": {"x": [["b0", 7]]}, "columns": [good]}).encode(), secret)
    assert drift.compare(report([10] + [0] * 9), drift.earlier(earlier), {"x": ["b0"]})[0].distance is None


def forge(folder, data, secret):
    """A report that the folder's own key signs."""
    (folder / "quality.json").write_bytes(data)
    record = {"quality": lineage.file_hash(folder / "quality.json")}
    lineage.write_signed(folder / "lineage.json", folder / "lineage.sig", record, lineage.derived_key(secret))


def test_a_missing_key_is_not_made(earlier):
    (earlier / "commitment.key").unlink()
    with pytest.raises(DataError, match="holds no key") as e:
        drift.earlier(earlier)
    assert "--against-public" in e.value.hint
    assert not (earlier / "commitment.key").exists()


def test_the_same_folder_can_be_compared_and_written(contract, rows, table, secret, earlier):
    out = ingest(table(many(rows)), contract, earlier, secret=secret, before=drift.earlier(earlier))
    assert all(d.distance == 0 for d in out.report.moves)
    assert len(drift.earlier(earlier)["drift"]) == 5


def keyed(make, **quality):
    columns = [c.model_dump() for c in make().columns]
    columns[0]["pseudonym"] = True
    return make(columns=columns, quality={"near_key": ["patient"], **quality})


def test_contradictions_under_one_key_are_counted(make, rows, table, secret):
    contract = keyed(make)
    rows += [
        ["p000", "21", *rows[0][2:]],  # another age than p000 has
        ["p001", *rows[1][1:3], "?", *rows[1][4:]],  # says nothing of the dose: no contradiction
        ["p002", *rows[2][1:]],
        ["p002", *rows[2][1:]],
        ["p002", rows[2][1], "b", *rows[2][3:]],  # one of four rows has another job
    ]
    report = assess(read(table(rows), contract, rules=Rules(secret=secret)), contract)
    found = {c.name: c.conflicting for c in report.columns}
    assert found == {"age": 2, "job": 4, "dose": 0, "grade": 0, "y": 0}
    assert sum("share their near key" in n for n in report.notes) == 2
    shown = {c["column"]: c["consistency"] for c in page.to_json(report)["columns"]}
    assert shown == {"age": "hidden", "job": "hidden", "dose": 1.0, "grade": 1.0, "y": 1.0}


def test_without_a_key_consistency_is_not_claimed(contract, rows, table):
    report = assess(read(table(rows), contract), contract)
    assert {c.conflicting for c in report.columns} == {None}
    assert {c["consistency"] for c in page.to_json(report)["columns"]} == {"no key"}


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=30))
def test_contradictions_are_those_of_the_definition(pairs):
    from fedveil.client.records.judge import quality
    from fedveil.client.records.read.intake import RawTable
    from fedveil.common.contract import Column

    keys, values = (np.array(x) for x in zip(*pairs, strict=True))
    c = Column.model_validate({"name": "x", "role": "feature", "type": "number", "low": 0, "high": 9})
    numbers = np.where(values == 0, np.nan, values.astype(float))
    raw = RawTable(len(pairs), {"x": numbers}, keys, near=np.unique(keys, return_inverse=True)[1])
    expected = sum(
        v > 0 and any(k == other and w not in (0, v) for other, w in pairs) for k, v in pairs
    )  # fmt: skip
    assert quality._conflicting(raw, c, quality._repeated(raw)) == expected
