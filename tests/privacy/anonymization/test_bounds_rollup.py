"""Pruning and roll-up of the optimal search: bounds against all releases, nodes against counting, the optimum against
looking at every node."""

import itertools
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedveil.common.errors import AnonymityError
from fedveil.privacy.anonymization import rollup as rollup_module
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
from fedveil.privacy.anonymization.bounds import rows_lost
from fedveil.privacy.anonymization.counting import prepare
from fedveil.privacy.anonymization.criteria import (
    AlphaK,
    BetaLikeness,
    DeltaDisclosure,
    DistinctL,
    EntropyL,
    KAnonymity,
    RecursiveCL,
    TCloseness,
)
from fedveil.privacy.anonymization.distances import Reference
from fedveil.privacy.anonymization.lattice import Lattice
from fedveil.privacy.anonymization.prepare import bind
from fedveil.privacy.anonymization.rollup import Rollup
from fedveil.privacy.anonymization.rows import TableRows
from fedveil.privacy.anonymization.tuples import Constraints

TREE = np.array([[0, 1, 2, 3], [0, 0, 1, 1], [0, 0, 0, 0]], np.int32)
ATTRIBUTE = [
    TCloseness(0.1),
    TCloseness(0.3),
    TCloseness(0.3, distance="ordered"),
    TCloseness(0.25, distance="hierarchical"),
    BetaLikeness(0.5),
    BetaLikeness(1.0, enhanced=False),
    AlphaK(0.5, 2),
    AlphaK(0.7, 3),
    DistinctL(2),
    DistinctL(3),
    EntropyL(1.7),
    RecursiveCL(2, 2),
    DeltaDisclosure(1.5),
]
FINE = st.lists(  # by fine class: the coarse class it lies in, and the rows of each value
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 6), min_size=4, max_size=4)), min_size=1, max_size=7
)
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@many
# Where the released table differs most from the table, and where the ranks of the values left move closer together.
@example([(0, [5, 0, 0, 5]), (1, [6, 4, 0, 0])], TCloseness(0.05, distance="ordered"), 0.5, True)
@example([(0, [5, 0, 0, 5]), (1, [6, 4, 0, 0])], TCloseness(0.05, distance="hierarchical"), 0.5, True)
@example([(0, [6, 0, 0, 0]), (1, [0, 0, 6, 1]), (2, [0, 1, 0, 0])], TCloseness(0.308, distance="ordered"), 0.1, False)
@given(FINE, st.sampled_from(ATTRIBUTE), st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]), st.booleans())
def test_no_release_keeps_more_rows_than_the_bound_allows(fine, model, share, declared):
    owner = np.array([c for c, _ in fine])
    counts = np.array([own for _, own in fine], np.int64)
    sizes, n = counts.sum(axis=1), int(counts.sum())
    limit = int(share * n)
    coarse = np.stack([counts[owner == c].sum(axis=0) for c in range(3)])
    bound = rows_lost(model, coarse.sum(axis=1), coarse, Reference(counts.sum(axis=0), TREE, declared), limit)
    assert ((bound >= 0) & (bound <= coarse.sum(axis=1))).all()
    for kept in itertools.product([False, True], repeat=len(fine)):
        r = np.array(kept)
        if n - int(sizes[r].sum()) > limit or not r.any() or (sizes[r] == 0).any():
            continue
        whole = Reference(counts[r].sum(axis=0), TREE, declared)
        if model.holds(sizes[r], counts[r], whole).all():
            lost = np.array([sizes[~r & (owner == c)].sum() for c in range(3)])
            assert (lost >= bound).all()


@pytest.mark.parametrize(
    ("model", "classes"),
    [
        (TCloseness(0.333333333333), [(29970, 30), (29940, 30060)]),
        (TCloseness(0.49999), [(999990, 10), (10, 999990)]),
        (TCloseness(0.4999999999995, distance="ordered"), [(1500000, 0), (1500000, 3000000)]),
        (BetaLikeness(0.999999999999, enhanced=False), [(1000000, 0), (0, 1000000)]),
        (AlphaK(0.999999, 2), [(999999, 1), (1, 999999)]),
    ],
)
def test_what_the_criteria_forgive_is_not_pruned_in_large_classes(model, classes):
    """Thresholds that classes of millions of rows meet exactly, or within the rounding that counts as met."""
    counts = np.array(classes)
    whole = Reference(counts.sum(axis=0))
    assert model.holds(counts.sum(axis=1), counts, whole).all()
    assert rows_lost(model, counts.sum(axis=1), counts, whole, 0).tolist() == [0] * len(classes)


