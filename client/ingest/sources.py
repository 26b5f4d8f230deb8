"""CSV and Parquet into a :class:`RawTable` of the contract's columns.

Every cell is read as text and parsed here, so that both formats obey one set of rules and no parser's message, which
would quote the cell, can reach anybody. A header that is not in the contract is named by its position only: in a file
without a header line it would be a record's value.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedveil.common.contract import Column, DataContract
from fedveil.common.errors import DataError

pc: Any = pyarrow.compute  # its functions are made at import time, where type checkers cannot see them

MAX_HEADER_BYTES = 1 << 20
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_NOT_FINITE = r"^[+-]?(nan|inf|infinity)$"


@dataclass(frozen=True)
class RawTable:
    """The contract's columns as read: the site's secret, not to be written or sent.

    Attributes:
        rows: number of rows, at least 1.
        columns: by name, (rows,) each: float64 with NaN for "no value", or texts (object) with "" for "no value".
        identity: (rows,) codes that are equal where the source rows are, identifiers included, drop columns not.
    """

    rows: int
    columns: dict[str, NDArray[Any]] = field(repr=False)
    identity: NDArray[np.int64] = field(repr=False)


def read(path: Path, contract: DataContract) -> RawTable:
    """Read ``path`` (.csv, .parquet or .pq). Identifier and drop columns may be absent.

    Drop columns are not read; identifiers only to tell repeated rows apart. Neither is kept.

    Raises:
        DataError: no such file, not the expected form, a column missing, unknown or twice, no rows, cells that are not
            numbers, NaN or infinities. Messages hold column names of the contract, positions and counts only.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".parquet", ".pq"):
        raise DataError(f"{path} is neither .csv nor .parquet", hint="convert the table first")
    if not path.is_file():
        raise DataError(f"{path} is not a file", hint="give the path of the site's table")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty", hint="a table has a header line and at least one row")
    table = _read_csv(path, contract) if kind == ".csv" else _read_parquet(path, contract)
    if table.num_rows == 0:
        raise DataError(f"{path} has a header but no rows")
    texts = {name: _safe_text(table.column(name), name) for name in table.column_names}
    columns = {c.name: _numbers(texts[c.name], c) if c.type == "number" else _leaves(texts[c.name], c)
               for c in contract.loaded}  # fmt: skip
    return RawTable(table.num_rows, columns, _identity([texts[n] for n in table.column_names]))


def _read_csv(path: Path, contract: DataContract) -> pa.Table:
    header = _csv_header(path)
    _check_header(path, header, contract)
    wrong: list[int] = []

    def refuse_row(row: pacsv.InvalidRow) -> str:
        wrong.append(row.actual_columns)
        return "skip"

    # Names are positional while parsing, so that an odd header cannot confuse the reader.
    names = [str(i) for i in range(len(header))]
    table = None
    try:
        table = pacsv.read_csv(
            path,
            read_options=pacsv.ReadOptions(column_names=names, skip_rows=1),
            parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=refuse_row),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                null_values=[],
                include_columns=[n for n, h in zip(names, header, strict=True) if h in _wanted(contract)],
            ),
        )
    except (pa.ArrowException, ValueError, OSError):
        table = None
    if table is None:
        raise DataError(f"{path} is not a readable CSV file", hint="use UTF-8, commas and double quotes")
    if wrong:
        raise DataError(
            f"{path}: {len(wrong)} rows have another number of cells than the header", hint="quote cells with commas"
        )
    return table.rename_columns([h for h in header if h in _wanted(contract)])


def _wanted(contract: DataContract) -> frozenset[str]:
    return frozenset(c.name for c in contract.columns if c.role != "drop")


def _csv_header(path: Path) -> list[str]:
    header = None
    try:
        with path.open("rb") as f:
            line = f.readline(MAX_HEADER_BYTES).decode("utf-8-sig")
        header = next(csv.reader([line], strict=True), None)
    except (UnicodeDecodeError, csv.Error, OSError):
        header = None
    if not header:
        raise DataError(f"{path} has no readable header line", hint="use UTF-8, commas and double quotes")
    return [h.strip() for h in header]


