"""The recoding, and a verifier that shares no code with it: they must agree, and the verifier must not be fooled."""

import csv
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common.contract import DataContract
from fedveil.common.errors import AnonymityError, DataError
from fedveil.privacy.anonymization import codes, fixed
from fedveil.privacy.anonymization.advise import Members, passing_levels
from fedveil.privacy.anonymization.verify import require, verify


def contract(k=2, ell=2, *, limit=0.0, missing="error", cuts=(3, 6)):
    columns = [
        {
            "name": "age",
            "role": "quasi",
            "type": "number",
            "low": 0,
            "high": 9,
            "levels": list(cuts),
            "missing": missing,
        },
        {
            "name": "job",
            "role": "quasi",
            "type": "category",
            "values": ["a", "b", "c"],
            "levels": [["a"], ["b"], ["c"]],
        },
        {"name": "dose", "role": "feature", "type": "number", "low": 0, "high": 1, "missing": missing},
        {"name": "y", "role": "target", "type": "category", "values": ["no", "yes", "maybe"]},
    ]
    base = {"name": "t", "version": "1", "purpose": "p", "unit": "u", "k": k, "l": ell, "sensitive_target": True}
    return DataContract.model_validate({**base, "columns": columns, "suppression_limit": limit})


def columns_of(rows):
    age, job, dose, y = zip(*rows, strict=True)
    return {"age": np.array(age, float), "job": np.array(job, object), "dose": np.array(dose, float),
            "y": np.array(y, object)}  # fmt: skip


def write(path, table, c):
    with path.open("w", newline="") as f:
        out = csv.writer(f)
        out.writerow([col.name for col in c.loaded])
        for i in range(table.rows):
            cells = []
            for col in c.loaded:
                if col.coded:
                    code = table.coded[col.name][i]
                    cells.append(col.labels[code] if code >= 0 else "")
                else:
                    x = table.numbers[col.name][i]
                    cells.append("" if np.isnan(x) else repr(float(x)))
            out.writerow(cells)
    return path


ROW = st.tuples(
    st.integers(0, 9), st.sampled_from("abc"), st.floats(0, 1, width=32), st.sampled_from(["no", "yes", "maybe"])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=40), st.integers(2, 4), st.integers(1, 3))
def test_verifier_and_recoding_count_the_same_failing_classes(tmp_path_factory, rows, k, ell):
    c = contract(k, ell)
    table = fixed.recode(columns_of(rows), len(rows), c).table
    groups, bad = fixed.failing_classes(table, c)
    verdict = verify(write(tmp_path_factory.mktemp("v") / "r.csv", table, c), c)
    assert verdict.rows == len(rows)
    assert len(verdict.classes) == len(groups.sizes)
    assert sum(m.rows < k or len(m.seen[0]) < ell for m in verdict.classes.values()) == bad.sum()
    assert (verdict.k_met and verdict.l_met) == (not bad.any())


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=2, max_size=40), st.data())
def test_removing_a_record_removes_one_row_and_changes_no_other(rows, data):
    """The stability factor 1 that the evidence claims."""
    c = contract()
    gone = data.draw(st.integers(0, len(rows) - 1))
    rest = rows[:gone] + rows[gone + 1 :]
    with_, without = (fixed.recode(columns_of(r), len(r), c).table for r in (rows, rest))
    keep = np.delete(np.arange(len(rows)), gone)
    for name in with_.coded:
        assert (with_.coded[name][keep] == without.coded[name]).all()
    assert (with_.numbers["dose"][keep] == without.numbers["dose"]).all()


GOOD = [(1, "a", 0.5, "no"), (2, "a", 0.25, "yes"), (7, "b", 0.1, "no"), (8, "b", 0.2, "maybe")]


def good_file(tmp_path, c=None):
    c = c or contract()
    return write(tmp_path / "r.csv", fixed.recode(columns_of(GOOD), len(GOOD), c).table, c)


