"""What a released label says, read again for the verifier: sets, intervals, dates, labels of a hierarchy.

It shares only the specification with the code that writes labels.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Callable, Sequence

from fedveil.common.contract import MISSING
from fedveil.privacy.anonymization.attributes import QuasiIdentifier

PIECE = re.compile(r"(?:\\.|[^|\\])*")


def sets_of(q: QuasiIdentifier) -> Callable[[str], bool]:
    """Whether a label is a set of the column's values, or an interval between two of them, inside public bounds."""
    leaves = set(q.hierarchy.leaves) if q.hierarchy else None
    points = {x for v in leaves if (x := number_of(v)) is not None} if leaves is not None else None
    number = _reader(q)

    def is_set(label: str) -> bool:
        values = _members(label)
        if len(set(values)) != len(values):
            return False
        plain = [v for v in values if v != MISSING]
        ends = _ends(plain[0], number) if len(plain) == 1 else None
        if ends is not None:
            return ends[0] <= ends[1] and (points is None or set(ends) <= points) and _inside(q, ends)
        if q.numeric or (q.column is not None):
            numbers = [number(v) for v in plain]
            return None not in numbers and _inside(q, [x for x in numbers if x is not None])
        return leaves is None or set(plain) <= leaves

    return is_set


def _inside(q: QuasiIdentifier, values: Sequence[float]) -> bool:
    """Whether numbers are within a contract's public bounds."""
    c = q.column
    return c is None or c.low is None or c.high is None or all(c.low <= x <= c.high for x in values)


def _members(label: str) -> list[str]:
    """The values of ``a|b|c``, backslashes taken away."""
    out, at = [], 0
    while at <= len(label):
        piece = PIECE.match(label, at)
        if piece is None:
            return []
        out.append(re.sub(r"\\(.)", r"\1", piece.group()))
        at = piece.end() + 1
    return out


def _ends(text: str, number: Callable[[str], float | None]) -> tuple[float, float] | None:
    found = re.fullmatch(r"\[([^,\[\]]+),([^,\[\]]+)\]", text)
    low, high = (number(found.group(1)), number(found.group(2))) if found else (None, None)
    return (low, high) if low is not None and high is not None else None


def _reader(q: QuasiIdentifier) -> Callable[[str], float | None]:
    """How the numbers of a column's labels are read: days, where a contract's column holds dates."""
    if q.column is None or not q.column.format:
        return number_of

    def day(text: str) -> float | None:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            return number_of(text)
        try:
            return float((dt.date.fromisoformat(text) - dt.date(1970, 1, 1)).days)
        except ValueError:
            return None

    return day


def number_of(text: str) -> float | None:
    """The finite number that a text is; None if it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
