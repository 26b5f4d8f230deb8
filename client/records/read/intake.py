"""The stages that look at one row at a time. They turn batches of text from any source into the contract's columns.

Order: which rows may be used (consent, retention), identifiers (dropped, or a pseudonym), scan for identifiers in what
is left, declared replacements, types and missing codes, declared rescalings, numbers outside the public bounds if
the contract says what to do with them. Each works on a row by itself: factor 1 for differential privacy.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedveil.client.records.read import consent, corrections, pii, pseudonym
from fedveil.client.records.read import values as cells
from fedveil.client.records.read.corrections import Correction
from fedveil.client.records.read.files import Opened
from fedveil.client.records.read.values import Reading
from fedveil.common.contract import Column, DataContract
from fedveil.common.errors import DataError


@dataclass
class Tally:
    """What the stages counted. It stays at the site.

    Attributes:
        read: rows of the source. usable: what consent and retention left out.
        columns: by loaded column. identifiers: cells of identifier columns that were dropped or replaced. nameless:
            such cells without text. unkeyed: rows without a value in one of the near key's columns.
        breaks: line ends inside quoted cells of a CSV file.
        found: by column, the kinds of identifiers found in its cells and how many.
    """

    read: int = 0
    usable: consent.Usable = field(default_factory=consent.Usable)
    columns: dict[str, Reading] = field(default_factory=dict)
    identifiers: int = 0
    nameless: int = 0
    unkeyed: int = 0
    breaks: int = 0
    found: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class RawTable:
    """The contract's columns as read. They are the site's secret and must not be written or sent.

    Attributes:
        rows: number of rows, at least 1.
        columns: by name, (rows,) each: float64 with NaN for "no value", or texts (object) with "" for "no value".
        identity: (rows,) codes, equal for equal source rows. Identifiers count for that, drop columns do not.
        tally: what was counted on the way.
        near: (rows,) codes, equal for rows with the same ``near_key`` of the contract. A row that lacks a value of it
            has a code of its own. None without such a key.
        persons: (rows,) codes of the pseudonym's column, made in the same way; None without such a column.
    """

    rows: int
    columns: dict[str, NDArray[Any]] = field(repr=False)
    identity: NDArray[np.int64] = field(repr=False)
    tally: Tally = field(default_factory=Tally, repr=False)
    near: NDArray[np.int64] | None = field(default=None, repr=False)
    persons: NDArray[np.int64] | None = field(default=None, repr=False)

    def take(self, index: NDArray[np.int64]) -> RawTable:
        """The rows ``index``, in that order; the tally stays that of the reading."""
        some = [None if x is None else x[index] for x in (self.near, self.persons)]
        columns = {n: x[index] for n, x in self.columns.items()}
        return RawTable(len(index), columns, self.identity[index], self.tally, *some)


@dataclass(frozen=True)
class Rules:
    """What a site adds to the contract.

    Attributes:
        corrections: declared before the table is read.
        secret: key of the pseudonyms; needed where the contract asks for one.
        today: the day that retention counts from.
        progress: called after each batch with the rows read so far, and the bytes of a CSV file (else 0).
    """

    corrections: Sequence[Correction] = ()
    secret: bytes | None = field(default=None, repr=False)
    today: dt.date = field(default_factory=lambda: dt.datetime.now(dt.UTC).date())
    progress: Callable[[int, int], None] | None = None


def take_in(opened: Opened, contract: DataContract, rules: Rules, what: str) -> RawTable:
    """Read all batches through the stages.

    Args:
        what: the source, for messages.

    Raises:
        DataError: no rows, none that may be used, cells that are neither numbers nor texts, or, in a CSV file, a line
            end inside a cell of a loaded category. Cells of the wrong type are counted, not refused: the quality report
            names them together.
        ConfigError: a correction that does not fit the contract, or no secret where one is needed.
    """
    corrections.check(rules.corrections, contract)
    state = _Intake(opened, contract, rules)
    for table in opened.batches:
        state.add(table)
        if rules.progress is not None:
            rules.progress(state.tally.read, opened.position.bytes if opened.position else 0)
    state.tally.breaks = opened.position.breaks if opened.position else 0
    if not state.tally.read:
        raise DataError(f"{what} has a header but no rows", hint="export the table again, with its rows")
    if not state.rows:
        raise DataError(
            f"{what}: no row may be used: of {state.tally.read} rows, {state.tally.usable.refused} lack consent and "
            f"{state.tally.usable.expired + state.tally.usable.undated} are past their retention",
            hint="check the consent codes and the retention column of the contract",
        )
    return state.finish()


class _Intake:
    def __init__(self, opened: Opened, contract: DataContract, rules: Rules) -> None:
        self.contract, self.rules, self.style = contract, rules, opened.style
        self._quoted = opened.position is not None  # a CSV file: only there an open quote can swallow rows
        self.tally = Tally(columns={c.name: Reading() for c in contract.loaded})
        self.rows = 0
        self._keyed = [n for n in opened.names if next(c for c in contract.columns if c.name == n).role != "drop"]
        self._parts: dict[str, list[NDArray[Any]]] = {c.name: [] for c in contract.loaded}
        self._pools: dict[str, dict[str, str]] = {c.name: {} for c in contract.loaded}
        self._identity, self._near, self._persons = (pseudonym.RowKeys() for _ in range(3))
        self._near_key = [c for name in contract.quality.near_key for c in contract.columns if c.name == name]
        self._keyless: list[NDArray[np.bool_]] = []
        self._formats = {c.name: c.format for c in contract.columns if c.format}
        self._identifiers = [c for c in contract.columns if c.role == "identifier" and c.name in opened.names]
        self._person = [c for c in self._identifiers if c.pseudonym]
        self._nobody: list[NDArray[np.bool_]] = []

    def add(self, table: pa.Table) -> None:
        texts = {n: _safe_text(table.column(n), n, self._formats.get(n, "")) for n in table.column_names}
        self.tally.read += table.num_rows
        mask = consent.usable_rows(texts, self.contract, self.rules.today, self.tally.usable)
        if mask is not None:
            texts = {n: t.filter(pa.array(mask)) for n, t in texts.items()}
        rows = table.num_rows if mask is None else int(mask.sum())
        if not rows:
            return
        self.rows += rows
        self._keyless.append(_lacking_any(texts, self._near_key, rows))
        self._nobody.append(_lacking_any(texts, self._person, rows))
        self.tally.unkeyed += int(self._keyless[-1].sum())
        for c in self._identifiers:
            texts[c.name] = self._without_identity(texts[c.name], c)
        self._identity.add([texts[n] for n in self._keyed], rows)
        self._near.add([texts[c.name] for c in self._near_key], rows)
        self._persons.add([texts[c.name] for c in self._person], rows)
        for c in self.contract.loaded:
            self._parts[c.name].append(self._values(texts[c.name], c))

    def _without_identity(self, text: pa.Array, column: Column) -> pa.Array:
        """The identifier's cells, or their pseudonyms. Both are used as keys of rows only."""
        empty = cells.count(cells.pc.equal(text, ""))
        self.tally.identifiers += len(text) - empty
        self.tally.nameless += empty
        if not column.pseudonym:
            return text
        encoded = cells.pc.dictionary_encode(text)
        secret = self.rules.secret or b""
        keys = pa.array(pseudonym.pseudonyms(encoded.dictionary.to_pylist(), secret, column.name), pa.string())
        return keys.take(encoded.indices)

    def _values(self, text: pa.Array, c: Column) -> NDArray[Any]:
        seen = self.tally.columns[c.name]
        self._scan(text, c)
        own = [r for r in self.rules.corrections if r.column == c.name]
        for rule in own:
            text, changed = rule.on_text(text)
            seen.corrected += changed
        if c.type == "category":
            if self._quoted and (broken := cells.count(cells.pc.match_substring_regex(text, r"[\n\r]"))):
                raise DataError(
                    f"column {c.name!r}: at least {broken} cells hold a line end: an open quote may hold whole rows",
                    hint="close every quote; a quote inside a quoted cell is written twice",
                )
            return cells.leaves(text, c, self._pools[c.name], seen)
        values = cells.numbers(text, c, self.style, seen)
        for rule in own:
            seen.corrected += rule.on_numbers(values)
        return _within(values, c, seen)

    def _scan(self, text: pa.Array, c: Column) -> None:
        """Scan cells for identifiers. Cells that say what the contract itself says are public and left out."""
        undeclared = text.filter(cells.pc.invert(cells.is_declared(text, c)))
        if len(undeclared):
            found = self.tally.found.setdefault(c.name, {})
            for kind, n in pii.scan(undeclared, only_digits=c.type == "number").items():
                found[kind] = found.get(kind, 0) + n

    def finish(self) -> RawTable:
        columns = {n: np.concatenate(parts) for n, parts in self._parts.items()}
        near = _apart(self._near.codes(), self._keyless) if self._near_key else None
        persons = _apart(self._persons.codes(), self._nobody) if self._person else None
        return RawTable(self.rows, columns, self._identity.codes(), self.tally, near, persons)


