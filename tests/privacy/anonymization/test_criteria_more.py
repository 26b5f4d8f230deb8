"""The further criteria against worked examples, a linear program, and the verifier's own definitions."""

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from fedveil.common.errors import AnonymityError, ContractError
from fedveil.privacy.anonymization import criteria as cr
from fedveil.privacy.anonymization.anonymizer import Anonymizer
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
from fedveil.privacy.anonymization.distances import Reference, emd
from fedveil.privacy.anonymization.recheck_definitions import judge

# Li et al. 2007, Figure 2 (shortened): respiratory and digestive diseases under one root.
TREE = Hierarchy.from_rows(
    [["flu", "resp", "*"], ["pneumonia", "resp", "*"], ["bronchitis", "resp", "*"],
     ["ulcer", "dig", "*"], ["gastritis", "dig", "*"], ["cancer", "dig", "*"]]
)  # fmt: skip
LEVELS = np.array([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1], [0] * 6], np.int32)
COUNTS = st.lists(st.integers(0, 5), min_size=6, max_size=6)
TABLES = st.lists(COUNTS, min_size=1, max_size=4).filter(lambda t: any(map(any, t)))


def transport(p, q):
    """The earth mover's distance as a linear program over flows, ground distance: level of the common ancestor / 2."""
    ground = np.array(
        [[next(lv for lv in range(3) if LEVELS[lv][i] == LEVELS[lv][j]) / 2 for j in range(6)] for i in range(6)]
    )
    rows = np.zeros((12, 36))
    for i in range(6):
        rows[i, i * 6 : i * 6 + 6] = 1
        rows[6 + i, i::6] = 1
    return linprog(ground.ravel(), A_eq=rows, b_eq=np.r_[p, q]).fun


@settings(max_examples=40, deadline=None)
@given(TABLES)
def test_hierarchical_distance_is_the_linear_programs(classes):
    table = np.array(classes)
    got = emd(table, "hierarchical", Reference(table.sum(axis=0), LEVELS))
    for own, distance in zip(table, got, strict=True):
        if own.any():
            assert distance == pytest.approx(transport(own / own.sum(), table.sum(axis=0) / table.sum()), abs=1e-9)
        else:
            assert distance == 1


def test_hierarchical_distance_needs_a_hierarchy():
    with pytest.raises(ContractError, match="hierarchy"):
        emd(np.ones((1, 3), np.int64), "hierarchical")


def test_alpha_k():
    table = np.array([[3, 1], [2, 2], [1, 0]])
    assert cr.AlphaK(0.5, 2).holds(table.sum(axis=1), table).tolist() == [False, True, False]
    assert cr.AlphaK(0.75, 2).holds(table.sum(axis=1), table).tolist() == [True, True, False]
    # Absent values count for the class's size: Wong et al. bound the share of rows.
    assert cr.AlphaK(0.5, 2).holds(np.array([6]), np.array([[3, 0]])).tolist() == [True]


def test_beta_likeness():
    # Whole table: 2 of 10 and 8 of 10. A class with 1 of 2: gain (0.5 - 0.2) / 0.2 = 1.5 for the rare value.
    whole = Reference(np.array([2, 8]))
    table = np.array([[1, 1], [0, 4]])
    assert cr.BetaLikeness(1.5, enhanced=False).holds(table.sum(axis=1), table, whole).tolist() == [True, True]
    assert cr.BetaLikeness(1.4, enhanced=False).holds(table.sum(axis=1), table, whole).tolist() == [False, True]
    # Enhanced: -ln 0.8 = 0.223 bounds the frequent value; certainty of it is a gain of 0.25.
    assert cr.BetaLikeness(1.6).holds(table.sum(axis=1), table, whole).tolist() == [True, False]


def test_delta_disclosure():
    whole = Reference(np.array([2, 2]))
    table = np.array([[1, 1], [3, 1], [2, 0]])
    # log2(0.75 / 0.5) = 0.585, log2(0.25 / 0.5) = -1; a missing value is infinitely far.
    assert cr.DeltaDisclosure(1.01).holds(table.sum(axis=1), table, whole).tolist() == [True, True, False]
    assert cr.DeltaDisclosure(1.0).holds(table.sum(axis=1), table, whole).tolist() == [True, False, False]
    assert cr.DeltaDisclosure(99).measure(table.sum(axis=1), table, whole)[2] == math.inf


MODELS = st.sampled_from(
    [
        cr.KAnonymity(3), cr.DistinctL(2, "s"), cr.EntropyL(1.7, "s"), cr.RecursiveCL(1.5, 2, "s"),
        cr.TCloseness(0.3, "s"), cr.TCloseness(0.25, "s", "ordered"), cr.TCloseness(0.2, "s", "hierarchical"),
        cr.AlphaK(0.6, 2, "s"), cr.BetaLikeness(1.2, "s"), cr.BetaLikeness(0.7, "s", enhanced=False),
        cr.DeltaDisclosure(1.3, "s"),
    ]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(TABLES, MODELS)
def test_the_verifiers_definitions_agree_with_the_engines(classes, model):
    table = np.array(classes)
    whole = Counter({v: int(c) for v, c in zip(TREE.leaves, table.sum(axis=0), strict=True) if c})
    column = Sensitive("s", TREE.leaves, TREE)
    holds = model.holds(table.sum(axis=1), table, Reference(table.sum(axis=0), LEVELS))
    for own, expected in zip(table, holds.tolist(), strict=True):
        histogram = Counter({v: int(c) for v, c in zip(TREE.leaves, own, strict=True) if c})
        assert judge(model, int(own.sum()), histogram, whole, column)[0] == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: cr.AlphaK(0, 2),
        lambda: cr.AlphaK(20, 2),
        lambda: cr.AlphaK(0.5, 1),
        lambda: cr.BetaLikeness(0),
        lambda: cr.DeltaDisclosure(math.inf),
        lambda: cr.KAnonymity(2.5),  # type: ignore[arg-type]
        lambda: cr.KAnonymity(True),
        lambda: cr.TCloseness(20),
        lambda: cr.TCloseness(0.2, distance="far"),  # type: ignore[arg-type]
    ],
)
def test_meaningless_parameters_are_refused(make):
    with pytest.raises(ContractError):
        make()


@pytest.mark.parametrize("method", ["optimal", "mondrian"])
@pytest.mark.parametrize("declared", [(), ("u", "v")])
def test_a_sensitive_column_without_any_value(method, declared):
    """No value is in more than a share of any class: (α,k) is its k. Where a value has to occur, it is refused."""
    spec = TableSpec((QuasiIdentifier("a"),), (Sensitive("s", declared),))
    table = pa.table({"a": ["x", "x", "y", "y", "z"], "s": pa.array([None] * 5, pa.string())})
    out = Anonymizer(spec, [cr.AlphaK(0.5, 2)], method=method, suppression_limit=0.2).fit_transform(table)
    assert out.num_rows >= 4
    assert min(out.group_by("a").aggregate([([], "count_all")])["count_all"].to_pylist()) >= 2
    with pytest.raises(AnonymityError, match=r"column 's'"):
        Anonymizer(spec, [cr.DistinctL(1)], method=method, suppression_limit=0.2).fit_transform(table)
