"""Independent verification of a released table, for every criterion, from the bytes that were written.

It shares only the specification with the code that wrote the file. Arrow reads and groups. The criteria are written
once more from their definitions in plain Python (fractions where they are rational). Labels are parsed again. So an
error in the searches, in the numpy histograms or in the writer cannot hide itself.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fedveil.common.contract import MISSING
from fedveil.common.errors import AnonymityError, UsageError
from fedveil.privacy.anonymization import criteria as cr
from fedveil.privacy.anonymization.attributes import TOP, QuasiIdentifier, Sensitive, TableSpec, bins
from fedveil.privacy.anonymization.prepare import bind
from fedveil.privacy.anonymization.recheck_definitions import judge
from fedveil.privacy.anonymization.recheck_labels import number_of, sets_of

pc: Any = pyarrow.compute
BATCH = 1 << 20
SLACK = 1e-9
Histogram = Counter[str]
_AGAIN = "the file was changed, or made under another specification: anonymise the table again"
_GIVE = "give a .csv or .parquet file as the anonymisation wrote it"


@dataclass(frozen=True)
class Finding:
    """One criterion: whether it holds, in how many classes it fails, and the worst value found (local knowledge)."""

    name: str
    column: str
    required: str
    met: bool
    failing: int
    worst: float


@dataclass(frozen=True)
class Findings:
    """What a released file shows.

    Attributes:
        rows, classes: rows read and classes of equal labels.
        findings: by criterion.
    """

    rows: int
    classes: int
    findings: tuple[Finding, ...]

    @property
    def met(self) -> bool:
        """Whether every criterion holds in every class."""
        return all(f.met for f in self.findings)


def recheck(
    path: Path,
    spec: TableSpec,
    models: Sequence[cr.Criterion],
    *,
    original_rows: int | None = None,
    suppression_limit: float = 1.0,
) -> Findings:
    """Read a released ``.parquet`` or ``.csv`` file and check every criterion on it.

    Args:
        original_rows: rows of the table it was made from: the difference was suppressed.
        suppression_limit: share of ``original_rows`` that may be missing.

    Raises:
        AnonymityError: the file cannot be read, holds other columns, no rows, a cell that is no label of the
            specification, a sensitive value that is not among the declared ones, or too few of the original rows.
            Failing criteria are reported, not raised.
    """
    models = bind(models, spec)
    columns = sorted({m.column for m in models if m.column} | {s.name for s in spec.sensitive if _declared(s)})
    labels, table = _aggregate(path, spec, columns)
    for q in spec.quasi:
        _check_labels(q, list(labels[q.name]))
    for name in columns:
        _check_values(spec.sensitive_column(name), labels[name])
    rows = int(pc.sum(table["rows_count"]).as_py())
    _check_suppression(rows, original_rows, suppression_limit)
    names = [q.name for q in spec.quasi]
    classes = table.group_by(names).aggregate([("rows_count", "sum")])
    findings = [_judge(m, spec, labels, table, classes) for m in models]
    return Findings(rows, classes.num_rows, tuple(findings))


def require(path: Path, spec: TableSpec, models: Sequence[cr.Criterion], **kwargs: Any) -> Findings:
    """:func:`recheck`, and refuse a file on which a criterion fails.

    Raises:
        AnonymityError: also when a criterion fails; it says which, and in how many classes.
    """
    found = recheck(path, spec, models, **kwargs)
    if found.met:
        return found
    parts = []
    for f in found.findings:
        where = f" of column {f.column!r}" if f.column else ""
        if not f.met:
            parts.append(f"{f.name} ({f.required}){where} fails in {f.failing} of {found.classes} classes")
    raise AnonymityError(
        "the released table is not anonymous enough: " + "; ".join(parts),
        hint="do not release it: anonymise the table again, with coarser levels or more suppression",
    )


def _aggregate(path: Path, spec: TableSpec, columns: Sequence[str]) -> tuple[dict[str, dict[str, int]], pa.Table]:
    """Numbers of the labels by column, and one row per different combination with its count."""
    names = [*(q.name for q in spec.quasi), *columns]
    labels: dict[str, dict[str, int]] = {n: {} for n in names}
    spelt = {n: _spelling(spec.sensitive_column(n)) for n in columns}
    parts = []
    try:
        for batch in _batches(path, spec, names):
            arrays = [_numbered(batch.column(n), labels[n], spelt.get(n, str)) for n in names]
            _check_present(spec, arrays)
            part = pa.table(arrays, names=names)
            parts.append(part.group_by(names).aggregate([([], "count_all")]).rename_columns([*names, "rows_count"]))
    except (OSError, pa.ArrowException) as e:
        raise AnonymityError(f"the released file {path.name} cannot be read", hint=_GIVE) from e
    if not parts or not sum(p.num_rows for p in parts):
        raise AnonymityError("the released file holds no rows", hint=_GIVE)
    whole = pa.concat_tables(parts).group_by(names).aggregate([("rows_count", "sum")])
    return labels, whole.rename_columns([*names, "rows_count"])


def _batches(path: Path, spec: TableSpec, names: Sequence[str]) -> Iterator[Any]:
    expected = list(spec.released)
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        found = file.schema_arrow.names
        texts = [f.name for f in file.schema_arrow if f.name in names and pa.types.is_string(_plain(f.type))]
        file = pq.ParquetFile(path, read_dictionary=texts)
        source: Iterator[Any] = file.iter_batches(BATCH, columns=list(names))
    elif path.suffix == ".csv":
        # All columns are read as text: a guessed type would read "NA" as no value and "01" as 1.
        texts = dict.fromkeys(names, pa.string())
        convert = pacsv.ConvertOptions(column_types=texts, strings_can_be_null=False)
        reader = pacsv.open_csv(path, convert_options=convert)
        found, source = reader.schema.names, iter(reader)
    else:
        raise UsageError(f"{path.name} is neither .parquet nor .csv", hint=_GIVE)
    if found != expected:
        raise AnonymityError("the released file's columns are not the specification's released columns", hint=_AGAIN)
    yield from source


def _plain(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _numbered(array: Any, known: dict[str, int], spelling: Callable[[str], str | None]) -> Any:
    """A column as numbers that mean the same in every batch; -1 for "no value"."""
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    words = [None if v is None else spelling(_word(v)) for v in array.dictionary.to_pylist()]
    used = set(array.indices.unique().to_pylist()) - {None}
    table = [-1 if w is None or i not in used else known.setdefault(w, len(known)) for i, w in enumerate(words)]
    taken = pa.array(table, pa.int32()).take(array.indices)
    return taken.fill_null(-1)


def _declared(column: Sensitive) -> frozenset[str]:
    """The values that a sensitive column may hold; empty where none are declared."""
    leaves = column.hierarchy.leaves if column.hierarchy else ()
    return frozenset(column.values or leaves) & frozenset(leaves or column.values)


def _spelling(column: Sensitive) -> Callable[[str], str | None]:
    """How a sensitive cell is read: an empty text is "no value", as it is to the engine and to a CSV file's writer.

    A CSV file writes ``true`` and ``1.0`` where the table held the declared ``True`` and ``1``.
    """
    declared = _declared(column)

    def spelt(word: str) -> str | None:
        if word in declared or not declared or not word:
            return word or None
        number = number_of(word)
        other = word.capitalize() if number is None else _word(number)
        return other if other in declared else word

    return spelt


def _check_values(column: Sensitive, found: Mapping[str, int]) -> None:
    """An undeclared value adds no diversity, and no distance to it is defined."""
    declared = _declared(column)
    if declared and (unknown := len(set(found) - declared)):
        raise AnonymityError(
            f"column {column.name!r}: {unknown} different values are not among the declared ones",
            hint=_AGAIN,
        )


def _check_present(spec: TableSpec, arrays: Sequence[Any]) -> None:
    for q, array in zip(spec.quasi, arrays, strict=False):
        if empty := int(pc.sum(pc.equal(array, -1)).as_py() or 0):
            raise AnonymityError(
                f"column {q.name!r}: {empty} cells have no label", hint=f"no value is written as {MISSING!r}"
            )


def _word(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _check_suppression(rows: int, original: int | None, limit: float) -> None:
    if original is None:
        return
    if rows > original:
        raise AnonymityError(f"the released file has {rows - original} rows more than the original table", hint=_AGAIN)
    if original - rows > limit * original + SLACK:
        raise AnonymityError(
            f"{original - rows} of {original} rows are suppressed, more than the limit {limit:g}",
            hint="allow more suppression, or choose coarser levels",
        )


def _check_labels(q: QuasiIdentifier, labels: Sequence[str]) -> None:
    """Every cell is a label of the hierarchy, or a set or interval of its values."""
    known = {label for level in q.hierarchy.levels for label in level} if q.hierarchy else set()
    if q.column is not None:
        known |= {label for _, labels in bins(q.column) for label in labels}
    is_set = sets_of(q)
    broken = sum(not (label in known or label in (TOP, MISSING) or is_set(label)) for label in labels)
    if broken:
        raise AnonymityError(
            f"column {q.name!r}: {broken} different cells are no labels of the specification",
            hint=_AGAIN,
        )


def _judge(
    m: cr.Criterion, spec: TableSpec, labels: Mapping[str, Mapping[str, int]], table: pa.Table, classes: pa.Table
) -> Finding:
    """One criterion on every class. Keys of classes are built only where a criterion needs to tell them apart."""
    sizes = classes["rows_count_sum"].to_pylist()
    whole: Histogram = Counter()
    own: Iterator[Histogram] = itertools.repeat(Counter())
    column = None
    if m.column:
        column = spec.sensitive_column(m.column)
        histograms = _histograms(m.column, spec, labels, table)
        for h in histograms.values():
            whole.update(h)
        own = iter([histograms.get(key, Counter()) for key in _keys(spec, classes)])
    failing, worst = 0, -math.inf
    for size, histogram in zip(sizes, own, strict=False):
        ok, badness = judge(m, size, histogram, whole, column)
        failing += not ok
        worst = max(worst, badness)
    return Finding(m.name, m.column, m.required, failing == 0, failing, abs(worst))


def _keys(spec: TableSpec, table: pa.Table) -> list[tuple[int, ...]]:
    return list(zip(*(table[q.name].to_pylist() for q in spec.quasi), strict=True))


def _histograms(
    column: str, spec: TableSpec, labels: Mapping[str, Mapping[str, int]], table: pa.Table
) -> dict[tuple[int, ...], Histogram]:
    words = {i: w for w, i in labels[column].items()}
    out: dict[tuple[int, ...], Histogram] = {}
    values, counts = table[column].to_pylist(), table["rows_count"].to_pylist()
    for key, value, count in zip(_keys(spec, table), values, counts, strict=True):
        own = out.setdefault(key, Counter())
        if value >= 0:
            own[words[value]] += count
    return out
