"""The same rows in every form: encodings, separators, decimals, Arrow, SQL, DuckDB, FHIR; in bounded memory."""

import datetime as dt
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedveil.client.records.read import databases, fhir, sources
from fedveil.client.records.read.sources import Dialect, DuckSource, FhirSource, SqlSource, read
from fedveil.common.errors import ConfigError, DataError, UsageError

HEADER = ["patient", "age", "job", "dose", "grade", "y"]


def same(a, b):
    assert a.rows == b.rows
    for name in a.columns:
        np.testing.assert_array_equal(a.columns[name], b.columns[name])
    np.testing.assert_array_equal(a.identity[:, None] == a.identity, b.identity[:, None] == b.identity)


@pytest.fixture
def expected(contract, rows, table):
    rows[3][3], rows[7][3] = "", "?"
    rows[5] = list(rows[4])
    return read(table(rows), contract)


@pytest.fixture
def odd(rows):
    rows[3][3], rows[7][3] = "", "?"
    rows[5] = list(rows[4])
    return rows


def text(rows, delimiter=",", decimal="."):
    cells = [HEADER, *([r[0], *(v.replace(".", decimal) for v in r[1:])] for r in rows)]
    quoted = [[f'"{v}"' if delimiter in v else v for v in r] for r in cells]
    return "\r\n".join(delimiter.join(r) for r in quoted) + "\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encodings_and_separators(tmp_path, contract, odd, expected, encoding, delimiter):
    odd = [[f"Müller-{r[0]}", *r[1:]] for r in odd]  # an identifier in the file's own encoding
    (tmp_path / "t.csv").write_bytes(text(odd, delimiter).encode(encoding))
    declared = "auto" if encoding in ("utf-8", "utf-8-sig", "utf-16") else encoding
    same(read(tmp_path / "t.csv", contract, Dialect(encoding=declared)), expected)


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_quoted_headers(tmp_path, contract, odd, expected, delimiter):
    """Under a foreign delimiter a quoted header is malformed; that must not hide the right one."""
    head, _, rest = text(odd, delimiter).partition("\r\n")
    quoted = delimiter.join(f'"{h}"' for h in head.split(delimiter))
    (tmp_path / "t.csv").write_text(quoted + "\n" + rest)
    same(read(tmp_path / "t.csv", contract), expected)


@pytest.mark.parametrize("delimiter", [";", ","])
def test_decimal_commas_are_declared(tmp_path, contract, odd, expected, delimiter):
    (tmp_path / "t.csv").write_text(text(odd, delimiter, ","))
    same(read(tmp_path / "t.csv", contract, Dialect(decimal=",")), expected)
    with pytest.raises(DataError, match="'dose': .* cells are not numbers .*decimal comma has to be declared"):
        read(tmp_path / "t.csv", contract)


def test_an_undeclared_encoding_is_refused(tmp_path, contract, odd):
    odd = [[f"Müller-{r[0]}", *r[1:]] for r in odd]
    (tmp_path / "t.csv").write_bytes(text(odd).encode("latin-1"))
    with pytest.raises(DataError, match="declared encoding"):
        read(tmp_path / "t.csv", contract)


def test_ragged_rows_say_how_many_and_where(tmp_path, contract, odd):
    lines = text(odd).splitlines()
    lines[3] += ",x"
    lines[9] = "1,2"
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"2 rows have another number of cells than the header \(line 4, 10\)"):
        read(tmp_path / "t.csv", contract)


@pytest.mark.parametrize("wrong", [{"encoding": "utf-7"}, {"delimiter": "x"}, {"decimal": ";"}, {"thousands": "."}])
def test_dialects_are_bounded(wrong):
    with pytest.raises(ConfigError):
        Dialect(**wrong)


def arrow(odd):
    return pa.table({n: pa.array(v) for n, v in zip(HEADER, zip(*odd, strict=True), strict=True)})


