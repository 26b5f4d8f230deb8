"""One way to read every source (files, databases, FHIR) into a :class:`RawTable` of the contract's columns."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pyarrow as pa

from fedveil.client.records import lineage
from fedveil.client.records.read import databases, fhir, files, intake
from fedveil.client.records.read import values as cells
from fedveil.client.records.read.databases import DuckSource, SqlSource
from fedveil.client.records.read.fhir import FhirSource
from fedveil.client.records.read.files import Dialect, Opened
from fedveil.client.records.read.intake import RawTable, Rules
from fedveil.common.contract import DataContract
from fedveil.common.errors import DataError

Source = Path | SqlSource | DuckSource | FhirSource
__all__ = [
    "Dialect",
    "DuckSource",
    "FhirSource",
    "RawTable",
    "Rules",
    "Source",
    "SqlSource",
    "described",
    "open_source",
    "read",
]


def open_source(source: Source, contract: DataContract, dialect: Dialect | None = None) -> Opened:
    """Open any source. Its cells are read while the batches are iterated.

    Raises:
        DataError, ConfigError: as for the source's kind.
    """
    if isinstance(source, SqlSource):
        return databases.open_sql(source, contract)
    if isinstance(source, DuckSource):
        return databases.open_duckdb(source, contract)
    if isinstance(source, FhirSource):
        return fhir.open_fhir(source, contract)
    return files.open_file(source, contract, dialect or Dialect())


def described(source: Source) -> str:
    """The source in words, without a password or a query."""
    if isinstance(source, SqlSource):
        return "the database query"
    return str(source if isinstance(source, Path) else source.path)


def read(
    source: Source, contract: DataContract, dialect: Dialect | None = None, rules: Rules | None = None
) -> RawTable:
    """Read a source whose cells all have the contract's types. Identifier and drop columns may be absent.

    Drop columns are not read, unless the contract's consent, retention or near key names them. Identifiers are read
    only to tell repeated rows and persons apart. Neither is kept.

    Raises:
        DataError: no such source, not the expected form, a column missing, unknown or twice, no rows, cells that are
            not numbers or dates, NaN or infinities. Messages hold column names of the contract, positions and counts.
    """
    raw = intake.take_in(open_source(source, contract, dialect), contract, rules or Rules(), described(source))
    require_types(raw, contract)
    return raw


def require_types(raw: RawTable, contract: DataContract) -> None:
    """Raise :class:`DataError` for cells that held something else than their column's type."""
    said = [text for c in contract.loaded for text, _, _ in unreadable(raw.tally.columns[c.name], c.name)]
    if said:
        hints = [h for c in contract.loaded for _, _, h in unreadable(raw.tally.columns[c.name], c.name)]
        raise DataError("; ".join(said), hint="; ".join(dict.fromkeys(hints)))


def unreadable(seen: cells.Reading, name: str) -> list[tuple[str, int, str]]:
    """What could not be read in a column: words, count and remedy."""
    out = []
    declare = "correct them, or declare their text as a missing code"
    plain = seen.not_numbers - seen.like_dates
    if plain:
        words = f"column {name!r}: {plain} cells are not numbers"
        out.append((words, plain, f"{declare}; a decimal comma has to be declared"))
    if seen.like_dates:
        words = f"column {name!r}: {seen.like_dates} cells are not numbers but look like dates"
        out.append((words, seen.like_dates, "declare type = 'date' with its format: day and month are not guessed"))
    if seen.not_finite:
        out.append((f"column {name!r}: {seen.not_finite} cells are NaN or infinite", seen.not_finite, declare))
    if seen.not_dates:
        words = f"column {name!r}: {seen.not_dates} cells are not dates of the declared format"
        out.append((words, seen.not_dates, "correct them, or agree on the format that the table uses"))
    return out


def commitment(secret: bytes, source: Source, contract: DataContract) -> str:
    """What a site commits to as its source: a file's bytes; for a query, its columns and rows in order.

    Raises:
        DataError, ConfigError: the source cannot be read.
    """
    if isinstance(source, Path):
        return lineage.commitment(secret, "source", source)
    if isinstance(source, (DuckSource, FhirSource)):
        return lineage.commitment(secret, "source", source.path)
    mac = hmac.new(lineage.checked_secret(secret), b"rows\0", hashlib.sha256)
    for table in open_source(source, contract).batches:
        for name in table.column_names:
            text = cells.text_of(table.column(name))
            if text is None:
                raise DataError(
                    f"column {name!r} has cells that are neither numbers nor texts", hint="cast it in the query"
                )
            # Lengths come first, so that no two tables have the same serialisation.
            values = [v.encode() for v in text.to_pylist()]
            mac.update(pa.array([len(v) for v in values], pa.int64()).buffers()[1].to_pybytes()[: 8 * len(values)])
            mac.update(b"".join(values))
    return mac.hexdigest()
