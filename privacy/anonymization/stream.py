"""Parquet to Parquet in bounded memory: two passes over the file, one search between them.

Pass 1 turns record batches into integer keys and folds them into weighted distinct tuples; the search sees only those.
Pass 2 looks every row's class up. The order of the output is uniformly random: each row goes to a bucket drawn with the
operating system's randomness, and each bucket, small enough for memory, is permuted and written as one row group. What
waits in the buckets on disk is what will be released (class numbers and released columns), in a folder of mode 0700
that is removed at the end.

Memory: the distinct tuples (not the rows), a few record batches, one bucket.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedveil.common.contract import DataContract
from fedveil.common.errors import AnonymityError, DataError, UsageError
from fedveil.common.files import scratch
from fedveil.privacy.anonymization.anonymizer import (
    Method,
    Outcome,
    check_limit,
    contract_models,
    labelled,
    outcome_of,
    random_order,
    search,
)
from fedveil.privacy.anonymization.attributes import TableSpec
from fedveil.privacy.anonymization.criteria import Criterion
from fedveil.privacy.anonymization.domains import encode, occurring
from fedveil.privacy.anonymization.mondrian import CUTS
from fedveil.privacy.anonymization.prepare import (
    Frame,
    bind,
    check_rows,
    check_schema,
    frame_of,
    sensitive_codes,
    sensitive_names,
    tuples_of,
)
from fedveil.privacy.anonymization.recheck import Findings, require
from fedveil.privacy.anonymization.recoding import Recoding

Index = NDArray[np.int64]
BATCH_ROWS = 1 << 19
BUCKET_ROWS = 1 << 20
DENSE_CELLS = 48_000_000  # a table of all combinations is used where it is at most this large (192 MB)
PENDING_KEYS = 1 << 22


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
    spec: TableSpec | DataContract,
    models: Sequence[Criterion] = (),
    *,
    method: Method = "auto",
    suppression_limit: float = 0.0,
    cuts: int = CUTS,
) -> Streamed:
    """Anonymise a Parquet file of any length into ``destination`` (mode 0600), which exists only if verified.

    The result is that of :class:`~.anonymizer.Anonymizer` on the same rows. Arguments as there.

    Raises:
        DataError, AnonymityError, ContractError, UsageError: as there; also a file that cannot be read or written, a
            destination that is the source, or more combinations than 64 bits.
    """
    if isinstance(spec, DataContract):
        models = models or contract_models(spec)
        spec = TableSpec.from_contract(spec)
    check_limit(suppression_limit)
    bound = bind(models, spec)
    if source.resolve() == destination.resolve():
        raise UsageError("the released file would overwrite its source", hint="name another destination")
    clock = _Clock()
    try:
        reader = _Reader(source, spec, bound)
        frame = reader.frame()
        clock.lap("scan")
        keys = _Keyed(frame)
        combos, weights = keys.count(reader)
        tuples = tuples_of(frame, combos, weights)
        clock.lap("count")
        levels = [q.fixed_level for q in spec.quasi]
        given = None if None in levels else tuple(level for level in levels if level is not None)
        found = search(method, tuples, frame.domains, bound, limit=suppression_limit, cuts=cuts, given=given)
        outcome = outcome_of(found, tuples)
        clock.lap("search")
        classes = _ClassOf(keys, combos, found)
        del tuples, combos
        _give_back()
        findings = _write(reader, classes, found, destination, clock, outcome, suppression_limit)
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{source.name} cannot be read, or {destination.name} cannot be written") from e
    return Streamed(outcome, findings, clock.seconds, clock.cpu)


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


class _Reader:
    """Record batches of the source, the next one decoded while the last one is worked on."""

    def __init__(self, source: Path, spec: TableSpec, models: Sequence[Criterion]) -> None:
        self.source, self.spec, self.models = source, spec, models
        schema = pq.read_schema(source)
        check_schema(schema, spec)
        self.rows = pq.read_metadata(source).num_rows
        check_rows(self.rows, models)
        coded = {*(q.name for q in spec.quasi), *(s.name for s in spec.sensitive)}
        self._texts = [f.name for f in schema if f.name in coded and _is_text(f.type)]
        self.others = spec.released[len(spec.quasi) :]

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        file = pq.ParquetFile(self.source, read_dictionary=self._texts, memory_map=True)
        iterator = file.iter_batches(BATCH_ROWS, columns=list(columns))
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(next, iterator, None)
            while (batch := ahead.result()) is not None:
                ahead = pool.submit(next, iterator, None)
                yield batch

    def frame(self) -> Frame:
        """Domains: the values that occur."""
        names = [*(q.name for q in self.spec.quasi), *sensitive_names(self.models)]
        cells: dict[str, set[Any]] = {n: set() for n in names}
        for batch in self.batches(names):
            for n in names:
                cells[n] |= occurring(batch.column(n))
        return frame_of(self.spec, self.models, cells)


class _Keyed:
    """Rows as 64-bit keys: mixed-radix numbers of their codes, quasi-identifiers first."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.quasi = [d.size for d in frame.domains]
        self.values = [len(a.values) + 1 for a in frame.attributes]  # 0 stands for "no value"
        self.span = int(np.prod([float(w) for w in self.quasi]))
        if float(self.span) * float(np.prod([float(w) for w in self.values])) >= float(1 << 62):
            raise UsageError(
                "the columns' combinations do not fit into 64 bits",
                hint="use Anonymizer on a table, or declare fewer or coarser quasi-identifiers",
            )

    def quasi_key(self, batch: Any) -> Index:
        """(n,) key of the quasi-identifiers alone."""
        key = np.zeros(batch.num_rows, np.int64)
        for d in self.frame.domains:
            key *= d.size
            key += encode(batch.column(d.name), d)
        return key

    def count(self, reader: _Reader) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Distinct combinations (q + sensitive, u) in lexicographic order, and their weights (u,)."""
        names = [*(d.name for d in self.frame.domains), *(a.name for a in self.frame.attributes)]
        fold = _Fold(self.span * int(np.prod(self.values, initial=1)))
        for batch in reader.batches(names):
            key = self.quasi_key(batch)
            for a, width in zip(self.frame.attributes, self.values, strict=True):
                key *= width
                key += sensitive_codes(batch.column(a.name), a) + 1
            fold.add(key)
        keys, weights = fold.result()
        columns = []
        for shift, width in [*[(1, w) for w in reversed(self.values)], *[(0, w) for w in reversed(self.quasi)]]:
            columns.append((keys % width - shift).astype(np.int32))
            keys = keys // width
        return np.stack(columns[::-1]), weights


class _Fold:
    """Keys to distinct keys with weights: a table of all combinations where it fits, else sorted runs, merged."""

    def __init__(self, span: int) -> None:
        self._table = np.zeros(span, np.int32) if span <= DENSE_CELLS else None
        self._keys = np.zeros(0, np.int64)
        self._weights = np.zeros(0, np.int64)
        self._pending: list[tuple[Index, NDArray[np.int64]]] = []
        self._waiting = 0

    def add(self, key: Index) -> None:
        if self._table is not None:
            np.add.at(self._table, key, np.int32(1))
            return
        distinct, weights = np.unique(key, return_counts=True)
        self._pending.append((distinct, weights.astype(np.int64)))
        self._waiting += len(distinct)
        if self._waiting > PENDING_KEYS:
            self._merge()

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(k for k, _ in self._pending)])
        weights = np.concatenate([self._weights, *(w for _, w in self._pending)])
        order = np.argsort(keys, kind="stable")
        keys, weights = keys[order], weights[order]
        first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
        self._keys, self._weights = keys[first], np.add.reduceat(weights, first)
        self._pending, self._waiting = [], 0

    def result(self) -> tuple[Index, NDArray[np.int64]]:
        if self._table is not None:
            keys = np.flatnonzero(self._table)
            weights = self._table[keys].astype(np.int64)
            self._table = None
            return keys, weights
        if self._pending:
            self._merge()
        return self._keys, self._weights


class _ClassOf:
    """Class of a row by its key: a direct table where it fits, else binary search."""

    def __init__(self, keyed: _Keyed, combos: NDArray[np.int32], found: Recoding) -> None:
        self._keyed = keyed
        key = np.zeros(combos.shape[1], np.int64)
        for width, code in zip(keyed.quasi, combos, strict=False):
            key *= width
            key += code
        first = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
        keys, classes = key[first], found.classes[first].astype(np.int32)
        self._keys, self._classes = keys, classes
        self._table: NDArray[np.int32] | None = None
        if keyed.span <= DENSE_CELLS:
            self._table = np.full(keyed.span, -2, np.int32)
            self._table[keys] = classes

    def of(self, batch: Any) -> NDArray[np.int32]:
        """(n,) class of every row, -1 for suppressed ones."""
        key = self._keyed.quasi_key(batch)
        if self._table is not None:
            out = self._table[key]
            changed = int((out == -2).sum())
        else:
            at = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
            out, changed = self._classes[at], int((self._keys[at] != key).sum())
        if changed:
            raise DataError("the source changed between the two passes", hint="leave the file alone meanwhile")
        return out


def _write(
    reader: _Reader,
    classes: _ClassOf,
    found: Recoding,
    destination: Path,
    clock: _Clock,
    outcome: Outcome,
    limit: float,
) -> Findings:
    with scratch(destination) as folder:
        draft = folder / "draft.parquet"
        buckets = _Buckets(folder, reader)
        written = buckets.scatter(reader, classes)
        if written != outcome.rows - outcome.suppressed:
            raise AnonymityError("the rows written are not the rows the search saw")
        buckets.gather(draft, reader.spec, found)
        clock.lap("write")
        findings = require(draft, reader.spec, reader.models, original_rows=outcome.rows, suppression_limit=limit)
        clock.lap("verify")
        os.chmod(draft, 0o600)
        os.replace(draft, destination)
    return findings


class _Buckets:
    """Rows scattered over files at random."""

    def __init__(self, folder: Path, reader: _Reader) -> None:
        number = 1
        while number < 256 and number * BUCKET_ROWS < reader.rows:
            number *= 2
        self._paths = [folder / f"bucket-{i}.arrow" for i in range(number)]
        self._words: dict[str, dict[str, int]] = {}

    def scatter(self, reader: _Reader, classes: _ClassOf) -> int:
        """Put every released row into a random bucket; how many rows."""
        writers: list[Any] = []
        total = 0
        with contextlib.ExitStack() as stack:
            for batch in reader.batches([*(q.name for q in reader.spec.quasi), *reader.others]):
                own = classes.of(batch)
                kept = np.flatnonzero(own >= 0)
                drawn = np.frombuffer(os.urandom(len(kept)), np.uint8) & np.uint8(len(self._paths) - 1)
                order = np.argsort(drawn, kind="stable")
                rows = kept[order]
                arrays = [pa.array(own[rows]), *(self._column(batch, n, rows) for n in reader.others)]
                part = pa.record_batch(arrays, names=["class", *reader.others])
                if not writers:
                    writers = [stack.enter_context(ipc.new_stream(p, part.schema)) for p in self._paths]
                ends = np.searchsorted(drawn[order], np.arange(len(self._paths)), side="right").tolist()
                for writer, start, stop in zip(writers, [0, *ends], ends, strict=False):
                    if stop > start:
                        writer.write_batch(part.slice(start, stop - start))
                total += len(rows)
        return total

    def _column(self, batch: Any, name: str, rows: Index) -> Any:
        """A released column; texts as numbers into a list kept aside, so that no bucket repeats them."""
        column = batch.column(name)
        if not pa.types.is_dictionary(column.type):
            return column.take(pa.array(rows))
        known = self._words.setdefault(name, {})
        # Only words of released rows are remembered: the dictionary of a batch also lists suppressed ones.
        index = column.indices.fill_null(-1) if column.null_count else column.indices
        index = index.to_numpy(zero_copy_only=False)[rows]
        words = column.dictionary.to_pylist()
        used = np.unique(index)
        table = np.full(len(words) + 1, -1, np.int32)  # the last entry serves -1, "no value"
        for i in used[used >= 0].tolist():
            table[i] = known.setdefault(words[i], len(known))
        return pa.array(table[index])

    def gather(self, path: Path, spec: TableSpec, found: Recoding) -> None:
        """Permute each bucket and write it as one row group."""
        writer = None
        with contextlib.ExitStack() as stack:
            for bucket in self._paths:
                with pa.memory_map(str(bucket)) as f, ipc.open_stream(f) as stream:
                    table = stream.read_all()
                    order = random_order(table.num_rows)
                    part = self._released(table, order, spec, found)
                    del table
                if writer is None:
                    writer = stack.enter_context(pq.ParquetWriter(path, part.schema))
                writer.write_table(part, row_group_size=BUCKET_ROWS)
                bucket.unlink()

    def _released(self, table: pa.Table, order: Index, spec: TableSpec, found: Recoding) -> pa.Table:
        classes = table["class"].to_numpy()[order]
        columns: list[Any] = [labelled(cell.of_class[classes], cell.labels) for cell in found.cells]
        for name in spec.released[len(spec.quasi) :]:
            if name in self._words:
                words = list(self._words[name])
                index = table[name].to_numpy()[order]
                codes = pa.array(index, mask=index < 0)
                columns.append(pa.DictionaryArray.from_arrays(codes, pa.array(words, pa.string())))
            else:
                columns.append(table[name].take(pa.array(order)))
        return pa.table(columns, names=list(spec.released))


def _is_text(kind: Any) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(plain) or pa.types.is_large_string(plain)