@pytest.mark.parametrize("ending", [".arrow", ".feather", ".pq"])
def test_arrow_files(tmp_path, contract, odd, expected, ending):
    path = tmp_path / f"t{ending}"
    if ending == ".pq":
        pq.write_table(arrow(odd), path, row_group_size=5)
    else:
        with pa.ipc.new_file(path, arrow(odd).schema) as out:
            out.write_table(arrow(odd), max_chunksize=7)
    same(read(path, contract), expected)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="not a readable"):
        read(path, contract)


def test_batches_do_not_matter(tmp_path, contract, odd, expected, monkeypatch):
    """Streaming gives what one piece gives, also for rows that repeat in another batch."""
    pq.write_table(arrow(odd), tmp_path / "t.parquet")
    monkeypatch.setattr("fedveil.client.records.read.files.BATCH_ROWS", 3)
    same(read(tmp_path / "t.parquet", contract), expected)


SELECT = "SELECT patient, age, job, dose, grade, y FROM t ORDER BY n"


def typed(odd):
    return [(i, r[0], int(r[1]), r[2], None if r[3] in ("", "?") else float(r[3]), int(r[4]), float(r[5]))
            for i, r in enumerate(odd)]  # fmt: skip


def fill(url, odd):
    import sqlalchemy as sa

    engine = sa.create_engine(url)
    with engine.begin() as c:
        columns = "n INTEGER, patient VARCHAR(20), age INTEGER, job VARCHAR(9), dose DOUBLE PRECISION, grade INTEGER"
        c.execute(sa.text(f"CREATE TABLE t ({columns}, y NUMERIC(6,2))"))
        names = ("n", *HEADER)
        c.execute(
            sa.text(f"INSERT INTO t VALUES ({', '.join(':' + n for n in names)})"),
            [dict(zip(names, r, strict=True)) for r in typed(odd)],
        )
    engine.dispose()


CHANGING = ("drop table t", "DELETE FROM t", "UPDATE t SET age = 0", "INSERT INTO t SELECT * FROM t",
            "CREATE TABLE other AS SELECT * FROM t", "WITH x AS (SELECT 1) DELETE FROM t")  # fmt: skip


@pytest.mark.parametrize("year", [1, 87, 987, 2021])
def test_a_year_has_four_digits_whatever_the_platform(year):
    """As the platform's strftime writes it, the missing code 0001-01-01 comes out as 1-01-01."""
    assert databases._text(dt.date(year, 1, 2), "%Y-%m-%d") == f"{year:04}-01-02"


def test_a_misspelt_sqlite_file_is_not_made(tmp_path, contract):
    pytest.importorskip("sqlalchemy")
    with pytest.raises(DataError, match="not a file"):
        read(SqlSource(f"sqlite:///{tmp_path / 'none.db'}", SELECT), contract)
    assert not list(tmp_path.iterdir())


def check_database(url, contract, odd, expected, monkeypatch):
    fill(url, odd)
    same(read(SqlSource(url, SELECT), contract), expected)
    monkeypatch.setattr("fedveil.client.records.read.databases.BATCH_ROWS", 5)
    same(read(SqlSource(url, SELECT), contract), expected)
    with pytest.raises(DataError, match=r"could not be run \(\w+Error\)") as e:
        read(SqlSource(url, "SELECT canary73 FROM t"), contract)
    assert "canary73" not in str(e.value)
    with pytest.raises(DataError, match="missing: 'y'"):
        read(SqlSource(url, "SELECT patient, age, job, dose, grade FROM t"), contract)
    for query in CHANGING:
        with pytest.raises(UsageError):
            read(SqlSource(url, query), contract)
    # The second defence alone: what the text does not show, the connection refuses.
    with monkeypatch.context() as patched:
        patched.setattr("fedveil.client.records.read.databases.require_select", lambda *_: None)
        for query in CHANGING:
            with pytest.raises(DataError, match="could not be run"):
                read(SqlSource(url, query), contract)
    same(read(SqlSource(url, SELECT), contract), expected)
    key = bytes(32)
    twice = {sources.commitment(key, SqlSource(url, SELECT), contract) for _ in range(2)}
    assert len(twice) == 1
    assert sources.commitment(key, SqlSource(url, SELECT + " LIMIT 5"), contract) not in twice


