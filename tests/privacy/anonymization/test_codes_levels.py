"""Grouping against dictionaries, codes against interval membership, levels against their rules."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common.contract import Column, hierarchies
from fedveil.common.errors import ContractError, DataError
from fedveil.privacy.anonymization import codes
from fedveil.privacy.anonymization.attributes import Hierarchy
from fedveil.privacy.anonymization.hierarchy import Level, level_of

AGE = Column.model_validate({"name": "age", "role": "quasi", "type": "number", "low": 0, "high": 9, "levels": [3, 6]})
JOB = Column.model_validate(
    {"name": "job", "role": "quasi", "type": "category", "values": ["a", "b", "c"], "levels": [["a", "c"], ["b"]]}
)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4), st.data())
def test_group_agrees_with_a_dictionary(columns, data):
    rows = data.draw(st.lists(st.tuples(*[st.integers(-2, 3)] * columns), min_size=1, max_size=40))
    matrix = [np.array([r[j] for r in rows], np.int32) for j in range(columns)]
    groups = codes.group(matrix, len(rows))
    assert dict(zip(map(tuple, groups.tuples.tolist()), groups.sizes.tolist(), strict=True)) == Counter(rows)
    assert [tuple(groups.tuples[g]) for g in groups.inverse] == rows


def test_group_survives_more_combinations_than_a_machine_word_has():
    rng = np.random.default_rng(5)
    columns = [rng.integers(-2, 1000, 300).astype(np.int32) for _ in range(12)]  # 1002^12 is about 2^119
    columns = [np.concatenate([c, c[:100]]) for c in columns]
    groups = codes.group(columns, 400)
    expected = Counter(zip(*(c.tolist() for c in columns), strict=True))
    assert dict(zip(map(tuple, groups.tuples.tolist()), groups.sizes.tolist(), strict=True)) == expected


def test_group_refuses_ragged_columns():
    with pytest.raises(DataError):
        codes.group([np.zeros(3, np.int32), np.zeros(4, np.int32)], 3)


def test_histogram_ignores_absent_values():
    groups = codes.group([np.array([0, 0, 1, 1, 1], np.int32)], 5)
    assert codes.histogram(groups, np.array([0, 2, -1, 1, 1], np.int32), 3).tolist() == [[1, 0, 1], [0, 2, 0]]


def test_interval_codes_at_the_edges():
    values = np.array([0, 2.999, 3, 5.9, 6, 9, np.nan])
    assert codes.encode(values, AGE).tolist() == [0, 0, 1, 1, 2, 2, codes.ABSENT]


def test_a_threshold_belongs_to_the_lower_class():
    y = Column.model_validate({"name": "y", "role": "target", "type": "number", "low": 0, "high": 9, "threshold": 3})
    assert codes.encode(np.array([2.9, 3.0, 3.1]), y).tolist() == [0, 0, 1]


def test_leaf_codes():
    texts = np.array(["c", "b", "a", "", "z"], object)
    assert codes.encode(texts, JOB).tolist() == [0, 1, 0, codes.ABSENT, codes.UNSEEN]
    spec = {"name": "j", "role": "feature", "type": "category", "values": ["a", "other"], "unseen": "other"}
    assert codes.encode(texts, Column.model_validate(spec)).tolist() == [1, 1, 0, codes.ABSENT, 1]


def test_level_refuses_gaps_overlaps_and_shared_leaves():
    for bins in (((0, 3), (4, 9)), ((0, 5), (4, 9)), ((3, 3),), ()):
        with pytest.raises(ContractError):
            Level("x", bins, ordered=True)
    with pytest.raises(ContractError):
        Level("x", (("a",), ("a", "b")), ordered=False)
    with pytest.raises(ContractError):
        Level("x", (("a",), ()), ordered=False)


def test_joining_and_describing():
    age, job = level_of(AGE), level_of(JOB)
    assert age.boundaries == 2
    assert age.joined(()) == (0, 1, 2)
    assert age.joined({0}) == (0, 0, 1)
    assert age.joined({0, 1}) == (0, 0, 0)
    assert age.describe({1}) == "dropping the cut at 6 of 'age'"
    assert age.describe({0, 1}) == "dropping the column 'age'"
    assert job.describe({0}) == "dropping the boundary between 'a|c' and 'b' of 'job'"
    with pytest.raises(ContractError):
        age.joined({2})


def test_cuts_of_dates_are_told_as_dates():
    born = Column.model_validate(
        {"name": "born", "role": "quasi", "type": "date", "format": "%d.%m.%Y", "low": "1955-03-01",
         "high": "1985-12-31", "levels": "decade"}
    )  # fmt: skip
    level = level_of(born)
    assert level.describe({0}) == "dropping the cut at 1960-01-01 of 'born'"
    assert level.describe({0, 2}) == "dropping the cut at 1960-01-01 and the cut at 1980-01-01 of 'born'"
    assert level.describe({0, 1, 2}) == "dropping the column 'born'"


def test_no_value_joins_only_when_the_column_goes():
    level = level_of(AGE.model_copy(update={"missing": "indicator"}))
    assert level.boundaries == 3
    assert level.joined({1}) == (0, 1, 1, 2)
    assert not level.allows({2})
    assert not level.allows({1, 2})
    assert level.describe({0, 1, 2}) == "dropping the column 'age'"
    with pytest.raises(ContractError):
        level.joined({2})


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xyab"), st.sampled_from("xyab*")), min_size=1, max_size=4))
def test_a_contract_accepts_a_hierarchy_only_if_the_engine_does(pairs):
    """A label that names two groups was signed and released, though the engine would have refused the same table."""
    rows = tuple((f"leaf{i}" if i % 2 else "xyab"[i], a, b, "*") for i, (a, b) in enumerate(pairs))
    try:
        hierarchies.check_rows(rows, [r[0] for r in rows], "h")
    except ContractError:
        return
    Hierarchy.from_rows(rows, name="h")
