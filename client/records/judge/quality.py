"""What a table is like before anything is done to it: counts per stage and per column, and what forbids its use.

The report stays at the site, in its private work folder. Even there, counts between 1 and k - 1 are shown as "<k", and
figures that would give them away are hidden (:mod:`~fedveil.client.records.judge.page`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.client.records.judge import drift, hidden_counts, hipaa, page
from fedveil.client.records.judge.quality_report import ColumnQuality, Problem, QualityReport
from fedveil.client.records.judge.stages import Stability, Stage
from fedveil.client.records.read import pii, sources
from fedveil.client.records.read.sources import RawTable
from fedveil.client.records.read.values import Reading
from fedveil.common.contract import OTHER, Column, DataContract

BINS = 10
# Ratios of units that are often confused: the factor by which a value would have to be multiplied.
_UNITS = (
    (38.67, "cholesterol in mmol/l"), (18.016, "glucose in mmol/l"), (88.57, "triglycerides in mmol/l"),
    (1 / 88.42, "creatinine in umol/l"), (100.0, "metres, or a fraction for a percentage"), (0.01, "centimetres, or a "
    "percentage for a fraction"), (0.4536, "pounds"), (2.2046, "kilograms"), (2.54, "inches"), (0.3937, "centimetres"),
    (1000.0, "thousands"), (0.001, "thousandths"), (7.5006, "kPa"), (1 / 365.25, "days"), (1 / 12, "months"),
)  # fmt: skip


def assess(
    raw: RawTable, contract: DataContract, stages: Sequence[Stage] = (), stability: Sequence[Stability] = ()
) -> QualityReport:
    """Count everything. It raises nothing, so that the report of a refused table can be kept too."""
    columns, problems, notes = [], [], []
    repeated = _repeated(raw)
    for c in contract.loaded:
        quality = replace(_assess_column(raw, c), conflicting=_conflicting(raw, c, repeated))
        columns.append(quality)
        problems += _value_problems(raw, c, quality, contract.k)
        problems += _identity_problems(raw, c, quality)
        notes += _notes(raw, c, quality)
    used = [c.name for c in contract.loaded]
    persons = 0 if raw.persons is None else int(np.bincount(raw.persons).max())
    least = hidden_counts.least(contract.k)
    if raw.tally.unkeyed:
        told = hidden_counts.shown(raw.tally.unkeyed, least) if raw.rows >= contract.k else "some"
        notes.append(f"{told} rows lack a value of the near key: they are not compared with others")
    if raw.tally.breaks:
        told = hidden_counts.shown(raw.tally.breaks, least) if raw.rows >= contract.k else "some"
        notes.append(
            f"{told} line ends are inside quoted cells of columns that are not loaded: compare the number of rows with "
            "the source's, because an open quote can hold whole rows"
        )
    most = contract.rows_per_person
    if most is None and persons > 1:
        notes.append("some persons have several rows: the unit of privacy is one row, so their loss adds up")
    if most is not None and persons > most:
        notes.append(f"some persons have more than {most} rows: only their first {most} are used")
    return QualityReport(
        raw.rows, raw.rows - len(np.unique(raw.identity)), tuple(columns), tuple(problems), contract.k, tuple(notes),
        tuple(stages), tuple(stability), hipaa.checklist(used, raw.tally.found), persons,
        unkeyed=raw.tally.unkeyed, nameless=raw.tally.nameless,
    )  # fmt: skip


def against(report: QualityReport, before: Mapping[str, Any]) -> QualityReport:
    """The report with every column compared to an earlier report, see :mod:`.drift`. A move is noted, not refused."""
    bins = {c.name: [label for label, _ in c.bins] for c in report.columns}
    found = drift.compare(page.to_json(report), before, bins)
    notes = [
        f"column {d.column!r} has moved from the earlier table by {d.distance:.3f} (chance explains {d.chance:.3f})"
        for d in found
        if d.moved
    ]
    return replace(report, moves=found, notes=(*report.notes, *notes))


def _assess_column(raw: RawTable, c: Column) -> ColumnQuality:
    """Counts of what the cells are, and of what was done to them while they were read."""
    seen = raw.tally.columns.get(c.name, Reading())
    gone = c.outliers == "missing"
    return replace(
        _values_of(raw, c, seen.unreadable, seen.other),
        limit=int(c.unseen_limit * max(raw.rows, 1)) if c.unseen == OTHER else None,
        kinds=(seen.not_numbers - seen.like_dates, seen.like_dates, seen.not_finite, seen.not_dates),
        scanned=tuple(raw.tally.found.get(c.name, {}).values()),
        coded=seen.coded,
        emptied=seen.moved if gone else 0,
        clamped=0 if gone else seen.moved,
        corrected=seen.corrected,
    )


def _values_of(raw: RawTable, c: Column, unreadable: int, other: int) -> ColumnQuality:
    values = raw.columns[c.name]
    if c.type == "number":
        present = values[~np.isnan(values)]
        outside = int(((present < c.low) | (present > c.high)).sum())
        distinct = len(np.unique(present))
        missing = raw.rows - present.size - unreadable
        bins = _bins(present, c)
        return ColumnQuality(c.name, missing, outside, 0, distinct == 1, unreadable, 0, distinct, bins=bins)
    distinct, each = np.unique(values.astype(str), return_counts=True)
    found = dict(zip(distinct.tolist(), each.tolist(), strict=True))
    missing = found.pop("", 0)
    values_seen = len(found)
    foreign = sum(n for v, n in found.items() if v not in set(c.values))
    unseen = 0 if c.unseen == OTHER else foreign
    if c.unseen == OTHER:
        found[OTHER] = found.get(OTHER, 0) + foreign  # such values are released as "other"
    bins = tuple(("|".join(g), sum(found.get(v, 0) for v in g)) for g in c.groups)
    return ColumnQuality(c.name, missing, 0, unseen, values_seen == 1, unreadable, other, values_seen, bins=bins)


def _repeated(raw: RawTable) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """The rows that share their near key with another row, and their keys as numbers; None without a near key."""
    if raw.near is None:
        return None
    rows = np.flatnonzero(np.bincount(raw.near)[raw.near] > 1)
    return rows, raw.near[rows]


def _conflicting(raw: RawTable, c: Column, repeated: tuple[NDArray[np.int64], NDArray[np.int64]] | None) -> int | None:
    """How many rows have a key under which a column has two different values. "No value" contradicts nothing."""
    if repeated is None:
        return None
    rows, keys = repeated
    values = raw.columns[c.name][rows]
    stated = ~np.isnan(values) if c.type == "number" else values.astype(str) != ""
    keys = keys[stated]
    codes = np.unique(values[stated] if c.type == "number" else values[stated].astype(str), return_inverse=True)[1]
    pairs = np.unique(np.stack([keys, codes.reshape(-1)]), axis=1)
    several = np.bincount(pairs[0], minlength=int(keys.max(initial=0)) + 1) > 1
    return int(several[keys].sum())


def _bins(present: NDArray[np.float64], c: Column) -> tuple[tuple[str, int], ...]:
    if c.low is None or c.high is None:
        return ()
    edges = np.array([c.low, *c.cuts, c.high]) if c.cuts else np.linspace(c.low, c.high, BINS + 1)
    each, _ = np.histogram(present, edges)
    return tuple(
        (f"{c.text(float(a))} - {c.text(float(b))}", int(n)) for a, b, n in zip(edges, edges[1:], each, strict=False)
    )


def _value_problems(raw: RawTable, c: Column, q: ColumnQuality, k: int) -> list[Problem]:
    out = []
    for words, n, remedy in sources.unreadable(raw.tally.columns[c.name], c.name) if q.unreadable else ():
        out.append(Problem(c.name, words.partition(" cells ")[2], n, remedy, "type", "kind"))
    if q.missing and c.missing == "error":
        every = " (every row: is the column filled at this site at all?)" if q.missing == raw.rows else ""
        remedy = "fill the missing values at the source, or agree on missing = 'indicator'"
        out.append(Problem(c.name, f"have no value{every}", q.missing, remedy, "missing", "missing"))
    if q.out_of_bounds:
        remedy = "correct unit or typing errors, or agree wider public bounds in a new contract"
        unit = _suspected_unit(raw.columns[c.name], c, max(k, 5))
        if unit:
            remedy += f"; most would be inside if they were {unit}: declare a correction"
        out.append(Problem(c.name, "are out of the public bounds", q.out_of_bounds, remedy, "range", "out_of_bounds"))
    if q.unseen:
        remedy = "correct them, or agree a leaf 'other' with unseen = 'other'"
        out.append(Problem(c.name, "are not among the contract's values", q.unseen, remedy, "value", "unseen"))
    if q.other > c.unseen_limit * max(raw.rows, 1):
        remedy = f"the limit is {c.unseen_limit:g} of the rows: agree on the values that are in use"
        out.append(Problem(c.name, "were taken for 'other'", q.other, remedy, "other", "other"))
    return out


def _suspected_unit(values: NDArray[np.float64], c: Column, least: int) -> str:
    """A unit in which at least nine in ten of the values out of bounds, and at least ``least``, would be inside."""
    if c.format or c.low is None or c.high is None:
        return ""
    outside = values[(values < c.low) | (values > c.high)]
    for factor, what in _UNITS:
        inside = int(((outside * factor >= c.low) & (outside * factor <= c.high)).sum())
        if inside >= least and inside >= 0.9 * len(outside):
            return what
    return ""


def _identity_problems(raw: RawTable, c: Column, q: ColumnQuality) -> list[Problem]:
    """Signs of a direct identifier in a column that will be used."""
    if c.reviewed:
        return []
    remedy = "give the column role 'identifier' or 'drop', or reviewed = true once somebody has looked"
    present = raw.rows - q.missing - q.unreadable
    out = []
    if named := hipaa.suspicious(c.name, c.role):
        out.append(Problem(c.name, f"are called after {named}", present, remedy, "identifier", "present"))
    for kind, n in raw.tally.found.get(c.name, {}).items():
        if c.type == "category" or n >= max(5, pii.NUMBER_SHARE * present):
            out.append(Problem(c.name, f"look like identifiers ({kind})", n, remedy, "identifier", "scan"))
    if (
        c.type == "number"
        and not c.format
        and c.role in ("feature", "sensitive")
        and pii.nearly_unique(q.distinct, present)
    ):
        values = raw.columns[c.name]
        if bool((values[~np.isnan(values)] % 1 == 0).all()):
            out.append(
                Problem(c.name, "are whole numbers and nearly all different", present, remedy, "identifier", "present")
            )
    return out


def _notes(raw: RawTable, c: Column, q: ColumnQuality) -> list[str]:
    out = []
    seen = raw.tally.columns.get(c.name)
    if q.missing == raw.rows and c.missing != "error":
        out.append(f"column {c.name!r} has no value in any row")
    elif q.constant:
        out.append(f"column {c.name!r} is constant")
    if q.conflicting:
        out.append(f"column {c.name!r} has different values in rows that share their near key")
    if seen and seen.dates and seen.swappable == seen.dates and "%d" in c.format and not c.format.startswith("%Y"):
        out.append(
            f"column {c.name!r}: every day could be a month: check that {c.format} is how the table writes dates"
        )
    if c.reviewed and raw.tally.found.get(c.name):
        out.append(f"column {c.name!r} holds texts like identifiers; it is marked as reviewed")
    return out