def test_good_file_passes(tmp_path):
    verdict = require(good_file(tmp_path), contract())
    assert verdict.k_met
    assert verdict.l_met
    assert set(verdict.classes) == {("[0,3)", "a"), ("[6,9]", "b")}


TAMPERED = {
    "finer label": ('"[0,3)"', "1", "'age' breaks"),
    "foreign leaf": (",a,", ",d,", "'job' breaks"),
    "number out of bounds": ("0.25", "1.5", "'dose' breaks"),
    "not a number": ("0.25", "x", "'dose' breaks"),
    "nan": ("0.25", "nan", "'dose' breaks"),
    "missing number": ("0.25", "", "'dose' breaks"),
    "missing label": (",a,", ",,", "'job' breaks"),
    "renamed column": ("age,", "ages,", "header"),
    "extra cell": ("0.25,yes", "0.25,yes,1", "5 cells"),
    "unclosed quote": ("0.25,yes", '0.25,"yes', "cannot be read"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_tampered_file_is_refused(tmp_path, how):
    path = good_file(tmp_path)
    old, new, words = TAMPERED[how]
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(AnonymityError, match=words):
        require(path, contract())


def test_empty_and_absent_files_are_refused(tmp_path):
    path = good_file(tmp_path)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(AnonymityError, match="no rows"):
        require(path, contract())
    path.write_bytes(path.read_bytes() + b"\xff\xfe")
    with pytest.raises(AnonymityError):
        require(path, contract())
    with pytest.raises(AnonymityError):
        require(tmp_path / "none.csv", contract())


def test_one_row_less_fails_k_and_a_changed_target_fails_l(tmp_path):
    path = good_file(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(AnonymityError, match="k = 2 fails in 1 classes; l = 2 for 'y' fails in 1 classes"):
        require(path, contract())
    path.write_text("\n".join([*lines[:-1], lines[-1].replace("maybe", "no")]) + "\n")
    with pytest.raises(AnonymityError, match="k = 2 holds; l = 2 for 'y' fails in 1 classes"):
        require(path, contract())


def test_an_absent_sensitive_value_is_no_diversity(tmp_path):
    sensitive = {"name": "s", "role": "sensitive", "type": "category", "values": ["u", "v"], "missing": "indicator"}
    c = contract(k=2, ell=2)
    payload = c.payload
    payload["columns"].insert(3, sensitive)
    c = DataContract.model_validate({**payload, "sensitive_target": False})
    data = columns_of([(1, "a", 0, "no"), (1, "a", 0, "yes")]) | {"s": np.array(["u", ""], object)}
    table = fixed.recode(data, 2, c).table
    assert fixed.failing_classes(table, c)[1].tolist() == [True]
    with pytest.raises(AnonymityError, match="no combination"):
        require(write(tmp_path / "r.csv", table, c), c)


def test_unseen_values_stop_the_recoding():
    with pytest.raises(DataError, match="'job': 1 values"):
        fixed.recode(columns_of([(1, "zebra", 0, "no")]), 1, contract())


def test_suppression_drops_whole_failing_classes_within_the_limit(tmp_path):
    rows = [*GOOD, (5, "c", 0.5, "no")]
    c = contract(limit=0.2)
    out = fixed.recode(columns_of(rows), 5, c)
    assert out.suppressed == 1
    assert out.table.rows == 4
    assert require(write(tmp_path / "r.csv", out.table, c), c).rows == 4
    tight = contract(limit=0.19)
    out = fixed.recode(columns_of(rows), 5, tight)
    assert out.suppressed == 0  # over the limit nothing is dropped, and the verification refuses
    with pytest.raises(AnonymityError, match="suppression within the contract's limit cannot repair"):
        require(write(tmp_path / "t.csv", out.table, tight), tight)


def test_stability_factor_belongs_to_the_procedure():
    assert fixed.stability_factor(contract(k=4)) == 1
    assert fixed.stability_factor(contract(k=4, ell=1, limit=0.1)) == 4
    assert fixed.stability_factor(contract(k=4, ell=2, limit=0.1)) is None


def test_suppression_for_k_changes_up_to_k_rows():
    """Negative control of factor 1: with suppression one record more does bring back a class of k."""
    c = contract(k=4, ell=1, limit=0.5)
    keep = [(8, "b", 0.1, "no")] * 4
    three = fixed.recode(columns_of([*keep, *[(1, "a", 0.5, "no")] * 3]), 7, c).table.rows
    four = fixed.recode(columns_of([*keep, *[(1, "a", 0.5, "no")] * 4]), 8, c).table.rows
    assert four - three == 4


def brute_passing(rows, c, removed_age, removed_job):
    """Does the table pass after taking boundaries away? Straight from the definition, over rows."""
    classes = {}
    for age, job, _, y in rows:
        a = sum(age >= cut for i, cut in enumerate(c.quasi[0].cuts) if i not in removed_age)
        j = sum("abc".index(job) > i for i in range(2) if i not in removed_job)
        classes.setdefault((a, j), []).append(y)
    return all(len(v) >= c.k and len(set(v)) >= c.l for v in classes.values())


def classes_of(rows, c):
    table = fixed.recode(columns_of(rows), len(rows), c).table
    out = {}
    for i in range(table.rows):
        key = tuple(q.labels[table.coded[q.name][i]] for q in c.quasi)
        m = out.setdefault(key, Members(0, (set(),)))
        m.rows += 1
        m.seen[0].add(rows[i][3])
    return out


@settings(max_examples=80, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=25), st.integers(2, 6), st.integers(1, 3))
def test_advice_is_exactly_the_minimal_passing_changes(rows, k, ell):
    c = contract(k, ell)
    subsets = [frozenset(s) for n in range(3) for s in itertools.combinations(range(2), n)]
    passing = [(a, j) for a in subsets for j in subsets if brute_passing(rows, c, a, j)]
    minimal = [x for x in passing if not any(y != x and y[0] <= x[0] and y[1] <= x[1] for y in passing)]
    words = {"age": {frozenset({0}): "dropping the cut at 3 of 'age'",
                     frozenset({1}): "dropping the cut at 6 of 'age'"},
             "job": {frozenset({0}): "dropping the boundary between 'a' and 'b' of 'job'",
                     frozenset({1}): "dropping the boundary between 'b' and 'c' of 'job'"}}  # fmt: skip
    expected = set()
    for a, j in minimal:
        parts = [words[n].get(s, f"dropping the column {n!r}") for n, s in (("age", a), ("job", j)) if s]
        expected.add(" together with ".join(parts))
    assert set(passing_levels(classes_of(rows, c), c)) == expected


def test_advice_names_the_cut(tmp_path):
    rows = [(1, "a", 0, "no"), (4, "a", 0, "yes")]
    c = contract(cuts=(3,))
    table = fixed.recode(columns_of(rows), 2, c).table
    with pytest.raises(AnonymityError) as e:
        require(write(tmp_path / "r.csv", table, c), c)
    assert e.value.hint == "dropping the cut at 3 of 'age' would pass"


def test_advice_still_found_when_the_search_is_cut_short(monkeypatch):
    monkeypatch.setattr("fedveil.privacy.anonymization.advise.MAX_WORK", 0)
    rows = [(1, "a", 0, "no"), (4, "a", 0, "yes"), (8, "b", 0, "no"), (8, "b", 0, "yes")]
    c = contract()
    assert passing_levels(classes_of(rows, c), c) == ("dropping the cut at 3 of 'age'",)


def test_advice_drops_a_column_together_with_its_missing_values():
    c = contract(missing="indicator")
    classes = {("", "a"): Members(1, ({"no"},)), ("[0,3)", "a"): Members(3, ({"no", "yes"},))}
    assert passing_levels(classes, c) == ("dropping the column 'age'",)


def test_codes_absent_is_the_last_label_index():
    assert codes.ABSENT == -1  # the writer relies on it: [*labels, ""][-1] is ""
