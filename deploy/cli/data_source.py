"""What the commands of ``fedveil data`` share: which source, how it is written, and how far reading has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.text import Text

    from fedveil.client.records.read.sources import Dialect, Source

TableArgument = Annotated[
    Path, typer.Argument(help="The site's table: .csv, .tsv, .parquet, .arrow, .duckdb, .ndjson, or a database's name.")
]
ContractOption = Annotated[Path, typer.Option("--contract", help="The signed contract (JSON).")]
SignerOption = Annotated[str, typer.Option(help="The consortium's public key, 64 hexadecimal digits.")]
WorkOption = Annotated[Path, typer.Option(help="Private folder of this site (mode 0700) for the reports.")]
EncodingOption = Annotated[str, typer.Option(help="Of a CSV file: auto (byte order mark, else UTF-8), latin-1, ...")]
DelimiterOption = Annotated[str, typer.Option(help="Of a CSV file; auto takes the one that gives the known columns.")]
DecimalOption = Annotated[str, typer.Option(help="Decimal sign of a CSV file: . or ,")]
ThousandsOption = Annotated[str, typer.Option(help="Sign between thousands in a CSV file; none by default.")]
QueryOption = Annotated[str, typer.Option(help="For a database: the SELECT whose columns are the contract's.")]
UrlOption = Annotated[Path | None, typer.Option(help="File (mode 0600) with a SQLAlchemy URL, for SQL databases.")]
FhirOption = Annotated[Path | None, typer.Option(help="For .ndjson: TOML file with resource and [paths].")]
CorrectionsOption = Annotated[Path | None, typer.Option(help="TOML file with the site's declared corrections.")]
_QUERY = "--query 'SELECT ... ORDER BY ...' (query in [data] of site.toml)"


def cells(*values: object) -> list[Text]:
    """Cells (or headers) of a table on the terminal, as they are: ``[mg/dl]`` in a column's name is no markup."""
    from rich.text import Text

    return [Text(str(v)) for v in values]


def dialect_of(encoding: str, delimiter: str, decimal: str, thousands: str) -> Dialect:
    """The dialect that the options say; ``tab`` is a tab."""
    from fedveil.client.records.read.sources import Dialect

    return Dialect(encoding, "\t" if delimiter in ("tab", "\\t") else delimiter, decimal, thousands)


def source_of(table: Path, query: str, url_file: Path | None, fhir: Path | None) -> Source:
    """The source that the options say.

    Raises:
        UsageError: options that do not go together.
        ConfigError: the file with the URL can be read by others, or the paths are malformed.
    """
    from fedveil.client.records.read.sources import DuckSource, SqlSource
    from fedveil.common.errors import UsageError

    if url_file is not None:
        if not query:
            raise UsageError("a database needs a query", hint=_QUERY)
        return SqlSource(_secret_line(url_file), query)
    if table.suffix.lower() in (".duckdb", ".ddb"):
        if not query:
            raise UsageError("a DuckDB file needs a query", hint=_QUERY)
        return DuckSource(table, query)
    if query:
        raise UsageError("a query needs a database", hint="--url-file (url_file in [data] of site.toml), or .duckdb")
    if table.suffix.lower() == ".ndjson":
        if fhir is None:
            raise UsageError("an .ndjson file needs its paths", hint="--fhir paths.toml (fhir in [data] of site.toml)")
        return _fhir_source(table, fhir)
    return table


def _fhir_source(table: Path, declared: Path) -> Source:
    import tomllib

    from fedveil.client.records.read.sources import FhirSource
    from fedveil.common.errors import ConfigError

    try:
        data = tomllib.loads(declared.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = {}
    paths, resource = data.get("paths"), data.get("resource")
    strings = isinstance(paths, dict) and all(isinstance(v, str) for v in paths.values())
    if not strings or not isinstance(resource, str) or not isinstance(paths, dict):
        raise ConfigError(f"{declared} does not declare resource and [paths]", hint="see docs/data.md")
    return FhirSource(table, resource, paths)


def _secret_line(path: Path) -> str:
    from fedveil.common.errors import ConfigError

    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others", hint=f"chmod 600 {path}")
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read", hint="a file of mode 0600 with one line: the URL") from e


def total_of(source: object) -> tuple[int | None, bool]:
    """What reading has to get through, and whether it is bytes (of a CSV file) and not rows (of a Parquet file).

    None for sources whose length is not known beforehand.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if isinstance(source, Path) and source.suffix.lower() in (".csv", ".tsv"):
            return source.stat().st_size, True
        if isinstance(source, Path) and source.suffix.lower() in (".parquet", ".pq"):
            return pq.read_metadata(source).num_rows, False
    except (OSError, pa.ArrowException):
        return None, False  # the reader will say what is wrong with it
    return None, False


@contextmanager
def progress_of(source: object) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal's standard error while rows are read; nothing where there is no terminal.

    What it gives is called with the rows, and the bytes of a CSV file, that have been read.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    rows_read = TextColumn("{task.fields[rows]:,} rows")
    columns = (TextColumn("reading"), BarColumn(), TaskProgressColumn(), rows_read, TimeElapsedColumn())
    total, in_bytes = total_of(source)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=total, rows=0)
        yield lambda rows, read: bar.update(task, completed=read if in_bytes else rows, rows=rows)