@pytest.mark.parametrize(
    ("model", "counts", "expected"),
    [
        # 100 rows, half of each value, none to be suppressed. A class of 10 with 9 of one value and t = 0.2 allows
        # 70 %: 9 - x <= 0.7 (10 - x), so x >= 6.67.
        (TCloseness(0.2), [9, 1], 7),
        (TCloseness(0.4), [9, 1], 0),
        (AlphaK(0.5, 2), [9, 1], 8),
        (BetaLikeness(0.4), [9, 1], 7),
        (DistinctL(2), [10, 0], 10),
        (DistinctL(2), [9, 1], 0),
        (EntropyL(2), [10, 0], 0),  # no bound is known
    ],
)
def test_known_bounds(model, counts, expected):
    whole = Reference(np.array([50, 50]))
    lost = rows_lost(model, np.array([sum(counts)]), np.array([counts]), whole, 0)
    assert lost.tolist() == [expected]


AGES = [(str(v), f"[{v // 2 * 2},{v // 2 * 2 + 1}]", f"[{v // 4 * 4},{v // 4 * 4 + 3}]", "*") for v in range(8)]
AGE = Hierarchy.from_rows(AGES, name="age")
CITY = Hierarchy.from_rows([["a", "n", "*"], ["b", "n", "*"], ["c", "s", "*"], ["d", "s", "*"], ["e", "s", "*"]])
SEX = Hierarchy.from_rows([["f", "*"], ["m", "*"]])
ILL = Hierarchy.from_rows([["flu", "lung", "*"], ["cold", "lung", "*"], ["ulcer", "gut", "*"], ["gout", "gut", "*"]])
QUASI = (QuasiIdentifier("age", AGE), QuasiIdentifier("city", CITY), QuasiIdentifier("sex", SEX))
SPEC = TableSpec(QUASI, (Sensitive("ill", ILL.leaves, ILL), Sensitive("job")))
ROWS = st.lists(
    st.tuples(
        st.integers(0, 7), st.sampled_from("abcde"), st.sampled_from("fm"), st.sampled_from([*ILL.leaves, None]),
        st.sampled_from("xyz"),
    ),
    min_size=2, max_size=50,
)  # fmt: skip
NAMES = ("age", "city", "sex", "ill", "job")
T, K = TCloseness, KAnonymity
SEARCHED = [
    (K(2),),
    (K(4),),
    (K(2), DistinctL(2, "ill")),
    (K(3), DistinctL(2, "ill"), DistinctL(2, "job")),
    (K(2), T(0.3, "ill")),
    (K(2), T(0.2, "ill"), DistinctL(2, "job")),
    (K(2), T(0.2, "ill", distance="ordered"), T(0.3, "job")),
    (K(2), T(0.2, "ill", distance="hierarchical")),
    (AlphaK(0.6, 2, "job"),),
    (K(2), BetaLikeness(1.0, "job")),
    (K(2), DeltaDisclosure(1.5, "job")),
    (K(2), EntropyL(1.5, "ill")),
]


def prepared(rows, models):
    table = pa.table({n: [r[i] for r in rows] for i, n in enumerate(NAMES)})
    bound = bind(models, SPEC)
    return prepare(TableRows(table), SPEC, bound), bound


def searched(found, bound, limit):
    return Lattice(found.tuples, found.frame.domains, Constraints(bound, found.tuples), limit=limit)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ROWS, st.sampled_from(SEARCHED), st.sampled_from([0.0, 0.1, 0.3, 0.7]), st.sampled_from([1, 1 << 14]))
