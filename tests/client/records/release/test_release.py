"""A checked table through every method of the engine: verified, and encoded to one width whatever the method."""

import csv
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedveil.client.records.read.sources import read
from fedveil.client.records.release import anonymize
from fedveil.client.records.release.pipeline import ingest
from fedveil.common.contract import DataContract
from fedveil.common.errors import AnonymityError, UsageError

JOB = [["nurse", "care", "*"], ["medic", "care", "*"], ["clerk", "office", "*"]]


def agreed(**changes):
    columns = [
        {"name": "born", "role": "quasi", "type": "date", "format": "%d.%m.%Y", "low": "1920-01-01",
         "high": "2019-12-31", "levels": "decade", "encoding": "sets"},
        {"name": "age", "role": "quasi", "type": "number", "low": 0, "high": 100, "ladder": [[20, 50, 70], [50], []],
         "level": 2, "encoding": "sets", "missing": "indicator"},
        {"name": "job", "role": "quasi", "type": "category", "values": ["nurse", "medic", "clerk"], "hierarchy": JOB,
         "level": 1, "encoding": "sets"},
        {"name": "x", "role": "feature", "type": "number", "low": 0, "high": 1},
        {"name": "y", "role": "target", "type": "number", "low": 0, "high": 4, "threshold": 0},
    ]  # fmt: skip
    base = {
        "name": "r",
        "version": "1",
        "purpose": "p",
        "unit": "u",
        "k": 5,
        "l": 2,
        "sensitive_target": True,
        "t": 0.45,
    }
    return DataContract.model_validate({**base, "suppression_limit": 0.2, "columns": columns, **changes})


@pytest.fixture
def checked(table):
    rows = []
    for i in range(400):
        age = "" if i % 9 == 0 else str(i * 37 % 100)
        born = f"{1 + i * 7 % 28}.{1 + i % 12}.{1990 + i * 11 % 29}"
        rows.append([born, age, JOB[i * 5 % 7 % 3][0], f"{i / 400:.3f}", str(i * 13 % 5 if i * 29 % 97 < 48 else 0)])
    return read(table(rows, ["born", "age", "job", "x", "y"]), agreed())


@pytest.mark.parametrize("method", ["fixed", "mondrian", "optimal", "peel", "auto"])
def test_every_method_is_verified_and_encodes_alike(tmp_path, checked, method, released_inputs):
    contract, out = agreed(), tmp_path / "r.parquet"
    done = anonymize.anonymise(checked, contract, method, out)
    assert done.findings.met
    assert [f.name for f in done.findings.findings] == ["k-anonymity", "distinct l-diversity", "t-closeness"]
    assert done.stability.factor is None  # suppression for l, or a method that looks at the data
    released = pq.read_table(out)
    encoded = released_inputs.encode_released(released, contract)
    assert encoded.X.shape == (released.num_rows, contract.width)
    job = [n.startswith("job=") for n in contract.feature_names]
    assert abs(encoded.X[:, job].sum(axis=1) - 1).max() < 1e-6
    # The exact x travels along: every record's own job lies in its released set.
    exact = dict(zip((f"{x:.3f}" for x in checked.columns["x"]), checked.columns["job"], strict=True))
    place = {v: contract.feature_names.index(f"job={v}") for v in ("nurse", "medic", "clerk")}
    for row, x in zip(encoded.X, released["x"].to_pylist(), strict=True):
        assert row[place[exact[f"{x:.3f}"]]] > 0
    assert anonymize.verify(out, contract).rows == released.num_rows
    # Dates read as dates in every label, whatever made it: 9131 says nothing to a reader.
    born = set(released["born"].to_pylist()) - {"*"}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d|\[\d{4}-\d\d-\d\d,\d{4}-\d\d-\d\d[\])]", b) for b in born), born
    risk = anonymize.risk(out, contract)
    assert risk.prosecutor <= 1 / 5
    assert risk.unique == 0
    assert risk.marketer == risk.classes / risk.rows


def test_a_tampered_release_is_refused(tmp_path, checked):
    contract, out = agreed(), tmp_path / "r.parquet"
    anonymize.anonymise(checked, contract, "mondrian", out)
    released = pq.read_table(out)
    lonely = released.slice(0, 1).set_column(0, "born", pa.array(["[1969-09-23,1969-09-24]"]))
    plain = released.cast(
        pa.schema([(f.name, pa.string() if f.name in ("born", "age", "job") else f.type) for f in released.schema])
    )
    pq.write_table(pa.concat_tables([plain, lonely.cast(plain.schema)]), tmp_path / "bad.parquet")
    with pytest.raises(AnonymityError):
        anonymize.verify(tmp_path / "bad.parquet", contract)
    assert anonymize.risk(tmp_path / "bad.parquet", contract).prosecutor == 1


