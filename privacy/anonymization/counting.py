"""Rows to weighted distinct tuples, and from a row back to its class: each row is one key, a number where it fits.

Two passes read the rows before the search: the first finds the values that occur, the second counts their combinations.
Everything a search needs is here; from here on the number of rows does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import DataError
from fedveil.privacy.anonymization.attributes import TableSpec
from fedveil.privacy.anonymization.criteria import Criterion
from fedveil.privacy.anonymization.domains import encode, occurring
from fedveil.privacy.anonymization.prepare import (
    Frame,
    check_rows,
    check_schema,
    frame_of,
    sensitive_codes,
    sensitive_names,
    tuples_of,
)
from fedveil.privacy.anonymization.recoding import Recoding
from fedveil.privacy.anonymization.rows import Rows
from fedveil.privacy.anonymization.tuples import SPARSE, Codes, Tuples

Index = NDArray[np.int64]
Keys = NDArray[Any]  # int64; or byte strings, which sort like the codes that they are made of
DENSE_CELLS = 48_000_000  # a table of all combinations is used where it is at most this large (192 MB)
PENDING_KEYS = 1 << 22
EXACT = 1 << 62  # combinations that a number can name
UNKNOWN = -2  # the class of a combination that was not there


@dataclass(frozen=True)
class Prepared:
    """Attributes:
    frame: what the codes mean.
    tuples: the weighted distinct combinations.
    """

    frame: Frame
    tuples: Tuples


def prepare(
    rows: Rows,
    spec: TableSpec,
    models: Sequence[Criterion],
    lap: Callable[[str], None] = lambda name: None,
) -> Prepared:
    """Check and count rows. ``lap`` is told when a pass ends.

    Raises:
        DataError, AnonymityError: see :func:`.check_schema`, :func:`.check_rows`, :func:`.frame_of`.
    """
    check_schema(rows.schema, spec)
    check_rows(rows.count, models)
    frame = _scanned(rows, spec, models)
    lap("scan")
    keyed = Keyed(frame)
    keys, weights = keyed.count(rows)
    tuples = tuples_of(frame, keyed.codes(keys), weights)
    lap("count")
    return Prepared(frame, tuples)


def _scanned(rows: Rows, spec: TableSpec, models: Sequence[Criterion]) -> Frame:
    names = [*(q.name for q in spec.quasi), *sensitive_names(models)]
    cells: dict[str, set[Any]] = {n: set() for n in names}
    for batch in rows.batches(names):
        for n in names:
            cells[n] |= occurring(batch.column(n))
    return frame_of(spec, models, cells)


class Keyed:
    """Rows as keys: mixed-radix numbers of their codes, quasi-identifiers first; bytes where 64 bits are too few."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.quasi = [d.size for d in frame.domains]
        self.widths = [*self.quasi, *(len(a.values) + 1 for a in frame.attributes)]  # 0 stands for "no value"
        self.exact = math.prod(self.widths) < EXACT

    def key(self, columns: Sequence[Codes]) -> Keys:
        """(n,) keys of the first columns' codes, each (n,)."""
        if not self.exact:
            return np.stack(columns, axis=1).astype(">u4").view(f"S{4 * len(columns)}").reshape(-1)
        key = np.zeros(len(columns[0]), np.int64)
        for width, code in zip(self.widths, columns, strict=False):
            key *= width
            key += code
        return key

    def quasi_key(self, batch: Any) -> Keys:
        """(n,) key of the quasi-identifiers alone."""
        return self.key(self._quasi_codes(batch))

    def _quasi_codes(self, batch: Any) -> list[Codes]:
        return [encode(batch.column(d.name), d) for d in self.frame.domains]

    def count(self, rows: Rows) -> tuple[Keys, Index]:
        """Distinct keys of all columns, ascending, and their weights."""
        attributes = self.frame.attributes
        fold = _Fold(self.cells(self.widths, rows.count))
        for batch in rows.batches([*(d.name for d in self.frame.domains), *(a.name for a in attributes)]):
            values = [sensitive_codes(batch.column(a.name), a) + 1 for a in attributes]
            fold.add(self.key([*self._quasi_codes(batch), *values]))
        return fold.result()

    def cells(self, widths: Sequence[int], rows: int) -> int | None:
        """The size of a table of all combinations, where it serves this many rows better than sorting does."""
        span = math.prod(widths)
        return span if self.exact and span <= min(DENSE_CELLS, SPARSE * rows) else None

    def codes(self, keys: Keys) -> Codes:
        """(q + sensitive, u) codes of keys of all columns; -1 for "no value" of a sensitive one."""
        if self.exact:
            columns = []
            for width in reversed(self.widths):
                columns.append((keys % width).astype(np.int32))
                keys = keys // width
            out = np.stack(columns[::-1])
        else:
            out = np.ascontiguousarray(keys.view(">u4").reshape(len(keys), -1).T.astype(np.int32))
        out[len(self.quasi) :] -= 1
        return out


class _Fold:
    """Keys to distinct keys with weights: a table of all combinations where it serves, else sorted runs, merged."""

    def __init__(self, cells: int | None) -> None:
        self._table = None if cells is None else np.zeros(cells, np.int32)
        self._runs: list[tuple[Keys, Index]] = []
        self._waiting = 0

    def add(self, key: Keys) -> None:
        if self._table is not None:
            np.add.at(self._table, key, np.int32(1))
            return
        distinct, weights = np.unique(key, return_counts=True)
        self._runs.append((distinct, weights.astype(np.int64)))
        self._waiting += len(distinct)
        if self._waiting > PENDING_KEYS:
            self._merge()

    def _merge(self) -> None:
        keys = np.concatenate([k for k, _ in self._runs])
        weights = np.concatenate([w for _, w in self._runs])
        order = np.argsort(keys, kind="stable")
        keys, weights = keys[order], weights[order]
        first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
        self._runs, self._waiting = [(keys[first], np.add.reduceat(weights, first))], 0

    def result(self) -> tuple[Keys, Index]:
        if self._table is not None:
            keys = np.flatnonzero(self._table)
            return keys, self._table[keys].astype(np.int64)
        if len(self._runs) > 1:
            self._merge()
        return self._runs[0]


class ClassOf:
    """Class of a row by its key: a direct table where it serves, else binary search."""

    def __init__(self, prepared: Prepared, found: Recoding) -> None:
        t = prepared.tuples
        self._keyed = Keyed(prepared.frame)
        key = self._keyed.key(list(t.codes))
        first = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
        self._keys, self._classes = key[first], found.classes[first].astype(np.int32)
        self._table: NDArray[np.int32] | None = None
        if (cells := self._keyed.cells(self._keyed.quasi, t.rows)) is not None:
            self._table = np.full(cells, UNKNOWN, np.int32)
            self._table[self._keys] = self._classes

    def of(self, batch: Any) -> NDArray[np.int32]:
        """(n,) class of every row, -1 for suppressed ones.

        Raises:
            DataError: rows that were not counted.
        """
        out = self._at(self._keyed.quasi_key(batch))
        if (out == UNKNOWN).any():
            raise DataError("the source changed between the two passes", hint="leave the file alone meanwhile")
        return out

    def _at(self, key: Keys) -> NDArray[np.int32]:
        if self._table is not None:
            return self._table[key]
        at = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        return np.where(self._keys[at] == key, self._classes[at], np.int32(UNKNOWN))
