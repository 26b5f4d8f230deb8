"""CSV and Parquet (or Arrow) files as batches of text, in bounded memory.

A header that is not in the contract is named by its position only, because in a file without a header line it would
be a record's value.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.ipc
import pyarrow.parquet as pq

from fedveil.client.records.read.quotes import Quotes
from fedveil.client.records.read.values import Decimals
from fedveil.common.contract import DataContract
from fedveil.common.errors import ConfigError, DataError

MAX_HEADER_BYTES = 1 << 20
BLOCK_BYTES = 1 << 23
BATCH_ROWS = 1 << 16
ENCODINGS = ("auto", "utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16", "utf-16-le", "utf-16-be")
DELIMITERS = (",", ";", "\t", "|")
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Dialect:
    """How a CSV file is written.

    Attributes:
        encoding: one of ``ENCODINGS``. ``auto`` follows a byte order mark, and is UTF-8 without one. Nothing else is
            guessed, because in latin-1 every byte is some character.
        delimiter: ``auto`` takes the separator under which the header is the contract's columns.
        decimal, thousands: signs in numbers. ``1,5`` is not a number unless the decimal sign is declared.
    """

    encoding: str = "auto"
    delimiter: str = "auto"
    decimal: str = "."
    thousands: str = ""

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ConfigError(f"encoding {self.encoding[:32]!r} is not known", hint=f"one of {', '.join(ENCODINGS)}")
        if self.delimiter not in ("auto", *DELIMITERS):
            raise ConfigError(f"delimiter {self.delimiter[:8]!r} is not known", hint="auto, or one of , ; | and a tab")
        if self.decimal not in (".", ",") or self.thousands not in ("", ",", ".", "'", " ") or self.style_clashes:
            raise ConfigError(
                "the decimal sign or the thousands sign cannot be used",
                hint="decimal is . or , and thousands another sign",
            )

    @property
    def style_clashes(self) -> bool:
        """Whether one sign would mean two things."""
        return self.decimal == self.thousands

    @property
    def style(self) -> Decimals:
        """The part that concerns numbers."""
        return Decimals(self.decimal, self.thousands)


@dataclass
class Position:
    """How many bytes of a file the rows so far took, give or take a block or two. At the end: the file's size.

    ``breaks`` counts the line ends inside quoted cells, of all columns.
    """

    bytes: int = 0
    breaks: int = 0


class _Blocks(io.FileIO):
    """A file that remembers where each block ended, as the reader is dozens of blocks ahead of the rows it gives."""

    def __init__(self, path: Path, quotes: Quotes) -> None:
        super().__init__(path)
        self._ends = [0]
        self._quotes = quotes

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as from any file."""
        data = super().read(-1 if size is None else size) or b""
        if data:
            self._ends.append(self._ends[-1] + len(data))
            self._quotes.feed(data)
        return data

    def end(self, blocks: int | None = None) -> int:
        """Where the first ``blocks`` blocks end; by default all that were read."""
        last = len(self._ends) - 1
        return self._ends[last if blocks is None else min(blocks, last)]


@dataclass(frozen=True)
class Opened:
    """An opened table.

    Attributes:
        names: the columns that will come, each once, all of them the contract's.
        batches: tables with these columns, of any simple type, at least one batch.
        style: how texts of this table write numbers.
        position: how far the file has been read; None if that is not counted.
    """

    names: tuple[str, ...]
    batches: Iterator[pa.Table]
    style: Decimals = field(default_factory=Decimals)
    position: Position | None = None


def wanted(contract: DataContract) -> frozenset[str]:
    """The columns that are read: all that are not dropped, and those that decide which rows may be used."""
    rules = (contract.consent, contract.retention)
    asked = {r.column for r in rules if r is not None} | set(contract.quality.near_key)
    return frozenset({c.name for c in contract.columns if c.role != "drop"} | asked)