def _lacking_any(texts: dict[str, pa.Array], columns: Sequence[Column], rows: int) -> NDArray[np.bool_]:
    """Rows that lack a value in one of the columns. Such rows do not say whose they are."""
    out = np.zeros(rows, bool)
    for c in columns:
        out |= cells.lacking(texts[c.name], c)
    return out


def _apart(codes: NDArray[np.int64], lacking: Sequence[NDArray[np.bool_]]) -> NDArray[np.int64]:
    """The codes. Every row that lacks a value gets a code of its own."""
    alone = np.concatenate(lacking)
    codes[alone] = len(codes) + np.arange(alone.sum())
    return codes


def _within(values: NDArray[np.float64], c: Column, seen: Reading) -> NDArray[np.float64]:
    if c.outliers == "error" or c.low is None or c.high is None:
        return values
    outside = (values < c.low) | (values > c.high)
    seen.moved += int(outside.sum())
    return np.clip(values, c.low, c.high) if c.outliers == "clamp" else np.where(outside, np.nan, values)


def _safe_text(values: pa.ChunkedArray, name: str, form: str) -> pa.Array:
    """The text of a column. If the source holds dates as dates, they are written in the contract's form."""
    text = None
    try:
        if form and (pa.types.is_date(values.type) or pa.types.is_timestamp(values.type)):
            values = cells.pc.strftime(values, format=form)
        text = cells.text_of(values)
    except pa.ArrowException:
        text = None
    if text is None:
        raise DataError(
            f"column {name!r} has cells that are neither numbers nor texts", hint="convert the column to one of them"
        )
    return text
