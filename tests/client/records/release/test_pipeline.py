"""The whole ingestion: what it gives, what it writes, what may leave, and what a failure leaves behind."""

import csv
import hashlib
import hmac
import json
import re
import stat

import numpy as np
import pytest

from fedveil.client.records.lineage import commitment, site_secret
from fedveil.client.records.release import pipeline
from fedveil.client.records.release.pipeline import ingest
from fedveil.common.errors import AnonymityError, ConfigError, DataError


def test_gives_features_evidence_and_private_files(contract, rows, table, tmp_path, secret):
    source, work = table(rows), tmp_path / "site" / "work"
    out = ingest(source, contract, work, secret=secret)
    assert out.X.shape == (24, contract.width)
    assert sorted(out.y.tolist()) == [0] * 12 + [1] * 12
    assert stat.S_IMODE(work.stat().st_mode) == 0o700
    files = {p.name: p for p in work.iterdir()}
    assert set(files) == {"released.csv", "quality.json", "quality.html", "lineage.json", "lineage.sig"}
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in files.values())
    assert json.loads(files["quality.json"].read_text())["usable"] is True
    lineage = json.loads(files["lineage.json"].read_text())
    assert lineage["source"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert lineage["released"]["rows"] == 24


def test_released_file_and_features_are_the_same_rows(contract, rows, table, tmp_path, secret):
    out = ingest(table(rows), contract, tmp_path / "w", secret=secret)
    with out.released.open(newline="") as f:
        released = list(csv.DictReader(f))
    assert list(released[0]) == ["age", "job", "dose", "grade", "y"]
    index = {n: i for i, n in enumerate(contract.feature_names)}
    for row, x, y in zip(released, out.X, out.y, strict=True):
        assert x[index[f"age={row['age']}"]] == x[index[f"job={row['job']}"]] == x[index[f"grade={row['grade']}"]] == 1
        assert x[index["dose"]] == pytest.approx((float(row["dose"]) - 1) / 2, abs=1e-6)
        assert row["y"] == ("<=5", ">5")[y]


def test_no_identifier_and_no_exact_quasi_identifier_is_released(contract, rows, table, tmp_path, secret):
    text = ingest(table(rows), contract, tmp_path / "w", secret=secret).released.read_text()
    assert "p0" not in text
    assert set(re.findall(r'^"(.*?)"', text, re.MULTILINE)) == {"[0,50)", "[50,100]"}


def test_row_order_is_fresh_each_time(contract, rows, table, tmp_path, secret):
    source = table(rows)
    seen = {ingest(source, contract, tmp_path / "w", secret=secret).released.read_bytes() for _ in range(5)}
    assert len(seen) == 5  # 24! orders
    assert len({b"".join(sorted(s.splitlines())) for s in seen}) == 1


def test_evidence_holds_no_count_and_no_plain_hash(contract, rows, table, tmp_path, secret):
    source = table(rows)
    out = ingest(source, contract, tmp_path / "w", secret=secret)
    e = out.evidence
    assert e["criteria"] == {
        "k-anonymity": {"required": 5, "met": True},
        "distinct l-diversity": {"required": 2, "met": True},
    }
    assert (e["stability_factor"], e["unit"], e["contract"]) == (1, "one row = one record", contract.hash)
    expected = hmac.new(secret, b"source\0" + source.read_bytes(), hashlib.sha256).hexdigest()
    assert e["commitments"]["source"] == expected
    assert e["commitments"]["released"] == commitment(secret, "released", out.released)
    text = json.dumps(e)
    for data in (source.read_bytes(), out.released.read_bytes()):
        assert hashlib.sha256(data).hexdigest() not in text
    numbers = set(re.findall(r"(?<![0-9a-f])\d+(?![0-9a-f])", text))
    assert numbers == {"1", "2", "5"}  # version and factor, l, k: all of them the contract's


def test_evidence_is_the_same_for_tables_of_other_sizes(contract, table, tmp_path, secret, rows):
    a = ingest(table(rows), contract, tmp_path / "a", secret=secret).evidence
    b = ingest(table(rows + rows, name="b.csv"), contract, tmp_path / "b", secret=secret).evidence
    assert {k: v for k, v in a.items() if k != "commitments"} == {k: v for k, v in b.items() if k != "commitments"}
    assert a["commitments"] != b["commitments"]


def test_missing_values_pass_through(contract, rows, table, tmp_path, secret):
    rows[0][3] = "?"
    out = ingest(table(rows), contract, tmp_path / "w", secret=secret)
    names = list(contract.feature_names)
    hit = out.X[:, names.index("dose=missing")] == 1
    assert hit.sum() == 1
    assert out.X[hit, names.index("dose")] == 0


def test_suppression_changes_the_unit(make, rows, table, tmp_path, secret):
    rows += [["x", "20", "a", "0", "1", "0"]] + [["x", "70", "a", "0", "1", "0"]]
    rare = [["x", "20", "c", "0", "1", "0"]]
    contract = make(suppression_limit=0.2, l=1)
    kept = [r for r in rows if not (r[2] == "c" and int(r[1]) < 50)] + rare
    out = ingest(table(kept), contract, tmp_path / "w", secret=secret)
    assert len(out.X) == len(kept) - 1
    assert out.evidence["stability_factor"] == 5
    assert out.evidence["unit"] == "one row = one record; a group of 5 of them"
    assert json.loads((tmp_path / "w" / "lineage.json").read_text())["suppressed_rows"] == 1
    both = make(suppression_limit=0.2, l=2)
    out = ingest(table(kept), both, tmp_path / "w", secret=secret)
    assert out.evidence["stability_factor"] is None
    assert "not bounded" in out.evidence["unit"]


def test_failing_table_leaves_no_release_behind(contract, rows, table, tmp_path, secret):
    work = tmp_path / "w"
    ingest(table(rows), contract, work, secret=secret)
    with pytest.raises(AnonymityError, match="k = 5 fails in 1 classes") as e:
        ingest(table(rows[2:]), contract, work, secret=secret)
    assert "dropping the cut at 50 of 'age'" in e.value.hint
    assert "dropping the boundary between 'a|b' and 'c' of 'job'" in e.value.hint
    assert {p.name for p in work.iterdir()} == {"quality.json", "quality.html"}
    rows[0][1] = "999"
    with pytest.raises(DataError):
        ingest(table(rows), contract, work, secret=secret)
    assert json.loads((work / "quality.json").read_text())["usable"] is False


def test_verifier_guards_against_a_broken_recoding(contract, rows, table, tmp_path, secret, monkeypatch):
    """Negative control: let the recoding leak exact ages into the labels; the re-read file must be refused."""
    honest = pipeline._csv_bytes
    monkeypatch.setattr(pipeline, "_csv_bytes", lambda t, c: honest(t, c).replace(b'"[0,50)"', b"20", 1))
    with pytest.raises(AnonymityError, match="'age' breaks the contract"):
        ingest(table(rows), contract, tmp_path / "w", secret=secret)
    assert not (tmp_path / "w" / "released.csv").exists()


def test_open_work_folder_is_refused_and_left_alone(contract, rows, table, tmp_path, secret):
    work = tmp_path / "open"
    work.mkdir()
    work.chmod(0o755)
    with pytest.raises(ConfigError, match="others can read"):
        ingest(table(rows), contract, work, secret=secret)
    assert stat.S_IMODE(work.stat().st_mode) == 0o755
    assert not list(work.iterdir())


def test_work_folder_that_is_a_file(contract, rows, table, tmp_path, secret):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        ingest(table(rows), contract, tmp_path / "file", secret=secret)


def test_short_secret_is_refused(contract, rows, table, tmp_path):
    with pytest.raises(ConfigError, match="too short"):
        ingest(table(rows), contract, tmp_path / "w", secret=b"short")


def test_site_secret_is_made_once_and_private(tmp_path):
    first = site_secret(tmp_path / "w")
    assert site_secret(tmp_path / "w") == first
    assert len(first) == 32
    path = tmp_path / "w" / "commitment.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"cut")
    with pytest.raises(ConfigError, match="commitment.key"):
        site_secret(tmp_path / "w")


def test_hundred_thousand_rows_of_duplicates(make, table, tmp_path, secret):
    """Size alone breaks nothing; k and l at the limits of what holds."""
    base = [["p", "20", "a", "0", "1", "0"], ["p", "20", "a", "0", "1", "9"]]
    out = ingest(table(base * 50_000), make(k=100_000), tmp_path / "w", secret=secret)
    assert out.X.shape[0] == 100_000
    assert out.report.duplicates == 99_998
    assert np.unique(out.X, axis=0).shape[0] == 1
    with pytest.raises(AnonymityError, match="no combination"):
        ingest(table(base * 50_000), make(k=100_001), tmp_path / "w", secret=secret)


def test_a_removal_changes_no_more_than_the_evidence_says(make, table, tmp_path, secret):
    """l = 1 asks for nothing: sixty rows without a sensitive value stay, whether or not one more has one."""
    columns = [
        {"name": "g", "role": "quasi", "type": "category", "values": ["a", "b"], "levels": [["a"], ["b"]]},
        {"name": "s", "role": "sensitive", "type": "category", "values": ["x", "y"], "missing": "indicator"},
        {"name": "f", "role": "feature", "type": "number", "low": 0, "high": 1},
        {"name": "y", "role": "target", "type": "category", "values": ["0", "1"]},
    ]
    contract = make(columns=columns, k=5, l=1, sensitive_target=False, suppression_limit=0.4)
    rows = [["a", "x", "0.5", "1"]] * 100 + [["b", "", "0.5", "1"]] * 60
    sizes = []
    for i, extra in enumerate(([], [["b", "x", "0.5", "1"]])):
        out = ingest(table([*rows, *extra], "gsfy", f"{i}.csv"), contract, tmp_path / "w", secret=secret)
        assert out.evidence["stability_factor"] == 5
        assert set(out.evidence["criteria"]) == {"k-anonymity"}  # nothing was required of l, so nothing is claimed
        sizes.append(len(out.y))
    assert sizes == [160, 161]
    with pytest.raises(AnonymityError, match="l = 2 for 's' fails in 2 classes"):
        ingest(table(rows, "gsfy"), make(columns=columns, sensitive_target=False), tmp_path / "w", secret=secret)
