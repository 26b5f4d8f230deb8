"""Tables from databases: SQL through SQLAlchemy (extra ``sql``), and DuckDB (extra ``duckdb``).

The query is the site's own, and only reads. Its text is checked (:mod:`.statements`). The connection is read-only if
the database offers that (SQLite, PostgreSQL, MySQL and MariaDB, Oracle, DuckDB). Nothing is ever committed. DuckDB
parses the query itself before it runs, and reads no file but its own. Rows come in batches, through a server-side
cursor if the database has one. A driver's error message may hold values and passwords, so it is replaced: only the
error's class is named.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedveil.client.records.read.files import BATCH_ROWS, Opened, check_header, wanted
from fedveil.client.records.read.statements import HINT, require_select
from fedveil.common.contract import DataContract
from fedveil.common.errors import ConfigError, DataError, UsageError

# The first statement on a connection. For a database that is not listed, only the query's text is checked.
_READ_ONLY = {
    "sqlite": "PRAGMA query_only = ON",
    "postgresql": "SET TRANSACTION READ ONLY",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
    "oracle": "SET TRANSACTION READ ONLY",
}


@dataclass(frozen=True)
class SqlSource:
    """A query against a database that SQLAlchemy knows.

    Attributes:
        url: as SQLAlchemy writes it. It may hold a password and is never shown.
        query: one SELECT whose columns are the contract's. Order its rows, so that its commitment can be repeated.
    """

    url: str = field(repr=False)
    query: str


@dataclass(frozen=True)
class DuckSource:
    """A query against a DuckDB file, opened read-only."""

    path: Path
    query: str


def open_sql(source: SqlSource, contract: DataContract) -> Opened:
    """Run the query; its rows come batch by batch.

    Raises:
        ConfigError: SQLAlchemy or the database's driver is not installed.
        UsageError: the query is not one SELECT.
        DataError: the query fails, or its columns are not the contract's.
    """
    try:
        import sqlalchemy
    except ModuleNotFoundError as e:
        raise ConfigError("a SQL source needs sqlalchemy", hint="pip install 'fedveil[sql]'") from e
    require_select(source.query, _kind(sqlalchemy, source.url))
    rows = _sql_rows(sqlalchemy, source)
    header = _checked_header(rows, contract)
    return Opened(tuple(h for h in header if h in wanted(contract)), _as_tables(rows, header, contract))


def _kind(sqlalchemy: Any, url: str) -> str:
    """The kind of database; "" for a URL that cannot be read. Such a URL is refused when the engine is made."""
    try:
        return sqlalchemy.make_url(url).get_backend_name()
    except sqlalchemy.exc.SQLAlchemyError:
        return ""


def _checked_header(rows: Generator[Any, None, None], contract: DataContract) -> list[str]:
    """The first item, which is the header. If it has other columns than the contract, the query is closed at once."""
    header = next(rows)
    try:
        check_header("the query", header, contract)
    except DataError:
        rows.close()
        raise
    return header


def _sql_rows(sqlalchemy: Any, source: SqlSource) -> Generator[list[Any], None, None]:
    """First the header, then lists of rows."""
    failure, missing = "", ""
    try:
        engine = sqlalchemy.create_engine(source.url, hide_parameters=True)
        _require_file(engine.url)
        try:
            with engine.connect() as connection:
                if statement := _READ_ONLY.get(engine.dialect.name):
                    connection.exec_driver_sql(statement)
                streaming = connection.execution_options(stream_results=True, yield_per=BATCH_ROWS)
                with streaming.execute(sqlalchemy.text(source.query)) as result:
                    yield [str(k) for k in result.keys()]
                    for part in result.partitions(BATCH_ROWS):
                        yield [tuple(row) for row in part]
        finally:
            engine.dispose()
    except ModuleNotFoundError as e:
        missing = e.name or "its driver"
    except sqlalchemy.exc.SQLAlchemyError as e:
        failure = type(e).__name__
    if missing:
        raise ConfigError(f"the database needs the library {missing}", hint="pip install 'fedveil[sql]'")
    if failure:
        raise DataError(f"the query could not be run ({failure})", hint="try it in the database's own client")


def _require_file(url: Any) -> None:
    """SQLite makes a file that it does not find: a misspelt name would give an empty database and leave it behind."""
    name = url.database or ""
    if url.get_backend_name() == "sqlite" and not name.startswith("file:") and not Path(name).is_file():
        raise DataError(
            "the SQLite database of the URL is not a file", hint="correct the path in the file with the URL"
        )


def _as_tables(rows: Iterator[list[Any]], header: list[str], contract: DataContract) -> Iterator[pa.Table]:
    keep = [i for i, h in enumerate(header) if h in wanted(contract)]
    forms = {c.name: c.format for c in contract.columns if c.format}
    for part in rows:
        columns = {}
        for i in keep:
            # A batch has one type per column, so 1 and "1" would clash. Hence every cell becomes its text here.
            form = forms.get(header[i], "")
            columns[header[i]] = pa.array([_text(row[i], form) for row in part], pa.string())
        yield pa.table(columns)


def _text(value: Any, form: str) -> str | None:
    """A cell's text. A date is written in the contract's form, if there is one."""
    if form and isinstance(value, dt.date):
        return value.strftime(form.replace("%Y", f"{value.year:04}"))  # strftime itself may write the year 1 as 1
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, (bytes, bytearray, memoryview, list, dict, tuple)):
        raise DataError(
            "a column of the query holds neither numbers nor texts", hint="cast it to one of them in the query"
        )
    return str(value)


def open_duckdb(source: DuckSource, contract: DataContract) -> Opened:
    """Run the query; its rows come as Arrow batches.

    Raises:
        ConfigError: DuckDB is not installed.
        UsageError: the query is not one SELECT.
        DataError: no such file, the query fails, or its columns are not the contract's.
    """
    require_select(source.query, "duckdb")
    try:
        import duckdb
    except ModuleNotFoundError as e:
        raise ConfigError("a DuckDB source needs duckdb", hint="pip install 'fedveil[duckdb]'") from e
    if not source.path.is_file():
        raise DataError(f"{source.path} is not a file", hint="give the path of the DuckDB database")
    batches = _duck_batches(duckdb, source)
    header = _checked_header(batches, contract)
    names = [h for h in header if h in wanted(contract)]
    return Opened(tuple(names), (batch.select(names) for batch in batches))


def _duck_batches(duckdb: Any, source: DuckSource) -> Generator[Any, None, None]:
    """First the header, then tables."""
    failure = ""
    try:
        # No other file, no extension, no network: a SELECT reads this database.
        config = {"enable_external_access": "false"}
        with duckdb.connect(str(source.path), read_only=True, config=config) as connection:
            reader = connection.sql(_single_select(duckdb, connection, source.query)).to_arrow_reader(BATCH_ROWS)
            yield list(reader.schema.names)
            for batch in reader:
                yield pa.Table.from_batches([batch])
    except (duckdb.Error, pa.ArrowException) as e:
        failure = type(e).__name__
    if failure:
        hint = "try it in duckdb itself; it may read no file but the database"
        raise DataError(f"the query could not be run ({failure})", hint=hint)


def _single_select(duckdb: Any, connection: Any, query: str) -> Any:
    """The one statement that DuckDB itself finds in the query.

    Raises:
        UsageError: several, or one that is no SELECT.
    """
    found = connection.extract_statements(query)
    if len(found) != 1 or found[0].type != duckdb.StatementType.SELECT:
        raise UsageError("DuckDB does not read the query as one SELECT", hint=HINT)
    return found[0]
