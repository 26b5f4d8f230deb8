"""What the commands of ``fedveil data`` share: their options, and how far reading has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.text import Text


TableArgument = Annotated[
    Path,
    typer.Argument(
        help="The site's table: .csv, .tsv, .parquet, .arrow, .duckdb or .ndjson. With --url-file, any name."
    ),
]
ContractOption = Annotated[Path, typer.Option("--contract", help="The signed contract (JSON).")]
SignerOption = Annotated[str, typer.Option(help="The consortium's public key, 64 hexadecimal digits.")]
WorkOption = Annotated[
    Path, typer.Option(help="Private work folder of this site (mode 0700), for release and reports.")
]
EncodingOption = Annotated[
    str, typer.Option(help="Encoding of a CSV file: auto (byte order mark, else UTF-8), latin-1, ...")
]
DelimiterOption = Annotated[str, typer.Option(help="Separator of a CSV file: auto, or one of , ; | and tab.")]
DecimalOption = Annotated[str, typer.Option(help="Decimal sign of a CSV file: . or ,")]
ThousandsOption = Annotated[str, typer.Option(help="Sign between thousands in a CSV file. By default none.")]
QueryOption = Annotated[str, typer.Option(help="For a database: one SELECT that gives the contract's columns.")]
UrlOption = Annotated[Path | None, typer.Option(help="For a SQL database: file (mode 0600) with its SQLAlchemy URL.")]
FhirOption = Annotated[Path | None, typer.Option(help="For .ndjson: TOML file with resource and [paths].")]
CorrectionsOption = Annotated[Path | None, typer.Option(help="TOML file with the site's declared corrections.")]


def cells(*values: object) -> list[Text]:
    """Cells (or headers) of a table on the terminal, as they are: ``[mg/dl]`` in a column's name is no markup."""
    from rich.text import Text

    return [Text(str(v)) for v in values]


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
