"""Criteria against the papers' own tables and against definitions spelt out in plain Python."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common.errors import ContractError
from fedveil.privacy.anonymization import criteria
from fedveil.privacy.anonymization.criteria import DistinctL, EntropyL, KAnonymity, RecursiveCL, TCloseness

HEART, VIRAL, CANCER = 0, 1, 2
# Machanavajjhala et al. 2007, Figures 2 and 3: the conditions of 12 in-patients, class by class.
FOUR_ANONYMOUS = [[HEART, HEART, VIRAL, VIRAL], [CANCER, HEART, VIRAL, VIRAL], [CANCER] * 4]
THREE_DIVERSE = [[HEART, VIRAL, CANCER, CANCER], [CANCER, HEART, VIRAL, VIRAL], [HEART, VIRAL, CANCER, CANCER]]
# Li et al. 2007, Table 4: salaries 3K..11K by rank, class by class.
SALARIES = [[0, 1, 2], [3, 8, 5], [4, 6, 7]]


def counts(classes, domain):
    return np.array([np.bincount(c, minlength=domain) for c in classes])


def sizes(table):
    return table.sum(axis=1)


def test_machanavajjhala_distinct_diversity():
    table = counts(FOUR_ANONYMOUS, 3)
    assert criteria.distinct(table).tolist() == [2, 3, 1]
    assert criteria.distinct(counts(THREE_DIVERSE, 3)).tolist() == [3, 3, 3]
    assert KAnonymity(4).holds(sizes(table), table).all()
    assert not KAnonymity(5).holds(sizes(table), table).any()
    assert DistinctL(3).holds(sizes(table), table).tolist() == [False, True, False]
    assert DistinctL(3).holds(sizes(table), counts(THREE_DIVERSE, 3)).all()


def test_machanavajjhala_entropy_diversity():
    table = counts(FOUR_ANONYMOUS, 3)
    # Two equal values: exactly 2-diverse. 1/4, 1/4, 1/2: exp(entropy) = 2^1.5. One value: 1.
    assert np.exp(criteria.entropy(table)) == pytest.approx([2, 2**1.5, 1])
    assert EntropyL(2).holds(sizes(table), table).tolist() == [True, True, False]
    assert EntropyL(2.9).holds(sizes(table), table).tolist() == [False, False, False]


def test_machanavajjhala_recursive_diversity():
    table = counts(THREE_DIVERSE, 3)  # sorted counts 2, 1, 1 in every class
    assert not RecursiveCL(1, 2).holds(sizes(table), table).any()  # 2 < 1·2 does not hold
    assert RecursiveCL(1.01, 2).holds(sizes(table), table).all()
    assert not RecursiveCL(2, 3).holds(sizes(table), table).any()  # 2 < 2·1 does not hold
    assert RecursiveCL(2.01, 3).holds(sizes(table), table).all()
    assert not RecursiveCL(1000, 4).holds(sizes(table), table).any()


def test_li_salary_distances():
    table = counts(SALARIES, 9)
    assert criteria.emd(table, "ordered") == pytest.approx([0.375, 1 / 6, 17 / 72])
    assert TCloseness(1 / 6, distance="ordered").holds(sizes(table), table).tolist() == [False, True, False]
    # All values equally far apart: each class holds 3 of 9 equal parts, so 2/3 of its mass has to move.
    assert criteria.emd(table, "equal") == pytest.approx([2 / 3] * 3)


def test_class_without_values_is_neither_diverse_nor_close():
    table = np.array([[0, 0], [3, 3]])
    assert DistinctL(1).holds(np.array([4, 6]), table).tolist() == [False, True]
    assert criteria.emd(table, "ordered").tolist() == [1.0, 0.0]
    assert RecursiveCL(5, 1).holds(np.array([4, 6]), table).tolist() == [False, True]


TABLES = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(TABLES, st.integers(1, 5), st.sampled_from([0.5, 1, 2, 3.5]))
def test_agrees_with_the_definitions(classes, ell, c):
    table = counts(classes, 5)
    whole = Counter(v for cl in classes for v in cl)
    n = sum(whole.values())
    for i, members in enumerate(classes):
        seen = Counter(members)
        r = sorted(seen.values(), reverse=True)
        assert bool(KAnonymity(3).holds(sizes(table), table)[i]) == (len(members) >= 3)
        assert bool(DistinctL(ell).holds(sizes(table), table)[i]) == (len(seen) >= ell)
        assert bool(RecursiveCL(c, ell).holds(sizes(table), table)[i]) == (r[0] < c * sum(r[ell - 1 :]))
        p = [Fraction(seen[v], len(members)) for v in range(5)]
        q = [Fraction(whole[v], n) for v in range(5)]
        equal = sum((max(a - b, Fraction(0)) for a, b in zip(p, q, strict=True)), Fraction(0))
        ordered = sum((abs(sum(p[:j]) - sum(q[:j])) for j in range(1, 6)), Fraction(0)) / 4
        assert criteria.emd(table, "equal")[i] == pytest.approx(float(equal), abs=1e-12)
        assert criteria.emd(table, "ordered")[i] == pytest.approx(float(ordered), abs=1e-12)
        h = -sum(float(x) * math.log(x) for x in p if x)
        assert criteria.entropy(table)[i] == pytest.approx(h, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(TABLES)
def test_joining_two_classes_never_hurts_k_and_distinct_l(classes):
    table = counts([*classes, classes[0]], 5)
    joined = counts([classes[0] + classes[-1]], 5)
    for k in (2, 4):
        if KAnonymity(k).holds(sizes(table), table)[[0, -2]].all():
            assert KAnonymity(k).holds(sizes(joined), joined).all()
    assert criteria.distinct(joined)[0] >= max(criteria.distinct(table)[0], criteria.distinct(table)[-2])


@pytest.mark.parametrize(
    "make",
    [
        lambda: KAnonymity(1),
        lambda: DistinctL(0),
        lambda: EntropyL(0.5),
        lambda: EntropyL(math.nan),
        lambda: RecursiveCL(0, 2),
        lambda: RecursiveCL(1, 0),
        lambda: TCloseness(1.5),
        lambda: TCloseness(math.nan),
    ],
)
def test_meaningless_parameters_are_refused(make):
    with pytest.raises(ContractError):
        make()
