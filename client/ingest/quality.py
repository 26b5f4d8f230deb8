"""What a table is like before anything is done to it: counts per stage and per column, and what forbids its use.

The report stays at the site, in its private work folder. Even there, counts between 1 and k - 1 are shown as "<k", and
so are the rates that would give them away.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedveil.client.ingest.sources import RawTable
from fedveil.common.contract import OTHER, Column, DataContract
from fedveil.common.errors import DataError

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;width:100%;margin:1rem 0}th,td{border-bottom:1px solid #ddd;padding:.3rem .6rem;"
    "text-align:left}td.n{text-align:right}"
)


@dataclass(frozen=True)
class ColumnQuality:
    """Counts of one column: cells without a value, out of bounds, not among the leaves; and whether it is constant."""

    name: str
    missing: int
    out_of_bounds: int
    unseen: int
    constant: bool

    @property
    def invalid(self) -> int:
        """Cells with a value that the contract does not allow."""
        return self.out_of_bounds + self.unseen


@dataclass(frozen=True)
class Problem:
    """Why the table cannot be used: column, what, how many cells, and what to do."""

    column: str
    what: str
    count: int
    remedy: str


@dataclass(frozen=True)
class QualityReport:
    """The outcome of every stage.

    Attributes:
        rows: rows read.
        duplicates: rows that repeat an earlier row exactly (identifiers included); they stay in the table.
        columns: one entry per loaded column.
        problems: what :meth:`require` refuses.
        k: counts from 1 to k - 1 are hidden in :meth:`to_json` and :meth:`to_html`.
    """

    rows: int
    duplicates: int
    columns: tuple[ColumnQuality, ...]
    problems: tuple[Problem, ...]
    k: int

    def require(self) -> None:
        """Raise :class:`DataError` with every problem: column, count and remedy, never a value."""
        if self.problems:
            raise DataError(
                "; ".join(f"column {p.column!r}: {p.count} cells {p.what}" for p in self.problems),
                hint="; ".join(dict.fromkeys(p.remedy for p in self.problems)),
            )

    def to_json(self) -> dict[str, Any]:
        """For the site's own records; small counts hidden."""
        total = {n: sum(getattr(c, n) for c in self.columns) for n in ("missing", "out_of_bounds", "unseen")}
        return {
            "rows": self._shown(self.rows),
            "stages": [
                {"stage": "read", "rows": self._shown(self.rows)},
                {"stage": "missing", "cells": self._shown(total["missing"])},
                {"stage": "out of bounds", "cells": self._shown(total["out_of_bounds"])},
                {"stage": "unseen values", "cells": self._shown(total["unseen"])},
                {"stage": "exact duplicates", "rows": self._shown(self.duplicates)},
            ],
            "columns": [
                {
                    "column": c.name,
                    "missing": self._shown(c.missing),
                    "invalid": self._shown(c.invalid),
                    "completeness": self._rate(c.missing, self.rows),
                    "validity": self._rate(c.invalid, self.rows - c.missing),
                    "constant": c.constant,
                }
                for c in self.columns
            ],
            "usable": not self.problems,
        }

    def to_html(self) -> str:
        """One self-contained page of :meth:`to_json`."""
        data = self.to_json()
        stages = _table(("stage", "count"), [(s["stage"], s.get("rows", s.get("cells"))) for s in data["stages"]])
        columns = _table(tuple(data["columns"][0]), [tuple(c.values()) for c in data["columns"]])
        verdict = "meets" if data["usable"] else "does not meet"
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Data quality</title><style>{_STYLE}</style>'
            f"<h1>Data quality</h1><p>The table {verdict} its contract's types, bounds and values. This report is "
            f"local. Counts under {self.k} are hidden.</p><h2>Stages</h2>{stages}<h2>Columns</h2>{columns}</html>"
        )

    def _shown(self, count: int) -> int | str:
        return f"<{self.k}" if 0 < count < self.k else count

    def _rate(self, bad: int, of: int) -> float | str:
        if of < self.k:
            return "hidden"
        return f">{1 - self.k / of:.4f}" if 0 < bad < self.k else round(1 - bad / of, 4)


def assess(raw: RawTable, contract: DataContract) -> QualityReport:
    """Count everything; raises nothing, so that the report can be kept even of a table that is refused."""
    columns, problems = [], []
    for c in contract.loaded:
        quality = _assess_column(raw, c)
        columns.append(quality)
        if quality.missing and c.missing == "error":
            problems.append(Problem(c.name, "have no value", quality.missing, "fill the missing values at the source"))
        if quality.out_of_bounds:
            remedy = "correct unit or typing errors, or agree wider public bounds in a new contract"
            problems.append(Problem(c.name, "are out of the public bounds", quality.out_of_bounds, remedy))
        if quality.unseen:
            remedy = "correct them, or agree a leaf 'other' with unseen = 'other'"
            problems.append(Problem(c.name, "are not among the contract's values", quality.unseen, remedy))
    duplicates = raw.rows - len(np.unique(raw.identity))
    return QualityReport(raw.rows, duplicates, tuple(columns), tuple(problems), contract.k)


def _assess_column(raw: RawTable, c: Column) -> ColumnQuality:
    values = raw.columns[c.name]
    if c.type == "number":
        present = values[~np.isnan(values)]
        outside = int(((present < c.low) | (present > c.high)).sum())
        constant = present.size > 0 and bool((present == present[0]).all())
        return ColumnQuality(c.name, raw.rows - present.size, outside, 0, constant)
    distinct, counts = np.unique(values.astype(str), return_counts=True)
    known = {"", *c.values}
    unseen = 0 if c.unseen == OTHER else sum(int(n) for v, n in zip(distinct, counts, strict=True) if v not in known)
    missing = int(counts[distinct == ""].sum())
    return ColumnQuality(c.name, missing, 0, unseen, bool((distinct != "").sum() == 1))


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in r) + "</tr>" for r in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"
