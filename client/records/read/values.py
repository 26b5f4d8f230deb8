"""Texts to values: numbers with declared decimals, dates in their declared form, leaves, missing codes.

Every source gives text. So all formats follow one set of rules, and no parser's message, which would quote a cell, can
reach anybody. What cannot be read becomes "no value" and is counted. Nothing is guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from fedveil.common.contract import OTHER, Column
from fedveil.common.contract import dates as contract_dates

pc: Any = pyarrow.compute  # its functions are made at import time, where type checkers cannot see them

_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_NOT_FINITE = r"^[+-]?(nan|inf|infinity)$"
_LIKE_A_DATE = r"^(\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{2,4})([T ].*)?$"
_DAY_ZERO = np.datetime64("1970-01-01")


@dataclass(frozen=True)
class Decimals:
    """How a file writes numbers: the decimal sign, and the sign between thousands ("" for none)."""

    decimal: str = "."
    thousands: str = ""


@dataclass
class Reading:
    """What was seen while one column was read. The counts stay at the site.

    Attributes:
        empty: cells without any text. coded: cells that held a missing code.
        not_numbers, not_finite, not_dates: cells that could not be read. They have "no value" afterwards.
        like_dates: of ``not_numbers``, those that look like dates.
        swappable: dates whose day could also be a month. dates: dates read.
        other: values taken for the leaf "other".
        corrected: cells changed by declared corrections. moved: cells moved by ``outliers`` to a bound or "no value".
    """

    empty: int = 0
    coded: int = 0
    not_numbers: int = 0
    not_finite: int = 0
    not_dates: int = 0
    like_dates: int = 0
    swappable: int = 0
    dates: int = 0
    other: int = 0
    corrected: int = 0
    moved: int = 0

    @property
    def unreadable(self) -> int:
        """Cells that held something else than the column's type."""
        return self.not_numbers + self.not_finite + self.not_dates


def text_of(values: pa.ChunkedArray | pa.Array) -> pa.Array | None:
    """Trimmed text of every cell, "" for null, one spelling per number; None for types that hold no simple values."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    simple = (pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean, pa.types.is_integer,
              pa.types.is_floating, pa.types.is_decimal, pa.types.is_temporal, pa.types.is_null)  # fmt: skip
    if not any(test(kind) for test in simple) or pa.types.is_duration(kind):  # a duration would read as a number
        return None
    if pa.types.is_float16(kind):
        values = values.cast(pa.float32())
    text = pc.utf8_trim_whitespace(pc.fill_null(values.cast(pa.string()), ""))
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        # In a file that has only floats, 1.0 is the leaf "1".
        text = pc.replace_substring_regex(text, pattern=r"^([+-]?\d+)\.0+$", replacement=r"\1")
    return text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text


def numbers(text: pa.Array, column: Column, style: Decimals, seen: Reading) -> NDArray[np.float64]:
    """Values (n,) of a number's or date's column, NaN for "no value"; what was seen is added to ``seen``."""
    absent = _absent(text, column, seen)
    present = text.filter(pc.invert(absent))
    values = _days(present, column, seen) if column.format else _floats(present, style, seen)
    for code in column.missing_codes:
        if _is_number(code):
            hit = values == float(code)
            seen.coded += int(hit.sum())
            values[hit] = np.nan
    out = np.full(len(text), np.nan)
    out[~absent.to_numpy(zero_copy_only=False)] = values
    return out


def leaves(text: pa.Array, column: Column, pool: dict[str, str], seen: Reading) -> NDArray[np.object_]:
    """Texts (n,) of a category: one of the column's leaves, "" for "no value", or the text itself if it is no leaf.

    A value that spells the same number as a leaf in another way ("1.0" for "1") is that leaf.

    Args:
        pool: the column's texts so far. Equal texts become one object, so that a long table takes little memory.
    """
    absent = _absent(text, column, seen)
    encoded = pc.dictionary_encode(pc.if_else(absent, "", text))
    known = frozenset(column.values)
    distinct = [_leaf(v, column, known) for v in encoded.dictionary.to_pylist()]
    indices = encoded.indices.to_numpy(zero_copy_only=False)
    foreign = np.array([bool(v) and v not in known for v in distinct], bool)
    if column.unseen == OTHER and len(distinct):
        seen.other += int(foreign[indices].sum())
    table = np.array([pool.setdefault(v, v) for v in distinct], dtype=object)
    return table[indices] if len(distinct) else np.zeros(0, object)


def is_declared(text: pa.Array, column: Column) -> pa.Array:
    """Mask of the cells that say what the contract itself says: a leaf or a missing code."""
    return pc.is_in(text, value_set=pa.array(["", *column.missing_codes, *column.values], pa.string()))


def _leaf(value: str, column: Column, known: frozenset[str]) -> str:
    if not value or value in known:
        return value
    if column.mask is not None:
        bare = re.sub(r"[\s-]", "", value).upper()
        if len(bare) == column.mask.length and bare.isalnum():
            return bare[: column.mask.keep] + "*" * (column.mask.length - column.mask.keep)
        return value
    if _is_number(value):
        number = float(value)
        if number.is_integer() and str(int(number)) in known:
            return str(int(number))
    return value


def _is_number(text: str) -> bool:
    return re.match(_NUMBER, text) is not None and abs(float(text)) < 1e300


def lacking(text: pa.Array, column: Column) -> NDArray[np.bool_]:
    """Mask of cells without text, or with a missing code of the column; numbers are compared by value."""
    by_value = {float(code) for code in column.missing_codes if column.type == "number" and _is_number(code)}
    encoded = pc.dictionary_encode(text)
    known = ("", *column.missing_codes)
    none = [
        v in known or (bool(by_value) and _is_number(v) and float(v) in by_value)
        for v in encoded.dictionary.to_pylist()
    ]
    return np.array(none, bool)[encoded.indices.to_numpy(zero_copy_only=False)]


def _absent(text: pa.Array, column: Column, seen: Reading) -> pa.Array:
    """Mask of cells without a value: null, or one of the column's missing codes."""
    empty = count(pc.equal(text, ""))
    absent = pc.is_in(text, value_set=pa.array(["", *column.missing_codes], pa.string()))
    seen.empty += empty
    seen.coded += count(absent) - empty
    return absent


