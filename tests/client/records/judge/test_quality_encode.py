"""Quality counts and the encoding, against counts and formulas spelt out here."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.client.records.judge import page
from fedveil.client.records.judge.quality import assess
from fedveil.client.records.read.sources import read
from fedveil.client.records.release.encode import encode
from fedveil.common.contract import DataContract
from fedveil.common.errors import DataError
from fedveil.privacy.anonymization import fixed
from fedveil.privacy.anonymization.fixed import ReleasedTable


def test_clean_table_is_usable(contract, rows, table):
    report = assess(read(table(rows), contract), contract)
    report.require()
    assert (report.rows, report.duplicates, report.problems) == (24, 0, ())
    assert not any(c.constant for c in report.columns)


def test_counts_per_column(contract, rows, table):
    for i in range(7):
        rows[i][3] = "?"
    rows[0][1], rows[1][2], rows[2][4] = "101", "zz", "9"
    for r in rows:
        r[5] = "0"
    rows += [rows[5], rows[5], ["another", *rows[6][1:]]]
    report = assess(read(table(rows), contract), contract)
    by_name = {c.name: c for c in report.columns}
    assert report.duplicates == 2  # the same values under another identifier are another record
    assert by_name["dose"].missing == 7 + 2 + 1
    assert by_name["age"].out_of_bounds == 1
    assert by_name["job"].unseen == 1
    assert by_name["grade"].unseen == 0  # 'other' takes it
    assert by_name["y"].constant
    assert not by_name["age"].constant
    with pytest.raises(
        DataError, match="'age': 1 cells are out of the public bounds; value: column 'job': 1 cells are not"
    ) as e:
        report.require()
    assert "wider public bounds" in e.value.hint


def test_missing_values_are_an_error_unless_agreed(contract, rows, table):
    rows[0][1] = rows[1][1] = ""
    rows[0][3] = ""
    with pytest.raises(DataError, match=r"^missing: column 'age': 2 cells have no value \("):
        assess(read(table(rows), contract), contract).require()


def test_small_counts_are_hidden_and_cannot_be_derived(contract, rows, table):
    for i in range(3):
        rows[i][3] = ""
    report = assess(read(table(rows), contract), contract)
    data = page.to_json(report)
    dose = next(c for c in data["columns"] if c["column"] == "dose")
    assert dose["missing"] == "<5"
    assert dose["completeness"] == ">0.7917"  # 1 - k / n, the same for 1 to 4 missing cells
    assert {"stage": "missing", "cells": "<5"} in data["stages"]
    texts = {json.dumps(data), page.to_html(report)}
    for i in (3,):
        rows[i][3] = ""  # four missing instead of three: nobody can tell
    again = assess(read(table(rows), contract), contract)
    assert {json.dumps(page.to_json(again)), page.to_html(again)} == texts


def test_html_is_self_contained_and_escaped(make, table):
    columns = [
        {"name": "<b>&", "role": "quasi", "type": "number", "low": 0, "high": 1, "levels": []},
        {"name": "y", "role": "target", "type": "number", "low": 0, "high": 1, "threshold": 0.5},
    ]
    contract = make(columns=columns)
    shown = page.to_html(assess(read(table([["1", "0"]] * 6, ["<b>&", "y"]), contract), contract))
    assert "&lt;b&gt;&amp;" in shown
    assert "<b>" not in shown
    assert not re.search(r"(src|href)=|https?://|<script", shown)


def columns_contract(missing):
    columns = [
        {"name": "q", "role": "quasi", "type": "number", "low": 0, "high": 10, "levels": [2, 5], "missing": missing},
        {"name": "g", "role": "quasi", "type": "category", "values": ["u", "v", "w"], "levels": [["u", "w"], ["v"]],
         "missing": missing},
        {"name": "n", "role": "feature", "type": "number", "low": -4, "high": 6, "missing": missing},
        {"name": "c", "role": "feature", "type": "category", "values": ["x", "z"], "missing": missing},
        {"name": "s", "role": "sensitive", "type": "category", "values": ["1", "2"], "as_feature": True},
        {"name": "t", "role": "sensitive", "type": "category", "values": ["1", "2"]},
        {"name": "y", "role": "target", "type": "category", "values": ["no", "yes", "may"]},
    ]  # fmt: skip
    base = {"name": "e", "version": "1", "purpose": "p", "unit": "u", "k": 2, "l": 2}
    return DataContract.model_validate({**base, "columns": columns})


def row_strategy(allow_missing):
    def gap(strategy, nothing):
        return st.one_of(strategy, st.just(nothing)) if allow_missing else strategy

    return st.tuples(
        gap(st.floats(0, 10), np.nan), gap(st.sampled_from("uvw"), ""), gap(st.floats(-4, 6), np.nan),
        gap(st.sampled_from("xz"), ""), st.sampled_from("12"), st.sampled_from("12"),
        st.sampled_from(["no", "yes", "may"]),
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.data(), st.booleans())
def test_encoding_row_by_row(data, allow_missing):
    contract = columns_contract("indicator" if allow_missing else "error")
    rows = data.draw(st.lists(row_strategy(allow_missing), min_size=1, max_size=20))
    columns = {c.name: np.array(v, float if c.type == "number" else object)
               for c, v in zip(contract.loaded, zip(*rows, strict=True), strict=True)}  # fmt: skip
    X, y = encode(fixed.recode(columns, len(rows), contract).table, contract)
    assert (X.dtype, y.dtype) == (np.float32, np.int64)
    assert X.shape == (len(rows), contract.width) == (len(rows), len(contract.feature_names))
    assert np.abs(X).max() <= 1
    for i, (q, g, n, c, s, _, target) in enumerate(rows):
        f = dict(zip(contract.feature_names, X[i].tolist(), strict=True))
        bin_ = "missing" if np.isnan(q) else "[0,2)" if q < 2 else "[2,5)" if q < 5 else "[5,10]"
        for prefix, label in (
            ("q", bin_),
            ("g", {"v": "v", "": "missing"}.get(g, "u|w")),
            ("c", c or "missing"),
            ("s", s),
        ):
            block = {k: v for k, v in f.items() if k.startswith(prefix + "=")}
            assert sum(block.values()) == 1
            assert block[f"{prefix}={label}"] == 1
        assert f["n"] == pytest.approx(0 if np.isnan(n) else (n - 1) / 5, abs=1e-6)
        if allow_missing:
            assert f["n=missing"] == np.isnan(n)
        assert y[i] == ["no", "yes", "may"].index(target)


def test_width_does_not_depend_on_the_data():
    contract = columns_contract("error")
    one = {"q": np.array([1.0]), "g": np.array(["u"], object), "n": np.array([0.0]), "c": np.array(["x"], object),
           "s": np.array(["1"], object), "t": np.array(["1"], object), "y": np.array(["no"], object)}  # fmt: skip
    assert encode(fixed.recode(one, 1, contract).table, contract)[0].shape == (1, contract.width)


@pytest.mark.parametrize(("name", "bad"), [("q", -1), ("q", -2), ("g", -2), ("s", -1), ("y", -1)])
def test_uncoded_cells_never_reach_the_model(name, bad):
    contract = columns_contract("error")
    coded = {c.name: np.zeros(3, np.int32) for c in contract.loaded if c.coded}
    coded[name] = np.array([0, bad, 0], np.int32)
    with pytest.raises(DataError, match=name):
        encode(ReleasedTable(3, coded, {"n": np.zeros(3)}), contract)


def test_missing_number_never_reaches_the_model():
    contract = columns_contract("error")
    coded = {c.name: np.zeros(3, np.int32) for c in contract.loaded if c.coded}
    with pytest.raises(DataError, match="'n'"):
        encode(ReleasedTable(3, coded, {"n": np.array([0, np.nan, 0])}), contract)
