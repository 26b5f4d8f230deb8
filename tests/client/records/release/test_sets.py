"""Sets of leaves as features: one width everywhere, sums to 1, raw cells as sets of one, unknown leaves counted."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.client.records.release.encode import encode
from fedveil.client.records.release.sets import Cells, Full, Interval, Leaves, Nothing, fill
from fedveil.common.contract import Column, DataContract
from fedveil.common.errors import DataError
from fedveil.privacy.anonymization import fixed

JOB = {"name": "job", "role": "quasi", "type": "category", "values": ["a", "b", "c", "other"], "unseen": "other",
       "encoding": "sets", "unseen_limit": 0.25,
       "hierarchy": [["a", "x", "*"], ["b", "x", "*"], ["c", "z", "*"], ["other", "z", "*"]], "level": 1}  # fmt: skip
AGE = {"name": "age", "role": "quasi", "type": "number", "low": 0, "high": 100, "levels": [20, 60], "encoding": "sets"}
BORN = {"name": "born", "role": "quasi", "type": "date", "format": "%Y-%m-%d", "low": "1900-01-01",
        "high": "2000-01-01", "levels": "decade", "encoding": "sets"}  # fmt: skip
Y = {"name": "y", "role": "target", "type": "category", "values": ["no", "yes"]}


def contract(*columns, **changes):
    base = {"name": "s", "version": "1", "purpose": "p", "unit": "u", "k": 2, "columns": [*(columns or (JOB, AGE)), Y]}
    return DataContract.model_validate({**base, **changes})


def filled(column, *cells):
    c = Column.model_validate(column)
    block = np.zeros((len(cells), len(c.feature_names)), np.float32)
    n = fill(block, Cells(tuple(cells), np.arange(len(cells))), c)
    return block.tolist(), n


def test_categories_share_their_weight():
    block, n = filled(JOB, Leaves(("a",)), Leaves(("a", "c")), Full(), Leaves(("a", "new")))
    assert block == [[1, 0, 0, 0], [0.5, 0, 0.5, 0], [0.25] * 4, [0.5, 0, 0, 0.5]]
    assert n == 1
    block, _ = filled({**JOB, "missing": "indicator"}, Nothing(), Leaves(("a", "missing")), Full())
    assert block == [[0, 0, 0, 0, 1], [0.5, 0, 0, 0, 0.5], [0.25, 0.25, 0.25, 0.25, 0]]


def test_numbers_are_midpoint_and_width():
    block, _ = filled(AGE, Interval(0, 100), Interval(50, 50), Interval(100, 100), Interval(20, 60), Full())
    np.testing.assert_allclose(block, [[0, 1], [0, 0], [1, 0], [-0.2, 0.4], [0, 1]], atol=1e-6)
    block, _ = filled({**AGE, "missing": "indicator"}, Nothing(), Interval(0, 0), Interval(0, 50, True))
    np.testing.assert_allclose(block, [[0, 1, 1], [-1, 0, 0], [-0.5, 0.5, 1]], atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.booleans())
def test_soft_one_hot_sums_to_one_and_stays_in_range(data, indicator):
    column = {**JOB, "missing": "indicator"} if indicator else JOB
    leaves = [*JOB["values"], "missing"] if indicator else JOB["values"]
    cell = st.lists(st.sampled_from(leaves), min_size=1, max_size=len(leaves), unique=True).map(
        lambda v: Leaves(tuple(v))
    )
    cells = data.draw(st.lists(cell, min_size=1, max_size=10))
    block, n = filled(column, *cells)
    np.testing.assert_allclose(np.sum(block, axis=1), 1, atol=1e-6)
    assert n == 0
    ends = data.draw(st.tuples(st.floats(0, 100), st.floats(0, 100)).map(sorted))
    (row,), _ = filled(AGE, Interval(*ends))
    assert -1 <= row[0] <= 1
    assert 0 <= row[1] <= 1


@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        ({**JOB, "unseen": "error"}, Leaves(("CANARY",)), "without a leaf"),
        (JOB, Nothing(), "without a leaf"),
        (JOB, Interval(0, 1), "without a leaf"),
        (JOB, Leaves(("CANARY",)), "1 cells hold values that the contract does not know"),
        (AGE, Interval(0, 101), "outside the public bounds"),
        (AGE, Interval(60, 50), "outside the public bounds"),
        (AGE, Nothing(), "without a value"),
        (AGE, Leaves(("CANARY",)), "no interval"),
    ],
)
def test_what_cannot_be_encoded_is_refused(column, cell, words):
    with pytest.raises(DataError, match=words) as e:
        filled(column, cell)
    assert "CANARY" not in str(e.value)


def test_unused_sets_do_not_count():
    c = Column.model_validate(JOB)
    block = np.zeros((2, 4), np.float32)
    assert fill(block, Cells((Leaves(("new",)), Leaves(("a",))), np.array([1, 1])), c) == 0


def test_labels_of_every_method_are_understood(released_inputs):
    job, age, born = (Column.model_validate(x) for x in (JOB, AGE, BORN))
    assert released_inputs.parse("a", job) == Leaves(("a",))
    assert released_inputs.parse("x", job) == Leaves(("a", "b"))
    assert released_inputs.parse("a|c", job) == Leaves(("a", "c"))
    assert released_inputs.parse("*", job) == Full()
    assert released_inputs.parse("", job) == released_inputs.parse("missing", job) == Nothing()
    assert released_inputs.parse("[20,60)", age) == Interval(20, 60)
    assert released_inputs.parse("[3,7]|missing", age) == Interval(3, 7, True)
    assert released_inputs.parse("42", age) == Interval(42, 42)
    assert released_inputs.parse("[1950-01-01,1960-01-01)", born) == Interval(-7305, -3653)
    assert released_inputs.parse("0", born) == Interval(0, 0)
    for label in ("twenty", "[1,2", "[1;2]", "a|b"):
        with pytest.raises(DataError, match="'age'"):
            released_inputs.parse(label, age)


def raw(job, age, y):
    return {"job": np.array(job, object), "age": np.array(age, float), "y": np.array(y, object)}


def test_fixed_levels_encode_alike_by_either_way(released_inputs):
    c = contract()
    table = fixed.recode(raw(["a", "b", "c", "c"], [5, 20, 60, 100], ["no", "yes", "no", "yes"]), 4, c).table
    X, y = encode(table, c)
    assert X.shape == (4, c.width) == (4, 6)
    labels = {
        n: pa.array([next(x for x in c.columns if x.name == n).labels[i] for i in table.coded[n]])
        for n in ("job", "age", "y")
    }
    other = released_inputs.encode_released(pa.table(labels), c)
    np.testing.assert_allclose(X, other.X, atol=1e-6)
    assert y.tolist() == other.y.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(X[0], [0.5, 0.5, 0, 0, -0.8, 0.2], atol=1e-6)


def test_raw_records_are_sets_of_one(released_inputs):
    c = contract()
    raw_cells = released_inputs.encode_released(
        pa.table({"job": ["a", "c"], "age": [50.0, 100.0], "y": ["no", "yes"]}), c
    )
    np.testing.assert_allclose(raw_cells.X, [[1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0]], atol=1e-6)


def test_width_is_the_contracts_whatever_the_rows_say(released_inputs):
    c = contract()
    few = released_inputs.encode_released(pa.table({"job": ["*"], "age": ["*"], "y": ["no"]}), c)
    many = released_inputs.encode_released(
        pa.table({"job": ["a", "b|c"], "age": ["[1,2]", "9"], "y": ["no", "yes"]}), c
    )
    assert few.X.shape[1] == many.X.shape[1] == c.width


def test_other_is_counted_and_limited(released_inputs):
    c = contract()
    jobs = ["a"] * 7 + ["new"]
    table = pa.table({"job": jobs, "age": [1] * 8, "y": ["no"] * 8})
    assert released_inputs.encode_released(table, c).other == {"job": 1}
    with pytest.raises(DataError, match="3 cells hold values"):
        released_inputs.encode_released(pa.table({"job": ["new"] * 3 + ["a"] * 5, "age": [1] * 8, "y": ["no"] * 8}), c)


def test_columns_by_labels_take_the_contracts_labels_only(released_inputs):
    c = contract({**JOB, "encoding": "labels"}, {**AGE, "encoding": "labels"})
    good = released_inputs.encode_released(pa.table({"job": ["x"], "age": ["[20,60)"], "y": ["yes"]}), c)
    assert good.X.tolist() == [[1, 0, 0, 1, 0]]
    for job, age in (("a", "[20,60)"), ("x", "[20,50)"), ("x", "30")):
        with pytest.raises(DataError, match="agree on encoding = 'sets'"):
            released_inputs.encode_released(pa.table({"job": [job], "age": [age], "y": ["yes"]}), c)
    with pytest.raises(DataError, match="without a class"):
        released_inputs.encode_released(pa.table({"job": ["x"], "age": ["[20,60)"], "y": ["perhaps"]}), c)
    with pytest.raises(DataError, match="lacks columns: 'age'"):
        released_inputs.encode_released(pa.table({"job": ["x"], "y": ["yes"]}), c)


def test_the_parser_is_the_engines(released_inputs):
    """Escaped bars of the engine's labels come back as one leaf."""
    column = Column.model_validate(
        {**JOB, "values": ["a|b", "c"], "unseen": "error", "hierarchy": [], "level": None, "levels": [["a|b"], ["c"]]}
    )
    assert released_inputs.parse("a\\|b|c", column) == Leaves(("a|b", "c"))
    assert released_inputs.parse("a|b", column) == Leaves(("a|b",))
