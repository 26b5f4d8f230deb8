"""The stability factor: the rules, and removals measured against them."""

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common.contract import Column
from fedveil.common.errors import AnonymityError, UsageError
from fedveil.privacy.anonymization.anonymizer import Anonymizer
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
from fedveil.privacy.anonymization.criteria import AlphaK, DistinctL, KAnonymity, TCloseness
from fedveil.privacy.anonymization.stability import stability

K, L = KAnonymity(5), DistinctL(3, "s")


@pytest.mark.parametrize(
    ("method", "models", "limit", "steps", "factor"),
    [
        ("fixed", [K], 0.0, [], 1),
        ("fixed", [K, L], 0.0, ["row-wise", "exact duplicates removed"], 1),
        ("fixed", [K], 0.05, [], 5),
        ("fixed", [K, KAnonymity(9)], 0.05, ["row-wise"], 9),
        ("fixed", [K, L], 0.05, [], None),
        ("fixed", [K, TCloseness(0.2, "s")], 0.05, [], None),
        ("fixed", [AlphaK(0.5, 5, "s")], 0.05, [], None),
        ("fixed", [K], 0.0, ["near duplicates removed"], None),
        ("fixed", [K], 0.0, ["data-fitted"], None),
        ("mondrian", [K], 0.0, [], None),
        ("optimal", [K], 0.0, [], None),
        ("peel", [K], 0.0, [], None),
        ("auto", [K], 0.0, [], None),
    ],
)
def test_rules(method, models, limit, steps, factor):
    s = stability(method, models, suppression_limit=limit, steps=steps)
    assert s.factor == factor
    words = {1: "original records", None: "not of the original records"}.get(factor, f"never {factor} times")
    assert words in s.sentence


def test_unknown_words_are_refused():
    with pytest.raises(UsageError):
        stability("best", [K])
    with pytest.raises(UsageError):
        stability("fixed", [K], steps=["magic"])  # type: ignore[list-item]


BINS = [(str(v), f"[{v // 4 * 4},{v // 4 * 4 + 3}]", f"[{v // 8 * 8},{v // 8 * 8 + 7}]", "*") for v in range(16)]
SPEC = TableSpec((QuasiIdentifier("q", Hierarchy.from_rows(BINS), fixed_level=1),), (Sensitive("s"),))
ROWS = st.lists(st.tuples(st.integers(0, 15), st.sampled_from("uvw")), min_size=6, max_size=40)


def removals(pipeline, table):
    """By how many rows the release changes when a record is removed, for each record: below the true factor."""

    def rows(t):
        return Counter(zip(*(c.to_pylist() for c in pipeline(t).columns), strict=True))

    n, whole = table.num_rows, rows(table)
    every = [rows(pa.concat_tables([table.slice(0, i), table.slice(i + 1)])) for i in range(n)]
    return [((whole - one) + (one - whole)).total() for one in every]


def table_of(rows):
    return pa.table({"q": [r[0] for r in rows], "s": [r[1] for r in rows]})


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([2, 3, 4]))
def test_removals_never_exceed_the_claimed_factor(rows, k):
    def pipeline(t):
        return Anonymizer(SPEC, [KAnonymity(k)], method="fixed", suppression_limit=1.0).fit_transform(t)

    try:
        distances = removals(pipeline, table_of(rows))
    except AnonymityError:
        return  # every row suppressed, or k above n
    assert len(distances) == len(rows)
    claimed = stability("fixed", [KAnonymity(k)], suppression_limit=1.0).factor
    assert claimed is not None
    assert max(distances) <= claimed


def test_suppression_for_k_reaches_k_and_for_l_goes_beyond():
    rows = [(0, "u")] * 4 + [(12, "v")] * 6
    k_only = Anonymizer(SPEC, [KAnonymity(4)], method="fixed", suppression_limit=1.0)
    assert max(removals(k_only.fit_transform, table_of(rows))) == 4
    # One record carries the class's second value: without it all twelve rows go.
    rows = [(0, "u")] * 11 + [(1, "v")] + [(12, "u"), (12, "v")] * 3
    with_l = Anonymizer(SPEC, [KAnonymity(4), DistinctL(2)], method="fixed", suppression_limit=1.0)
    assert max(removals(with_l.fit_transform, table_of(rows))) == 12


def test_mondrian_changes_many_rows_for_one():
    rows = [(i % 16, "uvw"[i % 3]) for i in range(33)]
    a = Anonymizer(SPEC, [KAnonymity(4)], method="mondrian")
    assert max(removals(a.fit_transform, table_of(rows))) > 4


AGE = Column.model_validate({"name": "q", "role": "quasi", "type": "number", "low": 0, "high": 100, "levels": [50]})
ODD = ("*", "\\*", "**", "a|b", "", "missing", "a", None)
QUASI = {
    "values or *, kept": (QuasiIdentifier("q", fixed_level=0), st.sampled_from(ODD)),
    "values or *, to *": (QuasiIdentifier("q", fixed_level=1), st.sampled_from(ODD)),
    "a declared *": (
        QuasiIdentifier("q", Hierarchy.from_rows([("*", "g", "any"), ("a", "g", "any")]), fixed_level=0),
        st.sampled_from(("*", "a", None)),
    ),
    "a contract's bins": (
        QuasiIdentifier("q", numeric=True, fixed_level=1, column=AGE),
        st.sampled_from((None, 3.0, 70.0)),
    ),
    "whole numbers": (QuasiIdentifier("q", fixed_level=0), st.sampled_from((None, 3, 70, -1))),
}


@pytest.mark.parametrize("kind", QUASI)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_cell_changes_the_label_of_another(kind, data):
    """Suppression for k = 2 claims 2, for every way in which a cell can be odd: suppressed, missing, empty, escaped."""
    quasi, cells = QUASI[kind]
    values = [data.draw(cells)] * 4 + data.draw(st.lists(cells, min_size=1, max_size=7))
    table = pa.table({"q": pa.array(values, pa.float64() if quasi.column else None)})
    a = Anonymizer(TableSpec((quasi,)), [KAnonymity(2)], method="fixed", suppression_limit=1.0)
    assert max(removals(a.fit_transform, table)) <= (a.stability.factor or 0) == 2


def test_a_suppressed_cell_moves_nothing():
    """It went wrong once: one cell "*" turned the label of every other row."""
    spec = TableSpec((QuasiIdentifier("q", fixed_level=1),))
    table = pa.table({"q": ["*"] + ["a", "b"] * 10})
    a = Anonymizer(spec, [KAnonymity(2)], method="fixed")
    assert a.stability.factor == 1
    assert max(removals(a.fit_transform, table)) == 1
    kept = TableSpec((QuasiIdentifier("q", fixed_level=0),))
    table = pa.table({"q": ["*"] * 2 + ["\\*"] * 2 + ["a|b"] * 2})
    released = Anonymizer(kept, [KAnonymity(2)], method="fixed").fit_transform(table)
    assert sorted(released["q"].to_pylist()) == sorted(["\\*", "\\\\*", "a\\|b"] * 2)
