"""Dates in a contract: each has a declared form, and stands for a number of days since 1970-01-01.

A form is strict. A year always has four digits, and nobody guesses which number is the day and which the month.
``03/04/2021`` has no meaning until the contract says ``%d/%m/%Y`` or ``%m/%d/%Y``.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from typing import Any

from fedveil.common.errors import ContractError

EPOCH = dt.date(1970, 1, 1)
FIRST, LAST = ((day - EPOCH).days for day in (dt.date.min, dt.date.max))
# Named groups: what a cell of each directive looks like.
_DIRECTIVES = {"%Y": r"(?P<y>\d{4})", "%m": r"(?P<m>\d{1,2})", "%d": r"(?P<d>\d{1,2})"}
_TIME = r"(?:[T ]\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:Z|[+-]\d{2}:?\d{2})?)?"
_SEPARATORS = frozenset("-./ ")
PERIODS = {"month": 1, "quarter": 3, "year": 12, "decade": 120}


def pattern(form: str) -> str:
    """Regular expression (with groups y, m, d) of the cells that ``form`` describes; a time of day may follow a day.

    Raises:
        ContractError: a directive other than ``%Y``, ``%m``, ``%d``, one of them twice, no four-digit year, a day
            without a month.
    """
    out, seen, i = "", [], 0
    digits = "{2}" if not _SEPARATORS & set(form) else "{1,2}"  # 202011 must not be read in two ways
    while i < len(form):
        piece = form[i : i + 2] if form[i] == "%" else form[i]
        if piece in _DIRECTIVES and piece not in seen:
            out += _DIRECTIVES[piece].replace("{1,2}", digits)
            seen.append(piece)
        elif piece in _SEPARATORS:
            out += re.escape(piece)
        else:
            raise ContractError(
                "a date format holds something other than %Y, %m, %d and one of '-./ '",
                hint="a two-digit year (%y) is ambiguous; write for example format = '%d.%m.%Y'",
            )
        i += len(piece)
    if "%Y" not in seen or ("%d" in seen and "%m" not in seen):
        raise ContractError(
            "a date format needs a four-digit year, and a month if it has a day", hint="for example format = '%Y-%m-%d'"
        )
    return f"^{out}{_TIME if '%d' in seen else ''}$"


def days(value: Any, what: str) -> Any:
    """An ISO date (or a TOML date) as days since 1970-01-01; numbers pass.

    Raises:
        ContractError: no date, or a number that is no day of the years 1 to 9999.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not FIRST <= value <= LAST:
        raise ContractError(f"{what} is not a day of the years 1 to 9999", hint="write it as 1950-01-31")
    if isinstance(value, dt.datetime) or not isinstance(value, (str, dt.date)):
        return value
    try:
        date = dt.date.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        date = None
    if date is None:
        raise ContractError(f"{what} is not a date", hint="write it as 1950-01-31")
    return float((date - EPOCH).days)


def iso(day: float) -> str:
    """The ISO form of days since 1970-01-01."""
    return (EPOCH + dt.timedelta(days=int(day))).isoformat()


def boundaries(period: str, low: float, high: float) -> Iterator[float]:
    """First days of the months, quarters, years or decades strictly between two days."""
    if period not in PERIODS:
        raise ContractError(f"{period[:32]!r} is not a period of time", hint=f"one of {', '.join(PERIODS)}")
    step = PERIODS[period]
    start, end = (EPOCH + dt.timedelta(days=int(x)) for x in (low, high))
    month = (start.year * 12 + start.month - 1) // step * step
    while (month := month + step) // 12 <= min(end.year, 9998):
        day = float((dt.date(month // 12, month % 12 + 1, 1) - EPOCH).days)
        if low < day < high:
            yield day
