"""The counts of a quality report as figures that may be shown together, see :mod:`.hidden_counts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedveil.client.records.judge import hidden_counts
from fedveil.client.records.judge.hidden_counts import HIDDEN, Figure, shown, total
from fedveil.client.records.judge.quality_report import ColumnQuality, Problem, QualityReport

SCAN_HIDES = 10  # a scan reports a column of numbers from 5 cells on, so a bound under twice that would tell the count


@dataclass(frozen=True)
class ColumnFigures:
    """One column's figures; the attributes are those of :class:`.quality_report.ColumnQuality`."""

    missing: Figure
    kinds: tuple[Figure, ...]
    out_of_bounds: Figure
    unseen: Figure
    other: Figure
    one_sided: bool
    present: Figure
    invalid: Figure
    scanned: tuple[Figure, ...]


def of_column(c: ColumnQuality, rows: int, k: int) -> ColumnFigures:
    """Missing and invalid cells are parts of the rows. The bars and the validity are about the rest of the rows."""
    kinds = c.kinds or (c.unreadable,)
    missing, *figures = hidden_counts.split((c.missing, *kinds, c.out_of_bounds, c.unseen), rows, k)
    unreadable, present = total(figures[:-2]), HIDDEN
    if isinstance(missing, int) and isinstance(unreadable, int):
        present = shown(rows - missing - unreadable, k)
    one_sided = c.limit is not None and 1 <= c.limit <= k - 2
    other = shown(c.other, k)
    if one_sided and c.limit is not None:
        # A problem tells whether the limit is exceeded. To show more than that would give a single value away.
        other = f"<{c.limit + 1}" if c.other <= c.limit else f">{c.limit}"
    scanned = tuple(shown(n, max(2 * k, SCAN_HIDES)) for n in c.scanned)
    return ColumnFigures(
        missing, tuple(figures[:-2]), figures[-2], figures[-1], other, one_sided, present, total(figures), scanned
    )


def consistency(report: QualityReport, c: ColumnQuality, k: int) -> float | str:
    """A rate. Hidden under 2k contradicting rows, and if a count of repeated or incomparable rows is hidden.

    Contradicting rows bound such a count: with x near and d exact duplicates, at most 2x + d rows contradict another.
    """
    if c.conflicting is None:
        return "no key"
    found = {s.name: s.cells for s in report.stages}
    related = (report.unkeyed, report.duplicates, found.get("near duplicates", 0))
    small = any(0 < n < k for n in related) or c.conflicting < 2 * k
    if c.conflicting and (small or HIDDEN in (f for f, _ in _dropping(report, k).values())):
        return HIDDEN
    if not c.conflicting:
        return 1.0 if report.rows >= k else HIDDEN
    return hidden_counts.rate(c.conflicting, report.rows - report.unkeyed, k)


def of_problem(p: Problem, columns: dict[str, ColumnFigures], k: int) -> Figure:
    """A problem's count is one of its column's figures, or made of them."""
    column = columns.get(p.column)
    if column is None or not p.counts:
        return shown(p.count, k)
    if p.counts == "scan":
        return shown(p.count, max(2 * k, SCAN_HIDES))
    if p.counts == "kind":
        # Equal counts have equal figures.
        return HIDDEN if HIDDEN in column.kinds else shown(p.count, k)
    return getattr(column, p.counts)


def duplicates(report: QualityReport, k: int) -> Figure:
    """Exact duplicates, as the stage that counts them shows them."""
    return hidden_counts.chain(report.rows, [(report.duplicates, False)], k)[0][0]


def stages(report: QualityReport, columns: Sequence[ColumnFigures], k: int) -> list[dict[str, Any]]:
    """The rows that every stage had and left, and what it found."""
    n, dropping = report.rows, _dropping(report, k)
    read = max([n, *(s.rows_in for s in report.stages)])
    before = f">{n}" if n >= k and 0 < read - n < k else shown(read, k)
    sums = _sums(report, columns, k)
    done, rows = [], shown(n, k)
    for s in report.stages:
        if s.name in ("read", "consent and retention"):
            left = before if s.rows_out == read and s.name == "read" else rows
            done.append({"stage": s.name, "rows": before, "left": left, "found": shown(s.cells, k)})
            continue
        found, left = dropping.get(s.name, (sums.get(s.name, shown(s.cells, k)), rows))
        done.append({"stage": s.name, "rows": rows, "left": left, "found": found})
        rows = left
    return [
        *(done or [{"stage": "read", "rows": rows}]),
        {"stage": "missing", "cells": total([c.missing for c in columns])},
        {"stage": "out of bounds", "cells": total([c.out_of_bounds for c in columns])},
        {"stage": "unseen values", "cells": total([c.unseen for c in columns])},
        {"stage": "exact duplicates", "rows": duplicates(report, k)},
    ]


def _dropping(report: QualityReport, k: int) -> dict[str, tuple[Figure, Figure]]:
    some = [s for s in report.stages if s.name in ("exact duplicates", "near duplicates", "outliers")]
    figures = hidden_counts.chain(report.rows, [(s.cells, s.rows_out < s.rows_in) for s in some], k)
    return dict(zip((s.name for s in some), figures, strict=True))


def _sums(report: QualityReport, columns: Sequence[ColumnFigures], k: int) -> dict[str, Figure]:
    """What the stages that look at cells found. These are sums of the columns' figures, not of their counts."""
    coded, moved = [], []
    for c, f in zip(report.columns, columns, strict=True):
        # Codes, and values moved to "no value", are parts of the missing cells. The other missing cells had no text.
        parts = (c.coded, c.emptied)
        figures = (
            hidden_counts.split(parts, c.missing, k)
            if isinstance(f.missing, int)
            else [HIDDEN if p else 0 for p in parts]
        )
        coded.append(figures[0])
        moved += [figures[1], shown(c.clamped, k)]
    one_sided = any(f.one_sided for f in columns)
    identified = next((s.cells for s in report.stages if s.name == "identifiers"), 0)
    nameless = any(0 < n < k for n in (report.unkeyed, report.nameless))
    return {
        "identifiers": HIDDEN if nameless else shown(identified, k),
        "scan for identifiers": total([n for f in columns for n in f.scanned]),
        "unreadable": total([n for f in columns for n in f.kinds]),
        "missing codes": total(coded),
        "declared corrections": total([shown(c.corrected, k) for c in report.columns]),
        "moved to bounds or to no value": total(moved),
        "taken for other": HIDDEN if one_sided else total([f.other for f in columns]),
    }