def test_what_cannot_be_met_leaves_no_file(tmp_path, checked):
    with pytest.raises(AnonymityError):
        anonymize.anonymise(checked, agreed(k=401), "mondrian", tmp_path / "r.csv")
    assert not list(tmp_path.glob("*r.csv*"))
    (tmp_path / "there.csv").write_text("")
    for name in ("there.csv", "r.xlsx"):
        with pytest.raises(UsageError, match="cannot be the release"):
            anonymize.anonymise(checked, agreed(), "mondrian", tmp_path / name)
    with pytest.raises(AnonymityError, match="not a readable release"):
        anonymize.risk(tmp_path / "there.csv", agreed())


ILL = ("flu", "cold", "gout")


def with_illness(**changes):
    columns = agreed().payload["columns"]
    ill = {"name": "ill", "role": "sensitive", "type": "category", "values": list(ILL), "missing": "indicator"}
    base = {"k": 3, "l": 2, "t": 0.5, "sensitive_target": False, "suppression_limit": 0.5}
    return agreed(columns=[*columns, ill], **{**base, **changes})


@pytest.fixture
def with_missing(table):
    """A checked table in which a third of the sensitive values is missing."""
    rows = []
    for i in range(300):
        born = f"{1 + i * 7 % 28}.{1 + i % 12}.{1990 + i * 11 % 29}"
        ill = "" if i % 3 == 0 else ILL[i * 7 % 11 % 3]
        rows.append([born, str(i * 37 % 100), JOB[i * 5 % 7 % 3][0], f"{i / 300:.3f}", str(i % 5), ill])
    return read(table(rows, ["born", "age", "job", "x", "y", "ill"]), with_illness())


@pytest.mark.parametrize("distance", ["equal", "ordered"])
@pytest.mark.parametrize("method", ["fixed", "mondrian", "optimal", "peel", "auto"])
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_missing_sensitive_values_verify_in_both_forms(tmp_path, with_missing, method, ending, distance):
    """It went wrong once: a CSV file's empty cell was one more sensitive value, so that its own release was refused."""
    contract, out = with_illness(t_distance=distance), tmp_path / f"r{ending}"
    done = anonymize.anonymise(with_missing, contract, method, out)
    assert anonymize.verify(out, contract) == done.findings


def test_forged_diversity_by_empty_cells(tmp_path, with_missing):
    contract, out = with_illness(t=None), tmp_path / "r.csv"
    anonymize.anonymise(with_missing, contract, "mondrian", out)
    rows = read_rows(out)
    first = rows[0]
    forged = [{**first, "ill": v} for v in ("flu", "", "flu")]
    write_rows(tmp_path / "f.csv", [*(r for r in rows if not same(r, first)), *forged])
    with pytest.raises(AnonymityError, match="distinct l-diversity"):
        anonymize.verify(tmp_path / "f.csv", contract)