def test_sqlite(tmp_path, contract, odd, expected, monkeypatch):
    pytest.importorskip("sqlalchemy")
    check_database(f"sqlite:///{tmp_path / 't.db'}", contract, odd, expected, monkeypatch)
    source = SqlSource("sqlite:///x?password=canary73", SELECT)
    assert "canary73" not in repr(source) + sources.described(source)


def postgres_bin():
    found = sorted(Path("/usr/lib/postgresql").glob("[0-9]*/bin"), key=lambda p: int(p.parent.name))
    initdb = shutil.which("initdb")
    return found[-1] if found else Path(initdb).parent if initdb else None


@pytest.fixture
def postgres():
    """A private cluster on a socket in a short temporary folder, as a user that is not root; stopped afterwards."""
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("psycopg")
    binaries = postgres_bin()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    import pwd
    import tempfile

    as_user: dict = {}
    if os.geteuid() == 0:
        try:
            owner = pwd.getpwnam("postgres")
            as_user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        except KeyError:
            pytest.skip("running as root and no user 'postgres' to run the server as")
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    if as_user:
        os.chown(folder, as_user["user"], as_user["group"])
    run = {"check": True, "capture_output": True, "cwd": folder, **as_user}
    try:
        made = [binaries / "initdb", "-D", folder / "d", "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(made, **run)
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        started = [binaries / "pg_ctl", "-D", folder / "d", "-w", "-l", folder / "log", "-o", options, "start"]
        # The server keeps the pipes of whoever started it: none are given to it.
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(started, check=True, cwd=folder, **silent, **as_user)
        yield f"postgresql+psycopg://tester@/postgres?host={folder}"
        subprocess.run([binaries / "pg_ctl", "-D", folder / "d", "-m", "immediate", "stop"], **run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_postgresql(postgres, contract, odd, expected, monkeypatch):
    check_database(postgres, contract, odd, expected, monkeypatch)


def test_a_database_that_is_not_there(contract):
    pytest.importorskip("sqlalchemy")
    server = "postgresql+psycopg://u:canary73@127.0.0.1:1/x"
    for url in ("sqlite:////nowhere/canary73.db", server, "nonsense", "canary73://x"):
        with pytest.raises((DataError, ConfigError)) as e:
            read(SqlSource(url, SELECT), contract)
        assert "canary73" not in str(e.value)


def test_duckdb(tmp_path, contract, odd, expected, monkeypatch):
    duckdb = pytest.importorskip("duckdb")
    path, out = tmp_path / "t.duckdb", tmp_path / "out.csv"
    (tmp_path / "x.csv").write_text("patient,age,job,dose,grade,y\n")
    with duckdb.connect(str(path)) as c:
        columns = "n INTEGER, patient VARCHAR, age TINYINT, job VARCHAR, dose DOUBLE, grade INTEGER, y DECIMAL(6,2)"
        c.execute(f"CREATE TABLE t ({columns})")
        c.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?, ?)", typed(odd))
    same(read(DuckSource(path, SELECT), contract), expected)
    with pytest.raises(DataError, match="could not be run"):
        read(DuckSource(path, "SELECT canary73 FROM t"), contract)
    with pytest.raises(DataError, match="not a file"):
        read(DuckSource(tmp_path / "none.duckdb", SELECT), contract)
    for query in (*CHANGING, f"COPY t TO '{out}'", f"ATTACH '{tmp_path / 'new.duckdb'}'"):
        with pytest.raises(UsageError):
            read(DuckSource(path, query), contract)
    for query in (f"SELECT ['a]'] AS l, a FROM t; COPY t TO '{out}' -- '", f"SELECT * FROM '{tmp_path / 'x.csv'}'"):
        with pytest.raises((UsageError, DataError)):
            read(DuckSource(path, query), contract)
    # What the text does not show, DuckDB's own parser does, then its statements' types, then the connection.
    monkeypatch.setattr("fedveil.client.records.read.databases.require_select", lambda *_: None)
    for query in (*CHANGING, f"COPY t TO '{out}'", f"{SELECT}; COPY t TO '{out}'"):
        with pytest.raises((UsageError, DataError), match="as one SELECT|could not be run"):
            read(DuckSource(path, query), contract)
    assert not out.exists()
    monkeypatch.setattr("fedveil.client.records.read.databases._single_select", lambda duckdb, connection, query: query)
    for query in CHANGING:
        with pytest.raises(DataError, match="could not be run"):
            read(DuckSource(path, query), contract)
    same(read(DuckSource(path, SELECT), contract), expected)
    assert [p.name for p in tmp_path.glob("*.duckdb")] == ["t.duckdb"]


PATHS = {"patient": "identifier[system=urn:mrn].value", "age": "extension[url=age].valueInteger", "job": "job.text",
         "dose": "dose[0].value", "grade": "grade", "y": "y"}  # fmt: skip


def resource(r):
    names = [{"system": "x", "value": "no"}, {"system": "urn:mrn", "value": r[0]}]
    out = {"resourceType": "Patient", "identifier": names,
           "extension": [{"url": "age", "valueInteger": int(r[1])}], "job": {"text": r[2]}, "grade": int(r[4]),
           "y": float(r[5])}  # fmt: skip
    return out if r[3] == "" else {**out, "dose": [{"value": r[3]}]}


def test_fhir(tmp_path, contract, odd, expected):
    path = tmp_path / "t.ndjson"
    path.write_text("\n".join(json.dumps(resource(r)) for r in odd) + "\n\n")
    same(read(FhirSource(path, "Patient", PATHS), contract), expected)
    for paths, words in (
        ({**PATHS, "job": "job"}, "ends in an object"),
        ({k: v for k, v in PATHS.items() if k != "y"}, "missing: 'y'"),
        ({**PATHS, "z": "y"}, "not in the contract"),
    ):
        with pytest.raises(DataError, match=words):
            read(FhirSource(path, "Patient", paths), contract)
    path.write_text(path.read_text() + '{"resourceType": "Observation"}\n')
    with pytest.raises(DataError, match="line 26 is not a Patient resource"):
        read(FhirSource(path, "Patient", PATHS), contract)


def test_fhir_texts_that_are_none_and_byte_order_marks(tmp_path, contract, odd, expected):
    path = tmp_path / "t.ndjson"
    lines = "\n".join(json.dumps(resource(r)) for r in odd)
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    same(read(FhirSource(path, "Patient", PATHS), contract), expected)
    path.write_text(lines.replace(f'"{odd[0][0]}"', '"\\ud800"', 1))
    with pytest.raises(DataError, match="line 1 is not a Patient") as refused:
        read(FhirSource(path, "Patient", PATHS), contract)
    assert refused.value.hint


BORN = {"name": "born", "role": "quasi", "type": "date", "format": "%d.%m.%Y", "low": "1900-01-01",
        "high": "2020-12-31", "levels": "decade"}  # fmt: skip
DAYS = [dt.date(1950 + i, 1 + i % 12, 1 + i % 28) for i in range(24)]


@pytest.mark.parametrize("kind", [pa.date32(), pa.date64(), pa.timestamp("us"), pa.timestamp("ns")])
def test_dates_that_a_file_holds_as_dates(tmp_path, make, odd, kind):
    """It went wrong once: they are dates whatever form the contract gives for texts, and were refused as wrong ones."""
    contract = make(columns=[*make().payload["columns"], BORN])
    day = pa.array([*DAYS[:-1], None], pa.date32()).cast(kind)
    pq.write_table(arrow(odd).append_column("born", day), tmp_path / "t.parquet")
    raw = read(tmp_path / "t.parquet", contract)
    epoch = dt.date(1970, 1, 1)
    assert raw.columns["born"][:-1].tolist() == [(d - epoch).days for d in DAYS[:-1]]
    assert np.isnan(raw.columns["born"][-1])
    rules = {"retention": {"column": "born", "days": 20000}}
    kept = read(tmp_path / "t.parquet", make(columns=contract.payload["columns"], **rules)).rows
    assert 0 < kept < 24


def test_dates_that_a_database_holds_as_dates(tmp_path, make, odd):
    sa = pytest.importorskip("sqlalchemy")
    url = f"sqlite:///{tmp_path / 't.db'}"
    fill(url, odd)
    engine = sa.create_engine(url)
    table = sa.Table("b", sa.MetaData(), sa.Column("n", sa.Integer), sa.Column("born", sa.Date))
    with engine.begin() as c:
        table.create(c)
        c.execute(table.insert(), [{"n": i, "born": d} for i, d in enumerate(DAYS)])
    engine.dispose()
    # SQLite itself has no dates: the column arrives as a text in ISO form, which the contract then has to say.
    contract = make(columns=[*make().payload["columns"], {**BORN, "format": "%Y-%m-%d"}])
    query = "SELECT patient, age, job, dose, grade, y, born FROM t JOIN b ON t.n = b.n ORDER BY t.n"
    assert read(SqlSource(url, query), contract).columns["born"][0] == (DAYS[0] - dt.date(1970, 1, 1)).days


def test_dates_of_postgresql(postgres, make, odd):
    import sqlalchemy as sa

    fill(postgres, odd)
    engine = sa.create_engine(postgres)
    with engine.begin() as c:
        c.execute(sa.text("ALTER TABLE t ADD COLUMN born DATE"))
        c.execute(sa.text("UPDATE t SET born = DATE '1950-02-03' + n"))
    engine.dispose()
    contract = make(columns=[*make().payload["columns"], BORN])
    raw = read(SqlSource(postgres, SELECT.replace(" FROM", ", born FROM")), contract)
    first = (dt.date(1950, 2, 3) - dt.date(1970, 1, 1)).days
    assert raw.columns["born"].tolist() == [first + i for i in range(24)]


@pytest.mark.parametrize("path", ["", ".", "a.", "a[", "a[x]", "a[1", "a..b", "a b", "a[b=]", "1a"])
def test_paths_are_checked(path):
    with pytest.raises(ConfigError, match="is not a path"):
        fhir.parse_path(path)


MEMORY = """
import resource, sys
from pathlib import Path
from fedveil.client.records.read import sources
from fedveil.client.records.read import files
from fedveil.client.records.judge.profile import profile
from fedveil.common.contract import DataContract
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
contract = DataContract.model_validate({"name": "m", "version": "1", "purpose": "p", "unit": "u", "k": 2, "columns": [
    {"name": "x", "role": "feature", "type": "number", "low": 0, "high": 1e9},
    {"name": "s", "role": "drop"}, {"name": "y", "role": "target", "type": "category", "values": ["no", "yes"]}]})
path = Path(sys.argv[1])
if sys.argv[2] == "profile":
    list(zip(range(3), sources.open_source(path, contract).batches))
    before = peak()
    profile(path)
    print(peak() - before)
else:
    before = peak()
    rows = sum(t.num_rows for t in sources.open_source(path, contract).batches)
    print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    """A file whose texts take ten times the allowed memory: read batch by batch in a process of its own."""
    n, note = 40_000, "x" * 180
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        schema = pa.schema([("x", pa.int64()), ("s", pa.string()), ("y", pa.string())])
        with pq.ParquetWriter(path, schema, compression="zstd") as out:
            for i in range(50):
                part = [pa.array(range(i * n, i * n + n)), pa.array([note] * n), pa.array(["no"] * n)]
                out.write_table(pa.table(part, schema=schema))
        limit = 120
    else:
        with path.open("w") as f:
            f.write("x,s,y\n")
            for i in range(20):
                f.write("".join(f"{i * n + j},{note},no\n" for j in range(n)))
        limit = 100
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path), "stream"], capture_output=True, text=True, check=True
    )
    grown = float(done.stdout)
    whole = (50 if kind == "parquet" else 20) * n * 200 / 1e6
    print(f"{kind}: {whole:.0f} MB of cells, peak grew by {grown:.0f} MiB")
    assert grown < limit