def test_search_finds_what_looking_at_every_node_finds(rows, models, limit, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollup_module, "BLOCK", block)
        try:
            found, bound = prepared(rows, models)
        except AnonymityError:
            return  # more different values asked for than there are
        every = searched(found, bound, limit)
        nodes = [
            every.evaluate(node) for node in itertools.product(*(range(len(d.levels)) for d in found.frame.domains))
        ]
        feasible = [n for n in nodes if n.feasible]
        if not feasible:
            with pytest.raises(AnonymityError):
                searched(found, bound, limit).search()
            return
        least = min(n.loss for n in feasible)
        first = min(n.levels for n in feasible if n.loss <= least + 1e-12)
        got = searched(found, bound, limit).search()
        assert got.levels == first
        assert got.suppressed == next(n.suppressed for n in nodes if n.levels == first)
        assert got.loss == pytest.approx(least, abs=1e-12)


@many
@given(ROWS, st.data(), st.sampled_from([1, 8, 1 << 14]))
def test_rolled_up_classes_are_the_counted_ones(rows, data, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollup_module, "BLOCK", block)
        found, _ = prepared(rows, (K(2), T(0.5, "ill"), T(0.5, "job")))
        domains = found.frame.domains
        rolled = Rollup(found.tuples, domains, attributes=True)
    finer = tuple(data.draw(st.integers(0, len(d.levels) - 1)) for d in domains)
    node = tuple(data.draw(st.integers(level, len(d.levels) - 1)) for level, d in zip(finer, domains, strict=True))
    keys, sizes = rolled.sizes(rolled.base, finer)
    part = rolled.part(rolled.base, keys, len(sizes))
    keys, sizes = rolled.sizes(part, node)
    coarse = rolled.part(part, keys, len(sizes))

    def labels(codes):
        return tuple(d.labels[n][d.levels[n][c]] for d, n, c in zip(domains, node, codes, strict=True))

    expected, joint = Counter(), Counter()
    t = found.tuples
    for u in range(t.count):
        key, weight = labels(t.codes[:, u].tolist()), int(t.weights[u])
        expected[key] += weight
        joint[(key, int(t.sensitive["ill"][u]), int(t.sensitive["job"][u]))] += weight
    assert Counter(sizes[sizes > 0].tolist()) == Counter(expected.values())
    assert sorted(coarse.sizes.tolist()) == sorted(expected.values())
    own = coarse.entries
    # Each class is named by one of its tuples; its values and their weights are those counted.
    names, leaves = {}, rolled.base
    for c in range(coarse.count):
        tuple_ = next(
            u
            for u in range(leaves.count)
            if all(x[u] == y[c] for x, y in zip(leaves.columns, coarse.columns, strict=True))
        )  # noqa: E501
        names[c] = labels(t.codes[:, int(np.flatnonzero(leaves.entries.owner == tuple_)[0])].tolist())
    assert {names[c]: size for c, size in enumerate(coarse.sizes.tolist())} == dict(expected)
    v = own.values
    got = zip(
        own.owner.tolist(), v.sensitive["ill"].tolist(), v.sensitive["job"].tolist(), v.weights.tolist(), strict=True
    )
    assert {(names[c], a, b): w for c, a, b, w in got} == dict(joint)


@pytest.mark.data("adult_arx_30162.csv", "adult_hierarchies")
def test_closeness_prunes_adult(data_folder):
    """Without a bound 1,779 of the 2,160 nodes had to be looked at; the node is the one that found."""
    names = ("age", "workclass", "education", "marital-status", "race", "sex", "native-country")
    folder = data_folder / "adult_hierarchies"
    quasi = [QuasiIdentifier(q, Hierarchy.from_csv(folder / f"adult_hierarchy_{q}.csv", name=q)) for q in names]
    table = pacsv.read_csv(data_folder / "adult_arx_30162.csv", parse_options=pacsv.ParseOptions(delimiter=";"))
    spec = TableSpec(tuple(quasi), (Sensitive("occupation"),), (), ("salary-class",))
    bound = bind([K(5), T(0.2)], spec)
    found = prepare(TableRows(table), spec, bound)
    lattice = searched(found, bound, 0.05)
    best = lattice.search()
    assert best.levels == (4, 2, 3, 1, 1, 1, 1)
    assert best.suppressed == 235
    assert lattice.evaluated < 250
