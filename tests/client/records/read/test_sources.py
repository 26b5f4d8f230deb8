"""Reading: two formats, one meaning, and clear refusals."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedveil.client.records.read.sources import read
from fedveil.common.errors import DataError

HEADER = ["patient", "age", "job", "dose", "grade", "y"]


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def typed(rows, **changes):
    """The rows as a program would write them to Parquet: numbers as numbers, null for missing."""
    _, age, job, dose, grade, y = zip(*rows, strict=True)
    base = {"age": pa.array(map(int, age), pa.int16()), "job": pa.array(job).dictionary_encode(),
            "dose": pa.array([None if d in ("", "?") else float(d) for d in dose]),
            "grade": pa.array(map(float, grade)), "y": pa.array(map(float, y), pa.float32())}  # fmt: skip
    return {**base, **changes}


def test_csv_and_parquet_mean_the_same(tmp_path, contract, rows, table):
    rows[3][3], rows[7][3] = "", "?"
    a = read(table(rows), contract)
    b = read(parquet(tmp_path / "t.parquet", **typed(rows)), contract)
    assert a.rows == b.rows == len(rows)
    assert set(a.columns) == set(b.columns) == {"age", "job", "dose", "grade", "y"}
    for name in a.columns:
        np.testing.assert_array_equal(a.columns[name], b.columns[name])
    assert np.flatnonzero(np.isnan(a.columns["dose"])).tolist() == [3, 7]
    assert a.columns["grade"][0] == "1"
    assert "patient" not in a.columns


def test_bom_spaces_and_quotes_are_understood(tmp_path, contract):
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbf age,job, dose,grade,y\r\n 20 ,"a", +1.5e0 ,1,.5\r\n')
    raw = read(path, contract)
    assert [raw.columns[n][0] for n in ("age", "job", "dose", "grade", "y")] == [20, "a", 1.5, "1", 0.5]


def test_representation_shows_no_values(contract, rows, table):
    raw = read(table([["p", "31.25", *rows[0][2:]]]), contract)
    assert raw.columns["age"][0] == 31.25
    assert "31.25" not in repr(raw)


REFUSED = {
    "missing column": (
        lambda rows: ([r[:-1] for r in rows], ["patient", "age", "job", "dose", "grade"]),
        "missing: 'y'",
    ),
    "unknown column": (
        lambda rows: ([[*r, "1"] for r in rows], ["patient", "age", "job", "dose", "grade", "y", "z"]),
        "positions 7",
    ),
    "duplicate header": (
        lambda rows: ([[*r, "1"] for r in rows], ["patient", "age", "job", "dose", "grade", "y", "age"]),
        "twice: 'age'",
    ),
    "no header": (lambda rows: (rows, []), "positions 1"),
    "header only": (lambda rows: ([], None), "no rows"),
    "text in a number": (
        lambda rows: ([[*r[:1], "old", *r[2:]] for r in rows], None),
        "'age': 24 cells are not numbers",
    ),
    "one comma number": (lambda rows: ([*rows, ["p", "1,5", *rows[0][2:]]], None), "'age': 1 cells are not numbers"),
    "hexadecimal": (lambda rows: ([*rows, ["p", "0x1F", *rows[0][2:]]], None), "not numbers"),
    "underscore": (lambda rows: ([*rows, ["p", "1_0", *rows[0][2:]]], None), "not numbers"),
    "nan": (lambda rows: ([*rows, ["p", "NaN", *rows[0][2:]]], None), "'age': 1 cells are NaN or infinite"),
    "infinity": (lambda rows: ([*rows, ["p", "-inf", *rows[0][2:]]], None), "NaN or infinite"),
    "overflow": (lambda rows: ([*rows, ["p", "1e999", *rows[0][2:]]], None), "NaN or infinite"),
    "ragged": (lambda rows: ([*rows, rows[0][:-1], [*rows[0], "x"]], None), "2 rows have another number of cells"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_csv_refusals(contract, rows, table, how):
    change, words = REFUSED[how]
    with pytest.raises(DataError, match=words):
        read(table(*change(rows)), contract)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"\n\n", "no readable header"),
        ("t.csv", b'"age,job\n1,2\n', "no readable header"),
        ("t.csv", b"\xff\xfe\x00", "no readable header"),
        ("t.csv", b"age,job,dose,grade,y\n\xff,a,1,1,1\n", "not a readable CSV"),
        ("t.parquet", b"PAR1 but not really PAR1", "not a readable Parquet"),
        ("t.xlsx", b"PK", "not a .csv, .parquet or .arrow file"),
    ],
)
def test_unreadable_files(tmp_path, contract, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words):
        read(tmp_path / name, contract)


def test_absent_file(tmp_path, contract):
    with pytest.raises(DataError, match="not a file"):
        read(tmp_path / "none.csv", contract)


PARQUET = {
    "nan in a float": (lambda n: {"dose": pa.array([float("nan")] * n)}, "NaN or infinite"),
    "infinity in a float": (lambda n: {"y": pa.array([float("inf")] * n)}, "NaN or infinite"),
    "text in a number": (lambda n: {"age": pa.array(["old"] * n)}, "not numbers"),
    "truth value in a number": (lambda n: {"age": pa.array([True] * n)}, "not numbers"),
    "list": (lambda n: {"job": pa.array([["a"]] * n)}, "'job' has cells that are neither"),
    "length of time": (lambda n: {"age": pa.array([20] * n, pa.duration("s"))}, "'age' has cells that are neither"),
    "date": (lambda n: {"age": pa.array([0] * n, pa.date32())}, "not numbers"),
}


@pytest.mark.parametrize("how", PARQUET)
def test_parquet_refusals(tmp_path, contract, rows, how):
    change, words = PARQUET[how]
    with pytest.raises(DataError, match=words):
        read(parquet(tmp_path / "t.parquet", **typed(rows, **change(len(rows)))), contract)


def test_identifiers_may_be_dates_and_dropped_columns_anything(tmp_path, make, rows):
    columns = [*make().payload["columns"], {"name": "junk", "role": "drop"}]
    born = pa.array(range(len(rows)), pa.date32())
    for junk in (pa.array([["a"]] * len(rows)), pa.array([float("nan")] * len(rows))):
        path = parquet(tmp_path / "t.parquet", **typed(rows), patient=born, junk=junk)
        raw = read(path, make(columns=columns))
        assert set(raw.columns) == {"age", "job", "dose", "grade", "y"}
        assert len(np.unique(raw.identity)) == len(rows)


def test_dropped_columns_of_a_csv_are_not_read(table, make, rows):
    columns = [{"name": "junk", "role": "drop"}, *make().payload["columns"]]
    path = table([[f"x{i}", *r] for i, r in enumerate(rows + rows)], ["junk", *HEADER])
    raw = read(path, make(columns=columns))
    assert raw.rows == 2 * len(rows)
    assert len(np.unique(raw.identity)) == len(rows)  # they repeat, whatever the dropped column says
    np.testing.assert_array_equal(raw.columns["age"], [float(r[1]) for r in rows + rows])


def test_parquet_header_rules(tmp_path, contract, rows):
    columns = typed(rows)
    table = pa.table([*columns.values(), columns["age"]], names=[*columns, "age"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="twice: 'age'"):
        read(tmp_path / "t.parquet", contract)
    with pytest.raises(DataError, match="positions 6"):
        read(parquet(tmp_path / "u.parquet", **columns, z=columns["age"]), contract)


@pytest.mark.parametrize(
    "kind", [pa.decimal128(5, 2), pa.float16(), pa.float32(), pa.int64(), pa.string(), pa.large_string()]
)
def test_parquet_number_types(tmp_path, contract, rows, kind):
    age = pa.array([20.0, 70.0] * (len(rows) // 2))
    age = pa.array([str(int(x)) for x in age.to_pylist()], kind) if "string" in str(kind) else age.cast(kind)
    raw = read(parquet(tmp_path / "t.parquet", **typed(rows, age=age)), contract)
    assert raw.columns["age"].tolist() == [20.0, 70.0] * (len(rows) // 2)


def test_parquet_categories_keep_one_spelling(tmp_path, contract, rows):
    n = len(rows)
    raw = read(parquet(tmp_path / "t.parquet", **typed(rows, grade=pa.array([2.0, None] * (n // 2)))), contract)
    assert raw.columns["grade"].tolist() == ["2", ""] * (n // 2)
    raw = read(parquet(tmp_path / "u.parquet", **typed(rows, grade=pa.array([2.5] * n))), contract)
    assert set(raw.columns["grade"]) == {"2.5"}