def read_rows(path):
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def write_rows(path, rows):
    with path.open("w", newline="") as f:
        out = csv.DictWriter(f, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    return path


TAMPERED = {
    "a number beyond its bounds": ("x", "430"),
    "a number that is none": ("x", "abc"),
    "not a number": ("x", "nan"),
    "no number where none may be missing": ("x", ""),
    "a class that nobody agreed on": ("y", "maybe"),
    "no class": ("y", ""),
    "a name for a diagnosis": ("ill", "X Smith tel 030 12345678"),
    "missing where nothing may be": ("job", "missing"),
    "a quasi-identifier beyond its bounds": ("age", "[20,900]"),
}


@pytest.mark.parametrize("how", TAMPERED)
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_cells_that_the_contract_forbids_do_not_verify(tmp_path, with_missing, how, ending):
    contract, out = with_illness(k=2, l=1, t=None), tmp_path / "r.csv"
    anonymize.anonymise(with_missing, contract, "mondrian", out)
    name, cell = TAMPERED[how]
    rows = read_rows(out)
    spoilt = [{**r, name: cell} if r == rows[0] or (name in ("job", "age") and same(r, rows[0])) else r for r in rows]
    path = write_rows(tmp_path / "bad.csv", spoilt)
    good = write_rows(tmp_path / "good.csv", rows)
    if ending == ".parquet":
        path, good = (as_parquet(p, contract) for p in (path, good))
        if path is None:
            return  # a Parquet column of numbers cannot hold this text
    assert anonymize.verify(good, contract).met
    with pytest.raises(AnonymityError) as refused:
        anonymize.verify(path, contract)
    assert repr(name) in str(refused.value)
    assert refused.value.hint
    assert "Smith" not in str(refused.value)


def same(a, b):
    return all(a[n] == b[n] for n in ("born", "age", "job"))


def as_parquet(path, contract):
    rows = read_rows(path)
    columns = {}
    for n in rows[0]:
        cells = [r[n] or None for r in rows]
        if n == "x":
            if "abc" in cells:
                return None
            cells = [None if v is None else float(v) for v in cells]
        columns[n] = cells
    pq.write_table(pa.table(columns), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


@pytest.mark.parametrize("distance", ["equal", "ordered"])
def test_a_fixed_release_shows_its_distance(tmp_path, with_missing, distance, monkeypatch, secret):
    """Two verifiers that share no code agree on every figure that is shown, the distance among them."""
    contract = with_illness(t_distance=distance, suppression_limit=0.0, l=1, t=1.0, k=2)
    done = anonymize.anonymise(with_missing, contract, "fixed", tmp_path / "r.csv")
    released = ingest(tmp_path / "t.csv", contract, tmp_path / "w", secret=secret).released
    monkeypatch.delattr(anonymize.recheck, "require")
    shown = anonymize.verify(released, contract)
    assert [f.name for f in shown.findings] == [f.name for f in done.findings.findings]
    for ours, theirs in zip(shown.findings, done.findings.findings, strict=True):
        assert ours.worst == pytest.approx(theirs.worst)
        assert ours.required == theirs.required


def test_every_refusal_of_a_release_says_what_to_do(tmp_path, with_missing):
    contract, out = with_illness(), tmp_path / "r.csv"
    anonymize.anonymise(with_missing, contract, "mondrian", out)
    head, *lines = out.read_text().splitlines()
    (tmp_path / "short.csv").write_text("\n".join([head, *lines[:5], ""]))
    (tmp_path / "empty.csv").write_text(head + "\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for name in ("none.csv", "none.parquet", "short.csv", "empty.csv", "other.csv"):
        for judge in (anonymize.verify, anonymize.risk) if name != "short.csv" else (anonymize.verify,):
            with pytest.raises(AnonymityError) as refused:
                judge(tmp_path / name, contract)
            assert refused.value.hint, name


@pytest.mark.parametrize("label", ["[1990-01-01,2030-01-01]", "[1899-01-01,1990-01-01]", "[1990-02-30,1991-01-01]",
                                   "[1991-01-01,1990-01-01]", "1880-01-01", "01.01.1990"])  # fmt: skip
def test_dates_outside_the_bounds_do_not_verify(tmp_path, with_missing, label):
    contract = with_illness(k=2, l=1, t=None)
    anonymize.anonymise(with_missing, contract, "mondrian", tmp_path / "r.csv")
    rows = read_rows(tmp_path / "r.csv")
    path = write_rows(tmp_path / "bad.csv", [{**r, "born": label} if same(r, rows[0]) else r for r in rows])
    with pytest.raises(AnonymityError, match="'born'"):
        anonymize.verify(path, contract)


@pytest.mark.parametrize("cell", [" 0.5", "0.5 ", "0_1", "\u0661", "+", "1e", "nan", "inf", "0x1"])
def test_fixed_levels_and_other_methods_read_numbers_alike(tmp_path, with_missing, cell):
    """It went wrong once: ``" 0.5"`` passed a file of fixed levels, and no other."""
    contract, out = with_illness(k=2, l=1, t=None), tmp_path / "r.csv"
    anonymize.anonymise(with_missing, contract, "fixed", out)
    rows = read_rows(out)
    assert anonymize.verify(write_rows(tmp_path / "good.csv", [{**rows[0], "x": "+5E-1"}, *rows[1:]]), contract).met
    for kind in (contract, with_illness(k=2, l=1, t=0.9)):
        with pytest.raises(AnonymityError):
            anonymize.verify(write_rows(tmp_path / "bad.csv", [{**rows[0], "x": cell}, *rows[1:]]), kind)


def test_codes_are_the_same_as_texts_and_as_whole_numbers(tmp_path):
    """It went wrong once: a coded feature 1 passed as CSV, and was refused where Parquet held it as a number."""
    columns = [
        {"name": "q", "role": "quasi", "type": "category", "values": ["a", "b"], "levels": [["a"], ["b"]]},
        {"name": "g", "role": "feature", "type": "category", "values": [1, 2]},
        {"name": "y", "role": "target", "type": "category", "values": [0, 1]},
    ]
    contract = agreed(columns=columns, k=2, l=1, t=None, sensitive_target=False)
    for g, good in ((1, True), (3, False)):
        texts = pa.table({"q": ["a"] * 3, "g": [str(g)] * 3, "y": ["0"] * 3})
        numbers = pa.table({"q": ["a"] * 3, "g": [g] * 3, "y": [0] * 3})
        for i, table in enumerate((texts, numbers)):
            pq.write_table(table, tmp_path / f"{i}.parquet")
            if good:
                assert anonymize.verify(tmp_path / f"{i}.parquet", contract).met
            else:
                with pytest.raises(AnonymityError, match="'g': 3 cells"):
                    anonymize.verify(tmp_path / f"{i}.parquet", contract)
