"""The rows that are to be released, in batches: of a table in memory, or of a Parquet file of any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from fedveil.privacy.anonymization.attributes import TableSpec

BATCH_ROWS = 1 << 19


class Rows(Protocol):
    """Where rows come from. They can be read again, and are then the same.

    Attributes:
        schema: of all columns.
        count: number of rows.
        in_memory: whether all of them lie in memory anyway.
    """

    schema: Any
    count: int
    in_memory: bool

    def batches(self, coded: Sequence[str], released: Sequence[str] = ()) -> Iterator[Any]:
        """Record batches, or tables, of these columns: ``coded`` to be looked up, ``released`` to be passed on."""
        ...


class TableRows:
    """A table in memory: one batch. Texts that are looked up are numbered once, for both passes."""

    in_memory = True

    def __init__(self, table: pa.Table) -> None:
        self.schema, self.count, self._table = table.schema, table.num_rows, table
        self._coded: dict[str, Any] = {}

    def batches(self, coded: Sequence[str], released: Sequence[str] = ()) -> Iterator[Any]:
        """See :class:`Rows`."""
        for n in coded:
            if n not in self._coded:
                column = self._table[n]
                texts = pa.types.is_string(column.type)
                self._coded[n] = column.combine_chunks().dictionary_encode() if texts else column
        columns = [*(self._coded[n] for n in coded), *(plain(self._table[n]) for n in released)]
        yield pa.table(columns, names=[*coded, *released])


class ParquetRows:
    """A Parquet file: the next batch is decoded while the last one is worked on."""

    in_memory = False

    def __init__(self, source: Path, spec: TableSpec) -> None:
        self._source = source
        self.schema = pq.read_schema(source)
        self.count = pq.read_metadata(source).num_rows
        coded = {*(q.name for q in spec.quasi), *(s.name for s in spec.sensitive)}
        self._texts = [f.name for f in self.schema if f.name in coded and _is_text(f.type)]

    def batches(self, coded: Sequence[str], released: Sequence[str] = ()) -> Iterator[Any]:
        """See :class:`Rows`."""
        file = pq.ParquetFile(self._source, read_dictionary=self._texts, memory_map=True)
        iterator = file.iter_batches(BATCH_ROWS, columns=[*coded, *released])
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(next, iterator, None)
            while (batch := ahead.result()) is not None:
                ahead = pool.submit(next, iterator, None)
                yield batch


def plain(column: Any) -> Any:
    """The column without its dictionary, which would also list the values of suppressed rows."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _is_text(kind: Any) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(plain) or pa.types.is_large_string(plain)
