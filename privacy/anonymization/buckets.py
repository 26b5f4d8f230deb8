"""The last pass: every row's class is looked up, its cells are recoded, and the order becomes uniformly random.

Each row goes to a bucket drawn with the operating system's randomness. Each bucket is small enough for memory, and is
permuted. A single bucket stays in memory. Several wait on disk, and hold only what will be released.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
from numpy.typing import NDArray

from fedveil.privacy.anonymization.attributes import TableSpec
from fedveil.privacy.anonymization.counting import ClassOf
from fedveil.privacy.anonymization.recoding import Recoding
from fedveil.privacy.anonymization.rows import Rows

Index = NDArray[np.int64]
BUCKET_ROWS = 1 << 20


def released(
    rows: Rows, spec: TableSpec, classes: ClassOf, found: Recoding, folder: Path | None = None
) -> Iterator[pa.Table]:
    """The released rows, a table for each bucket; a table that lies in memory anyway is one bucket.

    Args:
        folder: where buckets wait. The caller made it and removes it.

    Raises:
        DataError: rows that were not counted.
    """
    buckets = _Buckets(rows, spec, folder)
    buckets.scatter(rows, classes)
    return buckets.gather(found)


def random_order(n: int) -> Index:
    """A permutation from the operating system's randomness (sorted 64-bit keys).

    Two equal keys among 10^6 rows have a probability below 3e-8. They would tell only the order of that one pair.
    """
    return np.argsort(np.frombuffer(os.urandom(8 * n), np.uint64))


class _Buckets:
    """Rows scattered at random."""

    def __init__(self, rows: Rows, spec: TableSpec, folder: Path | None) -> None:
        number = 1
        while not rows.in_memory and number < 256 and number * BUCKET_ROWS < rows.count:
            number *= 2
        self._paths = [folder / f"bucket-{i}.arrow" for i in range(number)] if folder and number > 1 else []
        self._held: list[pa.Table] = []
        self._quasi = [q.name for q in spec.quasi]
        self._others = spec.released[len(spec.quasi) :]
        self._words: dict[str, dict[Any, int]] = {}
        self._kinds: dict[str, Any] = {}  # what these words are

    def scatter(self, rows: Rows, classes: ClassOf) -> None:
        """Put every released row into a random bucket."""
        writers: list[Any] = []
        with contextlib.ExitStack() as stack:
            for batch in rows.batches(self._quasi, self._others):
                own = classes.of(batch)
                kept = np.flatnonzero(own >= 0)
                if not self._paths:
                    self._held.append(self._part(batch, own, kept))
                    continue
                drawn = np.frombuffer(os.urandom(len(kept)), np.uint8) & np.uint8(len(self._paths) - 1)
                order = np.argsort(drawn, kind="stable")
                part = self._part(batch, own, kept[order])
                if not writers:
                    writers = [stack.enter_context(ipc.new_stream(p, part.schema)) for p in self._paths]
                ends = np.searchsorted(drawn[order], np.arange(len(self._paths)), side="right").tolist()
                for writer, start, stop in zip(writers, [0, *ends], ends, strict=False):
                    if stop > start:
                        writer.write(part.slice(start, stop - start))

    def _part(self, batch: Any, own: NDArray[np.int32], rows: Index) -> pa.Table:
        columns = [pa.array(own[rows]), *(self._column(batch.column(n), n, rows) for n in self._others)]
        return pa.table(columns, names=["class", *self._others])

    def _column(self, column: Any, name: str, rows: Index) -> Any:
        """A released column. Texts become numbers of a list kept aside, so that no bucket repeats them."""
        if not pa.types.is_dictionary(column.type):
            return column.take(pa.array(rows))
        known = self._words.setdefault(name, {})
        self._kinds[name] = column.type.value_type
        # Only words of released rows are remembered: the dictionary of a batch also lists suppressed ones.
        index = column.indices.fill_null(-1) if column.null_count else column.indices
        index = index.to_numpy(zero_copy_only=False)[rows]
        words = column.dictionary.to_pylist()
        used = np.unique(index)
        table = np.full(len(words) + 1, -1, np.int32)  # the last entry serves -1, "no value"
        for i in used[used >= 0].tolist():
            table[i] = known.setdefault(words[i], len(known))
        return pa.array(table[index])

    def gather(self, found: Recoding) -> Iterator[pa.Table]:
        """Each bucket, permuted and recoded."""
        if not self._paths:
            yield self._released(pa.concat_tables(self._held), found)
        for path in self._paths:
            with pa.memory_map(str(path)) as f, ipc.open_stream(f) as stream:
                part = self._released(stream.read_all(), found)
            path.unlink()
            yield part

    def _released(self, table: pa.Table, found: Recoding) -> pa.Table:
        order = random_order(table.num_rows)
        classes = table["class"].to_numpy()[order]
        columns: list[Any] = [_labelled(cell.of_class[classes], cell.labels) for cell in found.cells]
        for name in self._others:
            if name in self._words:
                index = table[name].to_numpy()[order]
                codes = pa.array(index, mask=index < 0)
                words = pa.array(list(self._words[name]), self._kinds[name])
                columns.append(pa.DictionaryArray.from_arrays(codes, words))
            else:
                columns.append(table[name].take(pa.array(order)))
        return pa.table(columns, names=[*self._quasi, *self._others])


def _labelled(index: NDArray[np.int32], labels: Sequence[str]) -> Any:
    """A dictionary array of the labels that occur."""
    used = np.bincount(index, minlength=len(labels)) > 0
    place = (np.cumsum(used) - 1).astype(np.int32)
    words = [label for label, u in zip(labels, used.tolist(), strict=True) if u]
    return pa.DictionaryArray.from_arrays(pa.array(place[index]), pa.array(words, pa.string()))
