"""Cells: decimals, dates, missing codes, masks; against Python's own parsers and counts spelt out here."""

import datetime as dt
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.client.records.read import values as cells
from fedveil.client.records.read.values import Decimals, Reading
from fedveil.common.contract import Column

NUMBER = {"name": "x", "role": "feature", "type": "number", "low": -10000, "high": 100000}
DATE = {"name": "d", "role": "feature", "type": "date", "format": "%d.%m.%Y", "low": "1900-01-01", "high": "2100-01-01"}


def numbers(texts, style=None, **changes):
    seen = Reading()
    column = Column.model_validate({**NUMBER, **changes})
    return cells.numbers(pa.array(texts, pa.string()), column, style or Decimals(), seen).tolist(), seen


def same(a, b):
    return all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b, strict=True))


NAN = math.nan


@pytest.mark.parametrize(
    ("style", "texts", "values", "bad"),
    [
        (Decimals(), ["1.5", "1,5", "1e3", " 2"], [1.5, NAN, 1000.0, NAN], 2),
        (Decimals(","), ["1,5", "1.5", "-3", "1.234,5"], [1.5, NAN, -3.0, NAN], 2),
        (Decimals(",", "."), ["1.234,5", "1234,5", "1.23,4", "12.345.678"], [1234.5, 1234.5, NAN, 12345678.0], 1),
        (Decimals(".", ","), ["1,234.5", "12,34", "1,234"], [1234.5, NAN, 1234.0], 1),
        (Decimals(".", " "), ["1 234.5", "1  234"], [1234.5, NAN], 1),
    ],
)
def test_decimals_are_declared_not_guessed(style, texts, values, bad):
    read, seen = numbers(texts, style)
    assert same(read, values)
    assert seen.not_numbers == bad


def test_missing_codes_of_numbers_are_values():
    read, seen = numbers(["0", "0.0", "?", "", "7", "-0"], missing_codes=["?", 0], missing="indicator")
    assert same(read, [NAN, NAN, NAN, NAN, 7.0, NAN])
    assert (seen.empty, seen.coded, seen.unreadable) == (1, 4, 0)


def test_dates_among_numbers_are_named():
    _, seen = numbers(["01.02.2020", "2020-01-02", "x", "inf"])
    assert (seen.not_numbers, seen.like_dates, seen.not_finite) == (3, 2, 1)


@settings(max_examples=100, deadline=None)
@given(
    st.dates(dt.date(1850, 1, 1), dt.date(2150, 12, 31)),
    st.sampled_from(["%d.%m.%Y", "%Y-%m-%d", "%m/%d/%Y", "%Y%m%d"]),
)
def test_dates_read_back(date, form):
    column = Column.model_validate({**DATE, "format": form})
    read = cells.numbers(pa.array([date.strftime(form)]), column, Decimals(), Reading())
    assert read.tolist() == [(date - dt.date(1970, 1, 1)).days]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.integers(0, 14), st.integers(0, 2200))
def test_only_days_of_the_calendar_are_dates(day, month, year):
    try:
        wanted = float((dt.date(year, month, day) - dt.date(1970, 1, 1)).days)
    except ValueError:
        wanted = NAN
    seen = Reading()
    read = cells.numbers(pa.array([f"{day}.{month}.{year:04d}"]), Column.model_validate(DATE), Decimals(), seen)
    assert same(read.tolist(), [wanted])
    assert seen.not_dates == math.isnan(wanted)
    assert seen.swappable == (day <= 12 and not math.isnan(wanted))


def test_other_forms_of_dates_are_refused_with_their_count():
    seen = Reading()
    texts = pa.array(["2020-01-02", "1/2/2020", "31.2.2020", "1.2.20", "1.2.2020", "1.2.2020 13:45", ""])
    read = cells.numbers(texts, Column.model_validate({**DATE, "missing": "indicator"}), Decimals(), seen)
    assert np.isnan(read).tolist() == [True] * 4 + [False] * 2 + [True]
    assert (seen.not_dates, seen.dates, seen.empty) == (4, 2, 1)


def test_leaves_spellings_masks_and_other():
    seen, pool = Reading(), {}
    grade = Column.model_validate({"name": "g", "role": "feature", "type": "category", "values": [1, 2, "other"],
                                   "unseen": "other", "missing_codes": ["?"], "missing": "indicator"})  # fmt: skip
    read = cells.leaves(pa.array(["1", "1.0", "2.50", "?", "", "x", "+2"]), grade, pool, seen)
    assert read.tolist() == ["1", "1", "2.50", "", "", "x", "2"]
    assert (seen.other, seen.coded, seen.empty) == (2, 1, 1)
    masked = {"values": ["94***", "10***"], "levels": [["94***"], ["10***"]], "mask": {"keep": 2, "length": 5}}
    zip_code = Column.model_validate({"name": "z", "role": "quasi", "type": "category", **masked})
    read = cells.leaves(pa.array(["94110", "94 11-0", "10999", "9411", "94***"]), zip_code, {}, Reading())
    assert read.tolist() == ["94***", "94***", "10***", "9411", "94***"]


def as_text(array):
    text = cells.text_of(array)
    return None if text is None else text.to_pylist()


def test_types_without_text_are_refused():
    assert as_text(pa.array([b"x"])) is None
    assert as_text(pa.array([[1]])) is None
    assert as_text(pa.array([1.0, 2.5, None])) == ["1", "2.5", ""]
    assert as_text(pa.chunked_array([["a "], [None]])) == ["a", ""]
    assert as_text(pa.array([True])) == ["true"]
