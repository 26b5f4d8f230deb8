"""Streaming gives what the table in memory gives, in no order, and leaves nothing behind."""

import os
import stat
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedveil.common.errors import AnonymityError, DataError, UsageError
from fedveil.privacy.anonymization import buckets, counting, rows
from fedveil.privacy.anonymization.anonymizer import Anonymizer
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
from fedveil.privacy.anonymization.criteria import DistinctL, KAnonymity, TCloseness
from fedveil.privacy.anonymization.stream import anonymize_parquet

AGES = [(str(v), f"[{v // 4 * 4},{v // 4 * 4 + 3}]", f"[{v // 16 * 16},{v // 16 * 16 + 15}]", "*") for v in range(64)]
SPEC = TableSpec(
    (QuasiIdentifier("age", Hierarchy.from_rows(AGES)), QuasiIdentifier("city")),
    (Sensitive("ill"),),
    ("name",),
    ("row", "note"),
)


def table(n=3000, seed=1):
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "name": [f"p{i}" for i in range(n)],
            "age": pa.array(rng.integers(0, 64, n), mask=rng.random(n) < 0.02),
            "city": pa.array([f"c{x}" for x in rng.integers(0, 12, n)]),
            "ill": pa.array([f"i{x}" for x in rng.geometric(0.4, n)], mask=rng.random(n) < 0.01),
            "row": range(n),
            "note": [f"text {i}" for i in range(n)],
        }
    )


def rows_of(t):
    return Counter(tuple(r.values()) for r in t.to_pylist())


@pytest.mark.parametrize("keys", ["table of combinations", "sorted numbers", "sorted bytes"])
@pytest.mark.parametrize(
    ("models", "method", "limit"),
    [
        ([KAnonymity(10)], "mondrian", 0.0),
        ([KAnonymity(5), DistinctL(2)], "peel", 0.1),
        ([KAnonymity(5), TCloseness(0.5)], "optimal", 0.3),
    ],
)
def test_streaming_equals_memory(tmp_path, monkeypatch, models, method, limit, keys):
    monkeypatch.setattr(rows, "BATCH_ROWS", 256)
    monkeypatch.setattr(buckets, "BUCKET_ROWS", 500)
    monkeypatch.setattr(counting, "PENDING_KEYS", 700)
    t, a = table(), Anonymizer(SPEC, models, method=method, suppression_limit=limit)
    expected = a.fit_transform(t)
    if keys != "table of combinations":
        monkeypatch.setattr(counting, "DENSE_CELLS", 0)
    if keys == "sorted bytes":
        monkeypatch.setattr(counting, "EXACT", 1)
    pq.write_table(t, tmp_path / "in.parquet", row_group_size=700)
    done = anonymize_parquet(
        tmp_path / "in.parquet", tmp_path / "out.parquet", SPEC, models, method=method, suppression_limit=limit
    )
    assert done.outcome == a.outcome
    assert done.findings.met
    out = pq.read_table(tmp_path / "out.parquet")
    assert out.column_names == list(SPEC.released)
    assert rows_of(out) == rows_of(expected)
    # In no order: neither the whole file nor the start of it follows the source.
    order = out["row"].to_pylist()
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.15
    assert max(order[:300]) > 0.8 * len(t)
    assert stat.S_IMODE(os.stat(tmp_path / "out.parquet").st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]


def test_every_position_is_equally_likely(tmp_path, monkeypatch):
    """Where the first source row ends up, over many runs: a uniform position (chi-square on eighths)."""
    monkeypatch.setattr(rows, "BATCH_ROWS", 16)
    monkeypatch.setattr(buckets, "BUCKET_ROWS", 16)
    spec = TableSpec((QuasiIdentifier("q"),), (), (), ("row",))
    pq.write_table(pa.table({"q": [1] * 64, "row": range(64)}), tmp_path / "in.parquet")
    seen = np.zeros(8)
    for _ in range(160):
        anonymize_parquet(tmp_path / "in.parquet", tmp_path / "out.parquet", spec, [KAnonymity(2)])
        seen[pq.read_table(tmp_path / "out.parquet")["row"].to_pylist().index(0) // 8] += 1
    assert ((seen - 20) ** 2 / 20).sum() < 29.9  # 7 degrees of freedom: p = 1e-4


def test_failures_leave_no_file(tmp_path):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(table(50), source)
    with pytest.raises(AnonymityError, match="k = 51"):
        anonymize_parquet(source, out, SPEC, [KAnonymity(51)])
    with pytest.raises(UsageError, match="overwrite"):
        anonymize_parquet(source, source, SPEC, [KAnonymity(2)])
    with pytest.raises(DataError, match="cannot be read"):
        anonymize_parquet(tmp_path / "none.parquet", out, SPEC, [KAnonymity(2)])
    pq.write_table(table(50).drop_columns("ill"), source)
    with pytest.raises(DataError, match="'ill'"):
        anonymize_parquet(source, out, SPEC, [KAnonymity(2)])
    pq.write_table(table(0), source)
    with pytest.raises(DataError, match="no rows"):
        anonymize_parquet(source, out, SPEC, [KAnonymity(2)])
    assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"]


def test_combinations_beyond_64_bits(tmp_path):
    """It was refused once where memory was bounded, and worked on a table in memory."""
    names = [f"q{i}" for i in range(8)]
    t = pa.table({n: range(300) for n in names})
    pq.write_table(t, tmp_path / "in.parquet")
    spec = TableSpec(tuple(QuasiIdentifier(n) for n in names))
    expected = Anonymizer(spec, [KAnonymity(30)], method="mondrian").fit_transform(t)
    anonymize_parquet(tmp_path / "in.parquet", tmp_path / "out.parquet", spec, [KAnonymity(30)], method="mondrian")
    assert rows_of(pq.read_table(tmp_path / "out.parquet")) == rows_of(expected)
    assert len(rows_of(expected)) >= 8


def test_a_kept_column_of_numbered_values_stays_what_it_is(tmp_path):
    """It could not be read once: its values were taken for texts."""
    t = pa.table({"q": [1] * 6, "n": pa.array([7, 8, None, 7, 8, 9]).dictionary_encode()})
    pq.write_table(t, tmp_path / "in.parquet")
    spec = TableSpec((QuasiIdentifier("q"),), keep=("n",))
    anonymize_parquet(tmp_path / "in.parquet", tmp_path / "out.parquet", spec, [KAnonymity(2)])
    out = pq.read_table(tmp_path / "out.parquet")["n"].to_pylist()
    assert Counter(out) == Counter(t["n"].to_pylist())


def test_text_files_are_written_too(tmp_path):
    t = table(600)
    pq.write_table(t, tmp_path / "in.parquet")
    done = anonymize_parquet(tmp_path / "in.parquet", tmp_path / "out.csv", SPEC, [KAnonymity(5)])
    assert done.findings.rows == 600
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 601
