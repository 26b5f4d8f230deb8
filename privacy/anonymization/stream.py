"""A verified release in a file: every command's last step, and from Parquet to Parquet in bounded memory.

Two passes turn the rows into weighted distinct tuples. The search sees only those. A third pass looks up every row's
class and writes the rows in random order (:mod:`.counting`, :mod:`.buckets`). Until the end, what is on disk lies in a
folder of mode 0700, which is then removed.

Memory, for a file: the distinct tuples (not the rows), a few record batches, one bucket.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fedveil.common.errors import AnonymityError, DataError, UsageError
from fedveil.common.files import scratch
from fedveil.privacy.anonymization.anonymizer import Anonymizer, Method, Outcome
from fedveil.privacy.anonymization.attributes import TableSpec
from fedveil.privacy.anonymization.buckets import BUCKET_ROWS, released
from fedveil.privacy.anonymization.criteria import Criterion
from fedveil.privacy.anonymization.recheck import Findings, require
from fedveil.privacy.anonymization.rows import ParquetRows, Rows, plain


@dataclass(frozen=True)
class Streamed:
    """Attributes:
    outcome: what the search found.
    findings: what the verifier read in the written file.
    seconds, cpu: wall-clock and CPU time of the phases scan, count, search, write, verify.
    """

    outcome: Outcome
    findings: Findings
    seconds: dict[str, float]
    cpu: dict[str, float]


def anonymize_parquet(
    source: Path,
    destination: Path,
    spec: TableSpec,
    models: Sequence[Criterion] = (),
    *,
    method: Method = "auto",
    suppression_limit: float = 0.0,
) -> Streamed:
    """Anonymise a Parquet file of any length into ``destination`` (mode 0600), which exists only if verified.

    The result is that of :class:`~.anonymizer.Anonymizer` on the same rows. Arguments as there.

    Raises:
        DataError, AnonymityError, ContractError, UsageError: as there; also a file that cannot be read or written, and
            a destination that is the source.
    """
    engine = Anonymizer(spec, models, method=method, suppression_limit=suppression_limit)
    if source.resolve() == destination.resolve():
        raise UsageError("the released file would overwrite its source", hint="name another destination")
    try:
        return write_release(engine, ParquetRows(source, engine.spec), destination)
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{source.name} cannot be read, or {destination.name} cannot be written") from e


def write_release(
    engine: Anonymizer, rows: Rows, destination: Path, also: Callable[[Path], None] = lambda draft: None
) -> Streamed:
    """Recode ``rows`` into ``destination`` (.csv, else Parquet; mode 0600), which exists only if verified.

    Args:
        also: one more check of the draft, made after every criterion was checked on it.

    Raises:
        DataError, AnonymityError, UsageError: as there; a criterion that the written file fails.
        OSError, pyarrow.ArrowException: a file cannot be read or written.
    """
    clock = _Clock()
    fitted = engine.recoded(rows, clock.lap)
    outcome, classes, found = fitted.outcome, fitted.classes, fitted.found
    del fitted
    _give_back()
    with scratch(destination) as folder:
        draft = folder / f"draft{'.csv' if destination.suffix == '.csv' else '.parquet'}"
        written = _write(released(rows, engine.spec, classes, found, folder), draft)
        if written != outcome.rows - outcome.suppressed:
            raise AnonymityError("the rows written are not the rows the search saw")
        clock.lap("write")
        limit = engine.suppression_limit
        findings = require(draft, engine.spec, engine.models, original_rows=outcome.rows, suppression_limit=limit)
        also(draft)
        clock.lap("verify")
        draft.chmod(0o600)
        os.replace(draft, destination)
    return Streamed(outcome, findings, clock.seconds, clock.cpu)


def _write(parts: Iterator[pa.Table], path: Path) -> int:
    """Write the parts, and return how many rows they hold."""
    writer, rows, text = None, 0, path.suffix == ".csv"
    with contextlib.ExitStack() as stack:
        for part in parts:
            table = pa.table([plain(c) for c in part.columns], names=part.column_names) if text else part
            if writer is None:
                writer = stack.enter_context((pacsv.CSVWriter if text else pq.ParquetWriter)(path, table.schema))
            writer.write_table(table, BUCKET_ROWS)
            rows += table.num_rows
    return rows


def _give_back() -> None:
    """Return freed arrays to the system: the C library keeps those below 32 MiB, some hundred MiB after a search."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent outside glibc: then nothing is returned
    if trim is not None:
        trim(0)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._at = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds[name], self.cpu[name] = now[0] - self._at[0], now[1] - self._at[1]
        self._at = now
