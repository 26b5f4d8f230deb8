"""Independent verification of a released file.

Reads the bytes that were written, with its own parser and its own grouping (plain dictionaries), so that an error in
the recoding, in the writer or in the numpy grouping cannot hide itself. It shares with the recoding only the contract.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedveil.common.contract import Column, DataContract
from fedveil.common.errors import AnonymityError, DataError
from fedveil.privacy.anonymization.advise import Classes, Members, passing_levels

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_AGAIN = "the file was changed, or made under another contract: anonymise the table again"


@dataclass(frozen=True)
class Verdict:
    """What a released file shows. Counts are local knowledge; only :attr:`k_met` and :attr:`l_met` may leave a site.

    Attributes:
        rows: rows read.
        k_failing: classes with fewer than k rows.
        l_failing: by sensitive attribute, classes with fewer than l distinct values; empty where l = 1 asks for none.
        classes: by labels of the quasi-identifiers, the rows and the sensitive values seen.
    """

    rows: int
    k_failing: int
    l_failing: Mapping[str, int]
    classes: Classes = field(repr=False)

    @property
    def k_met(self) -> bool:
        """Every class has at least k rows."""
        return self.k_failing == 0

    @property
    def l_met(self) -> bool:
        """Every class has at least l distinct values of every sensitive attribute, or l = 1 asks for nothing."""
        return not any(self.l_failing.values())


def verify(path: Path, contract: DataContract) -> Verdict:
    """Read the released CSV ``path`` and count failing classes.

    Raises:
        AnonymityError: the file holds anything but the contract's released columns, labels and bounded numbers, or
            no row at all.
    """
    classes: Classes = {}
    rows = 0
    released = contract.loaded
    quasi = [i for i, c in enumerate(released) if c.role == "quasi"]
    sensitive = [next(i for i, c in enumerate(released) if c.name == s.name) for s in contract.sensitive]
    allowed = [_allowed_labels(c) if c.coded else None for c in released]
    try:
        with path.open(newline="", encoding="utf-8") as f:
            lines = csv.reader(f, strict=True)
            if next(lines, None) != [c.name for c in released]:
                raise AnonymityError("the released file's header is not the contract's released columns", hint=_AGAIN)
            for row in lines:
                rows += 1
                _check_row(row, released, allowed, rows)
                own = classes.setdefault(tuple(row[i] for i in quasi), Members(0, tuple(set() for _ in sensitive)))
                own.rows += 1
                for seen, i in zip(own.seen, sensitive, strict=True):
                    if row[i]:
                        seen.add(row[i])
    except (OSError, UnicodeDecodeError, csv.Error):
        rows = -1
    if rows < 1:
        raise AnonymityError("the released file cannot be read or holds no rows", hint=_AGAIN)
    names = [c.name for c in contract.sensitive] if contract.l > 1 else []
    return Verdict(
        rows,
        k_failing=sum(m.rows < contract.k for m in classes.values()),
        l_failing={s: sum(len(m.seen[j]) < contract.l for m in classes.values()) for j, s in enumerate(names)},
        classes=classes,
    )


def require(path: Path, contract: DataContract) -> Verdict:
    """:func:`verify`, and refuse a file that does not meet k and l.

    Raises:
        AnonymityError: k or l fails. The message says in how many classes; the hint says which coarser levels of the
            contract would pass.
    """
    verdict = verify(path, contract)
    if verdict.k_met and verdict.l_met:
        return verdict
    parts = [f"k = {contract.k} " + ("holds" if verdict.k_met else f"fails in {verdict.k_failing} classes")]
    for name, failing in verdict.l_failing.items():
        parts.append(f"l = {contract.l} for {name!r} " + (f"fails in {failing} classes" if failing else "holds"))
    if contract.suppression_limit > 0:
        parts.append("suppression within the contract's limit cannot repair it")
    ways = passing_levels(verdict.classes, contract)
    hint = " or ".join(ways) + " would pass" if ways else "no combination of the contract's levels passes"
    raise AnonymityError("the released table is not anonymous enough: " + "; ".join(parts), hint=hint)


def _allowed_labels(column: Column) -> frozenset[str]:
    return frozenset((*column.labels, "") if column.missing == "indicator" else column.labels)


def _check_row(row: list[str], released: tuple[Column, ...], allowed: list[frozenset[str] | None], number: int) -> None:
    if len(row) != len(released):
        raise AnonymityError(
            f"row {number} of the released file has {len(row)} cells instead of {len(released)}", hint=_AGAIN
        )
    for cell, column, labels in zip(row, released, allowed, strict=True):
        if not (_is_bounded_number(cell, column) if labels is None else cell in labels):
            raise AnonymityError(
                f"row {number} of the released file: column {column.name!r} breaks the contract", hint=_AGAIN
            )


def _is_bounded_number(cell: str, column: Column) -> bool:
    if cell == "":
        return column.missing == "indicator"
    if column.low is None or column.high is None:
        raise DataError(f"column {column.name!r} has no public bounds")
    # float() alone also reads " 0.5", "1_0" and the digits of other scripts, which other readers refuse.
    return _NUMBER.fullmatch(cell) is not None and column.low <= float(cell) <= column.high