def open_file(path: Path, contract: DataContract, dialect: Dialect) -> Opened:
    """Open ``path`` (.csv, .tsv, .parquet, .pq, .arrow or .feather); its cells are read batch by batch.

    Raises:
        DataError: no such file, not the expected form, a column missing, unknown or twice. While iterating: rows with
            another number of cells than the header, damaged files. Messages hold column names of the contract,
            positions and counts only.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".parquet", ".pq", ".arrow", ".feather"):
        raise DataError(f"{path} is not a .csv, .parquet or .arrow file", hint="convert the table to one of them")
    if not path.is_file():
        raise DataError(f"{path} is not a file", hint="give the path of the site's table")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty", hint="a table has a header line and at least one row")
    if kind in (".csv", ".tsv"):
        return _open_csv(path, contract, dialect)
    header, batches = arrow_file(path)
    check_header(str(path), header, contract)
    names = tuple(h for h in header if h in wanted(contract))
    return Opened(names, batches(list(names)))


def check_header(what: str, header: Sequence[str], contract: DataContract) -> None:
    """Refuse unknown, repeated and missing columns.

    Raises:
        DataError: naming columns of the contract, and positions of the others.
    """
    known = {c.name: c for c in contract.columns}
    unknown = [i for i, h in enumerate(header, 1) if h not in known]
    if unknown:
        raise DataError(
            f"{what}: {len(unknown)} columns are not in the contract, at positions {', '.join(map(str, unknown[:8]))}",
            hint="check that the first line is a header; declare unused columns with role 'drop' in the contract",
        )
    twice = sorted({h for h in header if list(header).count(h) > 1})
    if twice:
        raise DataError(f"{what}: columns appear twice: {', '.join(map(repr, twice[:8]))}", hint="keep one of each")
    rules = wanted(contract) - {c.name for c in contract.columns if c.role == "identifier"}
    needed = [c.name for c in contract.columns if c.loaded or c.name in rules]
    missing = [n for n in needed if n not in header]
    if missing:
        raise DataError(
            f"{what}: columns of the contract are missing: {', '.join(map(repr, missing[:8]))}",
            hint="export the table again with these columns",
        )


def csv_header(path: Path, dialect: Dialect, known: frozenset[str]) -> tuple[list[str], str, str]:
    """The header of a CSV file, its encoding and its delimiter.

    Args:
        known: with ``auto``, the delimiter under which most header cells are among these.

    Raises:
        DataError: the header cannot be read.
    """
    encoding = dialect.encoding
    try:
        with path.open("rb") as f:
            data = f.read(MAX_HEADER_BYTES)
    except OSError:
        data = b""
    if encoding == "auto":
        encoding = next((e for bom, e in _BOMS if data.startswith(bom)), "utf-8-sig")
    try:
        text = codecs.getincrementaldecoder(encoding)("replace").decode(data)
        line = text.splitlines()[0].removeprefix("\ufeff") if text else ""
        if "\0" in line:
            hint = "it looks like UTF-16 or UTF-32: declare --encoding utf-16-le or utf-16-be, or export it as UTF-8"
            raise DataError(f"{path} has a header with NUL characters", hint=hint)
        if text and not line.strip():
            raise DataError(f"{path} has no readable header line", hint="its first line is empty: take that line out")
        if not line.strip() or "\ufffd" in line:
            raise ValueError
        choices = DELIMITERS if dialect.delimiter == "auto" else (dialect.delimiter,)
        read = {d: cells for d in choices if (cells := _split(line, d)) is not None}
    except ValueError:
        read = {}
    if not read:
        raise DataError(
            f"{path} has no readable header line",
            hint="declare its encoding if it is not UTF-8, for example latin-1 or utf-16; quote with double quotes",
        )
    best = max(read, key=lambda d: (sum(h in known for h in read[d]), len(read[d]) if not known else 0))
    return read[best], encoding, best


def _split(line: str, delimiter: str) -> list[str] | None:
    """The cells of a header line; None if its quotes show that the delimiter is another one."""
    try:
        return [h.strip() for h in next(csv.reader([line], delimiter=delimiter, strict=True))]
    except (csv.Error, StopIteration):
        return None


def _open_csv(path: Path, contract: DataContract, dialect: Dialect) -> Opened:
    known = frozenset(c.name for c in contract.columns)
    header, encoding, delimiter = csv_header(path, dialect, known)
    check_header(str(path), header, contract)
    names = tuple(h for h in header if h in wanted(contract))
    position = Position()
    return Opened(names, csv_batches(path, header, names, encoding, delimiter, position), dialect.style, position)


def csv_batches(
    path: Path, header: Sequence[str], names: Sequence[str], encoding: str, delimiter: str, position: Position
) -> Iterator[pa.Table]:
    """The columns ``names`` of a CSV file as texts; ``position`` is kept up to date.

    Raises:
        DataError: damaged, a quote that is never closed, or rows with another number of cells than the header (after
            the last row, with the count).
    """
    ragged: list[int] = []
    quotes = Quotes(delimiter, encoding)

    def refuse_row(row: pacsv.InvalidRow) -> str:
        ragged.append(-1 if row.number is None else row.number)
        return "skip"

    # Columns are named by position while parsing, so that an odd header cannot confuse the reader.
    positions = [str(i) for i in range(len(header))]
    keep = [p for p, h in zip(positions, header, strict=True) if h in names]

    def read() -> Iterator[pa.RecordBatch]:
        with _Blocks(path, quotes) as file:
            batches = pacsv.open_csv(
                file,
                read_options=pacsv.ReadOptions(
                    column_names=positions, skip_rows=1, block_size=BLOCK_BYTES, use_threads=False,
                    encoding="utf8" if encoding.startswith("utf-8") else encoding,
                ),
                parse_options=pacsv.ParseOptions(
                    delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse_row
                ),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(positions, pa.string()), null_values=[], include_columns=keep
                ),
            )  # fmt: skip
            # One batch ahead: there can be fewer batches than blocks, and when the last batch comes, all has been read.
            given, held = 0, None
            for batch in batches:
                if held is not None:
                    position.bytes = file.end(given)
                    yield held
                given, held = given + 1, batch
            if held is not None:
                position.bytes = file.end()
                yield held

    hint = "use commas and double quotes, and UTF-8 or a declared encoding"
    batches = _guarded(read, f"{path} is not a readable CSV file", hint)
    while True:
        try:
            batch = next(batches, None)
        except DataError:
            _require_lines(path, quotes, cut=True)
            raise
        if batch is None:
            break
        yield batch.rename_columns([header[int(p)] for p in keep])
    _require_lines(path, quotes, cut=False)
    position.breaks = quotes.breaks
    if ragged:
        lines = ", ".join(str(n) for n in ragged[:3] if n > 0)
        raise DataError(
            f"{path}: {len(ragged)} rows have another number of cells than the header"
            + (f" (line {lines})" if lines else ""),
            hint="quote cells that hold the separator",
        )


def _require_lines(path: Path, quotes: Quotes, *, cut: bool) -> None:
    """Refuse an open quote. If an open quote or a line without an end is why reading was ``cut`` short, name it.

    Raises:
        DataError: see above.
    """
    if cut and quotes.widest >= BLOCK_BYTES:  # it may be closed later: how much was read is chance
        raise DataError(
            f"{path}: the quote that is opened on line {quotes.begun} is not closed within {BLOCK_BYTES >> 20} MiB",
            hint="close it, or leave such cells out of the export; a quote inside a quoted cell is written twice",
        )
    if quotes.opened and not cut:
        raise DataError(
            f"{path}: a quote is opened on line {quotes.line} and never closed: the lines after it are one cell",
            hint="close it; a quote inside a quoted cell is written twice",
        )
    if cut and not quotes.lines:
        raise DataError(f"{path} has a header but no rows", hint="export the table again, with its rows")
    if cut and quotes.longest >= BLOCK_BYTES:
        raise DataError(
            f"{path} has a line of more than {BLOCK_BYTES >> 20} MiB",
            hint="check that it is a CSV file; end lines with a line feed, and leave such cells out of the export",
        )


def arrow_file(path: Path) -> tuple[list[str], Callable[[list[str]], Iterator[pa.Table]]]:
    """The header of a Parquet or Arrow file, and a function that reads the named columns batch by batch.

    Raises:
        DataError: damaged.
    """
    return (_arrow_batches if path.suffix.lower() in (".arrow", ".feather") else _parquet_batches)(path)


def _parquet_batches(path: Path) -> tuple[list[str], Callable[[list[str]], Iterator[pa.Table]]]:
    try:
        header = list(pq.read_schema(path).names)
    except (pa.ArrowException, ValueError, OSError):
        header = None
    what, hint = f"{path} is not a readable Parquet file", "write it again with a current library"
    if header is None:
        raise DataError(what, hint=hint)

    def read(names: list[str]) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=BATCH_ROWS, columns=names)

    return header, lambda names: _guarded(lambda: read(names), what, hint)


def _arrow_batches(path: Path) -> tuple[list[str], Callable[[list[str]], Iterator[pa.Table]]]:
    what, hint = f"{path} is not a readable Arrow file", "write it as an Arrow IPC file"
    try:
        with pa.memory_map(str(path)) as source, pyarrow.ipc.open_file(source) as file:
            header = list(file.schema.names)
    except (pa.ArrowException, ValueError, OSError):
        header = None
    if header is None:
        raise DataError(what, hint=hint)

    def read(names: list[str]) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as source, pyarrow.ipc.open_file(source) as file:
            for i in range(file.num_record_batches):
                batch = file.get_batch(i).select(names)
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield batch.slice(start, BATCH_ROWS)

    return header, lambda names: _guarded(lambda: read(names), what, hint)


def _guarded(read: Callable[[], Iterator[pa.RecordBatch]], what: str, hint: str) -> Iterator[pa.Table]:
    """Batches as tables. A reader's own message may quote cells, so ``what`` replaces it."""
    batches = iter(read())
    while True:
        failed = False
        batch = None
        try:
            batch = next(batches, None)
        except (pa.ArrowException, ValueError, OSError):
            failed = True
        if failed:
            raise DataError(what, hint=hint)
        if batch is None:
            return
        yield pa.Table.from_batches([batch])
