"""What a quality report holds: true counts. It is shown only through :mod:`.page`, which hides the small ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedveil.client.records.judge import drift, hipaa
from fedveil.client.records.judge.stages import Stability, Stage
from fedveil.common.errors import DataError


@dataclass(frozen=True)
class ColumnQuality:
    """Counts of one column.

    Attributes:
        missing: cells without a value. out_of_bounds, unseen, unreadable: cells that the contract does not allow.
        constant: whether only one value occurs. other: values taken for the leaf "other". limit: how many of them the
            contract allows, None if it allows none.
        kinds: unreadable cells by what they held. scanned: cells that look like identifiers, by kind.
        coded, emptied, clamped, corrected: cells that held a missing code, that were moved to "no value" or to a bound,
            and that a declared correction changed.
        distinct: how many different values occur.
        conflicting: rows whose value differs from that of another row with the same near key; None without such a key.
        bins: what a bar chart shows: the contract's labels, or ten equal parts of the public bounds, with counts.
    """

    name: str
    missing: int
    out_of_bounds: int
    unseen: int
    constant: bool
    unreadable: int = 0
    other: int = 0
    distinct: int = 0
    conflicting: int | None = None
    bins: tuple[tuple[str, int], ...] = field(default=(), repr=False)
    limit: int | None = None
    kinds: tuple[int, ...] = ()
    scanned: tuple[int, ...] = ()
    coded: int = 0
    emptied: int = 0
    clamped: int = 0
    corrected: int = 0

    @property
    def invalid(self) -> int:
        """Cells with a value that the contract does not allow."""
        return self.out_of_bounds + self.unseen + self.unreadable


@dataclass(frozen=True)
class Problem:
    """Why the table cannot be used: a code, the column, what is wrong, how many cells, and what to do.

    ``counts`` names the figure of the report that counts these cells, see :func:`.figures.of_problem`.
    """

    column: str
    what: str
    count: int
    remedy: str
    code: str = ""
    counts: str = ""

    @property
    def text(self) -> str:
        """One clause of the error message."""
        return f"{self.code}: column {self.column!r}: {self.count} cells {self.what}"


@dataclass(frozen=True)
class QualityReport:
    """The outcome of every stage.

    Attributes:
        rows: rows that may be used, before duplicates and outliers were dropped.
        duplicates: rows that repeat an earlier row exactly (identifiers included).
        columns: one entry per loaded column.
        problems: what :meth:`require` refuses.
        k: counts from 1 to k - 1 are hidden wherever the report is shown.
        notes: what is allowed, but worth knowing.
        stages, stability: what was done, and what it means for differential privacy.
        checklist: HIPAA's direct identifiers.
        rows_of_a_person: most rows that carry one pseudonym; 0 where the contract asks for none.
        moves: every column against an earlier table; () where none was named.
        unkeyed: rows without a value in one of the near key's columns: they are not compared.
        nameless: cells of identifier columns without text.
    """

    rows: int
    duplicates: int
    columns: tuple[ColumnQuality, ...]
    problems: tuple[Problem, ...]
    k: int
    notes: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    stability: tuple[Stability, ...] = ()
    checklist: tuple[hipaa.Entry, ...] = ()
    rows_of_a_person: int = 0
    moves: tuple[drift.Drift, ...] = ()
    unkeyed: int = 0
    nameless: int = 0

    def require(self) -> None:
        """Raise :class:`DataError` with every problem: code, column, count and remedy, never a value."""
        if self.problems:
            raise DataError(
                "; ".join(p.text for p in self.problems), hint="; ".join(dict.fromkeys(p.remedy for p in self.problems))
            )
