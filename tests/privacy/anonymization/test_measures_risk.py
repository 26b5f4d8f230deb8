"""Loss and risk on tables small enough to count by hand."""

import pyarrow as pa
import pytest

from fedveil.common.errors import DataError, UsageError
from fedveil.privacy.anonymization import measures, risk
from fedveil.privacy.anonymization.anonymizer import Anonymizer
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, TableSpec
from fedveil.privacy.anonymization.criteria import KAnonymity

CITY = Hierarchy.from_rows([["a", "n", "*"], ["b", "n", "*"], ["c", "s", "*"], ["d", "s", "*"]])


def fitted(level, k=2, limit=1.0):
    spec = TableSpec((QuasiIdentifier("city", CITY, fixed_level=level),))
    table = pa.table({"city": list("aabbcd")})
    a = Anonymizer(spec, [KAnonymity(k)], method="fixed", suppression_limit=limit).fit(table)
    return a.fitted


def loss(level, k=2):
    frame, tuples, found = fitted(level, k)
    return measures.measure(tuples, frame.domains, found, k=k, queries=50)


def test_by_hand():
    raw, middle, top = loss(0), loss(1), loss(2)
    # Level 0: two classes of 2, two rows suppressed (1 each). Level 1: labels cover 2 of 4 values: 1/3 each.
    assert raw.ncp == pytest.approx(2 / 6)
    assert middle.ncp == pytest.approx(1 / 3)
    assert top.ncp == 1
    assert (raw.discernibility, middle.discernibility, top.discernibility) == (4 + 4 + 2 * 6, 16 + 4, 36)
    assert (raw.average_class, middle.average_class, top.average_class) == (1, 1.5, 3)
    assert raw.precision == pytest.approx(4 / 6)
    assert (middle.precision, top.precision) == (0.5, 0)
    # Every label of level 1 holds two equally frequent values: one bit is lost per row. All: 2·(2/6)·log2 3 + ...
    whole = (4 / 6) * 1.584962500721156 + (2 / 6) * 2.584962500721156
    assert middle.entropy == pytest.approx(1 / whole)
    assert top.entropy == pytest.approx(1)
    assert top.query_error >= middle.query_error >= 0


def test_raw_cells_lose_nothing():
    frame, tuples, found = fitted(0, k=2)
    assert measures.query_error(tuples, frame.domains, found) in (0.0, 1.0)  # suppressed rows are missed
    spec = TableSpec((QuasiIdentifier("q"),))
    a = Anonymizer(spec, [KAnonymity(2)], method="mondrian").fit(pa.table({"q": [1, 1, 2, 2]}))
    f, t, r = a.fitted
    assert measures.measure(t, f.domains, r) == measures.Loss(0.0, 8, 2.0, None, 0.0, 0.0)


def test_risk_by_hand():
    r = risk.assess([1, 2, 5])
    assert r.prosecutor_highest == r.journalist_highest == 1
    assert r.prosecutor_average == r.marketer == 3 / 8
    assert r.at_risk == 3 / 8  # 1 and 1/2 are above 0.2, 1/5 is not
    assert r.unique == 1 / 8
    with_people = risk.assess([1, 2, 5], population=[4, 2, 10])
    assert with_people.journalist_highest == 0.5
    assert with_people.marketer == pytest.approx((1 / 4 + 1 + 1 / 2) / 8)
    _, tuples, _ = fitted(0)
    assert risk.raw_risk(tuples).unique == 2 / 6


def test_refusals():
    with pytest.raises(DataError):
        risk.assess([])
    with pytest.raises(DataError):
        risk.assess([2], population=[1])
    with pytest.raises(UsageError):
        risk.assess([2], threshold=20)
    frame, tuples, found = fitted(1)
    with pytest.raises(UsageError):
        measures.measure(tuples, frame.domains, found, k=0)
