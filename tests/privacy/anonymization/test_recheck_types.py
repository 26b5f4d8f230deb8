"""The verifier reads a CSV file's cells as what is written, not as what they look like."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedveil.common.errors import AnonymityError, ContractError
from fedveil.privacy.anonymization import recheck_labels
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
from fedveil.privacy.anonymization.criteria import AlphaK, DistinctL, KAnonymity, TCloseness
from fedveil.privacy.anonymization.recheck import recheck

SPEC = TableSpec((QuasiIdentifier("q"),), (Sensitive("s"),))
TABLES = {
    "a word that looks like no value": ([("x", v) for v in ["NA"] * 18 + ["1", "2"]], AlphaK(alpha=0.5, k=2)),
    "numbers that look alike": ([("x", "01")] * 10 + [("y", "1")] * 10, TCloseness(0.2, distance="equal")),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_both_kinds_of_file_fail_alike(tmp_path, name, kind):
    rows, model = TABLES[name]
    path = tmp_path / f"t.{kind}"
    if kind == "csv":
        path.write_text("q,s\n" + "".join(f"{q},{s}\n" for q, s in rows))
    else:
        pq.write_table(pa.table({"q": [q for q, _ in rows], "s": [s for _, s in rows]}), path)
    found = recheck(path, SPEC, [KAnonymity(2), model])
    assert not found.met
    assert [f.met for f in found.findings] == [True, False]


def test_a_number_that_is_none_is_a_value_of_its_own(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"q": ["x"] * 4, "s": [1.0, 2.0, float("nan"), 3.0]}), path)
    assert recheck(path, SPEC, [DistinctL(4)]).met


def test_a_sensitive_value_is_named_once():
    """A value named five times stretched the ordered distance: .05 of t-closeness was met at a true distance of .25."""
    with pytest.raises(ContractError, match="a value twice"):
        Sensitive("s", ("x", "x", "x", "x", "x", "y"))


def test_the_leaves_are_read_once_for_all_labels(tmp_path, monkeypatch):
    """It went wrong once: every label read all leaves again."""
    leaves, read = 2000, []
    number_of = recheck_labels.number_of
    monkeypatch.setattr(recheck_labels, "number_of", lambda text: read.append(text) or number_of(text))
    tens = Hierarchy.from_rows([(str(v), f"[{v // 10 * 10},{v // 10 * 10 + 9}]") for v in range(leaves)])
    q = QuasiIdentifier("q", tens, numeric=True)
    spec, path = TableSpec((q,)), tmp_path / "t.parquet"
    labels = [f"[{5 * i},{5 * i + 4}]" for i in range(200)]
    pq.write_table(pa.table({"q": labels * 2}), path)
    assert recheck(path, spec, [KAnonymity(2)]).met
    assert len(read) <= leaves + 10 * len(labels)
    pq.write_table(pa.table({"q": [*labels, "[0,2000]"] * 2}), path)
    with pytest.raises(AnonymityError, match="1 different cells are no labels"):
        recheck(path, spec, [KAnonymity(2)])