def _read_parquet(path: Path, contract: DataContract) -> pa.Table:
    table = None
    try:
        with pq.ParquetFile(path) as file:
            header = list(file.schema_arrow.names)
            _check_header(path, header, contract)
            table = file.read(columns=[h for h in header if h in _wanted(contract)])
    except (pa.ArrowException, ValueError, OSError):
        table = None
    if table is None:
        raise DataError(f"{path} is not a readable Parquet file", hint="write it again with a current library")
    return table


def _check_header(path: Path, header: Sequence[str], contract: DataContract) -> None:
    known = {c.name: c for c in contract.columns}
    unknown = [i for i, h in enumerate(header, 1) if h not in known]
    if unknown:
        raise DataError(
            f"{path}: {len(unknown)} columns are not in the contract, at positions {', '.join(map(str, unknown[:8]))}",
            hint="is the first line a header? declare unused columns with role 'drop' in the contract",
        )
    twice = sorted({h for h in header if list(header).count(h) > 1})
    if twice:
        raise DataError(f"{path}: columns appear twice: {', '.join(map(repr, twice[:8]))}", hint="keep one of each")
    missing = [c.name for c in contract.loaded if c.name not in header]
    if missing:
        raise DataError(
            f"{path}: columns of the contract are missing: {', '.join(map(repr, missing[:8]))}",
            hint="export the table again with these columns",
        )


def _safe_text(values: pa.ChunkedArray, name: str) -> pa.Array:
    text = None
    try:
        text = _text(values)
    except pa.ArrowException:
        text = None
    if text is None:
        raise DataError(f"column {name!r} has cells that are neither numbers nor texts", hint="convert the column")
    return text


def _text(values: pa.ChunkedArray) -> pa.Array | None:
    """Trimmed text of every cell, "" for null, one spelling per number; None for other types."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    simple = (pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean, pa.types.is_integer,
              pa.types.is_floating, pa.types.is_decimal, pa.types.is_temporal, pa.types.is_null)  # fmt: skip
    if not any(test(kind) for test in simple):
        return None
    if pa.types.is_float16(kind):
        values = values.cast(pa.float32())
    if pa.types.is_floating(kind) and bool(pc.all(pc.equal(values, pc.trunc(values))).as_py()):
        # 1.0 in a file that knows only floats is the leaf "1". Casting is exact or refused.
        try:
            values = values.cast(pa.int64())
        except pa.ArrowInvalid:
            values = values.cast(pa.float64())
    text = pc.utf8_trim_whitespace(pc.fill_null(values.cast(pa.string()), ""))
    return text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text


def _coded_missing(text: pa.Array, column: Column) -> pa.Array:
    """Mask of cells without a value: null, or one of the column's missing codes."""
    return pc.is_in(text, value_set=pa.array(["", *column.missing_codes], pa.string()))


def _numbers(text: pa.Array, column: Column) -> NDArray[np.float64]:
    absent = _coded_missing(text, column)
    present = text.filter(pc.invert(absent))
    infinite = _count(pc.match_substring_regex(present, _NOT_FINITE, ignore_case=True))
    parsable = pc.match_substring_regex(present, _NUMBER)
    strange = len(present) - _count(parsable) - infinite
    if strange:
        raise DataError(
            f"column {column.name!r}: {strange} cells are not numbers",
            hint="correct them, or declare their text as a missing code",
        )
    values = np.asarray(present.filter(parsable).to_numpy(zero_copy_only=False), dtype=str).astype(np.float64)
    infinite += int((~np.isfinite(values)).sum())
    if infinite:
        raise DataError(
            f"column {column.name!r}: {infinite} cells are NaN or infinite",
            hint="correct them, or declare their text as a missing code",
        )
    out = np.full(len(text), np.nan)
    out[~absent.to_numpy(zero_copy_only=False)] = values
    return out


def _leaves(text: pa.Array, column: Column) -> NDArray[np.object_]:
    return pc.if_else(_coded_missing(text, column), "", text).to_numpy(zero_copy_only=False)


def _count(mask: pa.Array) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _identity(texts: Sequence[pa.Array]) -> NDArray[np.int64]:
    """Codes equal exactly where all texts are equal; renumbered after each column, so nothing can overflow."""
    key = np.zeros(len(texts[0]), np.int64)
    for text in texts:
        code = pc.dictionary_encode(text).indices.to_numpy(zero_copy_only=False).astype(np.int64)
        _, key = np.unique(key * (int(code.max()) + 1) + code, return_inverse=True)
    return key
