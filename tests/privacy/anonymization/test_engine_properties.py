"""Every search on random tables, against brute force and against the promises of the Anonymizer."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedveil.common.errors import AnonymityError
from fedveil.privacy.anonymization.anonymizer import Anonymizer, Method
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
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
from fedveil.privacy.anonymization.recheck import recheck
from fedveil.privacy.anonymization.recoding import parse_set, set_label

AGES = [(str(v), f"[{v // 2 * 2},{v // 2 * 2 + 1}]", f"[{v // 4 * 4},{v // 4 * 4 + 3}]", "*") for v in range(8)]
AGE = Hierarchy.from_rows(AGES, name="age")
CITY = Hierarchy.from_rows([["a", "n", "*"], ["b", "n", "*"], ["c", "s", "*"], ["d", "s", "*"], ["e", "s", "*"]])
ILL = Hierarchy.from_rows([["flu", "lung", "*"], ["cold", "lung", "*"], ["ulcer", "gut", "*"]])
SPEC = TableSpec(
    (QuasiIdentifier("age", AGE), QuasiIdentifier("city", CITY)),
    (Sensitive("ill", ILL.leaves, ILL),),
    ("name",),
    ("row",),
)
ROW = st.tuples(st.integers(0, 7), st.sampled_from("abcde"), st.sampled_from(ILL.leaves))
ROWS = st.lists(ROW, min_size=2, max_size=40)
MODELS = st.sampled_from(
    [
        (KAnonymity(2),),
        (KAnonymity(3),),
        (KAnonymity(5),),
        (KAnonymity(2), DistinctL(2)),
        (KAnonymity(2), EntropyL(1.8)),
        (KAnonymity(2), RecursiveCL(2, 2)),
        (KAnonymity(2), TCloseness(0.3)),
        (KAnonymity(2), TCloseness(0.2, distance="ordered")),
        (KAnonymity(2), TCloseness(0.2, distance="hierarchical")),
        (AlphaK(0.6, 2),),
        (KAnonymity(2), BetaLikeness(1.0)),
        (KAnonymity(2), BetaLikeness(0.5, enhanced=False)),
        (KAnonymity(2), DeltaDisclosure(1.5)),
    ]
)
METHODS = st.sampled_from(["mondrian", "optimal", "peel", "auto"])
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def table_of(rows):
    age, city, ill = zip(*rows, strict=True)
    return pa.table(
        {"name": [f"p{i}" for i in range(len(rows))], "age": age, "city": city, "ill": ill, "row": range(len(rows))}
    )


def covers(quasi, label, value):
    """Whether a released label stands for a raw value: by the hierarchy, as an interval, or as a set."""
    h = quasi.hierarchy
    if any(level[h.leaves.index(str(value))] == label for level in h.levels):
        return True
    members = parse_set(label)
    if members is None or str(value) in members:
        return True
    low, high = label.strip("[]").split(",") if label.startswith("[") else (label, label)
    return isinstance(value, int) and low.lstrip("-").isdigit() and int(low) <= value <= int(high)


@quick
@given(ROWS, MODELS, METHODS, st.sampled_from([0.0, 0.1, 0.5]))
def test_release_keeps_its_promises(tmp_path_factory, rows, models, method, limit):
    table = table_of(rows)
    before = table.to_pylist()
    a = Anonymizer(SPEC, models, method=method, suppression_limit=limit)
    try:
        out = a.fit_transform(table)
    except AnonymityError:
        assume(False)
        return
    assert table.to_pylist() == before
    released = out.to_pylist()
    # Nothing is lost or invented, and every raw value lies inside its label.
    assert len(released) + a.outcome.suppressed == len(rows)
    assert a.outcome.suppressed <= limit * len(rows)
    assert out.column_names == ["age", "city", "ill", "row"]
    for r in released:
        age, city, ill = rows[r["row"]]
        assert r["ill"] == ill
        assert covers(SPEC.quasi[0], r["age"], age)
        assert covers(SPEC.quasi[1], r["city"], city)
    # The verifier, which shares no code with the search, agrees on the written bytes.
    path = tmp_path_factory.mktemp("r") / "r.parquet"
    pq.write_table(out, path)
    found = recheck(path, SPEC, models, original_rows=len(rows), suppression_limit=limit)
    assert found.met, found
    assert found.rows == len(released)


def brute_force(rows, models, limit):
    """Loss of the best node, straight from the definitions, over rows."""
    n, best = len(rows), None
    for node in itertools.product(range(4), range(3)):
        classes = {}
        for age, city, ill in rows:
            key = (AGE.levels[node[0]][age], CITY.levels[node[1]]["abcde".index(city)])
            classes.setdefault(key, []).append((age, city, ill))
        while True:  # suppression changes the table the rest is compared with
            whole = np.array([np.bincount([ILL.leaves.index(r[2]) for c in classes.values() for r in c], minlength=3)])
            bad = [key for key, c in classes.items() if not all(ok(m, c, whole) for m in models)]
            if not bad:
                break
            for key in bad:
                del classes[key]
        kept = sum(map(len, classes.values()))
        if n - kept > int(limit * n + 1e-9):
            continue
        ages, cities = {r[0] for r in rows}, {r[1] for r in rows}
        loss = float(n - kept)
        for (_, c_label), members in classes.items():
            a_label = AGE.levels[node[0]][members[0][0]]
            span = [v for v in range(8) if AGE.levels[node[0]][v] == a_label]
            low, high = min(ages), max(ages)
            a_share = max(0, min(max(span), high) - max(min(span), low)) / (high - low) if high > low else 0.0
            covered = sum(CITY.levels[node[1]]["abcde".index(x)] == c_label for x in cities)
            c_share = (covered - 1) / max(len(cities) - 1, 1)
            loss += len(members) * (a_share + c_share) / 2
        best = min(best, loss / n) if best is not None else loss / n
    return best


def ok(m, members, whole):
    if isinstance(m, KAnonymity):
        return len(members) >= m.k
    counts = np.bincount([ILL.leaves.index(r[2]) for r in members], minlength=3)
    if isinstance(m, DistinctL):
        return (counts > 0).sum() >= m.l
    assert isinstance(m, TCloseness)
    return np.abs(counts / counts.sum() - whole[0] / whole.sum()).sum() / 2 <= m.t + 1e-12


@quick
@given(
    ROWS,
    st.sampled_from(
        [(KAnonymity(2),), (KAnonymity(4),), (KAnonymity(2), DistinctL(2)), (KAnonymity(2), TCloseness(0.3))]
    ),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_optimal_is_the_brute_force_optimum(rows, models, limit):
    expected = brute_force(rows, models, limit)
    a = Anonymizer(SPEC, models, method="optimal", suppression_limit=limit)
    try:
        a.fit_transform(table_of(rows))
        got = a.outcome.ncp
    except AnonymityError:
        return  # the whole table as one class fails: refused before any search
    assert expected is not None
    assert got == pytest.approx(expected, abs=1e-9)


def multiset(table, drop=("row",)):
    return Counter(tuple(v for k, v in r.items() if k not in drop) for r in table.to_pylist())


@quick
@given(ROWS, MODELS, METHODS, st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(rows, models, method, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    results = []
    for part in (rows, shuffled):
        try:
            results.append(multiset(Anonymizer(SPEC, models, method=method).fit_transform(table_of(part))))
        except AnonymityError:
            results.append(None)
    assert results[0] == results[1]


@quick
@given(ROWS, st.integers(2, 3), METHODS)
def test_a_row_of_weight_w_is_w_rows(rows, times, method):
    """k on every row repeated is k / times on single rows: the same classes."""
    single = Anonymizer(SPEC, [KAnonymity(2)], method=method).fit_transform(table_of(rows))
    repeated = Anonymizer(SPEC, [KAnonymity(2 * times)], method=method).fit_transform(table_of(rows * times))
    assert multiset(repeated) == Counter({k: v * times for k, v in multiset(single).items()})


def test_output_order_is_not_input_order():
    rows = [(i % 8, "abcde"[i % 5], ILL.leaves[i % 3]) for i in range(400)]
    orders = [Anonymizer(SPEC, [KAnonymity(2)]).fit_transform(table_of(rows))["row"].to_pylist() for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    assert abs(np.corrcoef(orders[0], range(len(orders[0])))[0, 1]) < 0.3


def test_dictionaries_carry_no_suppressed_value():
    rows = [(0, "a", "flu")] * 4 + [(7, "e", "ulcer")]
    table = table_of(rows)
    for name in ("city", "ill"):
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    out = Anonymizer(SPEC, [KAnonymity(4)], method="optimal", suppression_limit=0.2).fit_transform(table)
    assert out.num_rows == 4
    assert b"ulcer" not in out.combine_chunks().to_batches()[0].serialize().to_pybytes()
    assert out["city"].combine_chunks().dictionary.to_pylist() == ["a"]


SCRIPT = """
import json, pyarrow as pa
from fedveil.privacy.anonymization.anonymizer import Anonymizer
from fedveil.privacy.anonymization.attributes import *
from fedveil.privacy.anonymization.criteria import *
rows = [(i * 7 % 31, "abcdefgh"[i * 5 % 8], "uvw"[i * 3 % 7 % 3]) for i in range(300)]
t = pa.table({"age": [r[0] for r in rows], "city": [r[1] for r in rows], "ill": [r[2] for r in rows]})
spec = TableSpec((QuasiIdentifier("age"), QuasiIdentifier("city")), (Sensitive("ill"),))
out = []
for method in ("mondrian", "optimal", "peel"):
    r = Anonymizer(spec, [KAnonymity(4), DistinctL(2)], method=method).fit_transform(t)
    out.append(sorted(map(repr, r.to_pylist())))
