"""A table without a contract: what its columns are like, in bounded memory and without any of its values.

A draft of a contract starts from such a profile. Nothing in it may leave the site.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedveil.client.records.judge import hipaa
from fedveil.client.records.read import files, pii, values
from fedveil.client.records.read.files import Dialect
from fedveil.common.errors import DataError

MAX_DISTINCT = 1 << 16
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+|\d+,\d+)([eE][+-]?\d+)?$"
_DATE = r"^(\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{2,4})([T ].*)?$"
CODES = ("?", "NA", "N/A", "NaN", "nan", "null", "NULL", "none", "None", "-", "-9", "-99", "-999", "999", "9999")


@dataclass
class ColumnProfile:
    """Counts of one column; no values.

    Attributes:
        name: its header.
        empty: cells without text. codes: texts of :data:`CODES` that occur.
        numbers, dates, commas: cells that read as a number (with a decimal comma: ``commas`` of them) or a date.
        distinct: different texts, up to ``MAX_DISTINCT``.
        found: kinds of identifiers and cells that hold them.
    """

    name: str
    rows: int = 0
    empty: int = 0
    numbers: int = 0
    commas: int = 0
    dates: int = 0
    codes: set[str] = field(default_factory=set)
    found: dict[str, int] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set, repr=False)

    @property
    def distinct(self) -> int:
        """Different texts seen, at most ``MAX_DISTINCT``."""
        return len(self._seen)

    @property
    def looks_like(self) -> str:
        """``number``, ``date``, ``category`` or ``text``: a remark, never a decision."""
        present = self.rows - self.empty
        if present and self.dates >= 0.95 * present:
            return "date"
        if present and self.numbers >= 0.95 * present:
            return "number"
        return "category" if self.distinct <= max(20, present // 20) else "text"

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should look at before giving the column a role."""
        present = self.rows - self.empty
        out = [f"{n} cells look like identifiers ({kind})" for kind, n in self.found.items()]
        if named := hipaa.suspicious(self.name, "feature"):
            out.append(f"called after {named}")
        if pii.nearly_unique(self.distinct, present) and self.looks_like in ("text", "number"):
            out.append("nearly every row is different")
        if self.codes:
            out.append(f"possible missing codes: {', '.join(sorted(self.codes))}")
        if self.commas:
            out.append("decimal commas: declare decimal = ','")
        if self.looks_like == "date":
            out.append("a date needs its format")
        if not present:
            out.append("no value in any row")
        return tuple(out)

    def add(self, text: pa.Array) -> None:
        """Count one batch."""
        pc = values.pc
        self.rows += len(text)
        self.empty += values.count(pc.equal(text, ""))
        self.numbers += values.count(pc.match_substring_regex(text, _NUMBER))
        self.commas += values.count(pc.match_substring_regex(text, r"^[+-]?\d+,\d+$"))
        self.dates += values.count(pc.match_substring_regex(text, _DATE))
        distinct = pc.unique(text)
        self.codes |= set(pc.filter(distinct, pc.is_in(distinct, value_set=pa.array(CODES))).to_pylist())
        if len(self._seen) < MAX_DISTINCT:
            self._seen |= {hash(v) for v in distinct.slice(0, MAX_DISTINCT - len(self._seen)).to_pylist() if v}
        for kind, n in pii.scan(text).items():
            self.found[kind] = self.found.get(kind, 0) + n


@dataclass(frozen=True)
class Profile:
    """A table's columns."""

    rows: int
    columns: tuple[ColumnProfile, ...]

    def to_json(self) -> str:
        """Counts and remarks, without values."""
        kept: list[dict[str, Any]] = [
            {
                "column": c.name,
                "looks_like": c.looks_like,
                "empty": c.empty,
                "distinct": c.distinct,
                "remarks": c.remarks,
            }
            for c in self.columns
        ]
        return json.dumps({"rows": self.rows, "columns": kept}, indent=1)


def profile(path: Path, dialect: Dialect | None = None, progress: Callable[[int, int], None] | None = None) -> Profile:
    """Read a CSV, Parquet or Arrow file once.

    Args:
        progress: called after each batch with the rows read so far, and the bytes of a CSV file (else 0).

    Raises:
        DataError: not readable, no header, no rows, or columns of types that hold no simple values.
    """
    position = files.Position()
    header, batches = _open(path, dialect or Dialect(), position)
    columns = [ColumnProfile(name) for name in header]
    rows = 0
    for table in batches:
        rows += table.num_rows
        for i, column in enumerate(columns):
            text = values.text_of(table.column(i))
            if text is None:
                raise DataError(
                    f"the column at position {i + 1} holds neither numbers nor texts", hint="convert it to one of them"
                )
            column.add(text)
        if progress is not None:
            progress(rows, position.bytes)
    if not rows:
        raise DataError(f"{path} has a header but no rows", hint="give a sample with some rows")
    return Profile(rows, tuple(columns))


def _open(path: Path, dialect: Dialect, position: files.Position) -> tuple[list[str], Iterator[pa.Table]]:
    kind = path.suffix.lower()
    if not path.is_file() or not path.stat().st_size:
        raise DataError(f"{path} is not a file, or is empty", hint="give a .csv, .parquet or .arrow file")
    if kind in (".csv", ".tsv"):
        header, encoding, delimiter = files.csv_header(path, dialect, frozenset())
        repeated = sorted({i + 1 for i, h in enumerate(header) if header.count(h) > 1})
        if repeated:
            places = ", ".join(map(str, repeated[:8]))
            raise DataError(f"{path}: columns have the same name, at positions {places}", hint="keep one of each")
        return header, files.csv_batches(path, header, header, encoding, delimiter, position)
    if kind not in (".parquet", ".pq", ".arrow", ".feather"):
        raise DataError(f"{path} is not a .csv, .parquet or .arrow file", hint="convert the table to one of them")
    header, batches = files.arrow_file(path)
    return header, batches(header)