def _floats(present: pa.Array, style: Decimals, seen: Reading) -> NDArray[np.float64]:
    text = _plain_decimals(present, style)
    infinite = pc.match_substring_regex(text, _NOT_FINITE, ignore_case=True)
    parsable = pc.match_substring_regex(text, _NUMBER)
    seen.not_finite += count(infinite)
    strange = pc.invert(pc.or_(infinite, parsable))
    seen.not_numbers += count(strange)
    seen.like_dates += count(pc.match_substring_regex(text.filter(strange), _LIKE_A_DATE))
    out = np.full(len(text), np.nan)
    read = np.asarray(text.filter(parsable).to_numpy(zero_copy_only=False), dtype=str).astype(np.float64)
    seen.not_finite += int((~np.isfinite(read)).sum())
    out[parsable.to_numpy(zero_copy_only=False)] = np.where(np.isfinite(read), read, np.nan)
    return out


def _plain_decimals(text: pa.Array, style: Decimals) -> pa.Array:
    """Numbers as the declared style writes them to ``1234.5``; everything else stays unreadable."""
    if style.thousands:
        mark, point = re.escape(style.thousands), re.escape(style.decimal)
        grouped = pc.match_substring_regex(text, rf"^[+-]?\d{{1,3}}({mark}\d{{3}})+({point}\d*)?$")
        text = pc.if_else(grouped, pc.replace_substring(text, style.thousands, ""), text)
    if style.decimal == ".":
        return text
    foreign = pc.match_substring(text, ".")
    return pc.if_else(foreign, "unreadable", pc.replace_substring(text, style.decimal, "."))


def _days(present: pa.Array, column: Column, seen: Reading) -> NDArray[np.float64]:
    """Days since 1970-01-01. A cell that is no calendar day in the declared form is counted and has no value."""
    parts = pc.extract_regex(present, contract_dates.pattern(column.format))
    out = np.full(len(present), np.nan)
    good = pc.is_valid(parts).to_numpy(zero_copy_only=False)
    matched = parts.filter(pc.is_valid(parts))
    year, month, day = (_part(matched, name) for name in "ymd")
    usable = (year >= 1) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    first = (np.where(usable, year, 1970) - 1970).astype("datetime64[Y]").astype("datetime64[M]")
    start = first + np.where(usable, month - 1, 0).astype("timedelta64[M]")
    date = start.astype("datetime64[D]") + np.where(usable, day - 1, 0).astype("timedelta64[D]")
    usable &= date.astype("datetime64[M]") == start  # the 31st of February is no day
    values = np.where(usable, (date - _DAY_ZERO).astype(np.float64), np.nan)
    out[good] = values
    seen.not_dates += len(present) - int(usable.sum())
    seen.dates += int(usable.sum())
    if "%d" in column.format:
        seen.swappable += int((usable & (day <= 12)).sum())
    return out


def _part(matched: pa.Array, name: str) -> NDArray[np.int64]:
    if name not in [f.name for f in matched.type]:
        return np.ones(len(matched), np.int64)
    return pc.struct_field(matched, name).cast(pa.int64()).to_numpy(zero_copy_only=False)


def count(mask: pa.Array) -> int:
    """How many entries of a mask are true."""
    return int(pc.sum(mask).as_py() or 0)