print(json.dumps(out))
"""


def test_hash_seed_does_not_matter():
    outputs = set()
    for seed in ("0", "1", "4242"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        outputs.add(subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, check=True).stdout)
    assert len(outputs) == 1
    assert len(json.loads(outputs.pop())) == 3


def test_suppressed_and_missing_cells_are_their_own_categories():
    table = pa.table({"age": [1, 1, None, None, 5, 5], "city": ["a", "a", "*", "*", "a|b", None]})
    spec = TableSpec((QuasiIdentifier("age"), QuasiIdentifier("city")))
    out = Anonymizer(spec, [KAnonymity(2)], method="mondrian").fit_transform(table).to_pylist()
    # "*" that came in is a value like any other, never "any"; and a value with a separator stays one value.
    assert Counter(tuple(r.values()) for r in out) == {("1", "a"): 2, ("missing", "\\*"): 2, ("5", "a\\|b|missing"): 2}


def test_a_suppressed_cell_is_not_any_value_in_labels_either():
    table = pa.table({"city": ["a", "a", "*", "*", "b"]})
    spec = TableSpec((QuasiIdentifier("city"),))
    labelled: tuple[Method, ...] = ("peel", "optimal")
    for method in labelled:
        out = Anonymizer(spec, [KAnonymity(2)], method=method, suppression_limit=0.2).fit_transform(table)
        assert Counter(out["city"].to_pylist()) == {"a": 2, "\\*": 2}
    out = Anonymizer(spec, [KAnonymity(5)], method="peel").fit_transform(table)
    assert set(out["city"].to_pylist()) == {"*"}


@given(st.lists(st.text("ab|\\*", min_size=1), min_size=1, max_size=5, unique=True))
def test_set_labels_read_back(values):
    assert parse_set(set_label(values, 99)) == tuple(values)
